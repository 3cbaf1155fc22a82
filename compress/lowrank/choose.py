"""Which rank each layer gets, and why some are left alone.

A budget is spread by Lagrange relaxation (Shoham and Gersho 1988): with a price for each unit of cost every layer takes the
option with the least ``sensitivity x error + price x cost``; the price is found by bisection, and what is left of the budget
goes to the layers where it helps most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import floor

from edgekit.compress.lowrank.layers import Layer
from edgekit.compress.lowrank.settings import Rank
from edgekit.compress.lowrank.split import Option, Split
from edgekit.errors import InputError

__all__ = ["Candidate", "choose", "nothing_pays", "spend"]


def choose(split: Split, rank: Rank, multiple: int) -> Option | str:
    """The option of one layer for an integer rank, a fraction of the break-even rank, or an energy; else why there is none."""
    layer = split.layer
    if rank.kind == "rank":
        fitting = [o for o in split.options if o.rank == int(rank.value)]
        if fitting:
            return min(fitting, key=lambda o: o.error)
        return f"rank {int(rank.value)} saves nothing: {_break_even(layer)}"
    if not split.options:
        return nothing_pays(split, multiple)
    if rank.kind == "fraction":
        limit = floor(rank.value * layer.break_even)
        share = rank.value * split.params
        fitting = [o for o in split.options if (o.rank <= limit if o.scheme == "ced" else o.params <= share)]
        if not fitting:
            return f"{rank.value:g} of the break-even rank is {limit}, less than {multiple} (`multiple`)"
        best = {o.scheme: o for o in sorted(fitting, key=lambda o: o.rank)}
        return min(best.values(), key=lambda o: o.error)
    fitting = [o for o in split.options if o.error <= 1 - rank.value]
    if not fitting:
        kept = 1 - min(o.error for o in split.options)
        return f"an energy of {rank.value:g} needs a rank that saves nothing ({kept:.3f} is kept at the largest that does)"
    return min(fitting, key=lambda o: (o.macs, o.error))


def nothing_pays(split: Split, multiple: int) -> str:
    """Why a layer has no option at all."""
    layer = split.layer
    if layer.groups > 1 and layer.weight.shape[1] == 1:
        return "a depthwise convolution has nothing to factorize"
    return f"no rank that is a multiple of {multiple} saves anything: {_break_even(layer)}"


def _break_even(layer: Layer) -> str:
    group = f" in each of {layer.groups} groups" if layer.groups > 1 else ""
    return f"{layer.rows} x {layer.columns} breaks even at rank {layer.break_even:.1f}{group}"


@dataclass(frozen=True)
class Candidate:
    """A layer in the auction: the cost of its dense form, its options, and what a unit of relative error does to the model.

    ``cost`` of an option, where that depends on the layer.
    """

    name: str
    dense: float
    options: tuple[Option, ...]
    sensitivity: float
    cost: Callable[[Option], float] | None = None


def spend(
    candidates: Sequence[Candidate],
    cost: Callable[[Option], float],
    budget: float,
    what: str,
    reachable: Callable[[float], str] = "{:,.0f} for these layers".format,
) -> Mapping[str, Option | None]:
    """Layer name to its option, None where it stays dense, so that the costs' sum is at most ``budget``.

    Args:
        cost: of an option, in the budget's unit, for candidates without their own.
        budget: for these layers together, in the same unit.
        what: the setting, for the error.
        reachable: the setting that these layers' least cost makes, for the error.

    Raises:
        InputError: even the smallest options cost more.
    """
    tables = [_table(c, c.cost or cost) for c in candidates]
    least = sum(min(price for price, _, _ in t) for t in tables)
    if least > budget:
        raise InputError(f"lowrank: {what} cannot be reached; the least reachable is {reachable(least)}")
    low, high = 0.0, 1e-30
    while sum(_pick(t, high)[0] for t in tables) > budget:
        low, high = high, high * 8
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(_pick(t, middle)[0] for t in tables) > budget else (low, middle)
    picks = [_pick(t, high) for t in tables]
    left = budget - sum(p[0] for p in picks)
    while True:
        moves = [
            ((old[1] - new[1]) / max(new[0] - old[0], 1e-9), i, new)
            for i, (t, old) in enumerate(zip(tables, picks, strict=True))
            for new in t
            if new[1] < old[1] and new[0] - old[0] <= left
        ]
        if not moves:
            break
        _, i, new = max(moves, key=lambda m: (m[0], -m[1]))
        left -= new[0] - picks[i][0]
        picks[i] = new
    return {c.name: p[2] for c, p in zip(candidates, picks, strict=True)}


_Row = tuple[float, float, Option | None]


def _table(candidate: Candidate, cost: Callable[[Option], float]) -> list[_Row]:
    """(cost, harm, option) of every choice; None is the dense layer."""
    rows: list[_Row] = [(cost(o), candidate.sensitivity * o.error, o) for o in candidate.options]
    return [*(r for r in rows if r[0] < candidate.dense), (candidate.dense, 0.0, None)]


def _pick(table: list[_Row], price: float) -> _Row:
    return min(table, key=lambda row: (row[1] + price * row[0], row[0]))
