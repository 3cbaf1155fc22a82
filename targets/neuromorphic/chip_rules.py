"""Does a NIR graph fit a chip? Every rule that it breaks, with the layer, the limit, what was found, and the smallest edit.

The tools of the chips accept silently what the chips cannot do (64 inputs on Xylo, weights out of range in lava), so these rules
read the graph itself: nothing is built, and all breaches are told at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from edgekit.errors import UnsupportedError
from edgekit.nir.semantics import FIRING, kind, rule
from edgekit.targets.neuromorphic import dynapcnn_rules, loihi_rules, xylo_rules
from edgekit.targets.neuromorphic.breaches import Breach, over
from edgekit.targets.neuromorphic.chips import Chip, Limit, chip
from edgekit.targets.neuromorphic.host import parts, takes_values
from edgekit.targets.neuromorphic.layers import Network, network

__all__ = ["Fit", "check"]


@dataclass(frozen=True)
class Fit:
    """What :func:`check` found: resources used beside those there are, and breaches. ``cores`` places layers, where they fit."""

    chip: str
    title: str
    used: Mapping[str, tuple[int, int]]
    breaches: tuple[Breach, ...]
    cores: Mapping[str, int]
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether no confirmed limit is exceeded."""
        return not any(breach.confirmed for breach in self.breaches)

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "ok": self.ok}


def check(graph: Any, name: str) -> Fit:
    """Check a graph against a chip's rules.

    Args:
        name: a name of :data:`edgekit.targets.neuromorphic.chips.CHIPS`.

    Raises:
        InputError: there is no such chip; UnsupportedError: the graph cannot be read as layers.
    """
    found, told = chip(name), list[str]()
    values = list(_real_input(found, graph, told))
    net = network(graph if values or not told else parts(graph, name).chip)
    used: dict[str, tuple[int, int]] = {}
    cores: dict[str, int] = {}
    breaches = [*values, *_neurons(found, net), *_KINDS[found.kind](found, net, used, cores)]
    bits = [f"{what} to {found.limits[key].value} bits" for what, key in _ROUNDED.items() if key in found.limits]
    rounded = (
        f"the chip rounds {' and '.join(bits)}; `edgekit verify --device sim:...` says what that costs, where there is a model"
    )
    return Fit(name, found.title, used, tuple(breaches), cores, (*told, *found.notes, rounded))


_ROUNDED = {"weights": "weight_bits", "states": "state_bits"}


def _real_input(found: Chip, graph: Any, told: list[str]) -> Iterator[Breach]:
    """A graph that gets real values: what the host runs of it, told in a sentence; a breach where that cannot be cut off."""
    if not takes_values(graph):
        return
    try:
        told.append(f"the input is real-valued: {parts(graph, found.name).sentence()}; the rest is checked")
    except UnsupportedError:
        edit = "make the network with spiking: {encoding: rate}"
        yield Breach("", "the input is", "spikes", "real values that several layers hear", edit, found.title)


def _neurons(found: Chip, net: Network) -> Iterator[Breach]:
    """Kinds of neurons and their rules."""
    for layer in net.layers:
        which = kind(layer.node)
        if which == "Output":
            continue  # a readout: the host applies its weights to spikes, and on Xylo output neurons do
        if which not in found.kinds:
            edit = f"train it with {' or '.join(found.kinds)}"
            if which == "LIF" and "CubaLIF" in found.kinds:
                edit = "train it with CubaLIF: the chip's neurons have a synaptic current"
            yield Breach(layer.name, "neurons are", " or ".join(found.kinds), which, edit, found.title)
        if which not in FIRING:
            continue
        how = rule(layer.name, layer.node)
        value = np.any(np.asarray(layer.node.v_reset)) and how.reset == "value"
        reset = "value" if value else "zero" if how.reset == "value" else how.reset
        if reset not in found.resets:
            wanted = " or ".join(found.resets)
            read = (found.resets_limit.source, found.resets_limit.confirmed)
            yield Breach(layer.name, "reset is", wanted, reset, f"train it with reset {wanted}", *read)
        most = found.limits.get("hidden_spikes", Limit(1, found.title))
        yield from over(
            layer.name, "spikes a step are", most, how.max_spikes, f"train it with at most {most.value} spikes a step"
        )


_KINDS: Mapping[str, Callable[[Chip, Network, dict[str, tuple[int, int]], dict[str, int]], Iterator[Breach]]] = {
    "reservoir": xylo_rules.rules,
    "cores": loihi_rules.rules,
    "layers": dynapcnn_rules.rules,
}
