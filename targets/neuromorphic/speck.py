"""The arithmetic of DYNAP-CNN and Speck (SynSense) as sinabs models it, in numpy.

One step of a layer (16-bit states that saturate; weights, biases and thresholds share one scale)::

    v = sat16(v + sum of the weights of arriving spikes + bias)
    spikes = floor(v / threshold), none below 0                  as many as fit
    v = v - spikes * threshold                                   or v = 0 where it spiked (reset to zero)

Layers hear the spikes of the same step: the chip has no clock, and a spike is on its way at once. That is also what this model
leaves out: on the chip each event is added by itself, and a membrane that crosses its threshold between two events of one step
has spiked, even if the next one would have taken it back. Measured against sinabs 3.1.3: equal in every spike
(``benchmarks/snn_simulators.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import InputError

__all__ = ["SpeckLayer", "Trace", "follow", "run"]

_LOW, _HIGH = -32768, 32767


@dataclass(frozen=True)
class SpeckLayer:
    """A layer and its neurons, convolutions written out as matrices; O neurons, I inputs.

    Attributes:
        name: for messages and traces.
        sources: layers that it hears, "" for the input, in the order of the weights' columns.
        weights: int8 (O, I).
        bias: int8 (O,), added in every step.
        threshold: 1 to 32767.
        start: membranes before the first step, int16 (O,).
        reset: "subtract" or "zero".
    """

    name: str
    sources: tuple[str, ...]
    weights: NDArray[np.int8]
    bias: NDArray[np.int8]
    threshold: int
    start: NDArray[np.int16]
    reset: str = "subtract"

    def __post_init__(self) -> None:
        outputs = self.weights.shape[0]
        if self.weights.ndim != 2 or self.bias.shape != (outputs,) or self.start.shape != (outputs,):
            found = f"weights {self.weights.shape}, bias {self.bias.shape}, start {self.start.shape}"
            raise InputError(f"Speck layer {self.name}: {found}; expected (O, I), (O,) and (O,)")
        if not 1 <= self.threshold <= _HIGH:
            raise InputError(f"Speck layer {self.name}: threshold is {self.threshold}, 1 to {_HIGH} allowed")


@dataclass(frozen=True)
class Trace:
    """What a layer did: spikes int16 (T, N, O), membranes after each step int16 (T, N, O), states that left 16 bits."""

    spikes: NDArray[np.int16]
    v: NDArray[np.int16]
    saturated: int


def run(layers: Sequence[SpeckLayer], spikes: NDArray[Any]) -> list[Trace]:
    """Run input spikes through layers from their start; one trace a layer.

    Args:
        spikes: counts (T, N, I).

    Raises:
        InputError: the inputs do not fit.
    """
    traces: dict[str, Trace] = {}
    for layer in layers:
        traces[layer.name] = follow(layer, spikes, traces)
    return list(traces.values())


def follow(layer: SpeckLayer, given: NDArray[Any], before: Mapping[str, Trace]) -> Trace:
    """A layer's trace from the input and the traces of the layers before it.

    Raises:
        InputError: they do not fit the layer.
    """
    sent = np.concatenate([np.asarray(before[name].spikes if name else given) for name in layer.sources], 2)
    if sent.shape[2] != layer.weights.shape[1] or (sent.size and sent.min() < 0):
        raise InputError(f"Speck layer {layer.name}: spikes of shape {sent.shape}, it has weights for {layer.weights.shape[1]}")
    arriving = sent.astype(np.float64) @ layer.weights.T.astype(np.float64)  # exact: far below 2**53
    v = np.broadcast_to(layer.start.astype(np.int64), arriving.shape[1:])
    fired, membranes, saturated = [], [], 0
    for a in arriving.astype(np.int64):
        grown = v + a + layer.bias
        v = np.clip(grown, _LOW, _HIGH)
        saturated += int(np.count_nonzero(v != grown))
        s = np.maximum(v // layer.threshold, 0)
        v = v - s * layer.threshold if layer.reset == "subtract" else np.where(s > 0, 0, v)
        fired.append(s)
        membranes.append(v)
    return Trace(np.array(fired, np.int16), np.array(membranes, np.int16), saturated)
