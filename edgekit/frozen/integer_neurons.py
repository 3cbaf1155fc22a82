"""Integer neurons and layers of spiking programs; what a step is stands in :mod:`edgekit.frozen.spiking_ops`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from edgekit.frozen.float_neurons import by_step, feedback

__all__ = [
    "NO_LEAK",
    "add_currents",
    "add_spikes",
    "current_bounds",
    "q15_step",
    "qlif",
    "qlif_recurrent",
    "qsynapse",
    "spike_sum_pool2d",
    "spiking_conv2d",
    "spiking_linear",
]

NO_LEAK = 32767
"""The ``decay`` that stands for exactly 1."""


def q15_step(v: Tensor, current: Tensor, decay: Tensor) -> Tensor:
    """Leak and integration of the integer neuron: int32 tensors in and out, saturated to int16."""
    leaked = torch.where(decay == NO_LEAK, v, (v * decay + 0x4000) >> 15)
    return (leaked + current).clamp(-32768, 32767)


def current_bounds(weight: Tensor, bias: Tensor, spikes_max: int = 1, spikes_min: int = 0) -> tuple[int, int]:
    """Smallest and largest value of any partial sum of ``bias + sum(weight * x)``, x in ``spikes_min`` (<= 0) .. ``spikes_max``.

    A layer fits an int16 accumulator in any order of summation if this lies within -32768 .. 32767.
    """
    w, b = weight.flatten(1).to(torch.int64), bias.to(torch.int64)
    negative, positive = w.clamp(max=0).sum(1), w.clamp(min=0).sum(1)
    low = spikes_max * negative + spikes_min * positive + b.clamp(max=0)
    high = spikes_max * positive + spikes_min * negative + b.clamp(min=0)
    return int(low.min()), int(high.max())


def qlif(x: Tensor, threshold: Tensor, decay: Tensor, v_init: Tensor, steps: int, reset: str, max_spikes: int) -> Tensor:
    """``qlif_sequence``."""
    if reset not in ("subtract", "zero"):
        raise ValueError(f"integer neuron with reset {reset!r}: expected subtract or zero")
    currents, threshold, decay = by_step(x.to(torch.int32), steps), threshold.to(torch.int32), decay.to(torch.int32)
    v, out = v_init.to(torch.int32).expand(currents.shape[1:]), torch.empty_like(currents, dtype=torch.int8)
    for t in range(steps):
        v = q15_step(v, currents[t], decay)
        out[t] = s = torch.div(v, threshold, rounding_mode="floor").clamp(0, max_spikes)
        v = v - s * threshold if reset == "subtract" else torch.where(s > 0, 0, v)
    return out.reshape(x.shape).contiguous()


def qsynapse(x: Tensor, decay: Tensor, steps: int) -> Tensor:
    """Currents that fade: ``j = sat16(((j * decay + 0x4000) >> 15) + x)``, int16, from 0."""
    currents, decay = by_step(x.to(torch.int32), steps), decay.to(torch.int32)
    j, out = torch.zeros_like(currents[0]), torch.empty_like(currents, dtype=torch.int16)
    for t in range(steps):
        out[t] = j = q15_step(j, currents[t], decay)
    return out.reshape(x.shape).contiguous()


def qlif_recurrent(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor, decay_syn: Tensor, threshold: Tensor, decay: Tensor,
    v_init: Tensor, steps: int, reset: str, max_spikes: int, weight_bits: int,
) -> Tensor:  # fmt: skip
    """``qlif_recurrent``: a neuron with a layer from its spikes back to itself."""
    if reset not in ("subtract", "zero"):
        raise ValueError(f"integer neuron with reset {reset!r}: expected subtract or zero")
    currents, (fade, threshold, decay) = (
        by_step(x.to(torch.int32), steps),
        (t.to(torch.int32) for t in (decay_syn, threshold, decay)),
    )
    v, out = v_init.to(torch.int32).expand(currents.shape[1:]), torch.empty_like(currents, dtype=torch.int8)
    j = torch.zeros_like(currents[0])
    for t in range(steps):
        given = currents[t]
        if t:
            back = feedback(out[t - 1].double(), weight, bias).clamp(-32768, 32767).to(torch.int32)
            given = (given + back).clamp(-32768, 32767)
        j = q15_step(j, given, fade)
        v = q15_step(v, j, decay)
        out[t] = s = torch.div(v, threshold, rounding_mode="floor").clamp(0, max_spikes)
        v = v - s * threshold if reset == "subtract" else torch.where(s > 0, 0, v)
    return out.reshape(x.shape).contiguous()


def spiking_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor, spikes_max: int, weight_bits: int) -> Tensor:
    """``spiking_linear``."""
    return F.linear(x.double(), weight.double(), bias.double()).clamp(-32768, 32767).to(torch.int16)


def spiking_conv2d(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, spikes_max: int, weight_bits: int,
) -> Tensor:  # fmt: skip
    """``spiking_conv2d``."""
    y = F.conv2d(x.double(), weight.double(), bias.double(), list(stride), list(padding), list(dilation), groups)
    return y.clamp(-32768, 32767).to(torch.int16)


def add_currents(a: Tensor, b: Tensor) -> Tensor:
    """``add_currents``."""
    return (a.to(torch.int32) + b.to(torch.int32)).clamp(-32768, 32767).to(torch.int16)


def add_spikes(x: Tensor, s: Tensor, amplitude: Tensor) -> Tensor:
    """``amplitude``: (C,) of the second dimension."""
    each = amplitude.to(torch.int32).reshape(-1, *[1] * (x.dim() - 2))
    return (x.to(torch.int32) + each * s.to(torch.int32)).clamp(-32768, 32767).to(torch.int16)


def spike_sum_pool2d(x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """Sum of spikes under a window, int8; padding adds none."""
    summed: Tensor = F.avg_pool2d(x.double(), list(kernel), list(stride), list(padding), divisor_override=1)
    return summed.to(torch.int8)
