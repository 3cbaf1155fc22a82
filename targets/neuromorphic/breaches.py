"""A rule of a chip that a graph breaks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from edgekit.targets.neuromorphic.chips import Limit

__all__ = ["Breach", "over"]


@dataclass(frozen=True)
class Breach:
    """A rule that a graph breaks.

    Attributes:
        layer: node; "" for the whole graph.
        rule: what the limit is of.
        limit: the chip's number or choice.
        found: the graph's.
        edit: the smallest change that would fit.
        source, confirmed: where the limit was read, and whether of this chip.
    """

    layer: str
    rule: str
    limit: str
    found: str
    edit: str
    source: str
    confirmed: bool = True

    def __str__(self) -> str:
        where = f"layer {self.layer}: " if self.layer else ""
        doubt = "" if self.confirmed else " (this limit is not confirmed)"
        return f"{where}{self.rule} {self.found}, {self.limit} allowed{doubt}; {self.edit}"


def over(layer: str, what: str, limit: Limit, found: int, edit: str) -> Iterator[Breach]:
    """A breach, if a number is above its limit."""
    if found > limit.value:
        yield Breach(layer, what, f"{limit.value:,}", f"{found:,}", edit, limit.source, limit.confirmed)
