"""From a float NIR graph to the numbers of a Xylo chip, calibrated on spikes.

The chip's neuron is a CubaLIF with reset by subtraction whose membrane and current lose ``2**-dash`` of themselves in a step, and
which may spike up to 31 times in it: a network trained for one spike a step behaves otherwise there (its ``max_spikes`` says what
it was trained for, :attr:`Quantized.notes` says what it does). Weights are int8 with one scale for each neuron, which its
threshold absorbs; how they are shifted and clipped is chosen by the spike counts that the chip's arithmetic
(:mod:`edgekit.targets.neuromorphic.xylo`) gives for calibration spikes beside those of the float graph.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import UnsupportedError
from edgekit.nir import interpret
from edgekit.nir.semantics import kind, rule, step_length
from edgekit.targets.neuromorphic import xylo
from edgekit.targets.neuromorphic.layers import Layer, Network, matrices, network
from edgekit.targets.neuromorphic.xylo import XyloNetwork

__all__ = ["Quantized", "quantize", "rasters"]

Array = NDArray[np.float64]
_CLIPS = (1.0, 0.9, 0.8, 0.7)
"""Shares of a neuron's largest weight that are tried as the range of int8."""


@dataclass(frozen=True)
class Quantized:
    """A graph in the chip's numbers.

    Attributes:
        network: what is written to the chip.
        places: layer to (population, first neuron, number, lag in steps).
        shift, clip: what was chosen.
        decays: layer to what membrane and current lose in a step, in the graph and on the chip.
        difference: spikes that the chip gives more or less than the graph in calibration, as a share of the graph's.
        notes: what a reader must know.
    """

    network: XyloNetwork
    places: Mapping[str, tuple[str, int, int, int]]
    shift: int
    clip: float
    decays: Mapping[str, Mapping[str, float]]
    difference: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Float:
    """The graph in the chip's form, before rounding: weights from inputs and hidden neurons to each population."""

    w_in: Array
    w_rec: Array
    w_out: Array
    bias: Array
    bias_out: Array
    threshold: Array
    threshold_out: Array
    dash: Mapping[str, NDArray[np.uint8]]


def quantize(graph: Any, calibration: NDArray[Any], dt: float | None = None, approximate: bool = False) -> Quantized:
    """Choose shift and clipping for the fewest spikes that differ, and round.

    Args:
        calibration: input spikes (T, N, I); counts up to 15 a step.
        approximate: also take LIF and IF neurons, which the chip has only with a synaptic current that halves in a step and a
            membrane that loses one unit in it.

    Raises:
        UnsupportedError: what the chip's neuron or its connections cannot do; names the node.
    """
    net, length, notes = network(graph), step_length(graph, dt), list[str]()
    places = _places(net)
    form, decays = _form(net, places, length, approximate, notes)
    wanted = interpret(graph, calibration.reshape(*calibration.shape[:2], *net.shapes[net.flat.inputs[0]]), dt=dt, record=None)
    counts = {name: wanted.values[name].sum(0).reshape(calibration.shape[1], -1) for name in places}
    best: tuple[float, int, float, XyloNetwork] | None = None
    for shift in range(8, -1, -1):
        for clip in _CLIPS:
            made = _rounded(form, shift, clip, length)
            if made is None:
                continue
            score = _difference(rasters(made, places, calibration), counts)
            if best is None or score < best[0]:
                best = (score, shift, clip, made)
    if best is None:
        raise UnsupportedError(
            "xylo: a threshold is more than 32767 times a neuron's largest weight; no shift makes it fit 16 bits"
        )
    notes += _multiple(net, places, best[3], calibration)
    total = max(1.0, float(sum(c.sum() for c in counts.values())))
    return Quantized(best[3], places, best[1], best[2], decays, best[0] / total, tuple(notes))


def rasters(
    made: XyloNetwork, places: Mapping[str, tuple[str, int, int, int]], spikes: NDArray[Any]
) -> dict[str, NDArray[np.uint8]]:
    """Spikes (T, N, neurons) of each layer by the chip's arithmetic, aligned to the input."""
    last = max(lag for *_, lag in places.values())
    trace = xylo.run(made, np.concatenate([spikes, np.zeros((last, *spikes.shape[1:]), spikes.dtype)]))
    populations = {"hidden": trace.hidden, "output": trace.outputs}
    return {
        name: populations[which][lag : lag + len(spikes), :, first : first + size]
        for name, (which, first, size, lag) in places.items()
    }


def _refusal(layer: Layer, reason: str) -> UnsupportedError:
    return UnsupportedError(f"xylo: node {layer.name} ({kind(layer.node)}) cannot be expressed: {reason}")


def _places(net: Network) -> dict[str, tuple[str, int, int, int]]:
    """Where each layer goes: those that only the output hears are output neurons, all others are hidden."""
    if len(net.flat.inputs) != 1:
        raise UnsupportedError(f"xylo: {len(net.flat.inputs)} inputs, the chip has one bank of channels")
    for layer in net.layers:
        if kind(layer.node) == "Output":
            raise _refusal(layer, "weights lead to it; the chip reads spikes or membranes of output neurons, add a neuron node")
    heard = {source for layer in net.layers for source, _ in layer.sources}
    places: dict[str, tuple[str, int, int, int]] = {}
    used = {"hidden": 0, "output": 0}
    lags = {net.flat.inputs[0]: -1}
    for layer in net.layers:
        lags[layer.name] = 1 + max(lags[s] for s, delay in layer.sources if not delay)
        which = "hidden" if layer.name in heard else "output"
        if which == "output" and net.flat.inputs[0] in (s for s, _ in layer.sources):
            raise _refusal(layer, "output neurons hear hidden neurons only, not inputs")
        for source, delay in layer.sources:
            if source in lags and lags[layer.name] - lags[source] + delay != 1:
                raise _refusal(layer, f"what it hears from {source} would arrive in another step; spikes take one step each")
        places[layer.name] = (which, used[which], layer.size, lags[layer.name])
        used[which] += layer.size
    if len([1 for which, *_ in places.values() if which == "hidden"]) == 0:
        raise UnsupportedError("xylo: the graph has no hidden layer; inputs reach the chip's outputs through hidden neurons only")
    return places


def _form(
    net: Network, places: Mapping[str, tuple[str, int, int, int]], dt: float, approximate: bool, notes: list[str]
) -> tuple[_Float, dict[str, Mapping[str, float]]]:
    sizes = {which: sum(n for w, _, n, _ in places.values() if w == which) for which in ("hidden", "output")}
    inputs = int(np.prod(net.shapes[net.flat.inputs[0]], dtype=int))
    w = {"in": np.zeros((inputs, sizes["hidden"])), "rec": np.zeros((sizes["hidden"],) * 2)}
    w["out"] = np.zeros((sizes["hidden"], sizes["output"]))
    bias = {which: np.zeros(size) for which, size in sizes.items()}
    threshold = {which: np.ones(size) for which, size in sizes.items()}
    dash = {f"{what}_{which}": np.zeros(size, np.uint8) for which, size in sizes.items() for what in ("mem", "syn")}
    decays = {}
    for layer in net.layers:
        which, first, size, _ = places[layer.name]
        here = slice(first, first + size)
        shifts, gain, decays[layer.name] = _neuron(layer, dt, approximate, notes)
        dash[f"mem_{which}"][here], dash[f"syn_{which}"][here] = shifts
        threshold[which][here] = np.broadcast_to(np.asarray(layer.node.v_threshold, float), layer.shape).reshape(-1)
        weights, constant = matrices(net, layer)
        charge = (1 - 2.0 ** -int(shifts[1])) / 2.0 ** -int(shifts[1])  # what one spike's current brings in all
        bias[which][here] = constant * gain * charge
        for (source, _), matrix in weights.items():
            block = (matrix * np.reshape(gain, (-1, 1))).T
            if source == net.flat.inputs[0]:
                w["in"][:, here] += block
            else:
                _, start, count, _ = places[source]
                w["rec" if which == "hidden" else "out"][start : start + count, here] += block
    values = (w["in"], w["rec"], w["out"], bias["hidden"], bias["output"], threshold["hidden"], threshold["output"], dash)
    return _Float(*values), decays


def _neuron(layer: Layer, dt: float, approximate: bool, notes: list[str]) -> tuple[tuple[int, int], Array, Mapping[str, float]]:
    """Bit shifts of membrane and current, the gain of the weights, and the decays beside each other."""
    node, how = layer.node, rule(layer.name, layer.node)
    if how.reset != "subtract":
        raise _refusal(layer, f"reset {how.reset!r}: the chip subtracts the threshold; train with reset subtract")
    if np.any(np.asarray(getattr(node, "v_leak", 0.0))) or np.any(np.asarray(how.v_init)):
        raise _refusal(layer, "the chip's membranes leak to 0 and begin there")
    if kind(node) != "CubaLIF" and not approximate:
        raise _refusal(layer, "the chip's neurons have a synaptic current; train with CubaLIF, or allow an approximation")
    rates = {"membrane": 0.0, "current": 1.0}
    if kind(node) != "IF":
        rates["membrane"] = _one(layer, dt / np.asarray(node.tau_mem if kind(node) == "CubaLIF" else node.tau, float))
    if kind(node) == "CubaLIF":
        rates["current"] = _one(layer, dt / np.asarray(node.tau_syn, float))
    if kind(node) != "CubaLIF":
        notes.append(f"node {layer.name}: a {kind(node)} has no synaptic current, the chip's shortest halves in a step")
    mem, syn = (_dash(rate) for rate in rates.values())
    chip = {"membrane": 2.0**-mem if mem < 15 else 0.0, "current": 2.0**-syn}
    for what, rate in rates.items():
        if rate not in (0.0, 1.0) and abs(chip[what] / rate - 1) > 0.02:
            notes.append(f"node {layer.name}: its {what} loses {rate:.4g} in a step, {chip[what]:.4g} on the chip's grid")
    r = np.asarray(node.r, float) * np.asarray(getattr(node, "w_in", 1.0), float)
    per_spike = chip["current"] / (1 - chip["current"])  # so that a constant input charges as much as in the graph
    gain = r * per_spike * (dt if kind(node) == "IF" else chip["membrane"])
    decays = {f"{what} {where}": v for what in rates for where, v in (("graph", rates[what]), ("chip", chip[what]))}
    return (mem, syn), np.broadcast_to(gain, layer.shape).reshape(-1), decays


def _one(layer: Layer, values: Array) -> float:
    found = np.unique(values)
    if len(found) != 1 or not 0 < found[0] <= 1:
        raise _refusal(
            layer, f"dt / tau is {found.min():g} to {found.max():g}; one value for the layer, above 0 and at most 1, expected"
        )
    return float(found[0])


def _dash(rate: float) -> int:
    """The bit shift nearest to a rate: 1 to 15 (a current that is shifted by 0 is gone at once)."""
    return 15 if rate <= 0 else int(np.clip(np.rint(-np.log2(rate)), 1, 15))


def _rounded(form: _Float, shift: int, clip: float, dt: float) -> XyloNetwork | None:
    """The network at a shift and clipping; None where a threshold or bias does not fit."""
    largest = np.maximum(np.abs(form.w_in).max(0, initial=0.0), np.abs(form.w_rec).max(0, initial=0.0))
    scale = 127 / np.where(largest > 0, clip * largest, 1.0)
    largest_out = np.abs(form.w_out).max(0, initial=0.0)
    scale_out = 127 / np.where(largest_out > 0, clip * largest_out, 1.0)
    states = [np.rint(form.threshold * scale * 2**shift), np.rint(form.threshold_out * scale_out * 2**shift)]
    biases = [np.rint(form.bias * scale * 2**shift), np.rint(form.bias_out * scale_out * 2**shift)]
    if any(x.max(initial=1) > 32767 or x.min(initial=1) < 1 for x in states) or any(
        np.abs(x).max(initial=0) > 32767 for x in biases
    ):
        return None

    def weights(w: Array, s: Array) -> NDArray[np.int8]:
        return np.clip(np.rint(w * s), -128, 127).astype(np.int8)

    dash = form.dash
    return XyloNetwork(
        weights(form.w_in, scale)[..., None], weights(form.w_rec, scale)[..., None], weights(form.w_out, scale_out),
        states[0].astype(np.int16), states[1].astype(np.int16), dash["mem_hidden"], dash["mem_output"],
        dash["syn_hidden"][:, None], dash["syn_output"], biases[0].astype(np.int16), biases[1].astype(np.int16),
        shift, shift, shift, dt,
    )  # fmt: skip


def _difference(found: Mapping[str, NDArray[Any]], counts: Mapping[str, Array]) -> float:
    return float(sum(np.abs(found[name].sum(0, dtype=np.int64) - counts[name]).sum() for name in counts))


def _multiple(
    net: Network, places: Mapping[str, tuple[str, int, int, int]], made: XyloNetwork, spikes: NDArray[Any]
) -> list[str]:
    """Sentences on hidden layers that were meant to spike less often in a step than they do on the chip."""
    found, notes = rasters(made, places, spikes), []
    for layer in net.layers:
        allowed, most = rule(layer.name, layer.node).max_spikes, int(found[layer.name].max(initial=0))
        if places[layer.name][0] == "hidden" and most > allowed:
            share = float((found[layer.name] > allowed).mean())
            above = f"{share:.2%} of steps above the {allowed} of the graph"
            notes.append(f"node {layer.name}: up to {most} spikes in a step on the chip, {above}")
        if places[layer.name][0] == "output" and allowed > 1:
            notes.append(f"node {layer.name}: up to {allowed} spikes in a step in the graph, outputs of the chip emit one")
    return notes
