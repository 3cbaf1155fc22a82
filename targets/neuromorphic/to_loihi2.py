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
from edgekit.targets.neuromorphic.loihi2 import LoihiLayer

__all__ = ["Quantized", "quantize", "rasters"]

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
    """Round a chain of layers, each with the clipping whose spike counts are nearest to the graph's.

    Args:
        calibration: input spikes (T, N, I), 0 or 1.

    Raises:
        UnsupportedError: what the chip's neuron or edgekit's chain of layers cannot do; names the node.
    """
    net, length = network(graph), step_length(graph, dt)
    wanted = interpret(graph, calibration.reshape(*calibration.shape[:2], *net.shapes[net.flat.inputs[0]]), dt=dt, record=None)
    made: list[LoihiLayer] = []
    clips, decays, notes, missed, total = {}, {}, list[str](), 0.0, 0.0
    before = net.flat.inputs[0]
    for layer in net.layers:
        if kind(layer.node) == "Output":
            notes.append(f"node {layer.name}: its weights are not on the chip; the host applies them to the spikes of {before}")
            continue
        _check(layer, before)
        counts = wanted.values[layer.name].sum(0).reshape(calibration.shape[1], -1)
        weights, bias, rates = _scaled(net, layer, length)
        decays[layer.name] = rates
        tried = []
        for clip in _CLIPS:
            one = _rounded(layer.name, weights, bias, rates, clip, made, calibration)
            spikes = loihi2.run([*made, one], calibration)[-1].aligned(len(calibration))
            tried.append((float(np.abs(spikes.sum(0) - counts).sum()), clip, one))
        score, clips[layer.name], chosen = min(tried, key=lambda entry: entry[0])
        made.append(chosen)
        missed, total = missed + score, total + float(counts.sum())
        if rule(layer.name, layer.node).tie == "ge":
            notes.append(f"node {layer.name}: spikes where v >= threshold in the graph, where v > threshold on the chip")
        if np.any(chosen.bias) and len(made) > 1:
            notes.append(f"node {layer.name}: its bias begins {len(made)} steps before its input arrives")
        before = layer.name
    return Quantized(tuple(made), clips, decays, missed / max(1.0, total), tuple(notes))


def rasters(layers: tuple[LoihiLayer, ...], spikes: NDArray[Any]) -> dict[str, NDArray[np.bool_]]:
    """Spikes (T, N, neurons) of each layer by the chip's arithmetic, aligned to the input."""
    return {one.name: trace.aligned(len(spikes)) for one, trace in zip(layers, loihi2.run(layers, spikes), strict=True)}


def _refusal(layer: Layer, reason: str) -> UnsupportedError:
    return UnsupportedError(f"loihi2: node {layer.name} ({kind(layer.node)}) cannot be expressed: {reason}")


def _check(layer: Layer, before: str) -> None:
    if kind(layer.node) not in ("IF", "LIF", "CubaLIF"):
        raise _refusal(layer, "edgekit has the arithmetic of the chip's IF, LIF and CubaLIF only")
    if layer.sources != ((before, 0),):
        heard = ", ".join(name for name, _ in layer.sources)
        raise _refusal(layer, f"it hears {heard}; edgekit runs chains, each layer hearing the one before ({before})")
    how = rule(layer.name, layer.node)
    reset = np.asarray(layer.node.v_reset, float) if how.reset == "value" else np.zeros(())
    leak, start = np.asarray(getattr(layer.node, "v_leak", 0.0), float), np.asarray(how.v_init, float)
    if how.reset == "subtract" or np.any(reset) or np.any(leak) or np.any(start):
        raise _refusal(layer, "the chip's neuron leaks to 0, begins there and is reset to it (reset 'zero')")
    if how.max_spikes > 1:
        raise _refusal(layer, f"it emits up to {how.max_spikes} spikes a step")


def _scaled(net: Network, layer: Layer, dt: float) -> tuple[Array, Array, Mapping[str, float]]:
    """Weights and bias in units of the threshold, and the decays in the graph and on the chip."""
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
    (matrix,) = found.values()
    chip = {"membrane": np.rint(4096 * rates["membrane"]) / 4096, "current": max(1.0, np.rint(4096 * rates["current"])) / 4096}
    both = {f"{what} {where}": float(v[what]) for what in rates for where, v in (("graph", rates), ("chip", chip))}
    return matrix * factor[:, None], bias * factor, both


def _one(layer: Layer, values: Array) -> float:
    found = np.unique(values)
    if len(found) != 1 or not 0 < found[0] <= 1:
        raise _refusal(layer, f"dt / tau is {found.min():g} to {found.max():g}; one value for the layer, in (0, 1], expected")
    return float(found[0])


def _rounded(
    name: str, weights: Array, bias: Array, rates: Mapping[str, float], clip: float, made: list[LoihiLayer], spikes: NDArray[Any]
) -> LoihiLayer:
    """The layer with the largest exponent at which its threshold fits and no state leaves 24 bits."""
    mixed = bool(weights.min(initial=0.0) < 0 < weights.max(initial=0.0))
    largest = float(np.abs(weights).max(initial=0.0)) or 1.0
    scale = (254 if mixed else 255) / (clip * largest)
    step = 2 if mixed else 1
    limits = (-256, 254) if mixed else (-255, 255)
    integers = np.clip(step * np.rint(weights * scale / step), *limits).astype(np.int16)
    last: LoihiLayer | None = None
    for exponent in range(7, -8, -1):
        unit = scale * 2.0**exponent  # of the chip's membrane, over 64
        threshold = int(np.rint(unit))
        mantissa, bias_exp = _bias(bias * unit * 64)
        if threshold > 131071 or mantissa is None:
            continue
        dv, du = int(np.rint(4096 * rates["membrane chip"])), int(np.rint(4096 * rates["current chip"])) - 1
        last = LoihiLayer(name, integers, mantissa, threshold, min(dv, 4095), du, exponent, bias_exp)
        trace = loihi2.run([*made, last], spikes)[-1]
        if not trace.wrapped and not trace.clipped:
            return last
    if last is None:
        raise UnsupportedError(f"loihi2: node {name}: its threshold or bias is too large for its weights; rescale the layer")
    return last


def _bias(values: Array) -> tuple[NDArray[np.int16] | None, int]:
    """Mantissas of 13 bits and the exponent that they share; None where 7 is not enough."""
    for exponent in range(8):
        mantissa = np.rint(values / 2**exponent)
        if np.all((mantissa >= -4096) & (mantissa <= 4095)):
            return mantissa.astype(np.int16), exponent
    return None, 0
