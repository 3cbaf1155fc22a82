"""Neurons and their currents in units: what :mod:`edgekit.compress.spiking.integer` puts into a program's integer tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from edgekit.errors import ModelError
from edgekit.frozen.ops import integer_range
from edgekit.frozen.spiking_ops import NO_LEAK, current_bounds
from edgekit.nir.semantics import FIRING, kind, rule

__all__ = ["THRESHOLD_MAX", "Cell", "bounds", "compact", "fitting_unit", "in_units", "rounded"]

THRESHOLD_MAX = 8192
"""Largest threshold in units: a membrane may hold three more before it saturates."""


@dataclass(frozen=True)
class Cell:
    """A layer of neurons in real numbers, gain and drive for each channel, the rest for each neuron (float64)."""

    gain: Tensor
    drive: Tensor
    keep: Tensor
    threshold: Tensor
    v_init: Tensor
    reset: str
    max_spikes: int
    shape: tuple[int, ...]
    fade: Tensor | None = None
    """What is left of a synaptic current after a step; None: all of it is gone."""

    @classmethod
    def of(cls, name: str, node: Any, dt: float, refused: Callable[[str, str], ModelError]) -> Cell:
        def real(value: Any, shape: tuple[int, ...]) -> Tensor:
            return torch.from_numpy(np.broadcast_to(np.asarray(value, np.float64), shape).copy())

        if kind(node) == "Threshold":
            shape = tuple(np.shape(node.threshold))
            one, zero = torch.ones(shape[0], dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
            return cls(one, 0 * one, zero, real(node.threshold, shape), zero, "zero", 1, shape)
        if kind(node) not in FIRING:
            raise refused(name, f"{kind(node)} has no integer form; use LIF, IF or CubaLIF")
        shape, how = tuple(np.shape(node.r)), rule(name, node)
        if how.reset == "value" and np.any(np.asarray(node.v_reset)):
            raise refused(name, "it resets to a value; integer neurons subtract the threshold or reset to 0")
        r, fade = real(node.r, shape), None
        if kind(node) == "CubaLIF":
            k, rise = dt / real(node.tau_mem, shape), dt / real(node.tau_syn, shape)
            gain, drive, keep, fade = k * r * rise * real(node.w_in, shape), 0 * r, 1 - k, 1 - rise
            if np.any(np.asarray(node.v_leak)):
                raise refused(name, "its leak potential is not 0")
        elif kind(node) == "IF":
            gain, drive, keep = r * dt, torch.zeros(shape, dtype=torch.float64), torch.ones(shape, dtype=torch.float64)
        else:
            k = dt / real(node.tau, shape)
            gain, drive, keep = k * r, k * real(node.v_leak, shape), 1 - k
        if float(keep.min()) < 0 or (fade is not None and float(fade.min()) < 0):
            raise refused(name, "its time constant is shorter than a step")
        channels = []
        for value in (gain, drive):
            flat = value.reshape(shape[0], -1)
            if float((flat.amax(1) - flat.amin(1)).abs().max()) > 1e-6 * float(flat.abs().max()):
                raise refused(name, "its time constant, resistance or leak differs within a channel")
            channels.append(flat[:, 0])
        reset = "subtract" if how.reset == "subtract" else "zero"
        threshold, start = real(node.v_threshold, shape), real(how.v_init, shape)
        return cls(channels[0], channels[1], keep, threshold, start, reset, how.max_spikes, shape, fade)

    @property
    def room(self) -> float:
        """How many times the largest current of a step a current that fades can become."""
        return 1.0 if self.fade is None else min(1 / (1 - float(self.fade.max()) + 1e-9), 1e4)

    def largest(self, channels: int) -> Tensor:
        """Largest threshold of each channel."""
        return self.threshold.reshape(channels, -1).amax(1)

    def integers(self, unit: Tensor) -> dict[str, Tensor]:
        """Threshold, decay and initial membrane in units of current, int64, of the neurons' shape."""
        of = unit.reshape(-1, *[1] * (len(self.shape) - 1))
        return {
            "threshold": torch.round(self.threshold / of).clamp(1, 32767).to(torch.int64),
            "decay": _q15(self.keep),
            "decay_syn": _q15(self.fade) if self.fade is not None else torch.zeros(self.shape, dtype=torch.int64),
            "v_init": torch.round(self.v_init / of).clamp(-32768, 32767).to(torch.int64),
        }


def _q15(kept: Tensor) -> Tensor:
    return torch.where(kept >= 1, NO_LEAK, torch.round(kept * 32768).clamp(0, NO_LEAK - 1)).to(torch.int64)


def compact(value: Tensor) -> Tensor:
    """A table as one number, or one a channel, where that says the same."""
    if bool((value == value.reshape(-1)[0]).all()):
        return value.reshape(-1)[0].clone()
    channel = value[(slice(None), *[slice(0, 1)] * (value.dim() - 1))]
    return channel.clone() if bool((value == channel).all()) else value


def rounded(weight: Tensor, bias: Tensor, unit: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Weights (int8, of ``bits`` bits) and biases (int64) in units of each output channel's current."""
    low, high = integer_range(bits)
    integers = torch.round(weight / unit.reshape(-1, *[1] * (weight.dim() - 1))).clamp(max(low, -high), high)
    return integers.to(torch.int8), torch.round(bias / unit).to(torch.int64)


def bounds(weight: Tensor, bias: Tensor, spikes: tuple[int, int]) -> tuple[int, int]:
    """Bounds of any partial sum of a current, for spike counts from ``spikes[0]`` to ``spikes[1]``."""
    return current_bounds(weight, bias, spikes[1], spikes[0])


def in_units(direct: Tensor, unit: Tensor) -> Tensor:
    """What spikes of shortcuts add (O, n), in units, int64."""
    return torch.round(direct / unit[:, None]).to(torch.int64)


def fitting_unit(
    weight: Tensor, bias: Tensor, bits: int, spikes: tuple[int, int], threshold: Tensor | None, direct: Tensor | None = None,
    room: float = 1.0,
) -> Tensor:  # fmt: skip
    """The unit of each channel, float64; one for all where there is no threshold (a readout).

    Args:
        direct: (O, n), what spikes of shortcuts add, held in 16 bits.
        room: how many times the current must fit 16 bits.
    """
    unit = (weight.flatten(1).abs().amax(1) / integer_range(bits)[1]).clamp(min=1e-12)
    if threshold is not None:
        unit = torch.maximum(unit, threshold / THRESHOLD_MAX)
    if bits < 8:
        unit = torch.maximum(_least_error(weight, unit, bits), (threshold if threshold is not None else 0 * unit) / THRESHOLD_MAX)
    unit = unit if threshold is not None else unit.max().expand(len(unit)).clone()
    while True:
        unit = unit.float().double()  # what is stored
        integers, offsets = rounded(weight, bias, unit, bits)
        every = integers.flatten(1).long()
        every = every if direct is None else torch.cat([every, in_units(direct, unit)], 1)
        spans = [bounds(w[None], b[None], spikes) for w, b in zip(every, offsets, strict=True)]
        over = torch.tensor([max(-low / 32768, high / 32767) for low, high in spans], dtype=torch.float64) * room
        over = over if threshold is not None else over.max().expand(len(over))
        if float(over.max()) <= 1:
            return unit
        unit = torch.where(over > 1, unit * over * 1.002, unit)


def _least_error(weight: Tensor, unit: Tensor, bits: int) -> Tensor:
    """Few bits: the unit of least squared error, from 40 % to 100 % of the one that clips nothing."""
    best, error = unit, torch.full_like(unit, torch.inf)
    for share in torch.linspace(0.4, 1.0, 25, dtype=torch.float64):
        tried = unit * share
        integers, _ = rounded(weight, torch.zeros_like(unit), tried, bits)
        off = (integers.double() * tried.reshape(-1, *[1] * (weight.dim() - 1)) - weight).flatten(1).square().sum(1)
        best, error = torch.where(off < error, tried, best), torch.minimum(off, error)
    return best
