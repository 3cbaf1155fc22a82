"""Offsets of all tensors in one static arena, planned on the host: best fit over lifetimes.

A buffer lives from the step that writes it to the last step that reads it; two buffers that live at the same time must not
overlap. Packing them into the smallest arena is NP-hard (dynamic storage allocation); buffers are placed one after the other,
each into the smallest (or the lowest) gap that holds it, in several orders: by size, by lifetime, by the load of their busiest
step, and then in neighbours of the best order until the lower bound is met or the tries are used up. Everything is deterministic.
Source of the greedy order by size: Y. Pisarchyk, J. Lee, "Efficient Memory Management for Deep Neural Net Inference", 2020.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["ALIGNMENT", "Buffer", "Placement", "lower_bound", "place"]

ALIGNMENT = 16
"""Every offset is a multiple of this many bytes."""


@dataclass(frozen=True)
class Buffer:
    """``size`` bytes that must stay from step ``first`` to step ``last``, both included."""

    size: int
    first: int
    last: int

    def __post_init__(self) -> None:
        if self.size < 0 or self.last < self.first:
            raise ValueError(f"buffer of {self.size} bytes from step {self.first} to {self.last}")

    def meets(self, other: Buffer) -> bool:
        """Both are needed at some step."""
        return self.first <= other.last and other.first <= self.last


@dataclass(frozen=True)
class Placement:
    """``offsets`` of the buffers, the ``size`` of the arena, and the ``bound`` under which no plan can go (all in bytes)."""

    offsets: tuple[int, ...]
    size: int
    bound: int


def place(buffers: Sequence[Buffer], tries: int = 400) -> Placement:
    """Offsets with no overlap of buffers that live at the same time.

    Args:
        tries: how many orders are tried after the four fixed ones, while the arena is larger than the bound.
    """
    bound = lower_bound(buffers)
    indices = range(len(buffers))
    load = [_busiest(buffers, i) for i in indices]
    orders = [
        sorted(indices, key=lambda i: (-_round(buffers[i].size), buffers[i].first, i)),
        sorted(indices, key=lambda i: (buffers[i].first, -buffers[i].size, i)),
        sorted(indices, key=lambda i: (buffers[i].first - buffers[i].last, -buffers[i].size, i)),
        sorted(indices, key=lambda i: (-load[i], -buffers[i].size, i)),
    ]
    best_size, best_offsets, best = min((*_greedy(buffers, order), order) for order in orders)
    chance = random.Random(0)
    for _ in range(tries):
        if best_size <= bound:
            break
        order = list(best)
        for _ in range(chance.choice((1, 1, 2, 3))):
            order.insert(chance.randrange(len(order)), order.pop(chance.randrange(len(order))))
        size, offsets = _greedy(buffers, order)
        if size <= best_size:
            best_size, best_offsets, best = size, offsets, order
    return Placement(tuple(best_offsets), best_size, bound)


def lower_bound(buffers: Sequence[Buffer]) -> int:
    """Bytes of all buffers that live at the busiest step: no arena can be smaller."""
    steps = {b.first for b in buffers}
    return max((sum(_round(b.size) for b in buffers if b.first <= step <= b.last) for step in steps), default=0)


def _round(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _busiest(buffers: Sequence[Buffer], index: int) -> int:
    mine = buffers[index]
    starts = {b.first for b in buffers if mine.first <= b.first <= mine.last} | {mine.first}
    return max(sum(_round(b.size) for b in buffers if b.first <= step <= b.last) for step in starts)


def _greedy(buffers: Sequence[Buffer], order: Sequence[int]) -> tuple[int, list[int]]:
    """Size and offsets: each buffer into the smallest gap that holds it, or all into the lowest, whichever arena is smaller."""
    return min((_extent(buffers, offsets), offsets) for offsets in (_fit(buffers, order, best) for best in (True, False)))


def _fit(buffers: Sequence[Buffer], order: Sequence[int], best: bool) -> list[int]:
    """Each buffer into a gap between those already placed that it meets, else above them."""
    offsets = [-1] * len(buffers)
    for i in order:
        need, cursor = _round(buffers[i].size), 0
        taken = sorted((offsets[j], _round(buffers[j].size)) for j in order if offsets[j] >= 0 and buffers[j].meets(buffers[i]))
        gaps = []
        for start, size in taken:
            if start - cursor >= need:
                gaps.append((start - cursor if best else 0, cursor))
            cursor = max(cursor, start + size)
        offsets[i] = min(gaps)[1] if gaps else cursor
    return offsets


def _extent(buffers: Sequence[Buffer], offsets: Sequence[int]) -> int:
    return max((o + _round(b.size) for b, o in zip(buffers, offsets, strict=True)), default=0)
