"""The arithmetic of the Xylo chips (SynSense), bit by bit, in numpy.

One step, for all hidden neurons and then all output neurons (16-bit states that saturate, ``>>`` rounds toward minus infinity)::

    fade(x, d) = x >> d, but 1 where that is 0 and x > 0          what decays in a step; 0 for x = 0
    i = sat16(i + (weight << shift))                              for each arriving spike, one after the other
    i = i - fade(i, dash_syn)                                     each synaptic current by itself
    d = sat16(sat16(-fade(v, dash_mem) + sum of the i) + bias)    what v changes by
    v = sat16(v + d)
    spikes = min(v // threshold, limit), v = v - spikes * threshold         limit: 31 hidden, 1 output

Input spikes (at most 15 a channel and step) arrive in the step they are given, hidden spikes one step later, at hidden and
output neurons alike: a network with one hidden layer and outputs lags by one step at its outputs. Hidden neurons may have two
synaptic currents, outputs one. Measured against xylosim 0.1.3, SynSense's C++ model of the chip: equal in every spike and state
(``benchmarks/snn_simulators.py``); saturation included, for which the order of arrival matters: inputs by channel, then hidden
neurons by number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import InputError

__all__ = ["HIDDEN_LIMIT", "INPUT_LIMIT", "OUTPUT_LIMIT", "Trace", "XyloNetwork", "fade", "run", "specification"]

INPUT_LIMIT, HIDDEN_LIMIT, OUTPUT_LIMIT = 15, 31, 1
"""Most spikes of one input channel, hidden neuron and output neuron in a step."""

_RANGES = {
    (-128, 127): ("weights_in", "weights_rec", "weights_out"),
    (1, 32767): ("threshold", "threshold_out"),
    (0, 15): ("dash_mem", "dash_mem_out", "dash_syn", "dash_syn_out"),
    (-32768, 32767): ("bias", "bias_out"),
}

Int = NDArray[np.int64]


@dataclass(frozen=True)
class XyloNetwork:
    """What is written to the chip; H hidden neurons, O outputs, I input channels, S synaptic currents of a hidden neuron.

    Attributes:
        weights_in: int8 (I, H, S).
        weights_rec: int8 (H, H, S), from the first index to the second.
        weights_out: int8 (H, O).
        threshold, threshold_out: int16 (H,), (O,), at least 1.
        dash_mem, dash_mem_out: bit shifts 0 to 15 (H,), (O,).
        dash_syn, dash_syn_out: bit shifts (H, S), (O,).
        bias, bias_out: int16 (H,), (O,).
        shift_in, shift_rec, shift_out: left shift of the weights, 0 to 8.
        dt: seconds a step.
        hidden_limit: most spikes of a hidden neuron in a step; the chip's 31, or fewer to try what a single one costs.
    """

    weights_in: NDArray[np.int8]
    weights_rec: NDArray[np.int8]
    weights_out: NDArray[np.int8]
    threshold: NDArray[np.int16]
    threshold_out: NDArray[np.int16]
    dash_mem: NDArray[np.uint8]
    dash_mem_out: NDArray[np.uint8]
    dash_syn: NDArray[np.uint8]
    dash_syn_out: NDArray[np.uint8]
    bias: NDArray[np.int16]
    bias_out: NDArray[np.int16]
    shift_in: int = 0
    shift_rec: int = 0
    shift_out: int = 0
    dt: float = 1e-3
    hidden_limit: int = HIDDEN_LIMIT

    def __post_init__(self) -> None:
        hidden, synapses = self.weights_in.shape[1:]
        outputs = self.weights_out.shape[1]
        shapes = {
            "weights_rec": (hidden, hidden, synapses), "weights_out": (hidden, outputs), "threshold": (hidden,),
            "threshold_out": (outputs,), "dash_mem": (hidden,), "dash_mem_out": (outputs,), "dash_syn": (hidden, synapses),
            "dash_syn_out": (outputs,), "bias": (hidden,), "bias_out": (outputs,),
        }  # fmt: skip
        for name, shape in shapes.items():
            if getattr(self, name).shape != shape:
                raise InputError(f"Xylo network: {name} has shape {getattr(self, name).shape}, expected {shape}")
        for (low, high), names in _RANGES.items():
            for name in names:
                values = np.asarray(getattr(self, name))
                if values.size and (values.min() < low or values.max() > high):
                    found = f"{values.min()} to {values.max()}"
                    raise InputError(f"Xylo network: {name} has values from {found}, {low} to {high} allowed")
        for name in ("shift_in", "shift_rec", "shift_out"):
            if not 0 <= getattr(self, name) <= 8:
                raise InputError(f"Xylo network: {name} is {getattr(self, name)}, 0 to 8 allowed (weights must stay in 16 bits)")
        if synapses not in (1, 2):
            raise InputError(f"Xylo network: {synapses} synaptic currents a hidden neuron, 1 or 2 allowed")


@dataclass(frozen=True)
class Trace:
    """What happened, every array (T, N, ...): spikes and, after each step, synaptic currents and membranes.

    Attributes:
        hidden, outputs: spikes, uint8 (T, N, H), (T, N, O).
        i_hidden, i_outputs: int16 (T, N, H, S), (T, N, O).
        v_hidden, v_outputs: int16 (T, N, H), (T, N, O).
        saturated: how many additions, of all, left 16 bits.
    """

    hidden: NDArray[np.uint8]
    outputs: NDArray[np.uint8]
    i_hidden: NDArray[np.int16]
    i_outputs: NDArray[np.int16]
    v_hidden: NDArray[np.int16]
    v_outputs: NDArray[np.int16]
    saturated: int


def specification(network: XyloNetwork) -> dict[str, Any]:
    """The network by the names of rockpool, SynSense's toolchain: what its mappers return, and ``config_from_specification`` and
    ``XyloSim.from_specification`` take. edgekit was not run with rockpool (AGPL, and a driver of its own).
    """
    single = network.dash_syn.shape[1] == 1
    hidden = len(network.threshold)
    return {
        "weights_in": network.weights_in[..., 0] if single else network.weights_in,
        "weights_rec": network.weights_rec[..., 0] if single else network.weights_rec,
        "weights_out": network.weights_out,
        "dash_mem": network.dash_mem, "dash_mem_out": network.dash_mem_out, "dash_syn": network.dash_syn[:, 0],
        "dash_syn_2": np.zeros(hidden, np.uint8) if single else network.dash_syn[:, 1], "dash_syn_out": network.dash_syn_out,
        "threshold": network.threshold, "threshold_out": network.threshold_out,
        "bias": network.bias, "bias_out": network.bias_out,
        "weight_shift_in": network.shift_in, "weight_shift_rec": network.shift_rec, "weight_shift_out": network.shift_out,
        "aliases": [[] for _ in range(hidden)], "dt": network.dt,
    }  # fmt: skip


def fade(x: Int, dash: NDArray[Any]) -> Int:
    """What a state loses in a step by its bit shift: at least one unit toward zero unless it is 0."""
    shifted: Int = x >> dash
    change: Int = np.where((shifted == 0) & (x > 0), 1, shifted)
    return change


def run(network: XyloNetwork, spikes: NDArray[Any]) -> Trace:
    """Run input spikes through the chip's arithmetic from rest.

    Args:
        spikes: counts (T, N, I); more than 15 count as 15, as on the chip.

    Raises:
        InputError: the inputs do not fit the network.
    """
    given = np.asarray(spikes).astype(np.int64)
    if given.ndim != 3 or given.shape[2] != network.weights_in.shape[0] or (given.size and given.min() < 0):
        raise InputError(f"Xylo: spikes of shape {given.shape}, expected (T, N, {network.weights_in.shape[0]}) of counts")
    given = np.minimum(given, INPUT_LIMIT)
    one, batch = network, given.shape[1]
    hidden = _Population(one.threshold, one.dash_mem, one.dash_syn, one.bias, one.hidden_limit, batch)
    output = _Population(one.threshold_out, one.dash_mem_out, one.dash_syn_out[:, None], one.bias_out, OUTPUT_LIMIT, batch)
    w_in = one.weights_in.astype(np.int64) << one.shift_in
    w_rec = one.weights_rec.astype(np.int64) << one.shift_rec
    w_out = one.weights_out.astype(np.int64)[..., None] << one.shift_out
    before = np.zeros((batch, w_in.shape[1]), np.int64)
    for step in given:
        hidden.receive((step, w_in), (before, w_rec))
        output.receive((before, w_out))
        before = hidden.step()
        output.step()
    return Trace(
        np.array(hidden.spikes, np.uint8), np.array(output.spikes, np.uint8), np.array(hidden.currents, np.int16),
        np.array(output.currents, np.int16)[..., 0], np.array(hidden.membranes, np.int16),
        np.array(output.membranes, np.int16), hidden.saturated + output.saturated,
    )  # fmt: skip


class _Population:
    """Neurons that are updated together; states (N, neurons) and (N, neurons, synapses)."""

    def __init__(
        self, threshold: NDArray[Any], dash_mem: NDArray[Any], dash_syn: NDArray[Any], bias: NDArray[Any], limit: int, batch: int
    ) -> None:
        self.threshold, self.bias = threshold.astype(np.int64), bias.astype(np.int64)
        self.dash_mem, self.dash_syn, self.limit = dash_mem.astype(np.int64), dash_syn.astype(np.int64), limit
        self.i: Int = np.zeros((batch, *dash_syn.shape), np.int64)
        self.v: Int = np.zeros((batch, len(threshold)), np.int64)
        self.saturated = 0
        self.spikes: list[Int] = []
        self.currents: list[Int] = []
        self.membranes: list[Int] = []

    def receive(self, *arriving: tuple[Int, Int]) -> None:
        """Add weights of arriving spikes, (N, sources) with (sources, neurons, synapses), to the currents.

        Sums are exact where no order of arrival can leave 16 bits; elsewhere spikes are added one source after the other.
        """
        up = sum(np.tensordot(s, np.maximum(w, 0), 1) for s, w in arriving)
        down = sum(np.tensordot(s, np.minimum(w, 0), 1) for s, w in arriving)
        if bool(np.all(self.i + up <= 32767) and np.all(self.i + down >= -32768)):
            self.i = self.i + up + down
            return
        for spikes, weights in arriving:
            for source in np.flatnonzero(spikes.any(axis=0)):
                self.i = self._sat(self.i + spikes[:, source, None, None] * weights[source])

    def step(self) -> Int:
        """Decay, integrate, fire; the spikes (N, neurons)."""
        self.i = self.i - fade(self.i, self.dash_syn)
        lost = fade(self.v, self.dash_mem)
        change = self._sat((-lost + 32768) % 65536 - 32768 + self.i.sum(axis=2))  # -(-32768) is -32768 in 16 bits
        self.v = self._sat(self.v + self._sat(change + self.bias))
        spikes: Int = np.clip(self.v // self.threshold, 0, self.limit)
        self.v = self.v - spikes * self.threshold
        self.spikes.append(spikes)
        self.currents.append(self.i)
        self.membranes.append(self.v)
        return spikes

    def _sat(self, x: Int) -> Int:
        clipped: Int = np.clip(x, -32768, 32767)
        self.saturated += int(np.count_nonzero(clipped != x))
        return clipped
