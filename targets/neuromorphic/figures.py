"""What running a spiking network costs: spikes, synaptic operations, membrane updates; and the literature's energy proxy.

*Synaptic operations* are NeuroBench's effective operations (Yik et al., "The neurobench framework for benchmarking neuromorphic
computing algorithms and systems", Nature Communications 2025): products of a weight that is not 0 and an input that is not 0,
over all steps. They are accumulates (ACs) where a layer's inputs are spikes, and multiply-accumulates (MACs) where they are not,
as behind an analogue input or a spike count above 1. Biases and pools are not counted.

*Energy* is no measurement: 0.9 pJ an accumulate and 4.6 pJ a multiply-accumulate of 32-bit floats in 45 nm (Horowitz,
"Computing's energy problem", ISSCC 2014), the convention of papers on spiking networks. It knows no memory, no clock and no
chip, so it stands beside the same proxy of ONE dense pass, beside the number of steps, and beside what the membranes add to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.nir import Trace, interpret
from edgekit.nir.nodes import stateless
from edgekit.nir.semantics import FIRING, INTEGRATING, kind
from edgekit.targets.neuromorphic.layers import Network, network

__all__ = ["AC_PICOJOULES", "MAC_PICOJOULES", "PROXY", "Cost", "LayerFigures", "count", "indicator"]

AC_PICOJOULES, MAC_PICOJOULES = 0.9, 4.6
PROXY = "energy is a proxy by convention (0.9 pJ an AC, 4.6 pJ a MAC, 45 nm, Horowitz 2014), not a measurement"
_WEIGHTS = ("Affine", "Linear", "Conv1d", "Conv2d")


@dataclass(frozen=True)
class LayerFigures:
    """A node with weights or a node of neurons; counts are means over the samples, over all steps.

    Attributes:
        name, op: of the node.
        acs, macs: effective operations of weights.
        dense_macs: products of one pass with every input, zeros included.
        spikes: emitted by neurons.
        updates: of membranes.
    """

    name: str
    op: str
    acs: float = 0.0
    macs: float = 0.0
    dense_macs: int = 0
    spikes: float = 0.0
    updates: int = 0


@dataclass(frozen=True)
class Cost:
    """Figures of a network for one sample; see the module's text for what they mean.

    Attributes:
        steps: T.
        samples: how many were run.
        layers: in order of execution.
    """

    steps: int
    samples: int
    layers: tuple[LayerFigures, ...] = field(default=())

    @property
    def acs(self) -> float:
        """Effective accumulates."""
        return sum(layer.acs for layer in self.layers)

    @property
    def macs(self) -> float:
        """Effective multiply-accumulates, of what is not fed by single spikes."""
        return sum(layer.macs for layer in self.layers)

    @property
    def dense_macs(self) -> int:
        """Multiply-accumulates of one dense pass."""
        return sum(layer.dense_macs for layer in self.layers)

    def figures(self) -> dict[str, float]:
        """By name, for ``profile.json``."""
        updates = sum(layer.updates for layer in self.layers)
        leaking = sum(layer.updates for layer in self.layers if layer.op not in ("IF", "I"))
        weights = AC_PICOJOULES * self.acs + MAC_PICOJOULES * self.macs
        membranes = AC_PICOJOULES * (updates - leaking) + MAC_PICOJOULES * leaking
        return {
            "synaptic_operations": self.acs + self.macs,
            "effective_acs": self.acs,
            "effective_macs": self.macs,
            "spikes": sum(layer.spikes for layer in self.layers),
            "membrane_updates": float(updates),
            "steps": float(self.steps),
            "dense_macs_of_one_pass": float(self.dense_macs),
            "energy_proxy_nanojoules": weights / 1e3,
            "energy_proxy_with_membranes_nanojoules": (weights + membranes) / 1e3,
            "dense_energy_proxy_nanojoules": MAC_PICOJOULES * self.dense_macs / 1e3,
        }


def count(
    graph: Any,
    inputs: NDArray[Any] | Mapping[str, NDArray[Any]],
    dt: float | None = None,
    spikes: Mapping[str, NDArray[Any]] | None = None,
) -> Cost:
    """Run a graph in float64 and count.

    Args:
        inputs: (T, N, *shape), or one for each input node by its name.
        spikes: rasters of neurons, (T, N, ...), that a simulator gave, to count instead of the graph's own.

    Raises:
        UnsupportedError, InputError: the graph or the inputs cannot be run.
    """
    net = network(graph)
    trace = interpret(graph, inputs, dt=dt, record=None, forced=spikes or {})
    trace = replace(trace, values={**trace.values, **{n: np.asarray(x, np.float64) for n, x in (spikes or {}).items()}})
    steps, samples = next(iter(trace.values.values())).shape[:2]
    rows = []
    for name in (n for group in net.flat.groups for n in group):
        node, which = net.flat.nodes[name], kind(net.flat.nodes[name])
        if which in _WEIGHTS:
            rows.append(_weights(net, trace, name, samples))
        elif which in FIRING + INTEGRATING:
            emitted = float(trace.values[name].sum()) / samples if which in FIRING else 0.0
            size = int(np.prod(net.shapes[name], dtype=int))
            currents = 2 if which.startswith("Cuba") else 1
            rows.append(LayerFigures(name, kind(node), spikes=emitted, updates=currents * size * steps))
    return Cost(steps, samples, tuple(rows))


def _weights(net: Network, trace: Trace, name: str, samples: int) -> LayerFigures:
    """Products of nonzero weights and nonzero inputs: the node itself, run on what is there of both."""
    arriving = _arriving(net, trace, name)
    flat = arriving.reshape(-1, *arriving.shape[2:])
    node = indicator(net.flat.nodes[name])
    there = float(stateless(name, node, (flat != 0).astype(np.float64)).sum()) / samples
    dense = int(stateless(name, indicator(net.flat.nodes[name], True), np.ones((1, *flat.shape[1:]))).sum())
    spikes = bool(np.isin(flat, (-1.0, 0.0, 1.0)).all())
    return LayerFigures(name, kind(node), acs=there if spikes else 0.0, macs=0.0 if spikes else there, dense_macs=dense)


def _arriving(net: Network, trace: Trace, name: str) -> NDArray[np.float64]:
    total = None
    for source in net.flat.sources[name]:
        values = trace.values[source]
        if (source, name) in net.flat.feedback:
            values = np.concatenate([np.zeros_like(values[:1]), values[:-1]])
        total = values if total is None else total + values
    assert total is not None
    return total


def indicator(node: Any, every: bool = False) -> Any:
    """The node with 1 for each weight that is not 0 (or for every one), and no bias."""
    import copy

    other = copy.copy(node)
    weight = np.asarray(node.weight)
    other.weight = np.ones(weight.shape) if every else (weight != 0).astype(np.float64)
    if hasattr(node, "bias"):
        other.bias = np.zeros(weight.shape[0])
    return other
