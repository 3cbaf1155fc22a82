"""The operators of a frozen program: ``edgekit::*``, int8 tensors with one exact meaning.

Notation: ``s`` a float32 scale, ``z`` an integer zero point; a stored integer ``q`` stands for the real number ``s * (q - z)``.

Requantization, the one rounding rule of all weighted ops (it is XNNPACK's float path)::

    acc  = sum((x - in_zp) * w) + bias                      exact integer
    m[c] = float32(in_scale * weight_scale[c]) / out_scale  float32
    q    = round_half_even(float32(acc) * m[c]) + out_zp    then clamped to the activation's range

The other ops compute the real number in float64, divide by ``out_scale``, round once, half to even, and add ``out_zp``;
``quantize`` is ``round_half_even(x * float32(1 / scale)) + zero_point``. Padding of convolutions and pools stands for the real 0.

``activation`` is "none", "relu" or "relu6" and only narrows the clamp: relu lifts the lower bound to ``out_zp``, relu6 also
lowers the upper bound to ``out_zp + round(6 / out_scale)``.

Activations are int8 (``bits`` 8) or int16 (``bits`` 16). Weights are int8 tensors whose values fit ``weight_bits`` (8, 4 or
2), one scale for each output channel, zero point 0. ``bias`` is int32 at scale ``in_scale * weight_scale[c]``.

Layouts are PyTorch's: NCHW activations, OIHW weights. Importing this module registers the operators once.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "ACTIVATIONS",
    "LUT_FUNCTIONS",
    "OPS",
    "activation_bounds",
    "integer_range",
    "lut_table",
    "multiplier",
    "register",
    "requantize",
    "storage",
]

ACTIVATIONS = ("none", "relu", "relu6")

LUT_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "gelu": F.gelu,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
}
"""Elementwise functions that a 256-entry table replaces (:func:`lut_table`), with PyTorch's default arguments."""

OPS: Any = torch.ops.edgekit
"""The operator namespace: ``OPS.qconv2d.default`` and so on."""


def integer_range(bits: int) -> tuple[int, int]:
    """Smallest and largest value of a signed integer of ``bits`` bits: ``integer_range(8) == (-128, 127)``."""
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def activation_bounds(activation: str, scale: float, zero_point: int, bits: int = 8) -> tuple[int, int]:
    """The integer clamp that a fused activation means at the output's scale and zero point."""
    low, high = integer_range(bits)
    if activation == "none":
        return low, high
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r}: expected one of {', '.join(ACTIVATIONS)}")
    low = max(low, zero_point)
    if activation == "relu6":
        high = min(high, zero_point + round(6.0 / scale))
    return low, high


def multiplier(in_scale: float, weight_scale: Tensor, out_scale: float) -> Tensor:
    """Requantization multipliers, float32, shape (channels,): ``in_scale * weight_scale / out_scale`` in float32 arithmetic."""
    scale = weight_scale.to(torch.float32)
    return scale.new_tensor(in_scale) * scale / scale.new_tensor(out_scale)


def lut_table(function: str, in_scale: float, in_zp: int, out_scale: float, out_zp: int) -> Tensor:
    """int8 table of 256 entries: entry ``q + 128`` is the quantized function of the dequantized ``q``."""
    q = torch.arange(-128, 128, dtype=torch.float64)
    real = LUT_FUNCTIONS[function](q.sub(in_zp).mul(in_scale))
    return torch.round(real / out_scale).add(out_zp).clamp(-128, 127).to(torch.int8)


def storage(bits: int) -> torch.dtype:
    """dtype of an activation of that many bits."""
    return torch.int8 if bits <= 8 else torch.int16


def _round_to(real: Tensor, scale: float, zero_point: int, activation: str, bits: int) -> Tensor:
    """Float64 real values to integers: one rounding, half to even, then the activation's clamp."""
    low, high = activation_bounds(activation, scale, zero_point, bits)
    return torch.round(real / scale).add(zero_point).clamp(low, high).to(storage(bits))


def requantize(acc: Tensor, scale: Tensor, zero_point: int, bounds: tuple[int, int], bits: int) -> Tensor:
    """Exact sums to integers by the one rounding rule; ``scale`` holds the float32 multipliers."""
    return torch.round(acc.to(torch.float32) * scale).add(zero_point).clamp(*bounds).to(storage(bits))


def register(name: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Make ``edgekit::name`` from a function of tensors and one that gives its output's shape and dtype."""
    op = torch.library.custom_op(f"edgekit::{name}", reference, mutates_args=())
    op.register_fake(fake)


def _quantize(x: Tensor, scale: float, zero_point: int, bits: int) -> Tensor:
    low, high = integer_range(bits)
    q = torch.round(x.to(torch.float32) * (1.0 / scale)).add(zero_point)
    return q.clamp(low, high).to(storage(bits))


def _dequantize(x: Tensor, scale: float, zero_point: int) -> Tensor:
    return x.to(torch.float32).sub(zero_point).mul(scale)


def _qconv2d(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    in_scale: float,
    in_zp: int,
    out_scale: float,
    out_zp: int,
    activation: str,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    weight_bits: int,
    out_bits: int,
) -> Tensor:
    acc = F.conv2d(x.double() - in_zp, weight.double(), bias.double(), list(stride), list(padding), list(dilation), groups)
    scale = multiplier(in_scale, weight_scale, out_scale).view(1, -1, 1, 1)
    return requantize(acc, scale, out_zp, activation_bounds(activation, out_scale, out_zp, out_bits), out_bits)


def _qconv2d_fake(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor, in_scale: float, in_zp: int, out_scale: float,
    out_zp: int, activation: str, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
    weight_bits: int, out_bits: int,
) -> Tensor:  # fmt: skip
    y = F.conv2d(x.float(), weight.float(), None, list(stride), list(padding), list(dilation), groups)
    return y.to(storage(out_bits))


def _qlinear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor,
    in_scale: float,
    in_zp: int,
    out_scale: float,
    out_zp: int,
    activation: str,
    weight_bits: int,
    out_bits: int,
) -> Tensor:
    acc = F.linear(x.double() - in_zp, weight.double(), bias.double())
    bounds = activation_bounds(activation, out_scale, out_zp, out_bits)
    return requantize(acc, multiplier(in_scale, weight_scale, out_scale), out_zp, bounds, out_bits)


def _qlinear_fake(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor, in_scale: float, in_zp: int, out_scale: float,
    out_zp: int, activation: str, weight_bits: int, out_bits: int,
) -> Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=storage(out_bits))


def _binary(combine: Callable[[Tensor, Tensor], Tensor]) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    def reference(
        a: Tensor, b: Tensor, a_scale: float, a_zp: int, b_scale: float, b_zp: int,
        out_scale: float, out_zp: int, activation: str, out_bits: int,
    ) -> Tensor:  # fmt: skip
        real = combine((a.double() - a_zp) * a_scale, (b.double() - b_zp) * b_scale)
        return _round_to(real, out_scale, out_zp, activation, out_bits)

    def fake(
        a: Tensor, b: Tensor, a_scale: float, a_zp: int, b_scale: float, b_zp: int,
        out_scale: float, out_zp: int, activation: str, out_bits: int,
    ) -> Tensor:  # fmt: skip
        return combine(a, b).to(storage(out_bits))

    return reference, fake


def _qmean(x: Tensor, in_scale: float, in_zp: int, out_scale: float, out_zp: int, out_bits: int) -> Tensor:
    real = (x.double() - in_zp).mean((2, 3), keepdim=True) * in_scale
    return _round_to(real, out_scale, out_zp, "none", out_bits)


def _qmean_fake(x: Tensor, in_scale: float, in_zp: int, out_scale: float, out_zp: int, out_bits: int) -> Tensor:
    return x.new_empty((x.shape[0], x.shape[1], 1, 1), dtype=storage(out_bits))


def _qavg_pool2d(
    x: Tensor, in_scale: float, in_zp: int, out_scale: float, out_zp: int, kernel: Sequence[int],
    stride: Sequence[int], padding: Sequence[int], ceil_mode: bool, count_include_pad: bool,
) -> Tensor:  # fmt: skip
    real = F.avg_pool2d(x.double() - in_zp, list(kernel), list(stride), list(padding), ceil_mode, count_include_pad) * in_scale
    return _round_to(real, out_scale, out_zp, "none", 8)


def _qavg_pool2d_fake(
    x: Tensor, in_scale: float, in_zp: int, out_scale: float, out_zp: int, kernel: Sequence[int],
    stride: Sequence[int], padding: Sequence[int], ceil_mode: bool, count_include_pad: bool,
) -> Tensor:  # fmt: skip
    return F.avg_pool2d(x.float(), list(kernel), list(stride), list(padding), ceil_mode, count_include_pad).to(torch.int8)


def _qmax_pool2d(
    x: Tensor, scale: float, zero_point: int, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], ceil_mode: bool,
) -> Tensor:  # fmt: skip
    y: Tensor = F.max_pool2d(x.float(), list(kernel), list(stride), list(padding), list(dilation), ceil_mode)
    return y.to(x.dtype)


def _qconcat(
    xs: Sequence[Tensor], scales: Sequence[float], zero_points: Sequence[int], out_scale: float, out_zp: int, dim: int
) -> Tensor:
    parts = [
        _round_to((x.double() - z) * s, out_scale, out_zp, "none", 8) for x, s, z in zip(xs, scales, zero_points, strict=True)
    ]
    return torch.cat(parts, dim)


def _qconcat_fake(
    xs: Sequence[Tensor], scales: Sequence[float], zero_points: Sequence[int], out_scale: float, out_zp: int, dim: int
) -> Tensor:
    return torch.cat(list(xs), dim)


def _qpad(x: Tensor, pad: Sequence[int], scale: float, zero_point: int) -> Tensor:
    return F.pad(x, list(pad), value=zero_point)


def _qreshape(x: Tensor, shape: Sequence[int], scale: float, zero_point: int) -> Tensor:
    return x.reshape(list(shape)).clone()


def _qpermute(x: Tensor, dims: Sequence[int], scale: float, zero_point: int) -> Tensor:
    return x.permute(list(dims)).clone(memory_format=torch.contiguous_format)  # contiguous() may return x itself


def _qslice(x: Tensor, dim: int, start: int, end: int, step: int, scale: float, zero_point: int) -> Tensor:
    part: Tensor = torch.ops.aten.slice.Tensor(x, dim, start, end, step)
    return part.clone(memory_format=torch.contiguous_format)


def _qlut(x: Tensor, table: Tensor, function: str, in_scale: float, in_zp: int, out_scale: float, out_zp: int) -> Tensor:
    return table[x.to(torch.int64) + 128]


def _qlut_fake(x: Tensor, table: Tensor, function: str, in_scale: float, in_zp: int, out_scale: float, out_zp: int) -> Tensor:
    return torch.empty_like(x)


for _name, _reference, _fake in (
    ("quantize", _quantize, lambda x, scale, zero_point, bits: torch.empty_like(x, dtype=storage(bits))),
    ("dequantize", _dequantize, lambda x, scale, zero_point: torch.empty_like(x, dtype=torch.float32)),
    ("qconv2d", _qconv2d, _qconv2d_fake),
    ("qlinear", _qlinear, _qlinear_fake),
    ("qadd", *_binary(torch.add)),
    ("qmul", *_binary(torch.mul)),
    ("qmean", _qmean, _qmean_fake),
    ("qavg_pool2d", _qavg_pool2d, _qavg_pool2d_fake),
    ("qmax_pool2d", _qmax_pool2d, _qmax_pool2d),
    ("qconcat", _qconcat, _qconcat_fake),
    ("qpad", _qpad, _qpad),
    ("qreshape", _qreshape, _qreshape),
    ("qpermute", _qpermute, _qpermute),
    ("qslice", _qslice, _qslice),
    ("qlut", _qlut, _qlut_fake),
):
    register(_name, _reference, _fake)
