"""What the firmware computes, in numpy: every kernel with TFLite's fixed-point rules, equal to the C to the last bit.

Arrays are flat int8, as they lie in the arena; :func:`run` gives every tensor of a :class:`Firmware` for one sample. It is
written from the formulas in ``edgekit.h`` and TFLite's quantization specification, not from the C kernels, and is their oracle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.targets.cortex_m import binary, spiking
from edgekit.targets.cortex_m.fixedpoint import Ints, multiply
from edgekit.targets.cortex_m.graph import Firmware, Step

__all__ = ["REFERENCES", "Int8", "run", "step"]

Int8 = NDArray[np.int8]


def run(firmware: Firmware, inputs: Sequence[Int8]) -> list[Int8]:
    """Every tensor of one inference, flat, in stored order.

    Args:
        inputs: one array for each port in ``firmware.inputs``, in stored order.
    """
    found: dict[int, Int8] = {p.tensor: x.reshape(-1) for p, x in zip(firmware.inputs, inputs, strict=True)}

    def value(tensor: int) -> Int8:
        return found[tensor] if tensor in found else found[firmware.root(tensor)]

    for one in firmware.steps:
        found[one.output] = step(one, [value(i) for i in one.inputs])
    return [
        value(t.index) if t.index in found or firmware.root(t.index) in found else np.zeros(0, np.int8) for t in firmware.tensors
    ]


def step(one: Step, inputs: Sequence[Int8]) -> Int8:
    """The output of one step, flat."""
    return REFERENCES[one.kind](one, inputs).reshape(-1)


def _finish(acc: Ints, values: Any, mantissa: Any, shift: Any) -> Int8:
    """Requantized sums, the zero point, the clamp."""
    scaled = multiply(acc, mantissa, shift) + values["out_zp"]
    result: Int8 = np.clip(scaled, values["low"], values["high"]).astype(np.int8)
    return result


def _padded(x: Int8, values: Any, kernel: Sequence[int], fill: int) -> tuple[Ints, list[tuple[slice, slice]]]:
    """The image with its padding, and for each kernel position (row-major) where its elements lie."""
    height, width, channels = values["in"]
    dilation, stride, pad, out = values.get("dilation", (1, 1)), values["stride"], values["pad"], values["out"]
    need = [(out[i] - 1) * stride[i] + (kernel[i] - 1) * dilation[i] + 1 for i in range(2)]
    size = [max(need[0], pad[0] + height), max(need[1], pad[1] + width)]
    image = np.full((*size, channels), fill, np.int64)
    image[pad[0] : pad[0] + height, pad[1] : pad[1] + width] = x.reshape(height, width, channels)
    places = []
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            first = i * dilation[0], j * dilation[1]
            places.append(tuple(slice(f, f + (out[k] - 1) * stride[k] + 1, stride[k]) for k, f in enumerate(first)))
    return image, places  # type: ignore[return-value]


def _conv2d(one: Step, inputs: Sequence[Int8]) -> Int8:
    values, weight = one.values, one.arrays["weight"].astype(np.int64)
    image, places = _padded(inputs[0], values, values["kernel"], values["in_zp"])
    outputs, kernel_h, kernel_w, width = weight.shape
    groups = values["groups"]
    acc = np.zeros((*values["out"][:2], outputs), np.int64) + one.arrays["bias"]
    taps = weight.reshape(outputs, kernel_h * kernel_w, width)
    each = outputs // groups
    for position, place in enumerate(places):
        patch = image[place]
        for g in range(groups):
            acc[..., g * each : (g + 1) * each] += (
                patch[..., g * width : (g + 1) * width] @ taps[g * each : (g + 1) * each, position].T
            )
    return _finish(acc, values, one.arrays["multiplier"], one.arrays["shift"])


def _depthwise(one: Step, inputs: Sequence[Int8]) -> Int8:
    values, weight = one.values, one.arrays["weight"].astype(np.int64)
    image, places = _padded(inputs[0], values, values["kernel"], values["in_zp"])
    acc = np.zeros(values["out"], np.int64) + one.arrays["bias"]
    for tap, place in zip(weight.reshape(-1, weight.shape[-1]), places, strict=True):
        acc += image[place] * tap
    return _finish(acc, values, one.arrays["multiplier"], one.arrays["shift"])


def _linear(one: Step, inputs: Sequence[Int8]) -> Int8:
    x = inputs[0].reshape(one.values["rows"], one.values["inputs"]).astype(np.int64)
    acc = x @ one.arrays["weight"].astype(np.int64).T + one.arrays["bias"]
    return _finish(acc, one.values, one.arrays["multiplier"], one.arrays["shift"])


def _repeated(one: Step, inputs: Sequence[Int8]) -> tuple[Ints, Ints]:
    a, b = (x.astype(np.int64) for x in inputs)
    return a - one.values["a_zp"], np.tile(b, len(a) // len(b)) - one.values["b_zp"]


def _add(one: Step, inputs: Sequence[Int8]) -> Int8:
    a, b = _repeated(one, inputs)
    (ma, mb, mo), (sa, sb, so) = one.values["multipliers"], one.values["shifts"]
    return _finish(multiply(a << 20, ma, sa) + multiply(b << 20, mb, sb), one.values, mo, so)


def _mul(one: Step, inputs: Sequence[Int8]) -> Int8:
    a, b = _repeated(one, inputs)
    return _finish(a * b, one.values, one.values["multiplier"], one.values["shift"])


def _requant(one: Step, inputs: Sequence[Int8]) -> Int8:
    values = one.values
    return _finish(inputs[0].astype(np.int64) - values["in_zp"], values, values["multiplier"], values["shift"])


def _lut(one: Step, inputs: Sequence[Int8]) -> Int8:
    table: Int8 = one.arrays["table"]
    return table[inputs[0].astype(np.int64) + 128]


def _softmax(one: Step, inputs: Sequence[Int8]) -> Int8:
    """Exponentials of 22 bits from the table, their share of the row's sum in 20 bits, requantized."""
    values, x = one.values, inputs[0].reshape(one.values["rows"], one.values["n"]).astype(np.int64)
    powers = one.arrays["table"].astype(np.int64)[x.max(1, keepdims=True) - x]
    share = (powers * ((1 << 53) // powers.sum(1, keepdims=True))) >> 33
    return _finish(share, {**values, "low": -128, "high": 127}, values["multiplier"], values["shift"])


def _mean(one: Step, inputs: Sequence[Int8]) -> Int8:
    values = one.values
    x = inputs[0].reshape(values["positions"], values["channels"]).astype(np.int64) - values["in_zp"]
    return _finish(x.sum(0), values, values["multiplier"], values["shift"])


def _avg_pool(one: Step, inputs: Sequence[Int8]) -> Int8:
    values = one.values
    image, places = _padded(inputs[0], values, values["kernel"], values["in_zp"])
    image = image - values["in_zp"]
    acc = sum((image[place] for place in places), np.zeros(values["out"], np.int64))
    height, width, _ = values["in"]
    counted = []
    for axis, size in enumerate((height, width)):
        pad = values["pad"][axis] if values["include"] else 0
        start = np.arange(values["out"][axis]) * values["stride"][axis] - values["pad"][axis]
        counted.append(np.minimum(start + values["kernel"][axis], size + pad) - np.maximum(start, -pad))
    divisor = np.outer(*counted)[..., None] + np.zeros(values["out"], np.int64)
    fixed = {n: (m, s) for m, s, n in values["divisors"]}
    chosen = np.vectorize(lambda n: fixed[n], otypes=[np.int64, np.int64])(divisor)
    return _finish(acc, values, *chosen)


def _max_pool(one: Step, inputs: Sequence[Int8]) -> Int8:
    image, places = _padded(inputs[0], one.values, one.values["kernel"], -128)
    result: Int8 = np.max([image[place] for place in places], axis=0).astype(np.int8)
    return result


def _concat(one: Step, inputs: Sequence[Int8]) -> Int8:
    parts = []
    for x, (_, mantissa, shift, zero_point) in zip(inputs, one.values["parts"], strict=True):
        part = x if mantissa == 0 else _finish(x.astype(np.int64) - zero_point, one.values, mantissa, shift)
        parts.append(part.reshape(one.values["rows"], -1))
    return np.concatenate(parts, axis=1)


def _pad(one: Step, inputs: Sequence[Int8]) -> Int8:
    sides = (one.values["vertical"], one.values["horizontal"], (0, 0))
    return np.pad(inputs[0].reshape(one.values["in"]), sides, constant_values=one.values["zp"])


def _gather(one: Step, inputs: Sequence[Int8]) -> Int8:
    place = np.full(one.values["shape"], one.values["offset"], np.int64)
    for axis, (size, stride) in enumerate(zip(one.values["shape"], one.values["stride"], strict=True)):
        place += (np.arange(size) * stride).reshape([-1 if i == axis else 1 for i in range(4)])
    return inputs[0][place]


REFERENCES: dict[str, Callable[[Step, Sequence[Int8]], Int8]] = {
    "conv2d": _conv2d,
    "depthwise": _depthwise,
    "linear": _linear,
    "add": _add,
    "mul": _mul,
    "requant": _requant,
    "lut": _lut,
    "softmax": _softmax,
    "mean": _mean,
    "avg_pool": _avg_pool,
    "max_pool": _max_pool,
    "concat": _concat,
    "pad": _pad,
    "gather": _gather,
    **binary.REFERENCES,
    **spiking.REFERENCES,
}
"""Kernel kind to its numpy form."""
