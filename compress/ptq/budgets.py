"""What the choices of bits cost: bytes, bit operations, or what a target's table of measured operators says (modelled)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from edgekit import costs
from edgekit.compress.capture import Graph
from edgekit.compress.ptq.settings import PTQ, Mixed, WeightType, bits_of
from edgekit.compress.ptq.simulate import taps
from edgekit.compress.ptq.units import Unit, weight_of
from edgekit.errors import InputError
from edgekit.frozen.work import weighted

__all__ = ["Budget", "budgets", "layer_work", "storable"]


@dataclass(frozen=True)
class Budget:
    """One limit of a mixed choice.

    Attributes:
        name: "size", "bops", "instructions" or "latency".
        costs: for each layer the cost of each of its choices.
        whole: what all layers cost with 8-bit weights.
        share: the largest share of ``whole``; None: no limit, costs are only ordered by.
    """

    name: str
    costs: tuple[tuple[float, ...], ...]
    whole: float
    share: float | None

    def cost(self, choice: Sequence[int]) -> float:
        """Of one choice for each layer."""
        return sum(c[i] for c, i in zip(self.costs, choice, strict=True))

    def within(self, choice: Sequence[int]) -> bool:
        """Whether the limit is kept."""
        return self.share is None or self.cost(choice) <= self.share * self.whole * (1 + 1e-9)

    @property
    def least(self) -> float:
        """The least share that any choice reaches."""
        return sum(map(min, self.costs)) / self.whole


def layer_work(graph: Graph, unit: Unit, outputs: int, bits: int) -> costs.Work:
    """A weighted unit as tables of costs take it; ``outputs``: numbers it makes from one sample."""
    shape = tuple(weight_of(graph, unit)[0].shape)
    return weighted((outputs,), shape, int(unit.attributes.get("groups", 1)), bits)


def storable(
    graph: Graph, layers: Sequence[Unit], choices: Mapping[str, tuple[WeightType, ...]], target: str
) -> dict[str, tuple[WeightType, ...]]:
    """The choices that a target stores as they are, for each layer; where it stores none of them so, int8."""
    found: dict[str, tuple[WeightType, ...]] = {}
    for unit in layers:
        kind = layer_work(graph, unit, 1, 8).kind
        kept = tuple(c for c in choices[unit.name] if costs.stored_bits(target, kind, bits_of(c)) == bits_of(c))
        found[unit.name] = kept or ("int8",)
    return found


def budgets(
    graph: Graph, layers: Sequence[Unit], in_order: Sequence[Sequence[WeightType]], settings: PTQ, how: Mixed,
    batch: tuple[torch.Tensor, ...], bits: Sequence[int],
) -> list[Budget]:  # fmt: skip
    """The limits of ``how``, the first of which points of a front are ordered by; bytes without a limit for an accuracy.

    Args:
        in_order: the choices of each layer.
        bits: of each layer's input.

    Raises:
        InputError: instructions or latency without a target, or for one whose table has another unit or no such layer.
    """
    seen = taps(graph.module, [u.nodes[0].name for u in layers], tuple(t[:1] for t in batch))
    outputs = [seen[u.nodes[0].name].numel() for u in layers]
    works = [[layer_work(graph, u, n, bits_of(c)) for c in found] for u, n, found in zip(layers, outputs, in_order, strict=True)]
    at8 = [layer_work(graph, u, n, 8) for u, n in zip(layers, outputs, strict=True)]
    found = []
    if how.instructions is not None or how.latency is not None:
        found.append(_of_target(how, works, at8))
    if how.bops is not None:
        bops = tuple(tuple(w.macs * w.bits * float(b) for w in ws) for ws, b in zip(works, bits, strict=True))
        found.insert(0, Budget("bops", bops, sum(w.macs * 64.0 for w in at8), how.bops))
    elif how.size is not None or how.max_accuracy_drop is not None:
        size = tuple(tuple(w.weights * w.bits / 8 for w in ws) for ws in works)
        found.insert(0, Budget("size", size, float(sum(w.weights for w in at8)), how.size))
    return found


def _of_target(how: Mixed, works: Sequence[Sequence[costs.Work]], at8: Sequence[costs.Work]) -> Budget:
    name, share = ("instructions", how.instructions) if how.instructions is not None else ("latency", how.latency)
    if not how.target:
        raise InputError(f"mixed: {name} is of a target; name one of {', '.join(costs.targets())} as `target`")
    table = costs.table(how.target)
    unit = {"instructions": "instructions", "latency": "microseconds"}[name]
    if table.unit != unit:
        other = "latency" if name == "instructions" else "instructions"
        raise InputError(f"mixed: the table of {how.target} is in {table.unit}; give {other} instead of {name}")

    def cost(work: costs.Work) -> float:
        value = table.cost(work)
        if value is None:
            raise InputError(f"mixed: the table of {how.target} has no {work.kind} layers of {work.bits} bits; leave out {name}")
        return value

    made = tuple(tuple(cost(w) for w in ws) for ws in works)
    return Budget(name, made, sum(cost(w) for w in at8), share)
