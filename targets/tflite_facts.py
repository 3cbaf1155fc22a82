"""What a finished .tflite file holds, against the frozen program: parity of every stored number, coverage, layouts, memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.artifact import Coverage, Mismatch, TensorSpec
from edgekit.frozen import FrozenProgram, Layer
from edgekit.frozen.dynamic_ops import DYNAMIC_OPS
from edgekit.frozen.ops import activation_bounds
from edgekit.targets.float_constants import Stored, compare_floats
from edgekit.targets.tflite_dynamic import compare_dynamic, integer_weight
from edgekit.targets.tflite_file import Op, Tensor, TfliteFile, enum_names
from edgekit.targets.tflite_finish import LAYOUTS, MOVING, VIEWS, WEIGHTED
from edgekit.targets.tflite_wide import is_wide

__all__ = ["channel_last_inputs", "compare", "coverage", "layouts", "memory", "notes", "spec"]


def _owner(file: TfliteFile, op: Op) -> str:
    """The layer (or "~node") that an operator computes, from its output's name; "" if it has none."""
    return file.tensors[op.outputs[0]].name.split("/")[0]


def _by_owner(file: TfliteFile) -> dict[str, list[Op]]:
    found: dict[str, list[Op]] = {}
    for op in file.ops:
        found.setdefault(_owner(file, op), []).append(op)
    return found


def compare(file: TfliteFile, program: FrozenProgram) -> list[Mismatch]:
    """Every stored integer, scale, zero point and type that is not the frozen program's, in the program's order."""
    ops, kind = _by_owner(file), _kind(program)
    found: list[Mismatch] = []
    for layer in program.layers:
        mine = ops.get(layer.name, [])
        if layer.op in DYNAMIC_OPS:
            found += _dynamic(file, layer, mine)
            continue
        found += _activation(file, layer, kind)
        found += [Mismatch(layer.name, "type", f"{t.dtype} in {op.kind}", kind) for op, t in _islands(file, layer, mine, kind)]
        if layer.weight_bits is not None:
            found += _weighted(file, layer, mine, kind)
        table = next((t for t in file.tensors if t.name == f"{layer.name}/table"), None)
        if layer.op == "qlut" and table is not None:
            found += _array(layer, "table", table.values(), layer.args["table"].numpy())
    found += _made_integer(file, program, ops)
    found += compare_floats(program, _float_constants(file))[0]
    if all(node.op != "call_function" or str(node.target).startswith("edgekit.") for node in program.module.graph.nodes):
        strange = [op for op in ops.get("", []) if any(t.dtype == "FLOAT32" for t in file.activations(op))]
        found += [Mismatch(f"{op.kind}#{op.index}", "operator", "a float operator", "no float operator") for op in strange]
    return found


def _dynamic(file: TfliteFile, layer: Layer, ops: list[Op]) -> Iterator[Mismatch]:
    for part in compare_dynamic(file, layer, ops):
        if isinstance(part, Mismatch):
            yield part
        else:
            yield from _array(layer, *part)


def _float_constants(file: TfliteFile) -> list[Stored]:
    """Float constants with the program's node that reads them."""
    readers = {i: _owner(file, op).removeprefix("~") for op in reversed(file.ops) for i in op.inputs}
    return [
        Stored(readers.get(t.index, ""), t.values()) for t in file.tensors if t.dtype == "FLOAT32" and t.data is not None
    ]  # fmt: skip


def _made_integer(file: TfliteFile, program: FrozenProgram, ops: Mapping[str, list[Op]]) -> Iterator[Mismatch]:
    """Operators that the program has in float and the file computes in int8; moving integers instead of floats is the same."""
    kind = _kind(program)
    quantizers = {layer.name for layer in program.layers if layer.op == "quantize"}
    names = {f"~{x.node}": x.name for x in program.float_layers}
    for owner, mine in ops.items():
        for op in mine if owner.startswith("~") or owner in quantizers else ():
            types = {t.dtype for t in file.activations(op)}
            if op.kind not in ("QUANTIZE", "DEQUANTIZE", *MOVING) and kind in types:
                yield Mismatch(names.get(owner, owner), "type", f"{kind} in {op.kind}", "FLOAT32")


def _kind(program: FrozenProgram) -> str:
    """Schema name of the program's integer activations."""
    return "INT16" if is_wide(program) else "INT8"


def _activation(file: TfliteFile, layer: Layer, kind: str) -> Iterator[Mismatch]:
    if layer.op == "dequantize":
        return
    tensor = file.by_name.get(layer.name)
    if tensor is None:
        if layer.op not in VIEWS:
            yield Mismatch(layer.name, "output", "missing", f"an {kind} tensor of scale {layer.out_scale:.9g}")
        return
    if tensor.dtype != kind:
        yield Mismatch(layer.name, "output type", tensor.dtype, kind)
    scale = float(np.float32(layer.out_scale or 0.0))
    if tensor.scale != scale:
        yield Mismatch(layer.name, "output scale", f"{tensor.scale or 0.0:.9g}", f"{scale:.9g}")
    if tensor.zero_point != layer.out_zero_point:
        yield Mismatch(layer.name, "output zero point", str(tensor.zero_point), str(layer.out_zero_point))


def _islands(file: TfliteFile, layer: Layer, ops: list[Op], kind: str) -> Iterator[tuple[Op, Tensor]]:
    """Float activations inside a layer whose meaning is integer."""
    if layer.op in ("quantize", "dequantize"):
        return
    for op in ops:
        for tensor in file.activations(op):
            if tensor.dtype not in (kind, "INT32", "BOOL"):
                yield op, tensor
                return


def _weighted(file: TfliteFile, layer: Layer, ops: list[Op], kind: str) -> Iterator[Mismatch]:
    op = next((op for op in ops if op.kind in WEIGHTED and file.tensors[op.inputs[1]].data is not None), None)
    if op is None:
        kinds = ", ".join(o.kind for o in ops) or "no operator"
        yield Mismatch(layer.name, "operator", kinds, f"one of {', '.join(WEIGHTED)} with constant weights")
        return
    weight = file.tensors[op.inputs[1]]
    if weight.dtype not in ("INT8", "INT4", "INT2"):
        yield Mismatch(layer.name, "weight type", weight.dtype, "INT8, INT4 or INT2")
        return
    wanted = layer.args["weight"].numpy()
    yield from _array(layer, "weight", _to_program(weight.values(), op.kind, wanted.shape), wanted)
    scales = layer.args["weight_scale"].numpy().astype(np.float32)
    yield from _array(layer, "weight scale", weight.scales, scales)
    yield from _array(layer, "weight zero point", weight.zero_points, np.zeros(len(weight.zero_points), np.int64))
    bias = layer.args["bias"].numpy().astype(np.int32)
    has_bias = len(op.inputs) > 2 and op.inputs[2] >= 0
    wide = "INT64" if kind == "INT16" else "INT32"
    if has_bias and file.tensors[op.inputs[2]].dtype != wide:
        yield Mismatch(layer.name, "bias type", file.tensors[op.inputs[2]].dtype, wide)
        return
    stored = file.tensors[op.inputs[2]].values() if has_bias else np.zeros_like(bias)  # the converter drops a bias of zeros
    yield from _array(layer, "bias", stored, bias)
    yield from _clamp(file, layer, op)


def _to_program(values: NDArray[Any], kind: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """Stored OHWI or 1HWC weights to PyTorch's OIHW; other shapes as they are."""
    if values.ndim == 4 and len(shape) == 4:
        order = (3, 0, 1, 2) if kind == "DEPTHWISE_CONV_2D" else (0, 3, 1, 2)
        return np.transpose(values, order)
    return values


def _array(layer: Layer, field: str, found: NDArray[Any], wanted: NDArray[Any]) -> Iterator[Mismatch]:
    if found.shape != wanted.shape:
        if found.size != wanted.size:
            yield Mismatch(layer.name, f"{field} shape", str(found.shape), str(wanted.shape))
            return
        found = found.reshape(wanted.shape)
    different = found != wanted
    if different.any():
        first = tuple(int(i) for i in np.argwhere(different)[0])
        place = f"{field} at {list(first)} ({int(different.sum())} of {different.size} differ)"
        yield Mismatch(layer.name, place, _show(found[first]), _show(wanted[first]))


def _show(value: Any) -> str:
    return f"{value:.9g}" if isinstance(value, np.floating) else str(int(value))


def _clamp(file: TfliteFile, layer: Layer, op: Op) -> Iterator[Mismatch]:
    """The clamp of the file's fused activation against the layer's."""
    name = enum_names("ActivationFunctionType")[op.options.fusedActivationFunction].lower()
    activation = layer.args["activation"]
    if layer.out_scale is None or layer.out_zero_point is None or name not in ("none", "relu", "relu6"):
        return
    found, wanted = (
        activation_bounds(a, layer.out_scale, layer.out_zero_point, int(layer.args.get("out_bits", 8)))
        for a in (name, activation)
    )
    if found != wanted:
        yield Mismatch(layer.name, "activation", f"{name}, clamped to {found}", f"{activation}, clamped to {wanted}")


def coverage(file: TfliteFile, program: FrozenProgram, delegated: frozenset[int]) -> tuple[Coverage, ...]:
    """How each frozen layer runs, then every operator that is none of theirs; ``delegated``: positions of XNNPACK's operators."""
    ops = _by_owner(file)
    *body, output = program.module.graph.nodes
    results = {getattr(node, "name", "") for node in output.args[0]}
    given = {user.name for node in body if node.op == "placeholder" for user in node.users}
    rows = [
        _layer_row(file, layer, ops.pop(layer.name, []), delegated, layer.node in given | results, _kind(program).lower())
        for layer in program.layers
    ]
    for x in program.float_layers:
        mine = ops.pop(f"~{x.node}", [])
        if mine or x.macs or x.parameters:
            kinds, storage = "+".join(dict.fromkeys(op.kind for op in mine)), "float32" if x.parameters else ""
            runs = _runs(file, mine, delegated) if mine and not x.macs else "float"
            rows.append(Coverage(x.name, kinds, runs, x.macs, storage, "" if mine else "merged into its neighbour"))
    for owner, rest in ops.items():
        for op in rest:
            rows.append(Coverage(owner.removeprefix("~") or f"{op.kind}#{op.index}", op.kind, _runs(file, [op], delegated)))
    return tuple(rows)


def _layer_row(file: TfliteFile, layer: Layer, ops: list[Op], delegated: frozenset[int], border: bool, integer: str) -> Coverage:
    if not ops:
        by_caller = border and layer.op in ("quantize", "dequantize")
        note = f"left to the caller: the file's input or output is {integer}" if by_caller else "merged into its neighbour"
        return Coverage(layer.name, "", integer, note=note)
    if layer.op in DYNAMIC_OPS:
        return _dynamic_row(file, layer, ops, delegated)
    computing = [op for op in ops if op.kind != "QUANTIZE"] or ops
    main = next((op for op in ops if op.kind in WEIGHTED), computing[-1])
    storage, why = _storage(file, layer, main)
    return Coverage(layer.name, main.kind, _runs(file, ops, delegated), layer.macs, storage, why)


def _dynamic_row(file: TfliteFile, layer: Layer, ops: list[Op], delegated: frozenset[int]) -> Coverage:
    """Integer products behind float tensors, or float products of stored integers."""
    main = next((op for op in ops if op.kind == "FULLY_CONNECTED"), ops[-1])
    weight = integer_weight(file, main) if main.kind == "FULLY_CONNECTED" else None
    runs = "float" if layer.op == "weight_only_linear" else "delegated" if main.index in delegated else "int8"
    note = "weights become float32 while it runs" if runs == "float" else ""
    return Coverage(layer.name, main.kind, runs, layer.macs, "" if weight is None else weight.dtype.lower(), note)


def _storage(file: TfliteFile, layer: Layer, op: Op) -> tuple[str, str]:
    if layer.weight_bits is None or op.kind not in WEIGHTED:
        return "", ""
    storage = file.tensors[op.inputs[1]].dtype.lower()
    if storage == "int4":
        if op.kind == "FULLY_CONNECTED":
            return storage, "not on tflite-runtime 2.14, which takes INT4 in CONV_2D only"
        other = "" if op.kind == "CONV_2D" else "; not on tflite-runtime 2.14"
        return storage, f"INT4 {op.kind} runs on LiteRT's builtin kernels, slower than XNNPACK's int8{other}"
    if storage == "int2":
        return storage, "not on tflite-runtime 2.14"
    if layer.weight_bits < 8 and int(layer.args.get("out_bits", 8)) > 8:
        return storage, f"{layer.weight_bits}-bit weights stored as int8, as all beside 16-bit activations"
    if layer.weight_bits < 8:
        takes = "FULLY_CONNECTED only" if layer.weight_bits == 2 else "CONV_2D, DEPTHWISE_CONV_2D and FULLY_CONNECTED"
        return storage, f"{layer.weight_bits}-bit weights stored as int8 (INT{layer.weight_bits} is for {takes}, where asked for)"
    return storage, ""


def _runs(file: TfliteFile, ops: list[Op], delegated: frozenset[int]) -> str:
    """ "float" if any operator computes in float (QUANTIZE and DEQUANTIZE only cross the border), else who runs them."""
    crossing = ("QUANTIZE", "DEQUANTIZE")
    if any(op.kind not in crossing and any(t.dtype == "FLOAT32" for t in file.activations(op)) for op in ops):
        return "float"
    if all(op.index in delegated for op in ops):
        return "delegated"
    return "int16" if any(t.dtype == "INT16" for op in ops for t in file.activations(op)) else "int8"


def notes(file: TfliteFile, program: FrozenProgram) -> tuple[str, ...]:
    """What a user would not expect: numbers that were merged, transposes that the converter added."""
    found = compare_floats(program, _float_constants(file))[1]
    permuted = {layer.name for layer in program.layers if layer.op == "qpermute"}
    added = [op for op in file.ops if op.kind == "TRANSPOSE" and _owner(file, op) not in permuted and _owner(file, op)[:1] != "~"]
    if added:
        where = ", ".join(dict.fromkeys(_owner(file, op) or "?" for op in added))
        found.append(f"{len(added)} TRANSPOSE operator(s) added by the converter at {where}")
    return tuple(found)


def spec(tensor: Tensor) -> TensorSpec:
    """An input or output as the artefact states it."""
    return TensorSpec(tensor.name.removeprefix("~"), tensor.shape, tensor.numpy_dtype, tensor.scale, tensor.zero_point)


def channel_last_inputs(file: TfliteFile) -> tuple[bool, ...]:
    """For each input, whether it is channel-last where the program's is channel-first (from the file's metadata)."""
    for entry in file.model.metadata or []:
        if (entry.name or b"").decode() == LAYOUTS:
            marks = bytes(np.asarray(file.model.buffers[entry.buffer].data, np.uint8)).decode().split(",")
            return tuple(mark == "NHWC" for mark in marks)
    return (False,) * len(file.inputs)


_CHANNEL_LAST_KINDS = ("CONV_2D", "DEPTHWISE_CONV_2D", "MAX_POOL_2D", "AVERAGE_POOL_2D")
_KEEPING = ("ADD", "MUL", "SUB", "CONCATENATION", "PAD", "PADV2", "STRIDED_SLICE", "SLICE", "MEAN", "QUANTIZE", "DEQUANTIZE",
            "LOGISTIC", "TANH", "RELU", "RELU6", "HARD_SWISH", "GELU", "LEAKY_RELU", "ELU", "GATHER")  # fmt: skip


def layouts(file: TfliteFile) -> Mapping[int, bool]:
    """Four-dimensional activation to "is channel-last", as far as operators tell: shapes alone cannot where C = H = W."""
    known: dict[int, bool] = dict(zip(file.inputs, channel_last_inputs(file), strict=False))
    for op in file.ops:
        if op.kind in _CHANNEL_LAST_KINDS:
            known |= {op.outputs[0]: True, op.inputs[0]: True}
        elif op.kind == "TRANSPOSE":
            order = tuple(int(i) for i in file.tensors[op.inputs[1]].values().ravel())
            if order == (0, 3, 1, 2):
                known |= {op.inputs[0]: True, op.outputs[0]: False}
            elif order == (0, 2, 3, 1):
                known[op.outputs[0]] = True
    for op in (*file.ops, *reversed(file.ops), *file.ops):
        if op.kind in _KEEPING:
            ends = [t.index for t in file.activations(op) if len(t.shape) == 4]
            told = [known[i] for i in ends if i in known]
            for index in ends:
                if told:
                    known.setdefault(index, told[0])
    return known


def memory(file: TfliteFile) -> dict[str, int]:
    """Bytes of constants, and the largest sum of activations alive at once (modelled from the operators' order, no alignment)."""
    sizes = {t.index: int(np.prod(t.shape)) * np.dtype(t.numpy_dtype).itemsize for t in file.tensors if t.data is None}
    last = {i: op.index for op in file.ops for i in op.inputs if i in sizes} | {i: len(file.ops) for i in file.outputs}
    first = {i: 0 for i in file.inputs} | {i: op.index for op in file.ops for i in op.outputs}
    peak = max(
        (sum(sizes[i] for i in first if first[i] <= step <= last.get(i, first[i])) for step in range(len(file.ops))), default=0
    )
    constants = {id(b): b for b in file.model.buffers if b.data is not None}
    return {"constant_bytes": sum(len(b.data) for b in constants.values()), "activation_peak_bytes": peak}
