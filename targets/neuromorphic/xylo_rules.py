"""Rules of the Xylo chips: input channels, hidden neurons, output neurons, what outputs hear, fan-out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from edgekit.targets.neuromorphic.breaches import Breach, over
from edgekit.targets.neuromorphic.chips import Chip
from edgekit.targets.neuromorphic.layers import Network, matrices

__all__ = ["rules"]


def rules(found: Chip, net: Network, used: dict[str, tuple[int, int]], cores: dict[str, int]) -> Iterator[Breach]:
    """Xylo: input channels, hidden neurons, outputs, synapses and fan-out."""
    limits = found.limits
    inputs = sum(int(np.prod(net.shapes[name], dtype=int)) for name in net.flat.inputs)
    heard = {source for layer in net.layers for source, _ in layer.sources}
    hidden = [layer for layer in net.neurons if layer.name in heard]
    outputs = [layer for layer in net.neurons if layer.name not in heard]
    outputs += [layer for layer in net.layers if layer not in net.neurons]  # weights at the end become output neurons
    count = {"inputs": inputs, "hidden": sum(x.size for x in hidden), "outputs": sum(x.size for x in outputs)}
    used |= {what: (number, limits[what].value) for what, number in count.items()}
    fewer = "combine them before the chip (sum neighbours, pool, or a smaller encoder)"
    yield from over(
        ", ".join(net.flat.inputs), "input channels are", limits["inputs"], inputs, f"leave {limits['inputs'].value}: {fewer}"
    )
    if (excess := count["hidden"] - limits["hidden"].value) > 0:
        largest = max(hidden, key=lambda x: x.size)
        enough = excess < largest.size  # else no single layer can give so many
        yield from over(
            largest.name,
            "hidden neurons of all layers are",
            limits["hidden"],
            count["hidden"],
            f"remove {excess:,} of its {largest.size:,}" if enough else f"remove {excess:,}, of this largest layer and others",
        )
    if (excess := count["outputs"] - limits["outputs"].value) > 0:
        yield from over(
            outputs[-1].name,
            "output neurons are",
            limits["outputs"],
            count["outputs"],
            f"leave out {excess} classes",
        )
    if not hidden:
        yield Breach(
            "", "hidden layers are", "at least 1", "0", "add a hidden layer between inputs and outputs", limits["hidden"].source
        )
    for layer in outputs:
        if layer.recurrent or set(net.flat.inputs) & {s for s, _ in layer.sources}:
            edit = "let a hidden layer do that, and outputs hear hidden layers only"
            yield Breach(
                layer.name,
                "outputs hear",
                "hidden neurons",
                ", ".join(s for s, _ in layer.sources),
                edit,
                limits["outputs"].source,
            )
    yield from _fan_out(found, net)


def _fan_out(found: Chip, net: Network) -> Iterator[Breach]:
    """Connections that leave a hidden neuron."""
    leaving: dict[str, Any] = {}
    for layer in net.neurons:
        for (source, _), matrix in matrices(net, layer)[0].items():
            if source not in net.flat.inputs:
                leaving[source] = leaving.get(source, 0) + (matrix != 0).sum(0)
    for name, numbers in leaving.items():
        limit, most = found.limits["fan_out"], int(np.max(numbers))
        many = int((numbers > limit.value).sum())
        edit = f"prune the smallest weights of {many:,} neurons to {limit.value} each, or split them"
        yield from over(name, "the largest fan-out is", limit, most, edit)
