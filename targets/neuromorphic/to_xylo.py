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

__all__ = ["Quantized", "quantize", "rasters", "with_output_neurons"]

Array = NDArray[np.float64]
_CLIPS = (1.0, 0.9, 0.8, 0.7)
"""Shares of a neuron's largest weight that are tried as the range of int8."""


@dataclass(frozen=True)
class Quantized:
    """A graph in the chip's numbers.

    Attributes:
        network: what is written to the chip.
        places: layer to (population, first neuron, number, lag in steps).
        shift, clip, shift_out: what was chosen: shift and clipping of hidden neurons' weights, shift of outputs'.
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
    shift_out: int = 0


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
    hidden, outputs = ({n: c for n, c in counts.items() if places[n][0] == which} for which in ("hidden", "output"))

    def difference(how: _Choice) -> tuple[float, XyloNetwork] | None:
        made = _rounded(form, how, length)
        if made is None:
            return None
        found = rasters(made, places, calibration)
        scores = [float(sum(np.abs(found[n].sum(0, dtype=np.int64) - c[n]).sum() for n in c)) for c in (hidden, outputs)]
        return (scores[0] if how.hidden_only else scores[1]), made

    first = _best([(how, found) for how in _choices() if (found := difference(how))])  # the chip shifts both by themselves
    chosen, (_, made) = _best([(how, found) for how in _choices(first[0]) if (found := difference(how))])
    notes += _multiple(net, places, made, calibration)
    missed = _difference(rasters(made, places, calibration), counts)
    total = max(1.0, float(sum(c.sum() for c in counts.values())))
    return Quantized(made, places, chosen.shift, chosen.clip, decays, missed / total, tuple(notes), chosen.shift_out)


@dataclass(frozen=True)
class _Choice:
    """Shift and clipping of the weights of hidden neurons and of outputs; ``hidden_only``: outputs do not count yet."""

    shift: int
    clip: float
    shift_out: int
    clip_out: float
    hidden_only: bool


def _choices(hidden: _Choice | None = None) -> list[_Choice]:
    each = [(shift, clip) for shift in range(8, -1, -1) for clip in _CLIPS]
    if hidden is None:
        return [_Choice(shift, clip, 0, 1.0, True) for shift, clip in each]
    return [_Choice(hidden.shift, hidden.clip, shift, clip, False) for shift, clip in each]


def _best(tried: list[tuple[_Choice, tuple[float, XyloNetwork]]]) -> tuple[_Choice, tuple[float, XyloNetwork]]:
    if not tried:
        raise UnsupportedError(
            "xylo: a threshold is more than 32767 times a neuron's largest weight; no shift makes it fit 16 bits"
        )
    return min(tried, key=lambda entry: entry[1][0])


_LEVELS = 24
"""Thresholds that are tried for output neurons."""


def with_output_neurons(graph: Any, calibration: NDArray[Any], dt: float | None = None) -> tuple[Any, list[str]]:
    """The graph with output neurons behind weights that lead to the output, and a sentence on it; as it is where there are none.

    The chip hands out spikes of output neurons, one a step at most. They get the time constants of the neurons before, and the
    threshold with which the most active one is most often the largest output of the graph.

    Args:
        calibration: input spikes (T, N, I).

    Raises:
        UnsupportedError: several layers lead to the output, or none with a synaptic current.
    """
    import nir

    net, length = network(graph), step_length(graph, dt)
    ends = [layer for layer in net.layers if kind(layer.node) == "Output"]
    if not ends:
        return graph, []
    (end,) = ends
    before = net.layer(end.sources[0][0]) if len(end.sources) == 1 and end.sources[0][0] not in net.flat.inputs else None
    if before is None or kind(before.node) != "CubaLIF":
        raise _refusal(end, "weights lead to it; the chip reads spikes of output neurons, let one layer of CubaLIF feed them")
    shape, count = net.shapes[end.name], int(np.prod(net.shapes[end.name], dtype=int))
    given = calibration.reshape(*calibration.shape[:2], *net.shapes[net.flat.inputs[0]])
    current = interpret(graph, given, dt=dt).output.reshape(*calibration.shape[:2], count)
    rates = [length / float(np.asarray(value).reshape(-1)[0]) for value in (before.node.tau_mem, before.node.tau_syn)]
    wanted, charged = current.sum(0).argmax(1), _filtered(current, rates)
    tried = []
    for threshold in np.geomspace(max(float(charged.max()), 1e-9), max(float(charged.max()), 1e-9) / 100, _LEVELS):
        share = float((_fired(current, rates, threshold).sum(0).argmax(1) == wanted).mean())
        tried.append((share, float(threshold)))
    share, threshold = max(tried)
    tau_mem, tau_syn = (np.full(shape, length / rate) for rate in rates)
    node = nir.CubaLIF(
        tau_syn=tau_syn, tau_mem=tau_mem, r=1 / rates[0] * np.ones(shape), v_leak=np.zeros(shape), w_in=np.ones(shape),
        v_threshold=np.full(shape, threshold), v_reset=np.zeros(shape),
        metadata={"reset": "subtract", "tie": "ge", "v_init": 0.0, "max_spikes": 1},
    )  # fmt: skip
    name = f"{end.name}_neurons"
    nodes = {**net.flat.nodes, name: node}
    edges = [(source, name if n == end.name else n) for n in net.flat.nodes for source in net.flat.sources[n]]
    note = (
        f"node {end.name}: {count} output neurons of threshold {threshold:.3g} stand behind its weights; the most active one is "
        f"the largest output in {share:.1%} of the calibration samples"
    )
    return nir.NIRGraph(nodes, [*edges, (name, end.name)], metadata=graph.metadata, type_check=False), [note]


def _filtered(current: Array, rates: list[float]) -> Array:
    """The membrane of a neuron that never fires, in each step."""
    i, v, rows = np.zeros(current.shape[1:]), np.zeros(current.shape[1:]), []
    for x in current:
        i = i + rates[1] * (x - i)
        v = v - rates[0] * v + i
        rows.append(v)
    return np.stack(rows)


def _fired(current: Array, rates: list[float], threshold: float) -> Array:
    i, v, rows = np.zeros(current.shape[1:]), np.zeros(current.shape[1:]), []
    for x in current:
        i = i + rates[1] * (x - i)
        v = v - rates[0] * v + i
        rows.append((v >= threshold).astype(float))
        v = v - rows[-1] * threshold
    return np.stack(rows)


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


def _rounded(form: _Float, how: _Choice, dt: float) -> XyloNetwork | None:
    """The network at shifts and clippings; None where a threshold or bias does not fit."""
    largest = np.maximum(np.abs(form.w_in).max(0, initial=0.0), np.abs(form.w_rec).max(0, initial=0.0))
    scale = 127 / np.where(largest > 0, how.clip * largest, 1.0)
    largest_out = np.abs(form.w_out).max(0, initial=0.0)
    scale_out = 127 / np.where(largest_out > 0, how.clip_out * largest_out, 1.0)
    units = (scale * 2**how.shift, scale_out * 2**how.shift_out)
    states = [np.rint(form.threshold * units[0]), np.rint(form.threshold_out * units[1])]
    biases = [np.rint(form.bias * units[0]), np.rint(form.bias_out * units[1])]
    if how.hidden_only:  # outputs are chosen later
        states[1], biases[1] = np.clip(states[1], 1, 32767), np.clip(biases[1], -32767, 32767)
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
        how.shift, how.shift, how.shift_out, dt,
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
