"""The 1-bit operators of a frozen program: packed signs in and out, integer sums, no floating point before requantization.

A packed tensor is uint8 with its channels (or features) last: ``(N, H, W, ceil(C / 8))`` for images, else ``(..., ceil(F / 8))``.
Bit ``i`` of byte ``j`` (least significant first) is channel ``8 j + i``; bit 1 stands for +1 and bit 0 for -1; the bits behind
the last channel are 0 and stand for nothing. Weights are packed alike, ``(O, kh, kw, ceil(C / groups / 8))`` and
``(O, ceil(F / 8))``: one bit each. ``channels`` (``features``) says how many there are, C over all groups.

``acc = sum(w * x)`` over the taps inside the image, w and x in {-1, +1}: an exact integer. Zero padding is the real 0, so a tap
outside the image adds nothing. There are three ends:

- ``binary_conv2d``, ``binary_linear``: ``bit = acc >= threshold[o]``, packed, for a binary layer that follows; batch
  normalization, scales, activation and the sign are all in the int32 threshold. ``|acc| <= taps * C / groups``, so a threshold
  beyond that is a channel that is always -1 (or +1).
- ``binary_qconv2d``, ``binary_qlinear``: integers, by the rule of ``qconv2d`` with ``in_scale`` 1 and ``in_zp`` 0::

      q = round_half_even(float32(acc + bias[o]) * (weight_scale[o] / out_scale)) + out_zp      then clamped

  with the product of float32 numbers; ``bias`` is int32 in units of ``weight_scale[o]``, which is positive.
- ``binary_qmatmul``: ``a`` (..., M, K) times the transpose of ``b`` (..., N, K), both packed along K, leading dimensions equal;
  ``q = round_half_even(float32(acc) * (scale / out_scale)) + out_zp``. With ``a_unsigned`` a bit of ``a`` is 1 or 0, not +1 or -1
  (attention probabilities).

``binarize`` makes packed tensors: ``bit = x >= threshold``, one threshold or one for each channel, int16 for int8 activations
(-128 is always +1, 128 never) and float32 for float ones. ``dim`` is the dimension that is packed and becomes the last.
sign(0) = +1 everywhere.

No operator has a bit that flips a comparison: a negative scale is removed by changing the signs of that channel's weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from edgekit.frozen.ops import activation_bounds, register, requantize, storage

__all__ = ["BINARY_OPS", "PACKED_OPS", "pack_signs", "packed_size", "unpack_signs"]

PACKED_OPS = frozenset({"binarize", "binary_conv2d", "binary_linear"})
"""Operators whose output is packed signs."""

BINARY_OPS = PACKED_OPS | {"binary_qconv2d", "binary_qlinear", "binary_qmatmul"}
"""All operators of this module."""


def packed_size(count: int) -> int:
    """Bytes that ``count`` signs take: ``packed_size(9) == 2``."""
    return -(-count // 8)


def pack_signs(positive: Tensor) -> Tensor:
    """Bool tensor (..., C), True for +1, as packed uint8 (..., ceil(C / 8))."""
    count = positive.shape[-1]
    bits = F.pad(positive.to(torch.uint8), (0, 8 * packed_size(count) - count))
    weights = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=positive.device)
    return (bits.view(*positive.shape[:-1], -1, 8) * weights).sum(-1, dtype=torch.uint8)


def unpack_signs(packed: Tensor, count: int) -> Tensor:
    """Packed uint8 (..., ceil(C / 8)) as int8 (..., count) of -1 and +1."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = (packed.unsqueeze(-1) >> shifts) & 1
    return bits.flatten(-2)[..., :count].to(torch.int8) * 2 - 1


def _binarize(x: Tensor, threshold: Tensor, dim: int) -> Tensor:
    last = x.movedim(dim, -1)
    compared = last if x.is_floating_point() else last.to(torch.int32)
    return pack_signs(compared >= threshold.to(compared.dtype))


def _binarize_fake(x: Tensor, threshold: Tensor, dim: int) -> Tensor:
    last = x.movedim(dim, -1)
    return x.new_empty((*last.shape[:-1], packed_size(last.shape[-1])), dtype=torch.uint8)


def _conv_sum(
    x: Tensor, weight: Tensor, channels: int, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Tensor:
    """The integer sums as float64, NCHW."""
    signs = unpack_signs(x, channels).movedim(-1, 1).double()
    kernel = unpack_signs(weight, channels // groups).movedim(-1, 1).double()
    return F.conv2d(signs, kernel, None, list(stride), list(padding), list(dilation), groups).contiguous()


def _conv_shape(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, ...]:
    """(N, O, H, W) of a convolution's output."""
    sizes = [(x.shape[1 + d] + 2 * padding[d] - dilation[d] * (weight.shape[1 + d] - 1) - 1) // stride[d] + 1 for d in range(2)]
    return (x.shape[0], weight.shape[0], *sizes)


def _binary_conv2d(
    x: Tensor, weight: Tensor, channels: int, threshold: Tensor, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    acc = _conv_sum(x, weight, channels, stride, padding, dilation, groups)
    return pack_signs(acc.movedim(1, -1) >= threshold).contiguous()


def _binary_conv2d_fake(
    x: Tensor, weight: Tensor, channels: int, threshold: Tensor, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int,
) -> Tensor:  # fmt: skip
    n, o, h, w = _conv_shape(x, weight, stride, padding, dilation)
    return x.new_empty((n, h, w, packed_size(o)))


def _binary_qconv2d(
    x: Tensor, weight: Tensor, channels: int, weight_scale: Tensor, bias: Tensor, out_scale: float, out_zp: int,
    activation: str, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int, out_bits: int,
) -> Tensor:  # fmt: skip
    acc = _conv_sum(x, weight, channels, stride, padding, dilation, groups) + bias.view(1, -1, 1, 1)
    scale = (weight_scale / weight_scale.new_tensor(out_scale)).view(1, -1, 1, 1)
    return requantize(acc, scale, out_zp, activation_bounds(activation, out_scale, out_zp, out_bits), out_bits)


def _binary_qconv2d_fake(
    x: Tensor, weight: Tensor, channels: int, weight_scale: Tensor, bias: Tensor, out_scale: float, out_zp: int,
    activation: str, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int, out_bits: int,
) -> Tensor:  # fmt: skip
    return x.new_empty(_conv_shape(x, weight, stride, padding, dilation), dtype=storage(out_bits))


def _linear_sum(x: Tensor, weight: Tensor, features: int) -> Tensor:
    return F.linear(unpack_signs(x, features).double(), unpack_signs(weight, features).double())


def _binary_linear(x: Tensor, weight: Tensor, features: int, threshold: Tensor) -> Tensor:
    return pack_signs(_linear_sum(x, weight, features) >= threshold)


def _binary_linear_fake(x: Tensor, weight: Tensor, features: int, threshold: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed_size(weight.shape[0])))


def _binary_qlinear(
    x: Tensor, weight: Tensor, features: int, weight_scale: Tensor, bias: Tensor, out_scale: float, out_zp: int,
    activation: str, out_bits: int,
) -> Tensor:  # fmt: skip
    scale = weight_scale / weight_scale.new_tensor(out_scale)
    bounds = activation_bounds(activation, out_scale, out_zp, out_bits)
    return requantize(_linear_sum(x, weight, features) + bias, scale, out_zp, bounds, out_bits)


def _binary_qlinear_fake(
    x: Tensor, weight: Tensor, features: int, weight_scale: Tensor, bias: Tensor, out_scale: float, out_zp: int,
    activation: str, out_bits: int,
) -> Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=storage(out_bits))


def _binary_qmatmul(
    a: Tensor, b: Tensor, features: int, a_unsigned: bool, scale: float, out_scale: float, out_zp: int, out_bits: int
) -> Tensor:
    left = unpack_signs(a, features).double()
    left = (left + 1) / 2 if a_unsigned else left
    acc = left @ unpack_signs(b, features).double().transpose(-1, -2)
    factor = torch.tensor(scale, dtype=torch.float32) / torch.tensor(out_scale, dtype=torch.float32)
    return requantize(acc, factor.to(acc.device), out_zp, activation_bounds("none", out_scale, out_zp, out_bits), out_bits)


def _binary_qmatmul_fake(
    a: Tensor, b: Tensor, features: int, a_unsigned: bool, scale: float, out_scale: float, out_zp: int, out_bits: int
) -> Tensor:
    return a.new_empty((*a.shape[:-1], b.shape[-2]), dtype=storage(out_bits))


for _name, _reference, _fake in (
    ("binarize", _binarize, _binarize_fake),
    ("binary_conv2d", _binary_conv2d, _binary_conv2d_fake),
    ("binary_linear", _binary_linear, _binary_linear_fake),
    ("binary_qconv2d", _binary_qconv2d, _binary_qconv2d_fake),
    ("binary_qlinear", _binary_qlinear, _binary_qlinear_fake),
    ("binary_qmatmul", _binary_qmatmul, _binary_qmatmul_fake),
):
    register(_name, _reference, _fake)
