"""What each ``edgekit::`` operator becomes in firmware: one function an operator, one row of :data:`RULES`.

A rule reads its input tensors in the layout that its kernel needs (transposes that cannot be avoided are steps of their own),
computes TFLite's fixed-point multipliers, and appends steps. Shapes and offsets are constants from here on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgekit.frozen import Layer
from edgekit.frozen.ops import activation_bounds
from edgekit.targets.cortex_m import binary_rules, softmax, spiking_rules
from edgekit.targets.cortex_m.fixedpoint import quantize_multiplier
from edgekit.targets.cortex_m.graph import Port, Tensor
from edgekit.targets.cortex_m.lowering import Builder, constants

__all__ = ["ADD_SHIFT", "RULES", "rounded_once"]

ADD_SHIFT = 20
"""TFLite's left shift of both operands of an addition, so that their common scale keeps 20 bits of fraction."""

_IMAGE_OPS = ("qconv2d", "spiking_conv2d", "qmean", "qavg_pool2d", "qmax_pool2d", "qpad")
_ACCUMULATOR = 1 << 30  # the kernels' contract: |sum| << shift stays below it
_FEW_LEVELS = 16
_LEAST_MANTISSA = 1 << 22
_DIMENSION = 1 << 16  # the kernels' structs hold sizes in 16 bits


def _f32(value: float) -> float:
    """A scale as the float32 that TFLite's files hold."""
    return float(np.float32(value))


def _bounds(layer: Layer) -> dict[str, int]:
    assert layer.out_scale is not None and layer.out_zero_point is not None
    low, high = activation_bounds(layer.args.get("activation", "none"), layer.out_scale, layer.out_zero_point)
    return {"low": low, "high": high, "out_zp": layer.out_zero_point}


def _fixed(build: Builder, layer: Layer, real: float) -> tuple[int, int]:
    try:
        return quantize_multiplier(real)
    except ValueError as error:
        raise build.refuse(layer, f"has a scale that makes the {error}", "calibrate it again with other samples") from None


def _quantize(build: Builder, layer: Layer) -> None:
    (source,) = layer.inputs
    if source in build.ends:  # integers, to float, to other integers: a table
        tensor, scale, zero_point = build.ends[source]
        output = build.output(layer, build.tensors[tensor].last)
        _requantize(build, layer, tensor, output, (scale, zero_point))
        return
    softmaxes = softmax.found(build.program)
    if source in softmaxes:
        softmax.add_step(build, layer.name, softmaxes[source], build.output(layer, last=False))
        return
    holders = [n for n in build.program.module.graph.nodes if n.op == "placeholder"]
    folded = next((x for x in build.program.layers if x.name == source and x.op == "fold_steps"), None)
    position = next((i for i, n in enumerate(holders) if n.name == (folded.inputs[0] if folded else source)), None)
    if position is None:
        raise build.refuse(layer, f"quantizes {source}, which is computed in float", "compute its input with integer layers")
    bits = int(layer.args["bits"])
    if folded:  # (1, T, ...) as the host has it; (T, ...) in the same place
        whole = build.tensor(folded, (1, *layer.shape), False, (layer.out_scale or 1.0, layer.out_zero_point or 0))
        build.inputs.append(Port(position, whole, layer.out_scale, layer.out_zero_point, bits))
        build.of[layer.name] = build.tensor(layer, layer.shape, False, (layer.out_scale or 1.0, layer.out_zero_point or 0), whole)
        return
    output = build.output(layer, len(layer.shape) == 4 and any(u.op in _IMAGE_OPS for u in build.users(layer)))
    build.inputs.append(Port(position, output, layer.out_scale, layer.out_zero_point, bits))


def _dequantize(build: Builder, layer: Layer) -> None:
    build.ends[layer.name] = (build.read(layer.inputs[0]), float(layer.args["scale"]), int(layer.args["zero_point"]))


def _requantize(build: Builder, layer: Layer, source: int, output: int, in_q: tuple[float, int]) -> None:
    tensor = build.tensors[output]
    mantissa, shift = _fixed(build, layer, _f32(in_q[0]) / _f32(tensor.scale))
    values = {"size": tensor.size, "in_zp": in_q[1], "multiplier": mantissa, "shift": shift, **_bounds(layer)}
    build.step(layer, "requant", [source], output, values=values)


def _weighted(build: Builder, layer: Layer) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Values and arrays of a convolution or linear layer; the weights in the program's layout.

    The bias is folded, ``bias - in_zp * sum(weight)``, so that kernels multiply the stored integers and padding is ``in_zp``.

    Raises:
        UnsupportedError: sums may pass 32 bits.
    """
    found = dict(constants(layer, "weight", "weight_scale", "bias"))
    scales = found.pop("weight_scale").astype(np.float64)
    real = _f32(layer.args["in_scale"]) * scales / _f32(layer.args["out_scale"])
    bounds = _bounds(layer)
    fixed = np.array([_fixed(build, layer, float(m)) for m in real], dtype=np.int64).reshape(-1, 2)
    in_zp = int(layer.args["in_zp"])
    if bounds["high"] - bounds["low"] < _FEW_LEVELS or in_zp > 127 - _FEW_LEVELS:  # it gives or reads few levels
        fixed = rounded_once(real, fixed)
    weight = found["weight"].astype(np.int64).reshape(len(scales), -1)
    folded = found["bias"].astype(np.int64) - in_zp * weight.sum(1)
    largest = np.abs(folded) + 128 * np.abs(weight).sum(1)
    unused = 8 - int(layer.args["weight_bits"])  # kernels sum packed weights in the upper bits of a byte
    if (largest << np.maximum(fixed[:, 1], unused)).max(initial=0) >= _ACCUMULATOR:
        raise build.refuse(layer, "may have sums that pass 30 bits", "give it fewer input channels or a larger output range")
    found |= {"bias": folded.astype(np.int32)}
    found |= {"multiplier": fixed[:, 0].astype(np.int32), "shift": fixed[:, 1].astype(np.int8)}
    return {"in_zp": in_zp, **bounds}, found


def rounded_once(real: NDArray[np.float64], fixed: NDArray[np.int64]) -> NDArray[np.int64]:
    """Mantissas and shifts (channels, 2) without right shifts, whose second rounding is felt where levels are few.

    Sums of few bits have multipliers near 1, so the first rounding is to halves or quarters of an output step: up to 25 % of
    values would come out a level off. A mantissa below 2^30 needs no shift; what it loses is below 2^-32 of a sum. Multipliers
    too small for that keep their shift, which is then large and its rounding not felt.
    """
    once = np.stack([np.rint(real * (1 << 31)).astype(np.int64), np.zeros(len(real), np.int64)], 1)
    chosen = (fixed[:, 1] <= 0) & (once[:, 0] >= _LEAST_MANTISSA) & (once[:, 0] < 1 << 31)
    return np.where(chosen[:, None], once, fixed)


def _conv2d(build: Builder, layer: Layer) -> None:
    if int(layer.args["out_bits"]) > 8:
        spiking_rules.current(build, layer)
        return
    name, (top, left) = layer.inputs[0], (int(p) for p in layer.args["padding"])
    if name in build.pads:
        name, (before, _, above, _) = build.pads[name]
        top, left = top + above, left + before
    source = build.read(name, last=True)
    shape, groups = build.tensors[source].shape, int(layer.args["groups"])
    values, arrays = _weighted(build, layer)
    channels, outputs = shape[1], layer.shape[1]
    arrays["weight"] = np.ascontiguousarray(arrays["weight"].transpose(0, 2, 3, 1))
    kind = "depthwise" if groups == channels == outputs and groups > 1 else "conv2d"
    if kind == "depthwise":  # (outputs, kh, kw, 1) to (kh, kw, outputs): neighbours in a row are neighbours in memory
        arrays["weight"] = np.ascontiguousarray(arrays["weight"][..., 0].transpose(1, 2, 0))
    values |= {
        "in": (shape[2], shape[3], channels), "out": (layer.shape[2], layer.shape[3], outputs),
        "kernel": tuple(layer.args["weight"].shape[2:]), "stride": tuple(layer.args["stride"]), "pad": (top, left),
        "dilation": tuple(layer.args["dilation"]), "groups": groups,
    }  # fmt: skip
    more = {"macs": layer.macs, "bits": int(layer.args["weight_bits"])}
    build.step(layer, kind, [source], build.output(layer, last=True), values=values, arrays=arrays, **more)


def _linear(build: Builder, layer: Layer) -> None:
    if int(layer.args["out_bits"]) > 8:
        spiking_rules.current(build, layer)
        return
    values, arrays = _weighted(build, layer)
    image = build.flattened.get(layer.inputs[0])
    source = build.read(layer.inputs[0], last=False) if image is None else image
    if image is not None:
        columns = arrays["weight"].reshape(-1, *build.tensors[image].shape[1:]).transpose(0, 2, 3, 1)
        arrays["weight"] = np.ascontiguousarray(columns.reshape(arrays["weight"].shape))
    outputs, inputs = arrays["weight"].shape
    values |= {"rows": prod(layer.shape[:-1]), "inputs": inputs, "outputs": outputs}
    more = {"macs": layer.macs, "bits": int(layer.args["weight_bits"])}
    build.step(layer, "linear", [source], build.output(layer, last=False), values=values, arrays=arrays, **more)


def _operands(build: Builder, layer: Layer) -> tuple[list[int], int, dict[str, int], bool]:
    """Both operands in one layout, the output, the sizes, and whether the operands change places.

    The second operand may repeat (a vector of channels); any other broadcast is made explicit first.
    """
    swapped = prod(build.tensors[build.read(layer.inputs[0])].shape) < prod(layer.shape)
    names = [*reversed(layer.inputs)] if swapped else [*layer.inputs]
    first = build.read(names[0])
    last = build.tensors[first].last and len(build.tensors[build.read(names[1])].shape) == 4
    found = [build.read(n, last) for n in names]
    output = build.output(layer, last)
    repeat = prod(layer.shape)
    for position, index in enumerate(found):
        tensor = build.tensors[index]
        shape = (1,) * (len(layer.shape) - len(tensor.shape)) + tensor.stored
        whole = build.tensors[output].stored
        if shape == whole:
            continue
        inner = next(i for i in range(len(whole)) if shape[i:] == whole[i:])
        if position == 1 and prod(shape[:inner]) == 1 and inner < len(whole):
            repeat = tensor.size
            continue
        wide = build.tensor(f"{tensor.name}.wide", layer.shape, last, (tensor.scale, tensor.zero_point))
        strides = [prod(shape[i + 1 :]) if size > 1 else 0 for i, size in enumerate(shape)]
        build.gather(layer, index, wide, whole, strides)
        found[position] = wide
    return found, output, {"size": prod(layer.shape), "repeat": repeat}, swapped


def _pair(layer: Layer, key: str, swapped: bool) -> tuple[Any, Any]:
    a, b = layer.args[f"a_{key}"], layer.args[f"b_{key}"]
    return (b, a) if swapped else (a, b)


def _add(build: Builder, layer: Layer) -> None:
    found, output, values, swapped = _operands(build, layer)
    a, b = map(_f32, _pair(layer, "scale", swapped))
    twice = 2 * max(a, b)
    fixed = [_fixed(build, layer, m) for m in (a / twice, b / twice, twice / ((1 << ADD_SHIFT) * _f32(layer.args["out_scale"])))]
    if fixed[2][1] > 0:
        raise build.refuse(layer, "has an output scale far below its inputs'", "calibrate it again with other samples")
    a_zp, b_zp = map(int, _pair(layer, "zp", swapped))
    more = {"a_zp": a_zp, "b_zp": b_zp, "multipliers": tuple(m for m, _ in fixed), "shifts": tuple(s for _, s in fixed)}
    build.step(layer, "add", found, output, values={**values, **more, **_bounds(layer)})


def _mul(build: Builder, layer: Layer) -> None:
    found, output, values, swapped = _operands(build, layer)
    a, b = map(_f32, _pair(layer, "scale", swapped))
    mantissa, shift = _fixed(build, layer, a * b / _f32(layer.args["out_scale"]))
    a_zp, b_zp = map(int, _pair(layer, "zp", swapped))
    more = {"a_zp": a_zp, "b_zp": b_zp, "multiplier": mantissa, "shift": shift}
    build.step(layer, "mul", found, output, values={**values, **more, **_bounds(layer)})


def _mean(build: Builder, layer: Layer) -> None:
    source = build.read(layer.inputs[0], last=True)
    _, channels, height, width = build.tensors[source].shape
    real = _f32(layer.args["in_scale"]) / (_f32(layer.args["out_scale"]) * height * width)
    mantissa, shift = _fixed(build, layer, real)
    values = {"positions": height * width, "channels": channels, "in_zp": int(layer.args["in_zp"])}
    values |= {"multiplier": mantissa, "shift": shift, **_bounds(layer)}
    build.step(layer, "mean", [source], build.output(layer, last=True), values=values)


def _window(build: Builder, layer: Layer) -> tuple[int, dict[str, Any]]:
    source = build.read(layer.inputs[0], last=True)
    _, channels, height, width = build.tensors[source].shape
    values = {
        "in": (height, width, channels), "out": (layer.shape[2], layer.shape[3], channels),
        "kernel": tuple(layer.args["kernel"]), "stride": tuple(layer.args["stride"]), "pad": tuple(layer.args["padding"]),
    }  # fmt: skip
    return source, values


def _avg_pool(build: Builder, layer: Layer) -> None:
    source, values = _window(build, layer)
    include = bool(layer.args["count_include_pad"])
    real = _f32(layer.args["in_scale"]) / _f32(layer.args["out_scale"])
    divisors = sorted({h * w for h in _elements(values, 0, include) for w in _elements(values, 1, include)})
    rows = tuple((*_fixed(build, layer, real / n), n) for n in divisors)
    values |= {"divisors": rows, "include": include, "in_zp": int(layer.args["in_zp"]), **_bounds(layer)}
    build.step(layer, "avg_pool", [source], build.output(layer, last=True), values=values)


def _elements(values: dict[str, Any], axis: int, include: bool) -> set[int]:
    """How many elements of one axis the windows count, as PyTorch does."""
    size, pad, kernel = values["in"][axis], values["pad"][axis], values["kernel"][axis]
    starts = [i * values["stride"][axis] - pad for i in range(values["out"][axis])]
    if include:
        return {min(s + kernel, size + pad) - s for s in starts}
    return {min(s + kernel, size) - max(s, 0) for s in starts}


def _max_pool(build: Builder, layer: Layer) -> None:
    source, values = _window(build, layer)
    values |= {"dilation": tuple(layer.args["dilation"])}
    build.step(layer, "max_pool", [source], build.output(layer, last=True), values=values)


def _concat(build: Builder, layer: Layer) -> None:
    rank, dim = len(layer.shape), int(layer.args["dim"]) % len(layer.shape)
    last = rank == 4 and build.tensors[build.read(layer.inputs[0])].last
    parts = [build.read(name, last) for name in layer.inputs]
    output = build.output(layer, last)
    target = build.tensors[output]
    axis = (0, 2, 3, 1).index(dim) if last else dim
    rows = []
    for part, scale, zero_point in zip(parts, layer.args["scales"], layer.args["zero_points"], strict=True):
        same = (_f32(scale), int(zero_point)) == (_f32(target.scale), target.zero_point)
        fixed = (0, 0) if same else _fixed(build, layer, _f32(scale) / _f32(target.scale))
        rows.append((prod(build.tensors[part].stored[axis:]), *fixed, int(zero_point)))
    values = {"rows": prod(target.stored[:axis]), "parts": tuple(rows), **_bounds(layer)}
    build.step(layer, "concat", parts, output, values=values)


def _pad(build: Builder, layer: Layer) -> None:
    flat = [int(p) for p in layer.args["pad"]]
    users = build.users(layer)
    merges = bool(users) and all(u.op == "qconv2d" for u in users) and not build.is_output(layer)
    if len(layer.shape) == 4 and min(flat) >= 0 and not any(flat[4:]) and merges:
        sides = [*flat, 0, 0, 0, 0][:4]
        build.pads[layer.name] = (layer.inputs[0], (sides[0], sides[1], sides[2], sides[3]))
        return
    tensor = build.tensors[build.read(layer.inputs[0])]
    pairs = [(flat[2 * i], flat[2 * i + 1]) for i in range(len(flat) // 2)]
    sides_of = [(0, 0)] * (len(tensor.shape) - len(pairs)) + pairs[::-1]
    if tensor.last:
        sides_of = [sides_of[i] for i in (0, 2, 3, 1)]
    if min(flat) < 0:
        raise build.refuse(layer, "pads by a negative number", "slice instead (x[..., a:b])")
    _pad_axes(build, layer, tensor, sides_of)


def _pad_axes(build: Builder, layer: Layer, tensor: Tensor, sides: list[tuple[int, int]]) -> None:
    """One step for each padded axis, seen as the middle one of three; two neighbours (height and width) share a step."""
    output, shape = build.output(layer, tensor.last), list(tensor.stored)
    axes = [i for i, side in enumerate(sides) if any(side)] or [0]
    together = len(axes) == 2 and axes[1] == axes[0] + 1 and prod(shape[: axes[0]]) == 1
    groups = [axes] if together else [[axis] for axis in axes]
    source, q = tensor.index, (tensor.scale, tensor.zero_point)
    for number, group in enumerate(groups):
        values = {
            "in": (shape[group[0]] if together else prod(shape[: group[0]]), shape[group[-1]], prod(shape[group[-1] + 1 :])),
            "vertical": sides[group[0]] if together else (0, 0), "horizontal": sides[group[-1]], "zp": tensor.zero_point,
        }  # fmt: skip
        for axis in group:
            shape[axis] += sum(sides[axis])
        logical = [shape[(0, 2, 3, 1).index(i)] for i in range(4)] if tensor.last else shape
        whole = number == len(groups) - 1
        target = output if whole else build.tensor(f"{layer.name}.part", logical, tensor.last, q)
        build.step(layer, "pad", [source], target, values=values)
        source = target


def _reshape(build: Builder, layer: Layer) -> None:
    before = build.tensors[build.read(layer.inputs[0])]
    users = build.users(layer)
    linear = bool(users) and all(u.op in ("qlinear", "spiking_linear") for u in users) and not build.is_output(layer)
    mixed = before.last and before.shape[1] > 1 and prod(before.shape[2:]) > 1
    if mixed and linear and layer.shape == (before.shape[0], prod(before.shape[1:])):
        build.flattened[layer.name] = before.index
        return
    source = build.tensors[build.read(layer.inputs[0], last=False)]
    build.of[layer.name] = build.tensor(layer, layer.shape, False, (source.scale, source.zero_point), source.base)


def _permute(build: Builder, layer: Layer) -> None:
    rank = len(layer.shape)
    source = build.tensors[build.read(layer.inputs[0])]
    dims = [int(d) % rank for d in layer.args["dims"]]
    stored = (0, 2, 3, 1) if source.last else tuple(range(rank))

    def order(last: bool) -> list[int]:
        return [stored.index(dims[j]) for j in ((0, 2, 3, 1) if last else range(rank))]

    def free(axes: Sequence[int]) -> bool:
        moved = [a for a in axes if source.stored[a] > 1]
        return moved == sorted(moved)

    image = rank == 4 and any(u.op in _IMAGE_OPS for u in build.users(layer))
    choices = [image, not image] if rank == 4 else [False]
    last = next((c for c in choices if free(order(c))), choices[0])
    if free(order(last)):
        build.of[layer.name] = build.tensor(layer, layer.shape, last, (source.scale, source.zero_point), source.base)
    else:
        build.transpose(layer, source.index, build.output(layer, last), order(last))


def _slice(build: Builder, layer: Layer) -> None:
    source = build.tensors[build.read(layer.inputs[0])]
    dim = int(layer.args["dim"]) % len(layer.shape)
    axis = (0, 2, 3, 1).index(dim) if source.last else dim
    taken = range(source.shape[dim])[slice(int(layer.args["start"]), int(layer.args["end"]), int(layer.args["step"]))]
    strides = [prod(source.stored[i + 1 :]) for i in range(len(source.stored))]
    offset = taken.start * strides[axis]
    strides[axis] *= taken.step
    output = build.output(layer, source.last)
    build.gather(layer, source.index, output, build.tensors[output].stored, strides, offset)


def _lut(build: Builder, layer: Layer) -> None:
    source = build.read(layer.inputs[0])
    output = build.output(layer, build.tensors[source].last)
    table: torch.Tensor = layer.args["table"]
    values = {"size": prod(layer.shape)}
    build.step(layer, "lut", [source], output, values=values, arrays={"table": table.numpy().astype(np.int8)})


RULES: dict[str, Callable[[Builder, Layer], None]] = {
    "quantize": _quantize,
    "dequantize": _dequantize,
    "qconv2d": _conv2d,
    "qlinear": _linear,
    "qadd": _add,
    "qmul": _mul,
    "qmean": _mean,
    "qavg_pool2d": _avg_pool,
    "qmax_pool2d": _max_pool,
    "qconcat": _concat,
    "qpad": _pad,
    "qreshape": _reshape,
    "qpermute": _permute,
    "qslice": _slice,
    "qlut": _lut,
    **binary_rules.RULES,
    **spiking_rules.RULES,
}
"""``edgekit::`` operator to its rule."""
