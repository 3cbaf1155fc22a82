"""Linear layers with integer weights and float activations: quantized while they run (``dynamic_qlinear``), or not at all.

Weights are int8 tensors whose values fit ``weight_bits``; ``weight_scale`` is float32, (O,) or, for groups of ``group_size``
inputs that share a scale, (O, I / group_size); zero points are 0. ``bias`` is float32. Group scales are bfloat16 values, which is
how XNNPACK stores them.

``dynamic_qlinear`` quantizes each row of x (its last axis) to int8 by its own least and greatest value (and 0), in float32::

    low, high = min(x, 0), max(x, 0)
    scale     = max((high - low) / 255, 2 ** -23)
    zero      = round(clamp(-128 - low / scale or 127 - high / scale, whichever end it errs less on, -128, 127))
    q         = clamp(round_half_even(x * (1 / scale)) + zero, -128, 127)
    y         = sum_groups(sum((q - zero) * w) * weight_scale) * scale + bias

The inner sums are exact integers, the rest is float64 rounded once. Runtimes do the rest in float32 in an order of their own, so
results agree to float32's last bits, unless a value lies on a rounding border.
``weight_only_linear`` is ``x @ (w * weight_scale).T + bias`` in float64, rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgekit.frozen.ops import register

__all__ = ["DYNAMIC_OPS", "dynamic_linear", "quantize_rows", "weight_only_linear"]

DYNAMIC_OPS = frozenset({"dynamic_qlinear", "weight_only_linear"})
"""Operators that read and give float32."""


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(integers, scale, zero point) of each row of the last axis, all float32; the latter two keep that axis with size 1."""
    x = x.float()
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = ((high - low) / 255.0).clamp(min=torch.finfo(torch.float32).eps)
    from_low, from_high = low / scale, high / scale
    zero = torch.where((-128 + from_low) + (127 + from_high) > 0, -128 - from_low, 127 - from_high).clamp(-128, 127).round()
    q = torch.round(x * (1.0 / scale)).add(zero).clamp(-128, 127)
    return q, scale, zero


def _by_groups(x: Tensor, weight: Tensor, weight_scale: Tensor, group_size: int) -> Tensor:
    """Float64 products of ``x`` with the scaled weight."""
    if not group_size:
        return (x.double() @ weight.double().T) * weight_scale.double()
    rows = x.double().reshape(*x.shape[:-1], -1, group_size)
    sums = torch.einsum("...gi,ogi->...og", rows, weight.double().reshape(len(weight), -1, group_size))
    return (sums * weight_scale.double()).sum(-1)


def dynamic_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor, group_size: int = 0, weight_bits: int = 8
) -> Tensor:
    """``dynamic_qlinear``: x (..., I) float32, weight (O, I) int8; (..., O) float32."""
    q, scale, zero = quantize_rows(x)
    found = _by_groups(q - zero, weight, weight_scale, group_size)
    return (found * scale.double() + bias.double()).float()


def weight_only_linear(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor, group_size: int = 0, weight_bits: int = 8
) -> Tensor:
    """x (..., I) float32, weight (O, I) int8; (..., O) float32."""
    return (_by_groups(x, weight, weight_scale, group_size) + bias.double()).float()


def _dynamic(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor, group_size: int, weight_bits: int) -> Tensor:
    return dynamic_linear(x, weight, weight_scale, bias, group_size, weight_bits)


def _weight_only(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor, group_size: int, weight_bits: int) -> Tensor:
    return weight_only_linear(x, weight, weight_scale, bias, group_size, weight_bits)


def _fake(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor, group_size: int, weight_bits: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=torch.float32)


register("dynamic_qlinear", _dynamic, _fake)
register("weight_only_linear", _weight_only, _fake)
