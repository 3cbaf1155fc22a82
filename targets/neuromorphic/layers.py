"""A NIR graph as layers of neurons: each neuron node with the nodes without state that lead to it.

Chips and simulators think in populations joined by weights. A :class:`Layer` says which populations a neuron node hears, through
what, with how many steps of delay (an edge that closes a cycle carries the value of the step before), and gives the weights as
matrices, whatever convolutions, pools and branches they are made of: all of it is linear, so a matrix is its value on a basis.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import UnsupportedError
from edgekit.nir import interpret
from edgekit.nir.nodes import stateless
from edgekit.nir.semantics import FIRING, INTEGRATING, Flat, flatten, kind

__all__ = ["Layer", "Network", "matrices", "network"]

Array = NDArray[np.float64]
Source = tuple[str, int]
"""A population and the steps after which its spikes arrive (0: in the same step)."""

_LARGEST = 1 << 27
"""Numbers of a matrix."""


@dataclass(frozen=True)
class Layer:
    """A neuron node, or an output that neurons do not stand before.

    Attributes:
        name, node: as in the flat graph.
        sources: what it hears, inputs of the graph and other layers, in the order of the edges.
        through: names of the nodes without state in between, first to last.
        shape: of one sample of its values.
    """

    name: str
    node: Any
    sources: tuple[Source, ...]
    through: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of neurons."""
        return int(np.prod(self.shape, dtype=int))

    @property
    def recurrent(self) -> bool:
        """Whether it hears itself or something later."""
        return any(delay for _, delay in self.sources)


@dataclass(frozen=True)
class Network:
    """A graph as layers in order of execution, and the shape of one sample of every node's values."""

    flat: Flat
    layers: tuple[Layer, ...]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def neurons(self) -> tuple[Layer, ...]:
        """The layers that are neurons or integrators."""
        return tuple(layer for layer in self.layers if kind(layer.node) in FIRING + INTEGRATING)

    def layer(self, name: str) -> Layer:
        """The layer of that name."""
        return next(layer for layer in self.layers if layer.name == name)


def network(graph: Any) -> Network:
    """The layers of a graph.

    Raises:
        UnsupportedError: the graph cannot be run, has an input without a shape, or a Delay (no chip here has one).
    """
    flat = flatten(graph)
    zeros = {}
    for name in flat.inputs:
        shape = flat.nodes[name].input_type["input"]
        if shape is None:
            raise UnsupportedError(f"node {name}: the input has no shape; write one into the graph")
        zeros[name] = np.zeros((1, 1, *(int(n) for n in np.atleast_1d(shape))))
    values = interpret(graph, zeros, record=None).values
    shapes = {name: value.shape[2:] for name, value in values.items()}
    order = [name for group in flat.groups for name in group]
    layers = []
    for name in order:
        node = flat.nodes[name]
        if kind(node) == "Delay":
            raise UnsupportedError(
                f"node {name}: a Delay cannot be written as layers of weights; fold it away or use another target"
            )
        if kind(node) in FIRING + INTEGRATING or name in flat.outputs:
            sources, through = _upstream(flat, name)
            if name not in flat.outputs or through:
                layers.append(Layer(name, node, sources, through, shapes[name]))
    return Network(flat, tuple(layers), shapes)


def matrices(net: Network, layer: Layer) -> tuple[dict[Source, Array], Array]:
    """Weights from each source, (size of the layer, size of the source), and the bias (size of the layer,), in float64.

    Raises:
        UnsupportedError: a Threshold in between, or a matrix that is too large to write out.
    """
    for name in layer.through:
        if kind(net.flat.nodes[name]) == "Threshold":
            raise UnsupportedError(f"node {name}: a Threshold between neurons is not linear and has no weights")
    silent = {source: np.zeros((1, *net.shapes[source[0]])) for source in layer.sources}
    bias = _arriving(net.flat, layer, silent)[0]
    found = {}
    for source in layer.sources:
        size = int(np.prod(net.shapes[source[0]], dtype=int))
        if size * layer.size > _LARGEST:
            raise UnsupportedError(f"node {layer.name}: {size:,} x {layer.size:,} weights are too many to write out one by one")
        basis = np.eye(size).reshape(size, *net.shapes[source[0]])
        given = {other: np.broadcast_to(value, (size, *value.shape[1:])) for other, value in silent.items()} | {source: basis}
        arrived = _arriving(net.flat, layer, given, biases=False)
        found[source] = np.ascontiguousarray(arrived.reshape(size, layer.size).T)
    return found, bias.reshape(layer.size).astype(np.float64)


def _upstream(flat: Flat, name: str) -> tuple[tuple[Source, ...], tuple[str, ...]]:
    """What a node hears and through which nodes, each once, the farthest first."""
    sources: list[Source] = []
    through: list[str] = []

    def visit(node: str, delay: int) -> None:
        for before in flat.sources[node]:
            late = delay + ((before, node) in flat.feedback)
            if _ends(flat, before):
                if (before, late) not in sources:
                    sources.append((before, late))
                continue
            visit(before, late)
            if before not in through:
                through.append(before)

    visit(name, 0)
    return tuple(sources), tuple(through)


def _ends(flat: Flat, name: str) -> bool:
    return kind(flat.nodes[name]) in (*FIRING, *INTEGRATING, "Delay") or name in flat.inputs


def _arriving(flat: Flat, layer: Layer, given: Mapping[Source, Array], biases: bool = True) -> Array:
    """What arrives at a layer for values of its sources, (n, *shape), with or without the biases on the way."""

    @cache
    def value(node: str, delay: int) -> Array:
        parts = []
        for before in flat.sources[node]:
            late = delay + ((before, node) in flat.feedback)
            if _ends(flat, before):
                parts.append(given[before, late])
            else:
                parts.append(_apply(flat, before, value(before, late), biases))
        return _sum(parts)

    return value(layer.name, 0)


def _apply(flat: Flat, name: str, x: Array, biases: bool) -> Array:
    node = flat.nodes[name]
    if not biases and hasattr(node, "bias"):
        node = copy.copy(node)
        node.bias = np.zeros_like(np.asarray(node.bias))
    try:
        return stateless(name, node, x)
    except ValueError as error:
        raise UnsupportedError(f"node {name} ({kind(node)}) does not take a value of shape {x.shape[1:]}: {error}") from error


def _sum(parts: Sequence[Array]) -> Array:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
