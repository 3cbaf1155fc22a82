"""Reading and writing .tflite files: tensors, operators, packed integers, and the few edits that lowering needs.

The format is TensorFlow Lite's flatbuffer schema, version 3 (file identifier "TFL3"). 4 and 2 bit weights are packed low bits
first, without padding between rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import FormatError, InputError, missing_extra

__all__ = ["AGAIN", "Op", "Tensor", "TfliteFile", "enum_names", "pack", "parse", "read", "schema", "serialize", "unpack"]

_NUMPY = {"INT8": np.int8, "INT16": np.int16, "INT32": np.int32, "INT64": np.int64, "FLOAT32": np.float32, "UINT8": np.uint8,
          "BOOL": np.bool_, "FLOAT16": np.float16, "FLOAT64": np.float64}  # fmt: skip
_PACKED = {"INT4": 4, "INT2": 2}

AGAIN = "make it again with `edgekit export RUN --target tflite`"
"""What to do about a file that cannot be used."""


class _Unfit(ValueError):
    """A file that can be read and does not fit together; the message says where."""


@cache
def schema() -> Any:
    """The generated flatbuffer classes; MissingTool without ai-edge-litert."""
    try:
        from ai_edge_litert import schema_py_generated
    except ImportError as error:
        raise missing_extra("ai-edge-litert", "tflite") from error
    return schema_py_generated


@cache
def enum_names(enum: str) -> dict[int, str]:
    """Value to name of a schema enum, such as "BuiltinOperator" or "TensorType"."""
    return {value: name for name, value in vars(getattr(schema(), enum)).items() if isinstance(value, int)}


def pack(values: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Signed integers to bytes, 8 // bits of them in a byte, low bits first; the last byte is filled with zeros."""
    each = 8 // bits
    flat = values.astype(np.int8).ravel()
    raw = np.pad(flat, (0, -len(flat) % each)).view(np.uint8) & ((1 << bits) - 1)
    shifts = np.arange(each, dtype=np.uint8) * bits
    joined: NDArray[np.uint8] = np.bitwise_or.reduce(raw.reshape(-1, each) << shifts, axis=1).astype(np.uint8)
    return joined


def unpack(data: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.int8]:
    """The inverse of :func:`pack`: the first ``count`` signed integers."""
    shifts = np.arange(8 // bits, dtype=np.uint8) * bits
    raw = ((data[:, None] >> shifts) & ((1 << bits) - 1)).reshape(-1)[:count].astype(np.int16)
    return np.where(raw >= 1 << (bits - 1), raw - (1 << bits), raw).astype(np.int8)


@dataclass(frozen=True)
class Tensor:
    """A tensor of the file.

    Attributes:
        index: position in the file.
        name: its name.
        shape: as stored (channel last for images).
        dtype: the schema's name, such as "INT8", "INT4", "FLOAT32".
        scales: float32 scales, empty if it is not quantized.
        zero_points: zero points, as many as scales.
        axis: dimension that the scales belong to.
        data: bytes of a constant, None for an activation.
    """

    index: int
    name: str
    shape: tuple[int, ...]
    dtype: str
    scales: NDArray[np.float32]
    zero_points: NDArray[np.int64]
    axis: int
    data: NDArray[np.uint8] | None

    @property
    def numpy_dtype(self) -> str:
        """Name of the numpy dtype that holds its values; packed integers are int8."""
        return np.dtype(_NUMPY.get(self.dtype, np.int8)).name

    @property
    def scale(self) -> float | None:
        """The scale of an activation."""
        return float(self.scales[0]) if len(self.scales) else None

    @property
    def zero_point(self) -> int | None:
        """The zero point of an activation."""
        return int(self.zero_points[0]) if len(self.zero_points) else None

    def values(self) -> NDArray[Any]:
        """A constant's values, unpacked, in the stored shape."""
        if self.data is None:
            raise ValueError(f"tensor {self.name} is not a constant")
        if self.dtype in _PACKED:
            return unpack(self.data, _PACKED[self.dtype], int(np.prod(self.shape))).reshape(self.shape)
        return np.frombuffer(self.data.tobytes(), _NUMPY[self.dtype]).reshape(self.shape)


@dataclass(frozen=True)
class Op:
    """An operator of the file: schema name, tensor indices (-1: an optional input left out), options of the schema."""

    index: int
    kind: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: Any


@dataclass(frozen=True)
class TfliteFile:
    """A parsed file; ``model`` is the schema's object tree, the rest a view of its first subgraph."""

    model: Any
    tensors: tuple[Tensor, ...]
    ops: tuple[Op, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    size: int

    @cached_property
    def producer(self) -> dict[int, Op]:
        """Tensor index to the operator that computes it."""
        return {out: op for op in self.ops for out in op.outputs}

    @cached_property
    def by_name(self) -> dict[str, Tensor]:
        """Activations (not constants) by name."""
        return {t.name: t for t in self.tensors if t.data is None and t.name}

    def activations(self, op: Op) -> Iterator[Tensor]:
        """Inputs and outputs of an operator that are not constants."""
        return (self.tensors[i] for i in (*op.inputs, *op.outputs) if i >= 0 and self.tensors[i].data is None)


def read(path: Path) -> TfliteFile:
    """Read a file.

    Raises:
        InputError: it cannot be read at all.
        FormatError: it is no whole .tflite file.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    return parse(content, Path(path).name)


def parse(content: bytes, where: str) -> TfliteFile:
    """Parse a file's bytes and check that every index in it points to something; FormatError names ``where``."""
    generated = schema()
    if content[4:8] != b"TFL3":
        raise FormatError(f"{where} is not a .tflite file (no TFL3 mark); {AGAIN}")
    try:
        model = generated.ModelT.InitFromObj(generated.Model.GetRootAs(content, 0))
        graph = model.subgraphs[0]
        tensors = tuple(_tensor(model, i, t) for i, t in enumerate(graph.tensors))
        ops = tuple(_op(model, i, o) for i, o in enumerate(graph.operators))
        file = TfliteFile(model, tensors, ops, tuple(map(int, graph.inputs)), tuple(map(int, graph.outputs)), len(content))
        _check(file)
    except Exception as error:  # the generated reader raises anything on damaged bytes
        # the reader's own failures speak of buffers and offsets; only what _check found says something to a user
        found = f" ({error})" if isinstance(error, _Unfit) else ""
        raise FormatError(f"{where} is damaged{found}; {AGAIN}") from error
    return file


def _tensor(model: Any, index: int, tensor: Any) -> Tensor:
    quantization = tensor.quantization
    scales = zeros = None
    if quantization is not None:
        scales, zeros = quantization.scale, quantization.zeroPoint
    buffer = model.buffers[tensor.buffer]
    if buffer.offset:
        raise _Unfit("its constants lie outside the flatbuffer, which this reader does not take")
    data = buffer.data
    shape = tuple(int(d) for d in tensor.shape) if tensor.shape is not None else ()
    return Tensor(
        index=index,
        name=(tensor.name or b"").decode(),
        shape=shape,
        dtype=enum_names("TensorType")[tensor.type],
        scales=np.asarray(scales if scales is not None else [], np.float32),
        zero_points=np.asarray(zeros if zeros is not None else [], np.int64),
        axis=int(quantization.quantizedDimension) if quantization is not None else 0,
        data=np.asarray(data, np.uint8) if data is not None and len(data) else None,
    )


def _op(model: Any, index: int, op: Any) -> Op:
    code = model.operatorCodes[op.opcodeIndex]
    kind = enum_names("BuiltinOperator")[max(code.builtinCode, code.deprecatedBuiltinCode)]
    return Op(index, kind, tuple(map(int, op.inputs)), tuple(map(int, op.outputs)), op.builtinOptions)


def _check(file: TfliteFile) -> None:
    """Every index inside its table, every constant as long as its shape says, quantization of matching lengths."""
    count = len(file.tensors)
    used = [i for op in file.ops for i in (*op.inputs, *op.outputs)] + [*file.inputs, *file.outputs]
    if any(not -1 <= i < count for i in used):
        raise _Unfit("an operator names a tensor that does not exist")
    if not file.outputs or any(not op.outputs or not op.inputs for op in file.ops):
        raise _Unfit("it or one of its operators has no input or output")
    if any(not 0 <= entry.buffer < len(file.model.buffers) for entry in file.model.metadata or []):
        raise _Unfit("its metadata names a buffer that does not exist")
    for t in file.tensors:
        if any(d < 0 for d in t.shape):
            raise _Unfit(f"tensor {t.name} has a negative dimension")
        if len(t.scales) != len(t.zero_points) and len(t.zero_points):
            raise _Unfit(f"tensor {t.name} has {len(t.scales)} scales and {len(t.zero_points)} zero points")
        if t.data is not None and (t.dtype in _PACKED or t.dtype in _NUMPY):
            bits = _PACKED.get(t.dtype) or 8 * np.dtype(_NUMPY[t.dtype]).itemsize
            if len(t.data) != -(-int(np.prod(t.shape)) * bits // 8):
                raise _Unfit(f"tensor {t.name} has {len(t.data)} bytes for shape {t.shape} of {t.dtype}")


def serialize(model: Any) -> bytes:
    """The schema's object tree as a file's bytes."""
    import flatbuffers  # type: ignore[import-untyped]

    builder = flatbuffers.Builder(1 << 16)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())
