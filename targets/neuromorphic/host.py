"""A chip takes spikes; where a network takes real values, its first neurons run on the host and send theirs.

What the host runs is either the whole first layer with its weights, or, in a network made with ``spiking: {encoding: rate}``, a
layer of neurons that does nothing but turn the input into spikes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import UnsupportedError
from edgekit.nir.nodes import stateless
from edgekit.nir.semantics import FIRING, kind
from edgekit.targets.neuromorphic.figures import indicator
from edgekit.targets.neuromorphic.layers import Network, network

__all__ = ["Parts", "counted", "parts", "share", "takes_values"]


@dataclass(frozen=True)
class Parts:
    """A graph cut behind its first neurons.

    Attributes:
        chip: the rest; its input is called ``sender`` and takes that layer's spikes.
        sender: the neurons whose spikes the host sends.
        host: nodes that the host runs, ``sender`` the last of them.
    """

    chip: Any
    sender: str
    host: tuple[str, ...]

    def sentence(self) -> str:
        """What the host does."""
        return f"the host runs {', '.join(self.host)} and sends the spikes of {self.sender}"


def takes_values(graph: Any) -> bool:
    """Whether the graph says that its input is the same real value at every step (``encoding: repeat``)."""
    return str(graph.metadata.get("encoding", "")) == "repeat"


def counted(spikes: NDArray[Any]) -> bool:
    """Whether an input holds nothing but numbers of spikes."""
    return bool(np.all(spikes == np.rint(spikes)) and np.all(spikes >= 0))


def parts(graph: Any, who: str) -> Parts:
    """Cut a graph behind the neurons that hear its input.

    Raises:
        UnsupportedError: several layers hear the input, or one that does not spike; names it.
    """
    import nir

    net = network(graph)
    (entry, *others) = net.flat.inputs
    first = [layer for layer in net.layers if any(source in net.flat.inputs for source, _ in layer.sources)]
    if others or len(first) != 1 or kind(first[0].node) not in FIRING or first[0].recurrent:
        heard = ", ".join(layer.name for layer in first) or entry
        raise UnsupportedError(
            f"{who}: the input is real-valued, a chip takes spikes, and the host cannot run the first neurons alone (it is heard "
            f"by {heard}); make the network with spiking: {{encoding: rate}}, or send it spikes"
        )
    sender = first[0].name
    host = (*first[0].through, sender)
    kept = [name for group in net.flat.groups for name in group if name not in (*host, entry)]
    nodes = {sender: nir.Input({"input": np.array(net.shapes[sender], np.int64)})}
    nodes |= {name: net.flat.nodes[name] for name in kept}
    edges = [(source, name) for name in kept for source in net.flat.sources[name]]
    facts = {key: value for key, value in graph.metadata.items() if key != "encoding"} | {"encoding": "sequence"}
    return Parts(nir.NIRGraph(nodes, edges, metadata=facts, type_check=False), sender, host)


def share(net: Network, names: Sequence[str]) -> float:
    """Products of one dense pass that some nodes take, as a share of all."""

    def products(name: str) -> float:
        node = net.flat.nodes[name]
        if not hasattr(node, "weight"):
            return 0.0
        source = net.flat.sources[name][0]
        return float(stateless(name, indicator(node, True), np.ones((1, *net.shapes[source]))).sum())

    each = {name: products(name) for name in net.flat.nodes}
    return sum(each[name] for name in names) / max(1.0, sum(each.values()))
