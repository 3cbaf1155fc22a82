"""Rules of Loihi and Loihi 2: compartments, axons and synapses, with layers cut over cores."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from edgekit.nir.semantics import kind
from edgekit.targets.neuromorphic.breaches import Breach, over
from edgekit.targets.neuromorphic.chips import Chip
from edgekit.targets.neuromorphic.layers import Layer, Network

__all__ = ["rules"]


def rules(found: Chip, net: Network, used: dict[str, tuple[int, int]], cores: dict[str, int]) -> Iterator[Breach]:
    """Loihi: compartments, axons and synapses, with layers cut over cores."""
    limits, total, synapses = found.limits, 0, 0
    for layer in net.neurons:
        fan_in, weights = _fan_in(net, layer)
        synapses += weights
        per_core = limits["compartments"].value
        needed = math.ceil(layer.size / per_core)
        if "synapse_bits" in limits:
            bits = 2 * limits["weight_bits"].value * weights
            needed = max(needed, math.ceil(bits / limits["synapse_bits"].value))
        cores[layer.name] = needed
        total += needed
        edit = f"hear at most {limits['in_axons'].value:,} neurons: a stride or pool before it, or grouped weights"
        yield from over(layer.name, "neurons heard by a core are", limits["in_axons"], fan_in, edit)
        behind = sum(1 for other in net.neurons if layer.name in (s for s, _ in other.sources))
        split = sum(math.ceil(o.size / per_core) for o in net.neurons if layer.name in (s for s, _ in o.sources))
        axons = min(layer.size, per_core) * max(1, split)
        if behind:
            yield from over(
                layer.name, "axons that leave a core are", limits["out_axons"], axons,
                f"place it on more cores ({math.ceil(axons / limits['out_axons'].value) * needed} instead of {needed})",
            )  # fmt: skip
    used["cores"] = (total, limits["cores"].value)
    yield from over("", "cores needed are", limits["cores"], total, "make the largest layers smaller, or use more chips")
    if "synapses" in limits:
        used["synapses"] = (synapses, limits["synapses"].value)
        yield from over("", "synapses are", limits["synapses"], synapses, "prune weights or make layers smaller")


def _fan_in(net: Network, layer: Layer) -> tuple[int, int]:
    """How many neurons a layer hears, and how many weights it has where every one is written out."""
    heard = sum(int(np.prod(net.shapes[source], dtype=int)) for source, _ in layer.sources)
    weights = 0
    for name in layer.through:
        node = net.flat.nodes[name]
        if kind(node) in ("Affine", "Linear"):
            weights += int(np.count_nonzero(node.weight))
        elif kind(node) in ("Conv1d", "Conv2d"):
            positions = int(np.prod(net.shapes[name][1:], dtype=int))
            weights += int(np.count_nonzero(node.weight)) * positions
    return heard, weights
