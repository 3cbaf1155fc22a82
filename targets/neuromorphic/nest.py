"""A NIR graph as populations of NEST's ``iaf_psc_delta`` neurons: an engine that shares no code and no file format with ours.

NEST solves the leak exactly, so a membrane that keeps ``1 - dt / tau`` in a step gets the time constant ``-1 / ln(1 - dt / tau)``
steps; an IF one that float64 does not see. Spikes travel for at least a step: layer k is k steps late, connections that skip
layers take as many steps as they skip, and biases arrive with the input they belong to, from generators of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import UnsupportedError
from edgekit.nir.semantics import FIRING, kind, rule, step_length
from edgekit.targets.neuromorphic.layers import Layer, matrices, network

__all__ = ["Populations", "populations"]

_FOREVER = 1e300


@dataclass(frozen=True)
class Populations:
    """What the adapter of NEST gets: ``settings`` and ``arrays`` of :mod:`edgekit.devices.simulator_runner`, and ``names``, the
    layers that it has. ``rewritten`` says what was changed, in sentences."""

    settings: Mapping[str, Any]
    arrays: Mapping[str, NDArray[Any]]
    names: tuple[str, ...]
    rewritten: tuple[str, ...]


def populations(graph: Any, dt: float | None = None) -> Populations:
    """A graph for NEST.

    Args:
        dt: length of a step instead of the graph's.

    Raises:
        UnsupportedError: what NEST's neuron cannot do; names the node and the reason.
    """
    net, length = network(graph), step_length(graph, dt)
    arrays: dict[str, NDArray[Any]] = {}
    layers: list[dict[str, Any]] = []
    lags, done = dict.fromkeys(net.flat.inputs, 0), list[str]()
    if len(net.flat.inputs) != 1:
        raise UnsupportedError(f"nest: {len(net.flat.inputs)} inputs; edgekit runs it on graphs with one")
    for layer in net.layers:
        if kind(layer.node) == "Output":
            done.append(f"node {layer.name}: has no neurons and was left out, with what leads to it only")
            continue
        parameters, gain = _parameters(layer, length)
        lags[layer.name] = 1 + max(lags[source] for source, delay in layer.sources if not delay)
        weights, bias = matrices(net, layer)
        sources = []
        for at, ((source, delay), matrix) in enumerate(weights.items()):
            late = lags[layer.name] - lags.get(source, lags[layer.name]) + delay
            if late < 1 or (delay and source not in lags):
                raise _refusal(layer, f"what it hears from {source} would have to arrive {1 - late} steps before it is sent")
            arrays[f"weights:{layer.name}:{at}"] = matrix * gain[:, None]
            sources.append({"name": source, "delay": late})
        arrays[f"bias:{layer.name}"] = bias * gain
        arrays |= {f"{key}:{layer.name}": value for key, value in parameters.items()}
        layers.append({"name": layer.name, "lag": lags[layer.name], "sources": sources, "shape": list(layer.shape)})
    settings = {"input": net.flat.inputs[0], "layers": layers}
    return Populations(settings, arrays, tuple(layer["name"] for layer in layers), tuple(done))


def _refusal(layer: Layer, reason: str) -> UnsupportedError:
    return UnsupportedError(f"nest: node {layer.name} ({kind(layer.node)}) cannot be expressed: {reason}")


def _parameters(layer: Layer, dt: float) -> tuple[dict[str, NDArray[Any]], NDArray[np.float64]]:
    """Parameters of each neuron, and by what its input is multiplied."""
    node, size = layer.node, (layer.size,)
    if kind(node) not in FIRING or kind(node) == "CubaLIF":
        raise _refusal(layer, "edgekit runs NEST's iaf_psc_delta, which is an IF or a LIF")
    how = rule(layer.name, node)
    if how.reset == "subtract":
        raise _refusal(layer, "reset 'subtract': NEST's neuron is set to a value")
    if how.max_spikes > 1:
        raise _refusal(layer, f"it emits up to {how.max_spikes} spikes a step")

    def spread(value: Any) -> NDArray[np.float64]:
        return np.broadcast_to(np.asarray(value, np.float64), layer.shape or (1,)).reshape(size).copy()

    threshold = spread(node.v_threshold)
    leak = spread(getattr(node, "v_leak", 0.0))
    reset = spread(node.v_reset if how.reset == "value" else 0.0)
    if how.tie == "gt":
        threshold = np.nextafter(threshold, np.inf)
    if np.any(reset >= threshold):
        raise _refusal(layer, "its reset is not below its threshold")
    if kind(node) == "IF":
        tau, gain = np.full(size, _FOREVER), spread(node.r) * dt
    else:
        k = dt / spread(node.tau)
        if np.any((k <= 0) | (k >= 1)):
            raise _refusal(layer, f"dt / tau is {k.max():g}, between 0 and 1 expected")
        tau, gain = -1 / np.log1p(-k), k * spread(node.r)
    return {"tau": tau, "threshold": threshold, "leak": leak, "reset": reset, "start": spread(how.v_init)}, gain
