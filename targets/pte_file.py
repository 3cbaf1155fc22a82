"""What an ExecuTorch ``.pte`` file holds: its operators in execution order and its tensors with their stored integers.

A ``.pte`` is a flatbuffer program (``program.fbs``), an extended header at byte 8, and segments: constants, and one blob for each
delegate. An XNNPACK blob has its own header (``XH00``) and flatbuffer graph (``runtime_schema.fbs``); its constants lie in named
segments of the file. Delegated and other operators come out in one list, so a reader need not care where an operator runs.

Everything is read from the bytes, nothing is executed, and neither torch nor executorch is imported (only its schemas are read).
"""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.errors import FormatError, missing_extra
from edgekit.targets.flatbuffer import Schema, Table, parse_schema, read_flatbuffer

__all__ = ["AGAIN", "FileOp", "FileTensor", "PteFile", "read_pte"]

_NO_ID = 0xFFFFFFFF
_NO_HANDLE = 65535  # of operators that XNNPACK's passes added, such as changes of layout
_NO_OFFSET = 0xFFFFFFFFFFFFFFFF
AGAIN = "make it again with `edgekit export RUN --target executorch`"
"""What a damaged file needs."""

_MAGIC = b"ET12"
_DTYPES = {
    "xnn_datatype_fp32": "float32", "xnn_datatype_fp16": "float16", "xnn_datatype_qint8": "int8", "xnn_datatype_quint8": "uint8",
    "xnn_datatype_qint32": "int32", "xnn_datatype_qcint8": "int8", "xnn_datatype_qcint32": "int32", "xnn_datatype_qcint4": "int4",
    "xnn_datatype_qbint4": "int4",
    "xnn_datatype_int32": "int32", "BYTE": "uint8", "CHAR": "int8", "SHORT": "int16", "INT": "int32", "LONG": "int64",
    "HALF": "float16", "FLOAT": "float32", "DOUBLE": "float64", "BOOL": "bool",
}  # fmt: skip


@dataclass(frozen=True)
class FileTensor:
    """A tensor of the file, in the file's own layout.

    Attributes:
        dtype: numpy name of the stored type, or "int4" (two to a byte in the file, one to an element in ``data``).
        shape: shape in the file; XNNPACK keeps images channel-last.
        scale, zero_point: of the whole tensor, None where it has none.
        scales: float32, one for each channel along ``channel``, None where it has none.
        data: stored values of a constant, None for an activation.
        at: byte offsets in the file of "data", "scale", "zero_point" and "scales", where they are stored.
    """

    dtype: str
    shape: tuple[int, ...]
    scale: float | None = None
    zero_point: int | None = None
    scales: np.ndarray | None = None
    channel: int = 0
    data: np.ndarray | None = None
    at: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class FileOp:
    """One operator: ``kind`` as the file names it (XNNConv2d, aten::add), and the ids of its tensors.

    A "Link" carries a tensor unchanged into or out of a delegate. ``delegate`` counts the delegate calls; -1 is a kernel.
    ``arguments`` are the operator's own fields (strides, paddings) for a delegated one.
    """

    kind: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    delegate: int = -1
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PteFile:
    """A parsed file: operators in execution order, tensors by id, and the ids of the program's inputs and outputs."""

    path: Path
    size: int
    ops: tuple[FileOp, ...]
    tensors: Mapping[int, FileTensor]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    arena: tuple[int, ...]
    delegates: tuple[str, ...]


def read_pte(path: Path) -> PteFile:
    """Parse the first execution plan of a file.

    Raises:
        FormatError: no such file, truncated, not a ``.pte``, or damaged.
        MissingTool: executorch, which brings the schemas, is not installed.
    """
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror or error})") from error
    if len(data) < 64 or data[4:8] != _MAGIC:
        raise FormatError(f"{path}: not an ExecuTorch program (no {_MAGIC.decode()} at byte 4); {AGAIN}")
    try:
        return _Parser(Path(path), data).parse()
    except (struct.error, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise FormatError(f"{path}: damaged, its program cannot be read ({error}); {AGAIN}") from error


@cache
def _schemas() -> tuple[Schema, Schema]:
    """Schemas of the program and of XNNPACK's graph, as installed with executorch."""
    spec = importlib.util.find_spec("executorch")
    if spec is None or not spec.submodule_search_locations:
        raise missing_extra("executorch", "executorch")
    root = Path(next(iter(spec.submodule_search_locations)))
    program = root / "exir" / "_serialize"
    xnnpack = root / "backends" / "xnnpack" / "serialization" / "runtime_schema.fbs"
    return parse_schema(program / "program.fbs", program / "scalar_type.fbs"), parse_schema(xnnpack)


class _Parser:
    """Walks one file; tensor ids are the program's value numbers, and for a delegate call k its own numbers + (k + 1) << 32."""

    def __init__(self, path: Path, data: bytes) -> None:
        self.path, self.data = path, data
        magic, _, self.program_size, self.base, stored = struct.unpack_from("<4sIQQQ", data, 8)
        if magic != b"eh00":
            self.program_size, self.base, stored = len(data), len(data), 0
        if self.program_size > len(data) or self.base + stored > len(data):
            raise FormatError(f"{path}: truncated, {self.base + stored} bytes are announced, {len(data)} are there; {AGAIN}")
        self.tensors: dict[int, FileTensor] = {}
        self.ops: list[FileOp] = []
        self.delegates: list[str] = []
        self.places: dict[int, tuple[int, int]] = {}
        self.written: dict[tuple[int, int], int] = {}

    def parse(self) -> PteFile:
        self.program = read_flatbuffer(self.data, _schemas()[0], 0, self.program_size, str(self.path))
        self.segments = [(self.base + s["offset"], s["size"]) for s in self.program.get("segments", [])]
        if any(at + size > len(self.data) for at, size in self.segments):
            raise FormatError(f"{self.path}: truncated, a segment ends behind the file; {AGAIN}")
        self.named = {n["key"]: self.segments[n["segment_index"]] for n in self.program.get("named_data", [])}
        plan = self.program["execution_plan"][0]
        values = plan["values"]
        for number, value in enumerate(values):
            if value["val"].kind == "Tensor":
                self.tensors[number] = self.program_tensor(number, value["val"])
        for instruction in plan["chains"][0]["instructions"]:
            call = instruction["instr_args"]
            before = len(self.ops)
            if call.kind == "KernelCall":
                self.kernel(plan, values, call)
            elif call.kind == "DelegateCall":
                self.delegate(plan["delegates"][call["delegate_index"]], [int(a) for a in call["args"]])
            self.link_views(before)
        return PteFile(
            self.path, len(self.data), tuple(self.ops), self.tensors,
            tuple(int(i) for i in plan["inputs"]), tuple(int(i) for i in plan["outputs"]),
            tuple(int(n) for n in plan["non_const_buffer_sizes"])[1:], tuple(self.delegates),
        )  # fmt: skip

    def program_tensor(self, value: int, table: Table) -> FileTensor:
        dtype, shape = _DTYPES.get(table["scalar_type"], str(table["scalar_type"])), _ints(table["sizes"])
        number = table["data_buffer_idx"]
        if not number or table.get("allocation_info") is not None:
            if (memory := table.get("allocation_info")) is not None:
                self.places[value] = (memory["memory_id"], memory["memory_offset_low"] + (memory["memory_offset_high"] << 32))
            return FileTensor(dtype, shape)
        segment = self.program["constant_segment"]
        start, _ = self.segments[segment["segment_index"]]
        at = start + int(segment["offsets"][number])
        return FileTensor(dtype, shape, data=self.constant(dtype, shape, at), at={"data": at})

    def constant(self, dtype: str, shape: tuple[int, ...], at: int) -> np.ndarray:
        count = int(np.prod(shape))
        if dtype != "int4":
            return np.frombuffer(self.data, np.dtype(dtype), count, at).reshape(shape)
        rows, columns = int(np.prod(shape[:-1])), shape[-1]
        raw = np.frombuffer(self.data, np.uint8, rows * -(-columns // 2), at).reshape(rows, -1)
        nibbles = np.stack([raw & 15, raw >> 4], axis=-1).reshape(rows, -1)[:, :columns]  # low nibble first, stored + 8
        return (nibbles.astype(np.int16) - 8).astype(np.int8).reshape(shape)

    def kernel(self, plan: Table, values: list[Table], call: Table) -> None:
        name = plan["operators"][call["op_index"]]["name"]
        arguments = [int(a) for a in call["args"]]
        found = [t for a in arguments for t in _tensor_ids(values, a)]
        # out variants: the last argument is the result, and executorch names it once more as the returned value
        outputs = tuple(dict.fromkeys(_tensor_ids(values, arguments[-1])))
        inputs = tuple(dict.fromkeys(t for t in found if t not in outputs))
        scalars = {str(i): _scalar(values[a]["val"], values) for i, a in enumerate(arguments)}
        self.ops.append(FileOp(name, inputs, outputs, arguments=scalars))
        self.quantize_params(name, inputs, outputs, scalars)

    def link_views(self, before: int) -> None:
        """A reshape that moves no bytes has no instruction: its result shares the place of its source. Make it one."""
        for op in self.ops[before:]:
            for number in op.inputs:
                source = self.written.get(self.places.get(number, (-1, -1)))
                if source is not None and source != number:
                    self.ops.insert(before, FileOp("aten::view", (source,), (number,)))
                    self.written[self.places[number]] = number
        for op in self.ops[before:]:
            self.written |= {self.places[number]: number for number in op.outputs if number in self.places}

    def quantize_params(self, name: str, inputs: tuple[int, ...], outputs: tuple[int, ...], scalars: dict[str, Any]) -> None:
        """A kernel's scale and zero point are its arguments: note them at the integer tensor they belong to."""
        if not name.startswith("quantized_decomposed::") or "per_tensor" not in name:
            return
        number = outputs[0] if "::quantize" in name else inputs[0]
        old = self.tensors[number]
        if old.scale is None:
            self.tensors[number] = FileTensor(old.dtype, old.shape, scalars["1"], scalars["2"], data=old.data, at=old.at)

    def delegate(self, delegate: Table, arguments: list[int]) -> None:
        number = len(self.delegates)
        self.delegates.append(delegate["id"])
        reference = delegate["processed"]
        if delegate["id"] != "XnnpackBackend" or reference["location"] != "SEGMENT":
            raise FormatError(f"{self.path}: delegate {delegate['id']} is not one that edgekit writes; {AGAIN}")
        start, size = self.segments[reference["index"]]
        if self.data[start + 4 : start + 8] != b"XH00":
            raise FormatError(f"{self.path}: an XNNPACK delegate has no XH00 header; {AGAIN}")
        at, length, constants = struct.unpack_from("<III", self.data, start + 10)
        if at + length > size:
            raise FormatError(f"{self.path}: an XNNPACK graph ends behind its segment; {AGAIN}")
        graph = read_flatbuffer(self.data, _schemas()[1], start + at, length, str(self.path))
        shift = (number + 1) << 32
        incoming: list[tuple[int, int]] = []
        outgoing: list[tuple[int, int]] = []
        for entry in graph["xvalues"]:
            value = entry["xvalue_union"]
            tensor = value if value.kind == "XNNTensorValue" else value["tensor_value"]
            self.tensors[shift + tensor["id_out"]] = self.graph_tensor(
                graph, tensor, value.get("quant_params"), start + constants
            )
            if tensor["external_id"] != _NO_ID and tensor["flags"] & 3:
                link = (shift + tensor["id_out"], arguments[tensor["external_id"]])
                (incoming if tensor["flags"] & 1 else outgoing).append(link)
        self.ops += [FileOp("Link", (outside,), (inside,), number) for inside, outside in incoming]
        self.ops += [_graph_op(node, shift, number) for node in graph["xnodes"]]
        self.ops += [FileOp("Link", (inside,), (outside,), number) for inside, outside in outgoing]

    def graph_tensor(self, graph: Table, tensor: Table, params: Table | None, constants: int) -> FileTensor:
        dtype, shape = _DTYPES.get(tensor["datatype"], tensor["datatype"]), _ints(tensor["dims"])
        at, data = {}, None
        if tensor["constant_buffer_idx"]:
            at["data"] = self.buffer(graph, tensor["constant_buffer_idx"], constants)
            data = self.constant(dtype, shape, at["data"])
        if params is None or params.kind == "PerTokenDynamicQuant":
            return FileTensor(dtype, shape, data=data, at=at)
        if params.kind == "PerChannelGroupQuant" and params["scale_buffer_idx"]:
            at["group_scales"] = self.buffer(graph, params["scale_buffer_idx"], constants)
            upper = np.frombuffer(self.data, "<u2", params["num_scales"], at["group_scales"]).astype(np.uint32)
            scales = (upper << 16).view(np.float32)  # bfloat16
            return FileTensor(dtype, shape, scales=scales, channel=params["channel_dim"], data=data, at=at)
        if params.kind == "PerTensorQuant":
            at |= params.at
            return FileTensor(dtype, shape, params["scale"], params["zero_point"], data=data, at=at)
        scales = params["scale"]
        if scales is None or not len(scales):
            at["scales"] = self.buffer(graph, params["scale_buffer_idx"], constants)
            scales = self.constant("float32", (params["num_scales"],), at["scales"])
        else:
            at["scales"] = params.at["scale"]
        return FileTensor(dtype, shape, scales=scales, channel=params["channel_dim"], data=data, at=at)

    def buffer(self, graph: Table, number: int, constants: int) -> int:
        entry = graph["constant_data"][number]
        return self.named[entry["named_key"]][0] if entry["offset"] == _NO_OFFSET else constants + int(entry["offset"])


def _graph_op(outer: Table, shift: int, number: int) -> FileOp:
    node, clamp = outer["xnode_union"], outer.get("output_min_max")
    ids = {k: int(v) + shift for k, v in node.fields.items() if k.endswith("_id") and v != _NO_ID}
    outputs = tuple(v for k, v in ids.items() if k.startswith("output"))
    arguments = {k: v for k, v in node.fields.items() if not k.endswith("_id")}
    arguments["in_program"] = outer["debug_handle"] != _NO_HANDLE
    if clamp is not None:
        arguments |= clamp.fields
    return FileOp(node.kind, tuple(v for k, v in ids.items() if not k.startswith("output")), outputs, number, arguments)


def _tensor_ids(values: list[Table], number: int) -> Iterator[int]:
    value = values[number]["val"]
    if value is not None and value.kind == "Tensor":
        yield number
    elif value is not None and value.kind in ("TensorList", "OptionalTensorList"):
        yield from (int(i) for i in value["items"] if i >= 0)


def _scalar(value: Table | None, values: list[Table]) -> Any:
    if value is not None and value.kind == "IntList":  # numbers of values, since these may be known at run time only
        return tuple(_scalar(values[int(i)]["val"], values) for i in value["items"])
    if value is None or value.kind in ("Null", "Tensor", "TensorList", "OptionalTensorList"):
        return None
    return next(iter(value.fields.values()), None)


def _ints(values: np.ndarray | None) -> tuple[int, ...]:
    return () if values is None else tuple(int(v) for v in values)
