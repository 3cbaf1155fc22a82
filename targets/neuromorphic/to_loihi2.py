"""From a float NIR graph to the numbers of Loihi 2's leaky integrate-and-fire neurons, calibrated on spikes.

Weights are 8-bit with one scale for each layer (a multiple of two where signs are mixed), decays are 4096ths, the threshold is
one integer for a layer: thresholds that differ go into the weights. The exponent of the weights is the largest with which
thresholds fit and no state leaves 24 bits in calibration; the clipping of weights is chosen by spike counts beside those of the
float graph.
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
from edgekit.targets.neuromorphic import loihi2
from edgekit.targets.neuromorphic.layers import Layer, Network, matrices, network
from edgekit.targets.neuromorphic.loihi2 import LoihiLayer, Trace

__all__ = ["Quantized", "for_lava", "quantize", "rasters"]

Array = NDArray[np.float64]
_CLIPS = (1.0, 0.9, 0.8, 0.7)


@dataclass(frozen=True)
class Quantized:
    """A graph in the chip's numbers.

    Attributes:
        layers: what is written to the chip, in order.
        clips: layer to the share of its largest weight that is the range of its 8 bits.
        decays: layer to what membrane and current lose in a step, in the graph and on the chip.
        difference: spikes that the chip gives more or less than the graph in calibration, as a share of the graph's.
        notes: what a reader must know.
    """

    layers: tuple[LoihiLayer, ...]
    clips: Mapping[str, float]
    decays: Mapping[str, Mapping[str, float]]
    difference: float
    notes: tuple[str, ...]


def quantize(graph: Any, calibration: NDArray[Any], dt: float | None = None) -> Quantized:
    """Round layer by layer, each with the clipping whose spike counts are nearest to the graph's.

    Args:
        calibration: input spikes (T, N, I), 0 or 1.

    Raises:
        UnsupportedError: what the chip's neuron or its connections cannot do; names the node.
    """
    net, length = network(graph), step_length(graph, dt)
    wanted = interpret(graph, calibration.reshape(*calibration.shape[:2], *net.shapes[net.flat.inputs[0]]), dt=dt, record=None)
    given = loihi2.padded(calibration, len(net.layers))
    made: list[LoihiLayer] = []
    traces: dict[str, Trace] = {}
    clips, decays, notes, missed, total = {}, {}, list[str](), 0.0, 0.0
    for layer in net.layers:
        if kind(layer.node) == "Output":
            heard = ", ".join(name for name, _ in layer.sources)
            notes.append(f"node {layer.name}: its weights are not on the chip; the host applies them to the spikes of {heard}")
            continue
        _check(layer)
        counts = wanted.values[layer.name].sum(0).reshape(calibration.shape[1], -1)
        form = _scaled(net, layer, length)
        decays[layer.name] = form.rates
        tried = []
        for clip in _CLIPS:
            one, trace = _rounded(layer, form, clip, given, traces)
            spikes = trace.aligned(len(calibration))
            tried.append((float(np.abs(spikes.sum(0) - counts).sum()), clip, one, trace))
        score, clips[layer.name], chosen, traces[layer.name] = min(tried, key=lambda entry: entry[0])
        made.append(chosen)
        missed, total = missed + score, total + float(counts.sum())
        notes += _notes(layer, chosen, traces[layer.name])
    return Quantized(tuple(made), clips, decays, missed / max(1.0, total), tuple(notes))


def _notes(layer: Layer, chosen: LoihiLayer, trace: Trace) -> list[str]:
    notes, how = [], rule(layer.name, layer.node)
    if how.tie == "ge" and not _even(layer):
        notes.append(
            f"node {layer.name}: spikes where v >= threshold in the graph, on the chip where v > threshold less one unit"
        )
    if how.reset == "subtract":
        notes.append(f"node {layer.name}: reset by subtraction, a neuron program of one's own on Loihi 2; Loihi has none")
    if np.any(chosen.bias) and trace.spikes[: trace.lag].any():
        early = int(trace.spikes[: trace.lag].sum())
        notes.append(f"node {layer.name}: its bias begins {trace.lag} steps before its input arrives, {early:,} spikes are early")
    return notes


def rasters(layers: tuple[LoihiLayer, ...], spikes: NDArray[Any]) -> dict[str, NDArray[np.bool_]]:
    """Spikes (T, N, neurons) of each layer by the chip's arithmetic, aligned to the input."""
    return {one.name: trace.aligned(len(spikes)) for one, trace in zip(layers, loihi2.run(layers, spikes), strict=True)}


def for_lava(
    layers: tuple[LoihiLayer, ...], traces: Mapping[str, Trace], spikes: NDArray[Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings and arrays of lava's adapter (:mod:`edgekit.devices.simulator_runner`) for layers and input spikes."""
    names = ("name", "du", "dv", "threshold", "weight_exp", "bias_exp", "reset")
    described, arrays, before = [], {"spikes": np.asarray(spikes)}, dict[str, Trace]()
    for one in layers:
        facts, first = {name: getattr(one, name) for name in names}, 0
        facts["sources"] = [list(source) for source in loihi2.heard(one, before)]
        facts["lag"] = traces[one.name].lag
        for at, (source, _) in enumerate(loihi2.heard(one, before)):
            size = before[source].spikes.shape[2] if source else spikes.shape[2]
            arrays[f"weights:{one.name}:{at}"] = one.weights[:, first : first + size]
            first += size
        arrays |= {f"bias:{one.name}": one.bias, f"start:{one.name}": np.zeros(len(one.bias)) if one.start is None else one.start}
        described.append(facts)
        before[one.name] = traces[one.name]
    return {"layers": described}, arrays


def _refusal(layer: Layer, reason: str) -> UnsupportedError:
    return UnsupportedError(f"loihi2: node {layer.name} ({kind(layer.node)}) cannot be expressed: {reason}")


def _check(layer: Layer) -> None:
    if kind(layer.node) not in ("IF", "LIF", "CubaLIF"):
        raise _refusal(layer, "edgekit has the arithmetic of the chip's IF, LIF and CubaLIF only")
    if layer.recurrent:
        raise _refusal(layer, "it hears itself or a later layer; edgekit runs networks without cycles on it")
    how = rule(layer.name, layer.node)
    reset = np.asarray(layer.node.v_reset, float) if how.reset == "value" else np.zeros(())
    leak = np.asarray(getattr(layer.node, "v_leak", 0.0), float)
    if np.any(reset) or np.any(leak):
        raise _refusal(layer, "the chip's neuron leaks to 0 and is reset to it (reset 'zero'), or by its threshold ('subtract')")
    if how.max_spikes > 1:
        raise _refusal(layer, f"it emits up to {how.max_spikes} spikes a step")


@dataclass(frozen=True)
class _Form:
    """A layer in units of its threshold: weights of all sources side by side, bias, membrane before the input arrives, decays."""

    weights: Array
    bias: Array
    start: Array
    rates: Mapping[str, float]
    sources: tuple[str, ...]


def _scaled(net: Network, layer: Layer, dt: float) -> _Form:
    node, rates = layer.node, {"membrane": 0.0, "current": 1.0}
    if kind(node) == "IF":
        gain = np.asarray(node.r, float) * dt
    else:
        rates["membrane"] = _one(layer, dt / np.asarray(node.tau if kind(node) == "LIF" else node.tau_mem, float))
        gain = np.asarray(node.r, float) * rates["membrane"]
    if kind(node) == "CubaLIF":
        rates["current"] = _one(layer, dt / np.asarray(node.tau_syn, float))
        gain = gain * np.asarray(node.w_in, float) * rates["current"]
    threshold = np.asarray(node.v_threshold, float)
    if np.any(threshold <= 0):
        raise _refusal(layer, "a threshold is not above 0")
    factor = np.broadcast_to(gain / threshold, layer.shape).reshape(-1)
    found, bias = matrices(net, layer)
    matrix = np.concatenate(list(found.values()), 1)
    start = np.broadcast_to(np.asarray(rule(layer.name, node).v_init, float) / threshold, layer.shape).reshape(-1)
    chip = {"membrane": np.rint(4096 * rates["membrane"]) / 4096, "current": max(1.0, np.rint(4096 * rates["current"])) / 4096}
    both = {f"{what} {where}": float(v[what]) for what in rates for where, v in (("graph", rates), ("chip", chip))}
    sources = tuple("" if name in net.flat.inputs else name for name, _ in layer.sources)
    return _Form(matrix * factor[:, None], bias * factor, start, both, sources)


def _one(layer: Layer, values: Array) -> float:
    found = np.unique(values)
    if len(found) != 1 or not 0 < found[0] <= 1:
        raise _refusal(layer, f"dt / tau is {found.min():g} to {found.max():g}; one value for the layer, in (0, 1], expected")
    return float(found[0])


def _rounded(layer: Layer, form: _Form, clip: float, given: Any, before: Mapping[str, Trace]) -> tuple[LoihiLayer, Trace]:
    """The layer with the largest exponent at which its threshold fits and no state leaves 24 bits."""
    weights, rates, name = form.weights, form.rates, layer.name
    mixed = bool(weights.min(initial=0.0) < 0 < weights.max(initial=0.0))
    largest = float(np.abs(weights).max(initial=0.0)) or 1.0
    scale = (254 if mixed else 255) / (clip * largest)
    step = 2 if mixed else 1
    limits = (-256, 254) if mixed else (-255, 255)
    integers = np.clip(step * np.rint(weights * scale / step), *limits).astype(np.int16)
    lag = 1 + max(before[source].lag if source else 0 for source in form.sources)
    reset = "subtract" if rule(name, layer.node).reset == "subtract" else "zero"
    tie = float(_even(layer))
    last: tuple[LoihiLayer, Trace] | None = None
    for exponent in range(7, -8, -1):
        unit = scale * 2.0**exponent  # of the chip's membrane, over 64
        threshold = int(np.rint(unit)) - (rule(name, layer.node).tie == "ge" and not tie)  # v > t - 1 is nearest to v >= t
        mantissa, bias_exp = _bias(form.bias * unit * 64)
        if threshold > 131071 or threshold < 1 or mantissa is None:
            continue
        dv, du = min(int(np.rint(4096 * rates["membrane chip"])), 4095), int(np.rint(4096 * rates["current chip"])) - 1
        start = _earlier(form.start * unit * 64 + tie, mantissa.astype(float) * 2**bias_exp, 1 - dv / 4096, lag, threshold << 6)
        one = LoihiLayer(name, integers, mantissa, threshold, dv, du, exponent, bias_exp, reset, start, form.sources)
        last = (one, loihi2.follow(one, given, before))
        if not last[1].wrapped and not last[1].clipped:
            return last
    if last is None:
        raise UnsupportedError(f"loihi2: node {name}: its threshold or bias is too large for its weights; rescale the layer")
    return last


def _even(layer: Layer) -> bool:
    """Whether one unit more at the start makes the chip's ``v > threshold`` the graph's ``v >= threshold`` for ever."""
    how = rule(layer.name, layer.node)
    return how.tie == "ge" and how.reset == "subtract" and kind(layer.node) == "IF"


def _earlier(start: Array, bias: Array, kept: float, lag: int, threshold: int) -> NDArray[np.int32] | None:
    """Membranes at the chip's first step from which biases alone lead to ``start`` when the input arrives, ``lag`` steps later.

    What would have to begin above the threshold begins there.
    """
    grown = bias * (lag if kept == 1 else (1 - kept**lag) / (1 - kept))
    with np.errstate(divide="ignore", over="ignore"):
        needed = (start - grown) / kept**lag if kept else np.zeros_like(start)
    made = np.rint(np.clip(needed, 1 - (1 << 23), min(threshold, (1 << 23) - 1))).astype(np.int32)
    return made if made.any() else None


def _bias(values: Array) -> tuple[NDArray[np.int16] | None, int]:
    """Mantissas of 13 bits and the exponent that they share; None where 7 is not enough."""
    for exponent in range(8):
        mantissa = np.rint(values / 2**exponent)
        if np.all((mantissa >= -4096) & (mantissa <= 4095)):
            return mantissa.astype(np.int16), exponent
    return None, 0
