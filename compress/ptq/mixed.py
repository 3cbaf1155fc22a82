"""Bits of each layer's weights, chosen to fit a budget: measured noise, an exact front, the best choice within the limits.

The noise that a layer's weights make at the model's output is measured for each choice of bits, that layer alone; the noises of
layers are taken to add up, as HAWQ and its successors do (Dong et al. 2020). Which choices cost least for each total noise is a
multiple-choice knapsack: all points that no other one beats are found by adding layer after layer and dropping what is beaten;
the one choice within one or more limits is an integer program (:mod:`edgekit.compress.ptq.budget_solver`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from edgekit.compress.capture import Graph
from edgekit.compress.ptq.budget_solver import least
from edgekit.compress.ptq.budgets import Budget, budgets, storable
from edgekit.compress.ptq.journal import Journal
from edgekit.compress.ptq.plan import Batches, make_plan, weight_bits
from edgekit.compress.ptq.sensitivity import Switched, first_samples, sqnr_db
from edgekit.compress.ptq.settings import PTQ, Mixed, WeightType, bits_of, stored_bits
from edgekit.compress.ptq.simulate import simulate
from edgekit.compress.ptq.units import Unit, find_units
from edgekit.data import Data, batches
from edgekit.errors import DataError, InputError

__all__ = ["Point", "choose_bits", "front"]

_STEPS = 20_000
"""Costs are rounded up to so many parts of the largest total, so that a front of many layers stays small."""


@dataclass(frozen=True)
class Point:
    """A choice that no other one beats: its cost, its noise, and for each layer the number of its choice."""

    cost: float
    noise: float
    choice: tuple[int, ...]


def front(costs: Sequence[Sequence[float]], noises: Sequence[Sequence[float]]) -> list[Point]:
    """All choices, one for each layer, that no other beats in both total cost and total noise; cheapest first.

    Args:
        costs, noises: for each layer the cost and the noise of each of its choices.

    Exact where all costs are multiples of ``largest total / 20000``; else costs are rounded up to such multiples while points are
    compared, so what is returned never costs more than it says.
    """
    unit = sum(max(c) for c in costs) / _STEPS
    points = [Point(0.0, 0.0, ())]
    for cost, noise in zip(costs, noises, strict=True):
        grown = [
            Point(p.cost + c, p.noise + n, (*p.choice, i))
            for p in points
            for i, (c, n) in enumerate(zip(cost, noise, strict=True))
        ]
        grown.sort(key=lambda p: (p.cost, p.noise))
        points, best, last = [], float("inf"), -1.0
        for p in grown:
            if p.noise < best:
                if points and len(grown) > _STEPS and p.cost - last < unit:
                    continue
                points.append(p)
                best, last = p.noise, p.cost
    return points


def choose_bits(
    graph: Graph,
    settings: PTQ,
    data: Data,
    stream: Batches,
    progress: Callable[[int, int], None] | None = None,
    folder: Path | None = None,
) -> tuple[PTQ, dict[str, object]]:
    """The settings with a scope for each layer, and what was decided (the front, the point, its prediction).

    Args:
        folder: what was measured is kept here and taken from here.

    Raises:
        InputError: even the fewest bits of ``choices`` are over the budget, or the most lose more than ``max_accuracy_drop``.
        DataError: ``max_accuracy_drop`` without labelled training samples.
    """
    how = settings.mixed
    assert how is not None
    journal = Journal(None if folder is None else folder / "bits.jsonl")
    units, unquantized = find_units(graph, settings.skip, stored_bits(settings.activations))
    layers = [u for u in units if u.weight is not None]
    choices = _choices(layers, units, settings, how)
    if how.target:
        choices = storable(graph, layers, choices, how.target)
    noises: dict[str, list[float]] = {u.name: [] for u in layers}
    samples = first_samples(graph, stream, how.samples)
    plans = {}
    for kind in sorted({c for found in choices.values() for c in found}, key=bits_of, reverse=True):
        everywhere: dict[str, WeightType] = {".*": kind}
        plans[kind] = make_plan(graph, units, unquantized, replace(settings, scopes=everywhere, mixed=None), stream)
        model = Switched(graph, plans[kind], samples)
        for u in layers:
            if kind in choices[u.name]:
                noises[u.name].append(journal.number(f"noise {kind} {u.name}", partial(model.noise, [u.name], ())))
                if progress:
                    progress(sum(map(len, noises.values())), sum(map(len, choices.values())))
    in_order = [[c for c in plans if c in choices[u.name]] for u in layers]
    inputs = [model.plan.activations[u.inputs[0].name] for u in layers]
    limits = budgets(graph, layers, in_order, settings, how, samples[0], [q.few or q.bits for q in inputs])
    first, noise, measured = limits[0], [noises[u.name] for u in layers], dict[str, object]()
    points = front(first.costs, noise)
    if how.max_accuracy_drop is not None:
        score = _scorer(graph, settings, how, data, layers, in_order, stream, journal)
        inside = [p for p in points if all(x.within(p.choice) for x in limits)]
        point = _accurate(inside or [_picked(limits, noise, how.target)], score, how.max_accuracy_drop)
        measured = {"metric": {"float": score(None), "chosen": score(point)}}  # kept by the journal, not measured again
    else:
        point = _picked(limits, noise, how.target)
    bits = {u.name: found[i] for u, found, i in zip(layers, in_order, point.choice, strict=True)}
    scopes: dict[str, WeightType] = {**settings.scopes, **{re.escape(name): kind for name, kind in bits.items()}}
    named = ["accuracy"] if how.max_accuracy_drop is not None else []
    record: dict[str, object] = {
        "budget": " and ".join([*named, *(x.name for x in limits if x.share is not None)]),
        "cost": first.name,
        "cost_share": round(first.cost(point.choice) / first.whole, 4),
        "target": how.target,
        "shares": {x.name: round(x.cost(point.choice) / x.whole, 4) for x in limits},
        "limits": {x.name: x.share for x in limits if x.share is not None},
        "predicted_db": round(sqnr_db(model.signal, point.noise), 2),
        "bits": bits,
        **measured,
        "front": [{"cost_share": round(p.cost / first.whole, 4), "predicted_db": round(sqnr_db(model.signal, p.noise), 2)}
                  for p in _thinned(points, 60)],
    }  # fmt: skip
    return replace(settings, scopes=scopes, mixed=None), record


def _choices(layers: Sequence[Unit], units: Sequence[Unit], settings: PTQ, how: Mixed) -> Mapping[str, tuple[WeightType, ...]]:
    """What each layer may choose from: one thing where a scope or ``keep_first_last_8bit`` says so."""
    fixed = weight_bits(units, replace(settings, weights="int2", mixed=None))
    other = weight_bits(units, replace(settings, weights="int4", mixed=None))
    kinds: dict[int, WeightType] = {8: "int8", 4: "int4", 2: "int2"}
    return {u.name: how.choices if fixed[u.name] != other[u.name] else (kinds[fixed[u.name]],) for u in layers}


def _picked(limits: Sequence[Budget], noise: Sequence[Sequence[float]], target: str) -> Point:
    """The choice of least noise within all limits."""
    for limit in limits:
        if limit.share is not None and limit.least > limit.share * (1 + 1e-9):
            more = "cheapest bits make" if limit.name in ("instructions", "latency") else "fewest bits allowed make"
            raise InputError(
                f"mixed: the {more} {limit.least:.3f} of int8's {_WORDS[limit.name]}, more than {limit.share}; raise the budget, "
                f"{_remedy(limit.name, target)}"
            )
    choice = least(noise, limits)
    if choice is None:
        both = " and ".join(f"{x.name} {x.share}" for x in limits)
        first, second = limits
        cheapest = least(second.costs, [first])
        assert cheapest is not None
        share = math.ceil(second.cost(cheapest) / second.whole * 1000) / 1000
        far = f"within {first.name} {first.share} at least {share:.3f} of int8's {_WORDS[second.name]}"
        raise InputError(f"mixed: no choice of bits keeps both {both}: {far} are needed; raise one of them")
    return Point(limits[0].cost(choice), sum(ns[i] for ns, i in zip(noise, choice, strict=True)), choice)


_WORDS = {"size": "bytes", "bops": "bit operations", "instructions": "instructions", "latency": "time"}


def _remedy(budget: str, target: str) -> str:
    if budget in ("instructions", "latency"):
        return "or take a smaller model (lowrank): bits alone do not make this target faster"
    stores = f", or another target: bits that {target} does not store were left out" if target else ""
    return f"add choices, or set keep_first_last_8bit: false{stores}"


def _accurate(points: Sequence[Point], score: Callable[[Point | None], float], drop: float) -> Point:
    """The cheapest point within the accuracy, which is taken to rise along the front; InputError if its end is not within it."""
    least = score(None) - drop
    low, high = 0, len(points) - 1
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if score(points[middle]) >= least else (middle + 1, high)
    if (found := score(points[high])) < least:
        raise InputError(
            f"mixed: the most bits allowed lose {score(None) - found:.3g} of the task metric on training samples, more than "
            f"max_accuracy_drop {drop:g}; raise it, or the other limit if there is one, or add choices"
        )
    return points[high]


def _scorer(
    graph: Graph, settings: PTQ, how: Mixed, data: Data, layers: Sequence[Unit], in_order: Sequence[Sequence[WeightType]],
    stream: Batches, journal: Journal,
) -> Callable[[Point | None], float]:  # fmt: skip
    """A point's task metric (None: the float model's) on labelled training samples."""
    if data.training is None:
        raise DataError(
            "mixed: max_accuracy_drop needs labelled samples; return Data(..., training=(x, y)) from the data factory"
        )
    xs, ys, count = [], [], 0
    for batch in batches(data.training, 64 if graph.dynamic_batch else 1, what="training"):
        *inputs, y = batch
        xs.append(tuple(inputs))
        ys.append(y)
        count += len(y)
        if count >= how.labelled:
            break
    labels = torch.cat(ys)
    units, unquantized = find_units(graph, settings.skip, stored_bits(settings.activations))

    def measured(point: Point | None) -> float:
        module: torch.nn.Module = graph.module
        if point is not None:
            named = {re.escape(u.name): found[i] for u, found, i in zip(layers, in_order, point.choice, strict=True)}
            made = make_plan(graph, units, unquantized, replace(settings, scopes=named, mixed=None), stream)
            module = simulate(graph, made)
        with torch.no_grad():
            outputs = torch.cat([module(*x) for x in xs])
        if callable(data.metric):
            return float(data.metric(outputs, labels))
        return 100 * float((outputs.flatten(1).argmax(1) == labels).float().mean())

    def score(point: Point | None) -> float:
        name = "float" if point is None else " ".join(found[i] for found, i in zip(in_order, point.choice, strict=True))
        return journal.number(f"metric {name}", partial(measured, point))

    return score


def _thinned(points: Sequence[Point], most: int) -> list[Point]:
    step = max(1, -(-len(points) // most))
    kept = list(points[::step])
    return kept if kept[-1] is points[-1] else [*kept, points[-1]]
