"""A layer while it learns to be binary, and what it is afterwards.

    y = norm( conv( sign((x - shift) / spread), binary(w) ) ) [+ x]

``spread`` and the first ``shift`` are the float model's standard deviation and mean of each input channel, so that the
estimator's window fits; the norm is batch normalization that starts with the float layer's output mean and spread as its bias
and gain.
Without it: ``y = conv(a * sign((x - shift) / spread), binary(w)) + bias`` with a learned ``a``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekit.compress.binary.estimators import frequency_for, sign
from edgekit.compress.binary.settings import Binary

__all__ = ["Baked", "BinaryLayer", "Moments"]

_EPS = 1e-5


@dataclass(frozen=True)
class Moments:
    """Mean and standard deviation of each channel of a layer's input and output in the float model, float32 (channels,)."""

    in_mean: Tensor
    in_std: Tensor
    out_mean: Tensor
    out_std: Tensor


@dataclass(frozen=True)
class Baked:
    """What a trained layer is at inference.

    Attributes:
        threshold: the input's sign is ``x >= threshold`` of its channel, float32 (channels,); None: the input stays real.
        weight: ``scale * (+1, 0 or -1)`` for each output channel, or real, float32.
        bias: float32 (outputs,).
    """

    threshold: Tensor | None
    weight: Tensor
    bias: Tensor


class BinaryLayer(nn.Module):
    """A conv2d or linear in training.

    Args:
        weight: float (O, C / groups, kh, kw) or (O, F).
        bias: (O,) or None.
        geometry: stride, padding, dilation, groups of a conv2d; empty for a linear.
        kind: see :class:`edgekit.compress.binary.settings.Binary`.
        shortcut: a new sum adds the input to the output.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, geometry: tuple[Any, ...], kind: str, settings: Binary, moments: Moments,
        shortcut: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.geometry, self.kind, self.settings = geometry, kind, settings
        self.real_weights = self.real_activations = False
        self.o = 1.0
        self.weight = nn.Parameter(weight.detach().clone())
        spread = moments.in_std.clamp(min=1e-3 * float(moments.in_std.max()) + 1e-12)
        self.register_buffer("spread", spread.clone())
        self.register_buffer("frequency", torch.tensor(self._frequency()))
        start = moments.in_mean.clone() if settings.shift else torch.zeros_like(spread)
        self.shift = nn.Parameter(start / spread, requires_grad=settings.shift and self.binary_inputs)
        if settings.norm == "batch":
            # beside a shortcut the layer brings half of the spread: streams of many such sums would grow without bound
            out_mean = moments.out_mean - (moments.in_mean if shortcut else 0)
            gain = moments.out_std * (0.5 if shortcut else 1.0)
            self.gain, self.bias = nn.Parameter(gain.clone()), nn.Parameter(out_mean.clone())
            self.register_buffer("mean", torch.zeros_like(out_mean))
            self.register_buffer("var", torch.ones_like(out_mean))
        else:
            self.bias = nn.Parameter(torch.zeros(len(weight)) if bias is None else bias.detach().clone())
            self.gain = nn.Parameter(2 * (moments.in_std.mean() if settings.shift else moments.in_mean.abs().mean()))
        self.quantizer = _brevitas(self.weight, kind) if settings.estimator == "brevitas" else None

    @property
    def binary_inputs(self) -> bool:
        return self.kind in ("binary", "binary_activations")

    @property
    def binary_weights(self) -> bool:
        return self.kind != "binary_activations"

    def _frequency(self) -> float:
        if self.settings.frequency != "auto":
            return float(self.settings.frequency)
        return frequency_for(self.settings.target_error, float(self.weight.detach().abs().mean()))

    def phase(self) -> Tensor:
        """``frequency * w`` of BiPer."""
        return self.weight * self.frequency  # type: ignore[operator]

    def signs(self) -> Tensor:
        """The binary (or ternary) weights without their scale, no gradient; sign(0) = +1."""
        with torch.no_grad():
            if self.quantizer is not None:
                value = self.quantizer(self.weight)[0]
                return torch.sign(value) if self.kind == "ternary_weights" else torch.where(value >= 0, 1.0, -1.0)
            z = torch.sin(self.phase()) if self.settings.estimator == "biper" else self.weight
            return torch.where(z >= 0, 1.0, -1.0)

    def _weight(self) -> Tensor:
        s = self.settings
        if not self.binary_weights:
            return self.weight
        if s.estimator == "biper":
            wave = torch.sin(self.phase())
            return wave if self.real_weights else sign(wave, "identity")
        if self.real_weights:
            return self.weight
        if self.quantizer is not None:
            value: Tensor = self.quantizer(self.weight)[0]
            return value
        kind = "reste" if s.estimator == "reste" else "ste"  # Bi-Real's polynomial is for activations
        return sign(self.weight, kind, self.o, s.clip, s.linear_below) * self._scale()

    def _scale(self) -> Tensor:
        size = self.weight.abs()
        if self.settings.scale == "tensor":
            return size.mean()
        return size.flatten(1).mean(1).view(-1, *[1] * (self.weight.dim() - 1))

    def _input(self, x: Tensor) -> Tensor:
        if not self.binary_inputs or self.real_activations:
            return x
        s = self.settings
        z = x / self._in(self.spread) - self._in(self.shift)  # type: ignore[arg-type]
        kind = {"biper": "polynomial", "brevitas": "ste"}.get(s.estimator, s.estimator)
        b = sign(z, kind, self.o, s.clip, s.linear_below)
        return b if s.norm == "batch" else b * self.gain

    def _in(self, value: Tensor) -> Tensor:
        return value.view(-1, 1, 1) if self.geometry else value

    def settle(self, x: Tensor) -> None:
        """Start from the spread and, with ``shift``, the mean of this input instead of the float model's."""
        flat = x.detach().movedim(1 if self.geometry else -1, -1).flatten(0, -2)
        spread = flat.std(0, correction=0)
        self.spread.copy_(spread.clamp(min=1e-3 * float(spread.max()) + 1e-12))  # type: ignore[operator]
        if self.settings.shift:
            self.shift.data.copy_(flat.mean(0) / self.spread)  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, H, W) for a conv, (..., F) for a linear."""
        b, w = self._input(x), self._weight()
        y = F.conv2d(b, w, None, *self.geometry) if self.geometry else F.linear(b, w)
        return self._normalized(y)

    def _normalized(self, y: Tensor) -> Tensor:
        if self.settings.norm == "none":
            return y + (self.bias.view(-1, 1, 1) if self.geometry else self.bias)
        flat = y if self.geometry else y.reshape(-1, y.shape[-1])
        found = F.batch_norm(flat, self.mean, self.var, self.gain, self.bias, self.training, 0.1, _EPS)  # type: ignore[arg-type]
        return found if self.geometry else found.view(y.shape)

    def baked(self) -> Baked:
        """The layer with normalization and scales in its weights and threshold."""
        with torch.no_grad():
            threshold = (self.shift.double() * self.spread.double()).float() if self.binary_inputs else None  # type: ignore[operator]
            shape = (-1, *[1] * (self.weight.dim() - 1))
            if self.settings.norm == "batch":
                factor = self.gain.double() / torch.sqrt(self.var.double() + _EPS)  # type: ignore[operator, arg-type]
                bias = self.bias.double() - self.mean.double() * factor  # type: ignore[operator]
            else:
                factor = (self.gain.double() if self.binary_inputs else self.gain.new_tensor(1.0).double()).expand(
                    len(self.weight)
                )
                bias = self.bias.double()
            w = self._weight().double()
            if self.binary_weights:  # one size for each channel, and the sign of what it is multiplied with
                signs = self.signs().double()
                size = w.abs().flatten(1).amax(1)
                w = signs * size.view(shape)
            return Baked(threshold, (w * factor.view(shape)).float(), bias.float())

    def regularizer(self) -> Tensor:
        """BiPer's mean of ``sin^2(frequency * w)``, 0 to 1."""
        return torch.sin(self.phase()).square().mean()


def _brevitas(weight: nn.Parameter, kind: str) -> nn.Module:
    """Brevitas's quantizer of a weight, with a learned scale for each output channel that starts at its mean size."""
    import brevitas.nn as qnn
    from brevitas.core.restrict_val import RestrictValueType
    from brevitas.inject.enum import ScalingImplType, ScalingPerOutputType
    from brevitas.quant.binary import SignedBinaryWeightPerTensorConst
    from brevitas.quant.ternary import SignedTernaryWeightPerTensorConst

    base = SignedTernaryWeightPerTensorConst if kind == "ternary_weights" else SignedBinaryWeightPerTensorConst
    shape = (-1, *[1] * (weight.dim() - 1))
    size = weight.detach().abs().flatten(1).mean(1).clamp(min=1e-8).view(shape)
    quantizer = base.let(
        scaling_impl_type=ScalingImplType.PARAMETER,
        restrict_scaling_type=RestrictValueType.LOG_FP,
        scaling_per_output_type=ScalingPerOutputType.CHANNEL,
        scaling_init=size,
        scaling_shape=tuple(size.shape),
    )
    holder: Any = qnn.QuantLinear(1, 1, bias=False, weight_quant=quantizer)
    found: nn.Module = holder.weight_quant.tensor_quant
    return found
