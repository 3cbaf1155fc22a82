"""Frozen program to a quantize/dequantize graph: the form ExecuTorch, LiteRT and onnxruntime turn back into integer kernels.

Each ``edgekit::`` operator becomes ``dequantize -> float ATen operator -> quantize`` (``quantized_decomposed`` operators) with
the program's own integers, scales and zero points; nothing is recomputed. A target states in a :class:`Style` how it wants its
weights and activations, and may replace single rules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import Tensor
from torch.export import ExportedProgram

from edgekit.frozen import FrozenProgram
from edgekit.frozen.ops import LUT_FUNCTIONS, OPS, integer_range
from edgekit.targets.fold import fold_constants

__all__ = ["Style", "rules", "to_qdq"]

_Q: Any = torch.ops.quantized_decomposed
_ATEN: Any = torch.ops.aten


@dataclass(frozen=True)
class Style:
    """How a target wants the graph.

    Attributes:
        integer_weights: weights as an int8 constant with one dequantize (ExecuTorch, ONNX); else as a float constant that is
            quantized and dequantized in the graph (LiteRT).
        unsigned_activations: uint8 activations, zero point + 128 (onnxruntime fuses only these); else int8.
        weight_range: (qmin, qmax) that the dequantize declares for weights of that many bits and rank; None: int8's.
        rules: replacements, ``edgekit`` operator name to a function of the same arguments.
    """

    integer_weights: bool = True
    unsigned_activations: bool = False
    weight_range: Callable[[int, int], tuple[int, int]] | None = None
    rules: Mapping[str, Callable[..., Tensor]] = field(default_factory=dict)

    def dequantize(self, x: Tensor, scale: float, zero_point: int) -> Tensor:
        """Integer activation to float."""
        form = (zero_point + 128, 0, 255, torch.uint8) if self.unsigned_activations else (zero_point, -128, 127, torch.int8)
        real: Tensor = _Q.dequantize_per_tensor(x, scale, *form)
        return real

    def quantize(self, x: Tensor, scale: float, zero_point: int) -> Tensor:
        """Float to integer activation."""
        form = (zero_point + 128, 0, 255, torch.uint8) if self.unsigned_activations else (zero_point, -128, 127, torch.int8)
        integers: Tensor = _Q.quantize_per_tensor(x, scale, *form)
        return integers

    def weight(self, weight: Tensor, scale: Tensor, bits: int) -> Tensor:
        """Integer weight, one scale for each output channel, to float."""
        low, high = self.weight_range(bits, weight.dim()) if self.weight_range else integer_range(8)
        zero = torch.zeros(weight.shape[0], dtype=torch.int64)
        stored = weight
        if not self.integer_weights:
            real = weight.float() * scale.view(-1, *[1] * (weight.dim() - 1))
            stored = _Q.quantize_per_channel(real, scale, zero, 0, low, high, torch.int8)
        result: Tensor = _Q.dequantize_per_channel(stored, scale, zero, 0, low, high, torch.int8)
        return result


def to_qdq(program: FrozenProgram, style: Style, aten_rules: Mapping[Any, Callable[..., Any]] | None = None) -> ExportedProgram:
    """The program as a quantize/dequantize graph, constants folded except the dequantize of weights.

    Args:
        aten_rules: further decompositions of plain ATen operators that the target needs, by overload.
    """
    table = {getattr(OPS, name).default: rule for name, rule in rules(style).items()}
    lowered = program.exported.run_decompositions({**table, **(aten_rules or {})})
    # without this list the weights' dequantize is folded too and the target silently gets FLOAT weights
    kept = {getattr(_Q, f"{verb}_per_{kind}").default for verb in ("quantize", "dequantize") for kind in ("tensor", "channel")}
    kept.add(_Q.dequantize_per_channel_group.default)
    return fold_constants(lowered, kept)


def rules(style: Style) -> dict[str, Callable[..., Tensor]]:
    """``edgekit`` operator name to the function of the same arguments that stands for it in the graph."""
    dq, q = style.dequantize, style.quantize

    def act(y: Tensor, activation: str) -> Tensor:
        if activation == "none":
            return y
        clamped: Tensor = _ATEN.relu.default(y) if activation == "relu" else _ATEN.hardtanh.default(y, 0.0, 6.0)
        return clamped

    def bias_real(bias: Tensor, weight_scale: Tensor, in_scale: float) -> Tensor:
        return bias.float() * (weight_scale * in_scale)

    def conv(
        x: Tensor, w: Tensor, ws: Tensor, b: Tensor, i_s: float, i_z: int, o_s: float, o_z: int, activation: str,
        stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int, weight_bits: int, out_bits: int,
    ) -> Tensor:  # fmt: skip
        y = _ATEN.convolution.default(
            dq(x, i_s, i_z), style.weight(w, ws, weight_bits), bias_real(b, ws, i_s),
            stride, padding, dilation, False, [0, 0], groups,
        )  # fmt: skip
        return q(act(y, activation), o_s, o_z)

    def linear(
        x: Tensor, w: Tensor, ws: Tensor, b: Tensor, i_s: float, i_z: int, o_s: float, o_z: int, activation: str,
        weight_bits: int, out_bits: int,
    ) -> Tensor:  # fmt: skip
        y = _ATEN.linear.default(dq(x, i_s, i_z), style.weight(w, ws, weight_bits), bias_real(b, ws, i_s))
        return q(act(y, activation), o_s, o_z)

    def binary(op: Any) -> Callable[..., Tensor]:
        def rule(
            a: Tensor, b: Tensor, a_s: float, a_z: int, b_s: float, b_z: int, o_s: float, o_z: int, activation: str, out_bits: int
        ) -> Tensor:
            return q(act(op(dq(a, a_s, a_z), dq(b, b_s, b_z)), activation), o_s, o_z)

        return rule

    def mean(x: Tensor, i_s: float, i_z: int, o_s: float, o_z: int, out_bits: int) -> Tensor:
        return q(_ATEN.mean.dim(dq(x, i_s, i_z), [-1, -2], True), o_s, o_z)

    def avg_pool(
        x: Tensor, i_s: float, i_z: int, o_s: float, o_z: int, kernel: Sequence[int], stride: Sequence[int],
        padding: Sequence[int], ceil_mode: bool, count_include_pad: bool,
    ) -> Tensor:  # fmt: skip
        y = _ATEN.avg_pool2d.default(dq(x, i_s, i_z), kernel, stride, padding, ceil_mode, count_include_pad)
        return q(y, o_s, o_z)

    def max_pool(
        x: Tensor, s: float, z: int, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int],
        dilation: Sequence[int], ceil_mode: bool,
    ) -> Tensor:  # fmt: skip
        return q(_ATEN.max_pool2d.default(dq(x, s, z), kernel, stride, padding, dilation, ceil_mode), s, z)

    def concat(xs: Sequence[Tensor], scales: Sequence[float], zps: Sequence[int], o_s: float, o_z: int, dim: int) -> Tensor:
        return q(_ATEN.cat.default([dq(x, s, z) for x, s, z in zip(xs, scales, zps, strict=True)], dim), o_s, o_z)

    def slice_(x: Tensor, dim: int, start: int, end: int, step: int, s: float, z: int) -> Tensor:
        return q(_ATEN.slice.Tensor(dq(x, s, z), dim, start, end, step), s, z)

    def lut(x: Tensor, table: Tensor, function: str, i_s: float, i_z: int, o_s: float, o_z: int) -> Tensor:
        return q(LUT_FUNCTIONS[function](dq(x, i_s, i_z)), o_s, o_z)

    return {
        "quantize": lambda x, s, z, bits: q(x, s, z),
        "dequantize": dq,
        "qconv2d": conv,
        "qlinear": linear,
        "qadd": binary(_ATEN.add.Tensor),
        "qmul": binary(_ATEN.mul.Tensor),
        "qmean": mean,
        "qavg_pool2d": avg_pool,
        "qmax_pool2d": max_pool,
        "qconcat": concat,
        "qpad": lambda x, pad, s, z: q(_ATEN.constant_pad_nd.default(dq(x, s, z), pad, 0.0), s, z),
        "qreshape": lambda x, shape, s, z: q(_ATEN.reshape.default(dq(x, s, z), shape), s, z),
        "qpermute": lambda x, dims, s, z: q(_ATEN.permute.default(dq(x, s, z), dims), s, z),
        "qslice": slice_,
        "qlut": lut,
        **style.rules,
    }
