"""From a float NIR graph to the numbers of DYNAP-CNN and Speck, calibrated on spikes.

Weights, biases and thresholds of a layer have one scale, the largest at which weights and biases fit 8 bits and threshold and
start 16 (sinabs, ``backend/dynapcnn/discretize.py``); thresholds that differ within a layer go into the weights. How much of the
largest weights is cut off is chosen by spike counts beside those of the float graph.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import UnsupportedError
from edgekit.nir import interpret
from edgekit.nir.semantics import kind, rule, step_length
from edgekit.targets.neuromorphic import speck
from edgekit.targets.neuromorphic.layers import Layer, Network, matrices, network
from edgekit.targets.neuromorphic.speck import SpeckLayer, Trace

__all__ = ["Quantized", "as_graph", "quantize", "rasters"]

Array = NDArray[np.float64]
_CLIPS = (1.0, 0.9, 0.8, 0.7, 0.5)


@dataclass(frozen=True)
class Quantized:
    """A graph in the chip's numbers.

    Attributes:
        layers: what is written to the chip, in order.
        clips: layer to the share of its largest weight that is the range of its 8 bits.
        difference: spikes that the chip gives more or less than the graph in calibration, as a share of the graph's.
        notes: what a reader must know.
    """

    layers: tuple[SpeckLayer, ...]
    clips: Mapping[str, float]
    difference: float
    notes: tuple[str, ...]


def quantize(graph: Any, calibration: NDArray[Any], dt: float | None = None) -> Quantized:
    """Round layer by layer, each with the clipping whose spike counts are nearest to the graph's.

    Args:
        calibration: numbers of input spikes (T, N, I).

    Raises:
        UnsupportedError: what the chip's neuron or its connections cannot do; names the node.
    """
    net, length = network(graph), step_length(graph, dt)
    wanted = interpret(graph, calibration.reshape(*calibration.shape[:2], *net.shapes[net.flat.inputs[0]]), dt=dt, record=None)
    made: list[SpeckLayer] = []
    traces: dict[str, Trace] = {}
    clips, notes, missed, total = {}, list[str](), 0.0, 0.0
    for layer in net.layers:
        if kind(layer.node) == "Output":
            heard = ", ".join(name for name, _ in layer.sources)
            notes.append(f"node {layer.name}: its weights are not on the chip; the host applies them to the spikes of {heard}")
            continue
        _check(layer)
        counts = wanted.values[layer.name].sum(0).reshape(calibration.shape[1], -1)
        tried = []
        for clip in _CLIPS:
            one = _rounded(net, layer, length, clip)
            trace = speck.follow(one, calibration, traces)
            tried.append((float(np.abs(trace.spikes.sum(0, dtype=np.int64) - counts).sum()), clip, one, trace))
        score, clips[layer.name], chosen, traces[layer.name] = min(tried, key=lambda entry: entry[0])
        made.append(chosen)
        missed, total = missed + score, total + float(counts.sum())
        notes += _notes(layer, chosen, traces[layer.name])
    return Quantized(tuple(made), clips, missed / max(1.0, total), tuple(notes))


def rasters(layers: tuple[SpeckLayer, ...], spikes: NDArray[Any]) -> dict[str, NDArray[np.int16]]:
    """Spikes (T, N, neurons) of each layer by the chip's arithmetic."""
    return {one.name: trace.spikes for one, trace in zip(layers, speck.run(layers, spikes), strict=True)}


def as_graph(made: Quantized) -> Any:
    """A chain of layers with the chip's integers as a NIR graph, which other tools run (states that saturate are not in it).

    Raises:
        UnsupportedError: the layers are no chain.
    """
    import nir

    layers = made.layers
    for at, one in enumerate(layers):
        if one.sources != (("",) if at == 0 else (layers[at - 1].name,)):
            raise UnsupportedError(f"speck: layer {one.name} hears {', '.join(one.sources)}; a chain is expected")
    nodes = {"input": nir.Input({"input": np.array([layers[0].weights.shape[1]])})}
    for one in layers:
        ones = np.ones(len(one.bias))
        facts = {"reset": one.reset, "tie": "ge", "max_spikes": 32767, "v_init": one.start.astype(float)}
        nodes[f"{one.name}_weights"] = nir.Affine(one.weights.astype(float), one.bias.astype(float))
        nodes[one.name] = nir.IF(r=ones, v_threshold=one.threshold * ones, v_reset=0 * ones, metadata=facts)
    nodes["output"] = nir.Output({"output": np.array([len(layers[-1].bias)])})
    names = list(nodes)
    return nir.NIRGraph(nodes, list(itertools.pairwise(names)), metadata={"dt": 1.0}, type_check=False)


def _refusal(layer: Layer, reason: str) -> UnsupportedError:
    return UnsupportedError(f"speck: node {layer.name} ({kind(layer.node)}) cannot be expressed: {reason}")


def _check(layer: Layer) -> None:
    if kind(layer.node) != "IF":
        raise _refusal(
            layer, "the chip's neurons integrate and fire, without a leak or a synaptic current; train with neuron: if"
        )
    if layer.recurrent:
        raise _refusal(layer, "it hears itself or a later layer; edgekit runs networks without cycles on it")
    how = rule(layer.name, layer.node)
    if how.reset == "value" and np.any(np.asarray(layer.node.v_reset, float)):
        raise _refusal(layer, "the chip resets by its threshold ('subtract') or to 0 ('zero')")
    if np.any(np.asarray(layer.node.v_threshold, float) <= 0):
        raise _refusal(layer, "a threshold is not above 0")


def _rounded(net: Network, layer: Layer, dt: float, clip: float) -> SpeckLayer:
    node, how = layer.node, rule(layer.name, layer.node)
    threshold = np.broadcast_to(np.asarray(node.v_threshold, float), layer.shape).reshape(-1)
    gain = np.broadcast_to(np.asarray(node.r, float) * dt, layer.shape).reshape(-1) / threshold
    found, bias = matrices(net, layer)
    weights, bias = np.concatenate(list(found.values()), 1) * gain[:, None], bias * gain
    start = np.broadcast_to(np.asarray(how.v_init, float), layer.shape).reshape(-1) / threshold
    scale = min(
        127 / max(clip * float(np.abs(weights).max(initial=0.0)), 1e-12), 127 / max(float(np.abs(bias).max(initial=0.0)), 1e-12),
        32767 / max(1.0, float(np.abs(start).max(initial=0.0))),
    )  # fmt: skip
    if np.rint(scale) < 1:
        raise _refusal(layer, "its threshold is less than a unit of its weights in 8 bits; rescale the layer")
    return SpeckLayer(
        layer.name, tuple("" if name in net.flat.inputs else name for name, _ in layer.sources),
        np.clip(np.rint(weights * scale), -128, 127).astype(np.int8), np.rint(bias * scale).astype(np.int8), int(np.rint(scale)),
        np.rint(start * scale).astype(np.int16), "subtract" if how.reset == "subtract" else "zero",
    )  # fmt: skip


def _notes(layer: Layer, chosen: SpeckLayer, trace: Trace) -> list[str]:
    notes, allowed, most = [], rule(layer.name, layer.node).max_spikes, int(trace.spikes.max(initial=0))
    if most > allowed:
        share = float((trace.spikes > allowed).mean())
        notes.append(
            f"node {layer.name}: up to {most} spikes in a step on the chip, {share:.2%} of steps above the {allowed} of the graph"
        )
    if trace.saturated:
        notes.append(f"node {layer.name}: {trace.saturated:,} membranes reached the end of 16 bits")
    if chosen.threshold < 16:
        notes.append(f"node {layer.name}: its threshold is {chosen.threshold} units, so coarse are its 8-bit weights or biases")
    return notes
