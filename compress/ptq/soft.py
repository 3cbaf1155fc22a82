"""Layers and activation quantizers that can be learned: AdaRound's gates and LSQ's scales, with QDrop.

Weights are ``scale * (floor + h)``, ``h = clip(1.2 sigmoid(gate) - 0.1, 0, 1)`` (Nagel et al. 2020, section 3.3). An activation's
scale learns through the straight-through estimate of Esser et al. 2020 (LSQ), section 2.1; while learning each value keeps its
float form with probability ``drop`` (Wei et al. 2022, QDrop, section 3.2).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekit.compress.ptq.observers import ActQ
from edgekit.compress.ptq.plan import WeightQ
from edgekit.compress.ptq.simulate import WeightedLayer
from edgekit.compress.ptq.units import Unit

__all__ = ["Chances", "LearnedActivation", "SoftLayer", "rounding_loss"]

_LOW, _HIGH = -0.1, 1.1


class SoftLayer(nn.Module):
    """A weighted layer whose weights are between two integers each."""

    def __init__(self, unit: Unit, weight: Tensor, w: WeightQ) -> None:
        super().__init__()
        self.layer = WeightedLayer(unit, torch.empty(0), torch.empty(0))
        bounds: tuple[Any, Any] = w.bounds
        self.low, self.high = bounds
        self.zero = w.zero
        scale = w.scale.view(-1, *[1] * (weight.dim() - 1))
        floor = torch.floor(weight / scale).clamp(self.low, self.high)
        rest = (weight / scale - floor).clamp(0.0, 1.0)
        layout = torch.channels_last if weight.dim() == 4 else torch.contiguous_format
        self.register_buffer("scale", scale.clone())
        self.register_buffer("floor", floor.contiguous(memory_format=layout))
        self.gate = nn.Parameter((-torch.log((_HIGH - _LOW) / (rest - _LOW) - 1)).contiguous(memory_format=layout))
        self.bias = nn.Parameter(w.bias.float().clone())

    def up(self) -> Tensor:
        """How far each weight goes up from its floor, 0 to 1."""
        return (torch.sigmoid(self.gate) * (_HIGH - _LOW) + _LOW).clamp(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, H, W) for a conv, (..., features) for a linear."""
        weight: Tensor = (self.floor + self.up()).clamp(self.low, self.high) * self.scale  # type: ignore[operator]
        return self.layer.compute(x, weight, self.bias)

    def integers(self) -> Tensor:
        """The weights rounded to where their gates lean, int8."""
        found: Tensor = (self.floor + (self.gate.detach() >= 0)).clamp(self.low, self.high)  # type: ignore[operator]
        if self.zero is not None:
            found = found + self.zero.view(-1, *[1] * (found.dim() - 1))
        return found.to(torch.int8).contiguous()


def rounding_loss(layers: list[SoftLayer], beta: float) -> Tensor:
    """AdaRound's regularizer, the mean over each layer's weights: 0 where every weight is at one of its two integers."""
    return torch.stack([(1 - (2 * layer.up() - 1).abs().pow(beta)).mean() for layer in layers]).sum()


class Chances:
    """Masks, 1.0 with a given probability and else 0.0, cut out of one table at random places: drawing fresh numbers costs more
    than quantizing does."""

    def __init__(self, probability: float, generator: torch.Generator, size: int = 1 << 22, device: str = "cpu") -> None:
        self.probability, self.generator, self.device = probability, generator, device
        self.table = torch.empty(0)
        self._draw(size)

    def _draw(self, size: int) -> None:
        self.table = (torch.rand(size, generator=self.generator) < self.probability).float().to(self.device)

    def mask(self, shape: torch.Size) -> Tensor:
        """A float32 tensor of this shape; images are channels-last in memory."""
        count = shape.numel()
        if 2 * count > len(self.table):
            self._draw(4 * count)
        start = int(torch.randint(len(self.table) - count, (), generator=self.generator))
        values = self.table[start : start + count]
        if len(shape) == 4:
            return values.view(shape[0], *shape[2:], shape[1]).permute(0, 3, 1, 2)
        return values.view(shape)


class _FakeQuantize(torch.autograd.Function):
    """``scale * (clamp(round(x / scale) + zero) - zero)``, where ``mask`` is 1 the activation's float value.

    Written in operators that have vector kernels: boolean masks and ``where`` are twenty times slower on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_scale: Tensor, low: int, high: int, lifted: bool, mask: Tensor | None) -> Tensor:
        scale = math.exp(float(log_scale))
        real = x.div(scale)
        q = real.clamp(low, high).round_()
        if ctx.needs_input_grad[1]:
            ctx.slope = (q - _inside(real, real, low, high)).mul_(scale)
        ctx.bounds, ctx.lifted, ctx.mask = (low, high), lifted, mask
        ctx.save_for_backward(real)
        result = q.mul_(scale)
        if mask is not None:
            torch.lerp(result, x.clamp(min=0) if lifted else x, mask, out=result)
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (real,) = ctx.saved_tensors
        grad = _as_laid_out(grads[0], real)
        through = None if ctx.mask is None else grad * ctx.mask
        rounded = grad if through is None else grad - through
        log_grad = torch.dot(_flat(rounded), _flat(ctx.slope)) if ctx.needs_input_grad[1] else None
        found = _inside(rounded, real, *ctx.bounds)
        if through is not None:
            found += torch.ops.aten.threshold_backward(through, real, 0.0) if ctx.lifted else through
        return found, log_grad, None, None, None, None


def _inside(values: Tensor, x: Tensor, low: int, high: int) -> Tensor:
    """``values`` where ``low < x < high``, else 0."""
    found: Tensor = torch.ops.aten.hardtanh_backward(values, x, float(low), float(high))
    return found


def _as_laid_out(x: Tensor, like: Tensor) -> Tensor:
    """``x`` in the memory layout of ``like``: operators on two layouts are forty times slower."""
    last = x.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last)
    return x.contiguous(memory_format=torch.channels_last) if last else x


def _flat(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).reshape(-1) if x.dim() == 4 else x.reshape(-1)


class LearnedActivation(nn.Module):
    """An activation's quantizer with a scale that can learn, at the plan's zero point.

    Attributes:
        chances: masks of the values that stay float; None: none do.
        seen: a function called with each tensor before it is quantized; None: not called.
    """

    def __init__(self, name: str, q: ActQ, activation: str, log_scale: nn.Parameter) -> None:
        super().__init__()
        self.name, self.q, self.activation = name, q, activation
        self.log_scale = log_scale
        self.chances: Chances | None = None
        self.seen: Any = None

    def forward(self, x: Tensor) -> Tensor:
        """x: any shape, float32."""
        if self.seen is not None:
            self.seen(self, x)
        scale = math.exp(float(self.log_scale.detach()))
        low, high = self.q.bounds(self.activation, scale)
        mask = None if self.chances is None else self.chances.mask(x.shape)
        if mask is not None and self.activation == "relu6":
            x = F.hardtanh(x, 0.0, 6.0)
        zero, lifted = self.q.zero_point, self.activation == "relu"
        found: Tensor = _FakeQuantize.apply(x, self.log_scale, low - zero, high - zero, lifted, mask)  # type: ignore[no-untyped-call]
        return found
