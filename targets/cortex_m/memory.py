"""Offsets of all tensors in one static arena, planned on the host: best fit over lifetimes.

A buffer lives from the step that writes it to the last step that reads it; two buffers that live at the same time must not
overlap. Packing them into the smallest arena is NP-hard (dynamic storage allocation); buffers are placed one after the other,
each into the smallest (or the lowest) gap that holds it, in several orders: by size, by lifetime, by the load of their busiest
step, and then in neighbours of the best order until the lower bound is met or the tries are used up. Everything is deterministic.
Source of the greedy order by size: Y. Pisarchyk, J. Lee, "Efficient Memory Management for Deep Neural Net Inference", 2020.

A kernel that works through an image from its beginning has read the first lines when it writes its last ones. Its output may
then lie over its input, if it starts far enough below it: a :class:`Trail`. Source: P. Blacker, C. Bridges, S. Hadfield, "Rapid
Prototyping of Deep Learning Models on Radiation Hardened CPUs" (diagonal memory optimisation), 2019.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["ALIGNMENT", "Buffer", "Placement", "Trail", "lower_bound", "place"]

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
class Trail:
    """Buffer ``output`` may overlap buffer ``input`` if it starts ``distance`` bytes or more below it (above it, if negative)."""

    input: int
    output: int
    distance: int


@dataclass(frozen=True)
class Placement:
    """``offsets`` of the buffers, the ``size`` of the arena, and the ``bound`` under which no plan can go (all in bytes).

    The bound is that of the lifetimes: trails may go below it.
    """

    offsets: tuple[int, ...]
    size: int
    bound: int


def place(buffers: Sequence[Buffer], trails: Sequence[Trail] = (), tries: int = 400) -> Placement:
    """Offsets with no overlap of buffers that live at the same time, but for that of trails.

    Args:
        tries: how many orders are tried after the fixed ones, while the arena is larger than what is possible at best.
    """
    least = lower_bound(buffers, trails)
    below = {(t.input, t.output): -(-t.distance // ALIGNMENT) * ALIGNMENT for t in trails}
    indices = range(len(buffers))
    load = [_busiest(buffers, i) for i in indices]
    orders = [
        sorted(indices, key=lambda i: (-_round(buffers[i].size), buffers[i].first, i)),
        sorted(indices, key=lambda i: (buffers[i].first, -buffers[i].size, i)),
        sorted(indices, key=lambda i: (buffers[i].first - buffers[i].last, -buffers[i].size, i)),
        sorted(indices, key=lambda i: (-load[i], -buffers[i].size, i)),
        sorted(indices, key=lambda i: (-buffers[i].last, -buffers[i].size, i)),  # an output before the input it may lie over
        sorted(indices, key=lambda i: (-load[i], -buffers[i].last, i)),
    ]
    best_size, best_offsets, best = min((*_greedy(buffers, order, below), order) for order in orders)
    chance = random.Random(0)
    for _ in range(tries):
        if best_size <= least:
            break
        order = list(best)
        for _ in range(chance.choice((1, 1, 2, 3))):
            order.insert(chance.randrange(len(order)), order.pop(chance.randrange(len(order))))
        size, offsets = _greedy(buffers, order, below)
        if size <= best_size:
            best_size, best_offsets, best = size, offsets, order
    return Placement(tuple(best_offsets), best_size, lower_bound(buffers))


def lower_bound(buffers: Sequence[Buffer], trails: Sequence[Trail] = ()) -> int:
    """Bytes of all buffers that live at the busiest step, less what trails save there: no arena can be smaller."""

    def load(step: int) -> int:
        total = sum(_round(b.size) for b in buffers if b.first <= step <= b.last)
        for trail in trails:
            a, b = buffers[trail.input], buffers[trail.output]
            if max(a.first, b.first) <= step <= min(a.last, b.last):
                both = _round(a.size) + _round(b.size)
                total -= max(0, both - max(_round(max(trail.distance, 0)) + _round(a.size), _round(b.size)))
        return total

    return max((load(step) for step in {b.first for b in buffers}), default=0)


def _round(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _busiest(buffers: Sequence[Buffer], index: int) -> int:
    mine = buffers[index]
    starts = {b.first for b in buffers if mine.first <= b.first <= mine.last} | {mine.first}
    return max(sum(_round(b.size) for b in buffers if b.first <= step <= b.last) for step in starts)


_Below = Mapping[tuple[int, int], int]


def _greedy(buffers: Sequence[Buffer], order: Sequence[int], below: _Below) -> tuple[int, list[int]]:
    """Size and offsets: each buffer into the smallest gap that holds it, or all into the lowest, whichever arena is smaller."""
    return min((_extent(buffers, offsets), offsets) for offsets in (_fit(buffers, order, below, best) for best in (True, False)))


def _fit(buffers: Sequence[Buffer], order: Sequence[int], below: _Below, best: bool) -> list[int]:
    """Each buffer into a gap between those already placed that it meets, else above them."""
    offsets = [-1] * len(buffers)
    for i in order:
        cursor, gaps = 0, []
        taken = (_taken(buffers, i, j, offsets[j], below) for j in order if offsets[j] >= 0 and buffers[j].meets(buffers[i]))
        for last, first in sorted(t for t in taken if t[0] < t[1]):
            if last >= cursor:
                gaps.append((last - cursor if best else 0, cursor))
            cursor = max(cursor, first)
        offsets[i] = min(gaps)[1] if gaps else cursor
    return offsets


def _taken(buffers: Sequence[Buffer], i: int, j: int, offset: int, below: _Below) -> tuple[int, int]:
    """Buffer ``j`` lies at ``offset``: the last place before it and the first one behind it where buffer ``i`` may start."""
    last, first = offset - _round(buffers[i].size), offset + _round(buffers[j].size)
    if (j, i) in below:
        last = max(last, offset - below[j, i])
    if (i, j) in below:
        first = min(first, offset + below[i, j])
    return last, first


def _extent(buffers: Sequence[Buffer], offsets: Sequence[int]) -> int:
    return max((o + _round(b.size) for b, o in zip(buffers, offsets, strict=True)), default=0)
