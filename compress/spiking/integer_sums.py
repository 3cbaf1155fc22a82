"""Currents of several layers, and spikes that skip them, into the same neurons: one unit for all, and one proof that they fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from edgekit.compress.spiking.integer_cells import bounds, fitting_unit, in_units, rounded

__all__ = ["Joint", "joint"]


@dataclass(frozen=True)
class Joint:
    """A sum of currents in integers.

    Attributes:
        unit: of each output channel, float64 (O,).
        weights: int8, of each layer.
        biases: int64 (O,) of each layer: the first has all of it.
        amplitudes: int64 (O,) of each spike that reaches the neurons directly.
        bounds: least and largest value of any partial sum, over all layers and shortcuts and whatever the spikes.
    """

    unit: Tensor
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    amplitudes: tuple[Tensor, ...]
    bounds: tuple[int, int]


def joint(
    weights: Sequence[Tensor],
    bias: Tensor,
    direct: Sequence[Tensor],
    bits: int,
    spikes: tuple[int, int],
    threshold: Tensor | None,
    room: float = 1.0,
) -> Joint:
    """The integers of layers whose currents are summed.

    The unit is chosen as for one layer that has the inputs of all, so every order of summation stays within int16.

    Args:
        weights: float64 (O, ...) of each layer, at least one.
        bias: float64 (O,), the sum of all.
        direct: float64 (O,), what a spike of each shortcut adds.
        spikes: least and largest spike count of all inputs.
        threshold: float64 (O,), largest of each channel; None for a readout.
        room: how many times the sum must fit 16 bits.
    """
    columns = torch.cat([w.flatten(1) for w in weights], 1)
    skipped = torch.stack(list(direct), 1) if direct else None
    unit = fitting_unit(columns, bias, bits, spikes, threshold, skipped, room)
    integers, offsets = rounded(columns, bias, unit, bits)
    parts = torch.split(integers, [w[0].numel() for w in weights], 1)
    amplitudes = () if skipped is None else tuple(in_units(skipped, unit).unbind(1))
    every = torch.cat([integers.long(), *(a[:, None] for a in amplitudes)], 1)
    return Joint(
        unit=unit,
        weights=tuple(p.reshape(w.shape).contiguous() for p, w in zip(parts, weights, strict=True)),
        biases=(offsets, *(torch.zeros_like(offsets) for _ in weights[1:])),
        amplitudes=amplitudes,
        bounds=bounds(every, offsets, spikes),
    )
