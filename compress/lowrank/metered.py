"""What a layer's options cost on a target, in instructions or in time: measured at some ranks, interpolated between them.

The layer and its chains at the smallest, a middle and the largest rank of each scheme are frozen with 8-bit weights, all in one
program that runs them side by side, and that program is measured layer by layer. Costs grow with the rank in steps that are
small beside the whole, so those between are read from straight lines. The model itself is measured too, before and after.
Nothing here knows a device: the measuring is given from outside (:mod:`edgekit.layer_costs`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from edgekit.compress.capture import Graph, capture
from edgekit.compress.lowrank.layers import Layer, Shape, dense_shape, part_shapes
from edgekit.compress.lowrank.settings import LowRank, Rank, parse_rank
from edgekit.compress.lowrank.split import Option
from edgekit.data import Data
from edgekit.frozen import FrozenProgram

__all__ = ["PROBES", "Costs", "Line", "Measure", "Meter"]

PROBES = 3
"""Ranks of a scheme that are measured."""


@dataclass(frozen=True)
class Costs:
    """Of one inference: the whole, each layer by its name, and how they were measured, in words."""

    total: float
    layers: Mapping[str, float]
    how: str


class Measure(Protocol):
    """Costs of a frozen program on a target; ``kind`` is "instructions" or "latency", ``sample`` a batch of one."""

    def __call__(self, program: FrozenProgram, target: str, kind: str, sample: Sequence[Tensor]) -> Costs: ...


@dataclass(frozen=True)
class Meter:
    """Measures for one ``lowrank`` block.

    Attributes:
        progress: called with (what, done, in all).
    """

    measure: Measure
    settings: LowRank
    data: Data
    progress: Callable[[str, int, int], None] | None = None

    @property
    def rank(self) -> Rank:
        return parse_rank(self.settings.rank)

    def model(self, graph: Graph) -> Costs:
        """The whole model with 8-bit weights and activations."""
        from edgekit.compress.ptq.freeze import freeze
        from edgekit.compress.ptq.quantize import quantize
        from edgekit.compress.ptq.settings import PTQ

        few = PTQ(samples=32)  # the integers' values hardly change the cost
        quantized, plan = quantize(graph, few, self.data)
        return self.measure(freeze(quantized, plan, "model"), self.settings.target, self.rank.kind, graph.sample)

    def layers(self, layers: Sequence[Layer], options: Mapping[str, Sequence[Option]]) -> dict[str, Line]:
        """Layer name to its own cost and the cost of any of its options; equal layers are measured once."""
        known: dict[Any, Line] = {}
        found = {}
        for done, layer in enumerate(layers):
            if self.progress:
                self.progress(f"measure on {self.settings.target}", done, len(layers))
            key = (dense_shape(layer), layer.in_size, tuple((o.scheme, o.rank) for o in options[layer.name]))
            if key not in known:
                known[key] = self._line(replace(layer, uses=1), options[layer.name])
            found[layer.name] = known[key].times(layer.uses)
        return found

    def _line(self, layer: Layer, options: Sequence[Option]) -> Line:
        from edgekit.compress.ptq.freeze import freeze
        from edgekit.compress.ptq.quantize import quantize
        from edgekit.compress.ptq.settings import PTQ

        wanted = _probes(options)
        chains = [(dense_shape(layer),), *(part_shapes(layer, s, r, self.settings.multiple) for s, r in wanted)]
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(8, *_input(layer), generator=generator)
        graph = capture(_Beside(chains), (x[:1],))
        program = freeze(*quantize(graph, PTQ(samples=8), Data(calibration=x)), layer.name)
        costs = self.measure(program, self.settings.target, self.rank.kind, (x[:1],)).layers

        def of(number: int) -> float:
            return sum(v for name, v in costs.items() if name.startswith(f"chains.{number}."))

        by_scheme: dict[str, list[tuple[int, float]]] = {}
        for number, (scheme, rank) in enumerate(wanted, start=1):
            by_scheme.setdefault(scheme, []).append((rank, of(number)))
        return Line(of(0), by_scheme)


@dataclass(frozen=True)
class Line:
    """The dense layer's cost, and for each scheme (rank, cost) in order of rank."""

    dense: float
    schemes: Mapping[str, Sequence[tuple[int, float]]]

    def __call__(self, option: Option) -> float:
        ranks, costs = zip(*self.schemes[option.scheme], strict=True)
        return float(np.interp(option.rank, ranks, costs))

    def times(self, uses: int) -> Line:
        return Line(uses * self.dense, {s: [(r, uses * c) for r, c in line] for s, line in self.schemes.items()})


def _probes(options: Sequence[Option]) -> list[tuple[str, int]]:
    """Smallest, middle and largest rank of each scheme."""
    found = []
    for scheme in dict.fromkeys(o.scheme for o in options):
        ranks = sorted(o.rank for o in options if o.scheme == scheme)
        at = np.linspace(0, len(ranks) - 1, PROBES).round().astype(int)
        found += [(scheme, ranks[i]) for i in dict.fromkeys(at.tolist())]
    return found


def _input(layer: Layer) -> tuple[int, ...]:
    if layer.is_linear:
        rows, features = layer.in_size[1], layer.weight.shape[1]
        return (features,) if rows == 1 else (rows, features)
    return (layer.weight.shape[1] * layer.groups, *layer.in_size)


class _Beside(nn.Module):
    """Chains of random layers, each on the same input."""

    def __init__(self, chains: Sequence[tuple[Shape, ...]]) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.chains = nn.ModuleList(nn.Sequential(*(_thin(s) for s in chain)) for chain in chains)
        self.eval()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(chain(x) for chain in self.chains)


def _thin(s: Shape) -> nn.Module:
    if len(s.weight) == 2:
        return nn.Linear(s.weight[1], s.weight[0])
    out, inputs, kh, kw = s.weight
    return nn.Conv2d(inputs * s.groups, out, (kh, kw), s.stride, s.padding, s.dilation, s.groups)
