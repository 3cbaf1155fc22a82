"""What is in an ONNX file, compared with the frozen program and with the graph that onnxruntime runs.

Everything is found by following the file's own data flow from the node that carries a layer's name, never by what ``lower`` meant
to write.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.artifact import Artifact, Coverage, Mismatch, TensorSpec
from edgekit.errors import FormatError
from edgekit.frozen import FrozenProgram, Layer
from edgekit.targets.float_constants import Stored, compare_floats
from edgekit.targets.float_rows import float_rows
from edgekit.targets.onnx_rules import bias_scale, bounds, unsigned

__all__ = ["artifact", "mismatches", "read"]

_TRANSPARENT = ("Cast", "Reshape", "Clip")
_INTEGER_OPS = {"MaxPool", "Pad", "Reshape", "Transpose", "Slice", "Concat", "Gather", "Squeeze", "Unsqueeze", "Flatten"}
_MOVERS = {"qmax_pool2d", "qpad", "qreshape", "qpermute", "qslice"}
_STORAGE = {3: "int8", 2: "uint8", 22: "int4", 21: "uint4", 26: "int2", 25: "uint2", 1: "float32", 10: "float16"}


def read(path: Path) -> Any:
    """The model in a file.

    Raises:
        FormatError: the file is missing, truncated or not an ONNX model.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        model = onnx.load_model_from_string(Path(path).read_bytes())
        onnx.checker.check_model(model)
    except OSError as error:
        raise FormatError(f"{path}: {error.strerror or error}") from error
    except DecodeError as error:
        raise FormatError(f"{path}: truncated or not an ONNX file; make it again with `edgekit export`") from error
    except onnx.checker.ValidationError as error:
        reason = str(error).strip().splitlines()[0][:200]
        if "com.microsoft" in str(error) or "is not registered" in str(error):
            return model  # onnxruntime's own operators: its graph, not ours, and the checker does not know them
        raise FormatError(f"{path}: not a valid ONNX model ({reason}); make it again with `edgekit export`") from error
    return model


@dataclass(frozen=True)
class _View:
    """A graph with its edges."""

    graph: Any

    @cached_property
    def constants(self) -> dict[str, Any]:
        return {t.name: t for t in self.graph.initializer}

    @cached_property
    def producers(self) -> dict[str, Any]:
        return {name: node for node in self.graph.node for name in node.output}

    @cached_property
    def consumers(self) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        for node in self.graph.node:
            for name in node.input:
                found.setdefault(name, []).append(node)
        return found

    @cached_property
    def named(self) -> dict[str, Any]:
        return {node.name: node for node in self.graph.node if node.name}

    def value(self, name: str) -> NDArray[Any] | None:
        """A constant's numbers, at most widened; None if the tensor is not a constant."""
        import onnx

        if name not in self.constants:
            return None
        array: NDArray[Any] = onnx.numpy_helper.to_array(self.constants[name])
        return array if array.dtype.kind in "fiub" else array.astype(np.int8)

    def producer(self, name: str, op: str) -> Any | None:
        """The node of that operator that a tensor comes from, through casts, reshapes and clips."""
        node = self.producers.get(name)
        while node is not None and node.op_type != op and node.op_type in _TRANSPARENT:
            node = self.producers.get(node.input[0])
        return node if node is not None and node.op_type == op else None

    def consumer(self, name: str, op: str) -> Any | None:
        """The first node of that operator that reads a tensor."""
        return next((n for n in self.consumers.get(name, []) if n.op_type == op), None)

    def stored(self, name: str) -> Any | None:
        """The initializer behind a tensor, through a cast."""
        node = self.producers.get(name)
        return self.constants.get(name if node is None else node.input[0])


def mismatches(model: Any, program: FrozenProgram) -> list[Mismatch]:
    """All facts of the file that differ from the program, in the layers' order."""
    view = _View(model.graph)
    return [found for layer in program.layers for found in _layer(view, layer)] + compare_floats(program, _floats(view))[0]


def _floats(view: _View) -> list[Stored]:
    """Float initializers and constants that are no scale of a QuantizeLinear or DequantizeLinear."""
    import onnx

    scales = {
        name for node in view.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear") for name in node.input[1:]
    }
    constants = dict(view.constants)
    for node in view.graph.node:
        if node.op_type == "Constant":
            constants.update((node.output[0], a.t) for a in node.attribute if a.name == "value")
    return [
        Stored(name, onnx.numpy_helper.to_array(tensor))
        for name, tensor in constants.items()
        if tensor.data_type == onnx.TensorProto.FLOAT and name not in scales
    ]


def _layer(view: _View, layer: Layer) -> Iterator[Mismatch]:
    node = view.named.get(layer.name)
    if node is None or layer.name not in view.producers:
        yield Mismatch(layer.name, "operator", "missing", layer.op)
        return
    if layer.op not in ("quantize", *_MOVERS):
        yield from _inputs(view, layer, node)
    if layer.op in ("qconv2d", "qlinear"):
        yield from _weighted(view, layer, node)
    if layer.op == "qpad":
        yield from _same(layer, "padding value", view.value(node.input[2]), np.array(unsigned(layer.args["zero_point"])))
    if node.op_type == "Gather":
        yield from _same(layer, "table", view.value(node.input[0]), layer.args["table"].numpy().astype(np.int16) + 128)
    if layer.op not in ("dequantize", *_MOVERS):
        yield from _output(view, layer)


def _inputs(view: _View, layer: Layer, node: Any) -> Iterator[Mismatch]:
    for i, (name, scale, zero) in enumerate(_expected_inputs(layer)):
        dequantize = node if node.op_type == "DequantizeLinear" else view.producer(node.input[i], "DequantizeLinear")
        if dequantize is None:
            if node.op_type not in ("Gather", "Concat"):
                yield Mismatch(layer.name, f"{name} dequantize", "missing", "DequantizeLinear")
            continue
        yield from _same(layer, f"{name} scale", view.value(dequantize.input[1]), np.float32(scale))
        yield from _same(layer, f"{name} zero point", view.value(dequantize.input[2]), np.array(unsigned(zero)))


def _expected_inputs(layer: Layer) -> list[tuple[str, float, int]]:
    a = layer.args
    if layer.op in ("qadd", "qmul"):
        return [("first input", a["a_scale"], a["a_zp"]), ("second input", a["b_scale"], a["b_zp"])]
    if layer.op == "qconcat":
        return [(f"input {i}", s, z) for i, (s, z) in enumerate(zip(a["scales"], a["zero_points"], strict=True))]
    if layer.op == "dequantize":
        return [("input", a["scale"], a["zero_point"])]
    return [("input", a["in_scale"], a["in_zp"])]


def _weighted(view: _View, layer: Layer, node: Any) -> Iterator[Mismatch]:
    a = layer.args
    for i, name, values, scale in (
        (1, "weight", a["weight"].numpy(), a["weight_scale"].float().numpy()),
        (2, "bias", a["bias"].numpy(), bias_scale(layer)),
    ):
        dequantize = view.producers.get(node.input[i])
        if dequantize is None or dequantize.op_type != "DequantizeLinear":
            yield Mismatch(layer.name, name, "not integers", "integers behind a DequantizeLinear")
            continue
        tensor = view.stored(dequantize.input[0])
        yield from _same(layer, name, None if tensor is None else view.value(tensor.name), values)
        yield from _same(layer, f"{name} scale", view.value(dequantize.input[1]), scale)
        if len(dequantize.input) > 2:
            yield from _same(layer, f"{name} zero point", view.value(dequantize.input[2]), np.zeros(len(scale)))


def _output(view: _View, layer: Layer) -> Iterator[Mismatch]:
    if view.producers[layer.name].op_type in ("Concat", "Gather"):
        return  # integers moved or looked up; no parameters of its own
    quantize = view.producer(layer.name, "QuantizeLinear")
    if quantize is None:
        yield Mismatch(layer.name, "output", "not quantized", "QuantizeLinear")
        return
    yield from _same(layer, "output scale", view.value(quantize.input[1]), np.float32(layer.out_scale or 0.0))
    yield from _same(layer, "output zero point", view.value(quantize.input[2]), np.array(unsigned(layer.out_zero_point or 0)))
    clip = view.consumer(quantize.output[0], "Clip") if quantize.output[0] != layer.name else None
    found = (0, 255) if clip is None else tuple(int(view.value(name)) for name in clip.input[1:3])  # type: ignore[arg-type]
    yield from _same(layer, "activation range", np.array(found), np.array(bounds(layer)))


def _same(layer: Layer, name: str, found: NDArray[Any] | None, expected: Any) -> Iterator[Mismatch]:
    expected = np.asarray(expected)
    if found is None:
        yield Mismatch(layer.name, name, "not a constant", f"{expected.size} numbers")
    elif found.shape != expected.shape:
        yield Mismatch(layer.name, name, f"of shape {found.shape}", f"of shape {expected.shape}")
    elif not np.array_equal(found, expected):
        different = np.argwhere(np.atleast_1d(found != expected))
        first = tuple(int(i) for i in different[0]) if found.ndim else ()
        where = f" at {list(first)}, one of {len(different)} that differ" if found.ndim else ""
        yield Mismatch(layer.name, name, f"{found[first]!s}{where}", f"{expected[first]!s}")


def artifact(path: Path, model: Any, optimized: Any, program: FrozenProgram) -> Artifact:
    """The facts of a file; ``optimized`` is what onnxruntime makes of it."""
    graph = model.graph
    coverage = _coverage(_View(graph), _View(optimized.graph), program)
    opset = next(o.version for o in model.opset_import if o.domain == "")
    notes = [f"opset {opset}; on x86 without VNNI set session.x64quantprecision=1"]
    islands = [c.layer for c in coverage[: len(program.layers)] if c.runs == "float"]
    if islands:
        shown = ", ".join(islands[:8]) + (", ..." if len(islands) > 8 else "")
        notes.append(f"{len(islands)} integer layers run in float between integers: {shown}")
    notes += compare_floats(program, _floats(_View(graph)))[1]
    return Artifact(
        path=Path(path),
        target="onnx",
        inputs=tuple(_spec(v) for v in graph.input),
        outputs=tuple(_spec(v) for v in graph.output),
        coverage=tuple(coverage),
        bytes=Path(path).stat().st_size,
        notes=tuple(notes),
        memory={"initializer_bytes": sum(_bytes(t) for t in graph.initializer)},
    )


def _bytes(tensor: Any) -> int:
    return len(tensor.raw_data) or int(tensor.ByteSize())


def _spec(value: Any) -> TensorSpec:
    import onnx

    kind = value.type.tensor_type
    shape = tuple(d.dim_value for d in kind.shape.dim)
    return TensorSpec(value.name, shape, str(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)))


def _coverage(file: _View, running: _View, program: FrozenProgram) -> list[Coverage]:
    """Each layer by the operator that computes its tensor, then the program's float operators, then what runs for them."""
    found: list[Coverage] = []
    claimed: set[int] = set()
    for layer in program.layers:
        op, runs = _operator(running, layer, claimed)
        note = f"onnxruntime has no integer kernel for {op} here" if runs == "float" else ""
        found.append(Coverage(layer.name, op, runs, layer.macs, _storage(file, layer), note))
    found += float_rows(program)
    kinds: dict[str, int] = {}
    for node in running.graph.node:
        if id(node) in claimed or node.op_type in ("QuantizeLinear", "DequantizeLinear", *_TRANSPARENT):
            continue
        integer = node.op_type.startswith("QLinear") or node.op_type in ("QGemm", "MatMulInteger", *_INTEGER_OPS)
        if not integer:
            kinds[node.op_type] = kinds.get(node.op_type, 0) + 1
    return found + [Coverage(kind, kind, "float", note=f"{count} times, float32") for kind, count in kinds.items()]


def _operator(running: _View, layer: Layer, claimed: set[int]) -> tuple[str, str]:
    """(operator, "int8" | "float") of the node that computes a layer in onnxruntime's graph."""
    node = running.producers.get(layer.name)
    if node is None:
        return "removed", "int8"  # fused into its neighbour, or the identity
    if layer.op in ("quantize", "dequantize"):
        return node.op_type, "int8"
    while node.op_type in _TRANSPARENT and layer.op != "qreshape" and node.input[0] in running.producers:
        claimed.add(id(node))
        node = running.producers[node.input[0]]
    if node.op_type != "QuantizeLinear":
        claimed.add(id(node))
        return node.op_type, "int8"
    return _island(running, node, claimed), "float"


def _island(running: _View, quantize: Any, claimed: set[int]) -> str:
    """Names of the float operators between a layer's DequantizeLinear nodes and its QuantizeLinear."""
    names: list[str] = []
    pending = [quantize.input[0]]
    while pending:
        node = running.producers.get(pending.pop())
        if node is None or node.op_type in ("DequantizeLinear", "QuantizeLinear") or id(node) in claimed:
            continue
        claimed.add(id(node))
        names.append(node.op_type)
        pending += node.input
    return "+".join(reversed(names)) or "QuantizeLinear"


def _storage(file: _View, layer: Layer) -> str:
    node = file.named.get(layer.name)
    if layer.weight_bits is None or node is None:
        return ""
    dequantize = file.producers.get(node.input[1])
    tensor = file.stored(dequantize.input[0] if dequantize is not None else node.input[1])
    return "" if tensor is None else _STORAGE.get(tensor.data_type, str(tensor.data_type))
