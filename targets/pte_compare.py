"""A ``.pte`` file against the frozen program, layer by layer: what differs, and how each layer runs and is stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import zip_longest
from typing import Any

import numpy as np

from edgekit.artifact import Coverage, Mismatch
from edgekit.frozen import FrozenProgram, Layer
from edgekit.frozen.dynamic_ops import DYNAMIC_OPS
from edgekit.frozen.ops import activation_bounds
from edgekit.targets.executorch_binary import KERNELS
from edgekit.targets.float_constants import Stored, compare_floats
from edgekit.targets.float_rows import float_rows
from edgekit.targets.pte_file import FileOp, FileTensor, PteFile
from edgekit.targets.pte_layers import FloatWeight, Placed, Placement, constant_of, kernel_arguments, stored_weight

__all__ = ["compare", "coverage", "float_constants", "io_quantization"]

_CARRIERS = {"Link", "XNNStaticTranspose", "XNNStaticReshape", "XNNCopy", "XNNConvert", "aten::view", "aten::view_copy"}
_CLAMPS = {"relu": (0.0, float("inf")), "relu6": (0.0, 6.0)}


def compare(file: PteFile, program: FrozenProgram, placement: Placement) -> list[Mismatch]:
    """Every difference, in the order of the program's layers."""
    producers = _producers(file)
    found: list[Mismatch] = []
    for placed in placement.values():
        layer = placed.layer
        if not placed.found:
            found.append(Mismatch(layer.name, "operator", "missing", layer.op))
            continue
        found += _output(file, placed)
        if layer.op in KERNELS:
            found += _binary(file, placed)
        elif layer.op in DYNAMIC_OPS:
            found += _dynamic(file, placed, producers)
        elif "weight" in layer.args:
            found += _weighted(file, placed, producers)
        elif layer.op == "qslice":
            found += _identity(file, placed)
    return found + float_constants(file, program)[0]


def float_constants(file: PteFile, program: FrozenProgram) -> tuple[list[Mismatch], list[str]]:
    """Float numbers of the file that are not the program's, and notes."""
    constants = [t for t in file.tensors.values() if t.dtype == "float32" and t.data is not None]
    return compare_floats(program, [Stored("", np.asarray(t.data, np.float32)) for t in constants])


def coverage(file: PteFile, program: FrozenProgram, placement: Placement) -> tuple[Coverage, ...]:
    """One row for each layer, then the program's float operators, then one for each other kind of operator."""
    producers = _producers(file)
    rows = [_row(file, placed, producers) for placed in placement.values()] + float_rows(program)
    used = {id(op) for placed in placement.values() for op in placed.ops}
    others: dict[tuple[str, bool], list[FileOp]] = {}
    for op in file.ops:
        if id(op) not in used and op.kind not in _CARRIERS and not op.kind.startswith("quantized_decomposed::"):
            others.setdefault((op.kind, op.delegate >= 0), []).append(op)
    for (kind, delegated), ops in others.items():
        where = "float32, in the XNNPACK delegate" if delegated else "kernel outside of a delegate"
        rows.append(Coverage(kind, kind, "float", note=f"{len(ops)} times, {where}"))
    return tuple(rows)


def io_quantization(file: PteFile) -> dict[int, tuple[float, int]]:
    """Scale and zero point of the program's integer inputs and outputs, by tensor."""
    found: dict[int, tuple[float, int]] = {}
    for number in {*file.inputs, *file.outputs}:
        near = [number]
        near += [
            n for op in file.ops if op.kind == "Link" and number in (*op.inputs, *op.outputs) for n in (*op.inputs, *op.outputs)
        ]
        for tensor in (file.tensors[n] for n in near):
            if tensor.dtype == "int8" and tensor.scale is not None and tensor.zero_point is not None:
                found[number] = (tensor.scale, tensor.zero_point)
    return found


def _producers(file: PteFile) -> dict[int, FileOp]:
    return {n: op for op in file.ops for n in op.outputs}


def _output(file: PteFile, placed: Placed) -> Iterator[Mismatch]:
    """Scale and zero point of every int8 form of the layer's output; one message a field."""
    layer = placed.layer
    if layer.out_scale is None:
        return
    tensors = [file.tensors[n] for n in placed.values]
    if not tensors:
        yield Mismatch(layer.name, "output type", "float32", "int8")
    wrong = next((t for t in tensors if t.scale is not None and np.float32(t.scale) != np.float32(layer.out_scale)), None)
    if wrong is not None:
        yield Mismatch(layer.name, "output scale", f"{wrong.scale:.9g}", f"{np.float32(layer.out_scale):.9g}")
    odd = next((t for t in tensors if t.zero_point is not None and t.zero_point != layer.out_zero_point), None)
    if odd is not None:
        yield Mismatch(layer.name, "output zero point", str(odd.zero_point), str(layer.out_zero_point))


def _weighted(file: PteFile, placed: Placed, producers: Mapping[int, FileOp]) -> Iterator[Mismatch]:
    layer, op = placed.layer, placed.ops[0]
    weight, bias = _constants(file, op, producers)
    if weight is None:
        yield Mismatch(layer.name, "weight", "missing", f"int{layer.weight_bits}")
        return
    stored, wanted = stored_weight(op, weight), layer.args["weight"].numpy()
    if isinstance(stored, FloatWeight):
        yield Mismatch(layer.name, "weight type", stored.dtype, f"int{layer.weight_bits}")
    elif stored.shape != wanted.shape:
        yield Mismatch(layer.name, "weight shape", str(stored.shape), str(wanted.shape))
    else:
        yield from _different(layer, "weight", stored, wanted)
    scales, in_scale = layer.args["weight_scale"].numpy(), np.float32(layer.args["in_scale"])
    yield from _different(layer, "weight scale", weight.scales, scales)
    if bias is None or bias.data is None:
        if layer.args["bias"].any():
            yield Mismatch(layer.name, "bias", "missing", "int32")
    elif bias.dtype == "int32":
        yield from _different(layer, "bias", _same_bias(bias.data, layer.args["bias"].numpy()), layer.args["bias"].numpy())
        yield from _different(layer, "bias scale", bias.scales, scales * in_scale)
    else:
        real = layer.args["bias"].numpy().astype(np.float32) * (scales * in_scale)
        yield from _different(layer, "bias", bias.data, real)
    yield from _input(file, placed, producers)
    yield from _geometry(layer, op)


def _dynamic(file: PteFile, placed: Placed, producers: Mapping[int, FileOp]) -> Iterator[Mismatch]:
    """Weights, scales and bias of a layer whose input is quantized while it runs, and that it is."""
    layer, op = placed.layer, placed.ops[0]
    weight, bias = _constants(file, op, producers)
    stored = FloatWeight("missing") if weight is None else stored_weight(op, weight)
    if weight is None or isinstance(stored, FloatWeight):
        kind = stored.dtype if isinstance(stored, FloatWeight) else "missing"
        yield Mismatch(layer.name, "weight type", kind, f"int{layer.weight_bits}")
        return
    yield from _different(layer, "weight", stored, layer.args["weight"].numpy())
    scales = layer.args["weight_scale"].numpy().reshape(-1)
    yield from _different(layer, "weight scale", weight.scales, scales)
    wanted = layer.args["bias"].numpy()
    if bias is None and wanted.any():
        yield Mismatch(layer.name, "bias", "missing", "float32")
    elif bias is not None:
        yield from _different(layer, "bias", bias.data, wanted)
    read = {file.tensors[n].dtype for n in op.inputs if constant_of(file, n, producers) is None}
    if read != {_ROWS}:
        yield Mismatch(layer.name, "input type", ", ".join(sorted(read)), "int8, quantized row by row")
    yield from _geometry(layer, op)


_ROWS = "xnn_datatype_qdint8"
"""Type of a tensor whose rows each have their own scale and zero point."""


def _binary(file: PteFile, placed: Placed) -> Iterator[Mismatch]:
    """Constants and other arguments of edgekit's own kernel."""
    layer, op = placed.layer, placed.ops[0]
    names = [n for n in ("weight", "weight_scale", "bias", "threshold") if n in layer.args]
    names.sort(key=list(layer.args).index)
    constants = [file.tensors[n] for n in op.inputs if file.tensors[n].data is not None]
    for name, tensor in zip_longest(names, constants):
        if name is None or tensor is None:
            yield Mismatch(layer.name, "constants", f"{len(constants)} in number", f"{len(names)}")
            return
        stored, wanted = stored_weight(op, tensor) if name == "weight" else tensor.data, layer.args[name].numpy()
        if isinstance(stored, FloatWeight) or stored is None or stored.dtype != wanted.dtype:
            yield Mismatch(layer.name, f"{name} type", tensor.dtype, str(wanted.dtype))
        else:
            yield from _different(layer, name, stored, wanted)
    wanted_arguments = dict(layer.args)
    if "out_zp" in layer.args:
        bounds = activation_bounds(layer.args.get("activation", "none"), layer.args["out_scale"], layer.args["out_zp"])
        wanted_arguments |= dict(zip(("low", "high"), bounds, strict=True))
    for name, value in kernel_arguments(op).items():
        expected = tuple(wanted_arguments[name]) if isinstance(value, tuple) else wanted_arguments[name]
        if value != expected:
            yield Mismatch(layer.name, name, str(value), str(expected))


def _same_bias(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """The file's bias, with the expected value where they agree to float32.

    XNNPACK's serializer is handed ``bias * scale`` in float32 and divides again: exact up to 2**22, and one part in 2**22 above,
    where the frozen program's float32 accumulator resolves no more either.
    """
    if found.shape != expected.shape:
        return found
    wide = expected.astype(np.int64)
    return np.where(np.abs(found - wide) <= np.abs(wide) >> 22, expected, found)


def _different(layer: Layer, what: str, found: np.ndarray | None, expected: np.ndarray) -> Iterator[Mismatch]:
    """The first element that differs, and how many do; floats must agree to the last bit."""
    if found is None or found.shape != expected.shape:
        yield Mismatch(layer.name, what, "missing" if found is None else f"of shape {found.shape}", f"of shape {expected.shape}")
        return
    wrong = np.argwhere(found != expected)
    if len(wrong):
        first = tuple(int(i) for i in wrong[0])
        at, count = ", ".join(map(str, first)), f" ({len(wrong)} of {found.size} differ)"
        yield Mismatch(layer.name, f"{what}[{at}]", f"{found[first]:.9g}{count}", f"{expected[first]:.9g}")


def _input(file: PteFile, placed: Placed, producers: Mapping[int, FileOp]) -> Iterator[Mismatch]:
    """What the operator reads, where the layer before could not be found (else that layer's output was checked)."""
    layer = placed.layer
    if placed.source is not None:
        return
    number = next((n for n in placed.ops[0].inputs if constant_of(file, n, producers) is None), None)
    tensor = file.tensors[number] if number is not None else None
    wanted = (np.float32(layer.args["in_scale"]), layer.args["in_zp"])
    if tensor is not None and tensor.scale is not None and (np.float32(tensor.scale), tensor.zero_point) != wanted:
        yield Mismatch(
            layer.name, "input scale and zero point", f"{tensor.scale:.9g}, {tensor.zero_point}", f"{wanted[0]:.9g}, {wanted[1]}"
        )


def _geometry(layer: Layer, op: FileOp) -> Iterator[Mismatch]:
    """Strides, paddings, dilation, groups and the fused clamp of a delegated operator."""
    if op.delegate < 0:
        return
    arguments = op.arguments
    pairs: list[tuple[str, tuple[Any, ...], tuple[Any, ...]]] = []
    if layer.op == "qconv2d":
        for field, keys in (
            ("stride", ("subsampling_height", "subsampling_width")),
            ("dilation", ("dilation_height", "dilation_width")),
        ):
            pairs.append((field, tuple(arguments[k] for k in keys), tuple(layer.args[field])))
        paddings = tuple(arguments[f"padding_{side}"] for side in ("top", "bottom", "left", "right"))
        pairs.append(("padding", paddings, tuple(p for p in layer.args["padding"] for _ in range(2))))
        pairs.append(("groups", (arguments["groups"],), (layer.args["groups"],)))
    if "output_min" in arguments:
        clamp = (arguments["output_min"], arguments["output_max"])
        pairs.append(
            ("activation bounds", clamp, _CLAMPS.get(layer.args.get("activation", "none"), (-float("inf"), float("inf"))))
        )
    for field, found, expected in pairs:
        if found != expected:
            yield Mismatch(layer.name, field, str(found), str(expected))


def _identity(file: PteFile, placed: Placed) -> Iterator[Mismatch]:
    """A strided slice as a depthwise convolution must have weights and scales of one, and nothing added."""
    for op in placed.ops:
        if op.kind != "XNNDepthwiseConv2d":
            continue
        constants = [file.tensors[n] for n in op.inputs[1:]]
        weight = constants[0]
        if weight.dtype != "int8" or weight.data is None or (weight.data != 1).any() or len(constants) > 1:
            yield Mismatch(placed.layer.name, "slice weights", "not all 1", "1")
        elif weight.scales is None or (weight.scales != 1).any():
            yield Mismatch(placed.layer.name, "slice scales", "not all 1", "1")


def _constants(file: PteFile, op: FileOp, producers: Mapping[int, FileOp]) -> tuple[FileTensor | None, FileTensor | None]:
    """(weight, bias) of an operator: its constants of rank two and more, and of rank one."""
    constants = [t for n in op.inputs if (t := constant_of(file, n, producers)) is not None]
    weight = next((t for t in constants if len(t.shape) > 1), None)
    return weight, next((t for t in constants if len(t.shape) == 1), None)


def _row(file: PteFile, placed: Placed, producers: Mapping[int, FileOp]) -> Coverage:
    layer, ops = placed.layer, placed.ops
    if layer.op in KERNELS and ops:
        return Coverage(layer.name, ops[0].kind, "binary", layer.macs, "int1" if "weight" in layer.args else "")
    kinds = "+".join(dict.fromkeys(op.kind for op in ops)) or "none"
    inside = all(op.delegate >= 0 for op in ops) if ops else bool(file.delegates)
    types = {file.tensors[n].dtype for op in ops for n in (*op.inputs, *op.outputs) if n in file.tensors}
    in_float = "float32" in types and layer.op not in ("quantize", "dequantize") and _ROWS not in types
    runs = "float" if in_float else "delegated" if inside else "int8"
    storage, notes = "", []
    if "weight" in layer.args and ops:
        weight, _ = _constants(file, ops[0], producers)
        storage = weight.dtype if weight is not None else ""
        runs = "float" if storage.startswith("float") else runs
        if storage == "int8" and (layer.weight_bits or 8) < 8:
            notes.append(f"{layer.weight_bits}-bit weights are stored as int8")
        if storage == "int4" and layer.weight_bits != 4:
            notes.append(f"{layer.weight_bits}-bit weights are stored as int4")
    if not inside:
        notes.append("not delegated to XNNPACK" if file.delegates else "portable kernels compute in float32")
    elif in_float:
        notes.append("computed in float32 between int8 tensors, in the XNNPACK delegate")
    if not placed.found:
        return Coverage(layer.name, "missing", "float", layer.macs, note="not found in the file")
    return Coverage(layer.name, kinds, runs, layer.macs, storage, "; ".join(notes))
