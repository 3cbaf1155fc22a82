"""Mixed precision: the front against all combinations, budgets kept, scopes kept, accuracy reached."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from float_models import Encoder, Modules, build
from pydantic import ValidationError
from torch import nn

from edgekit.compress.capture import Graph, capture
from edgekit.compress.ptq import PTQ
from edgekit.compress.ptq.budget_solver import least
from edgekit.compress.ptq.budgets import Budget
from edgekit.compress.ptq.mixed import _picked, front
from edgekit.compress.ptq.plan import Plan
from edgekit.compress.ptq.quantize import quantize
from edgekit.compress.ptq.settings import Mixed
from edgekit.compress.ptq.simulate import simulate
from edgekit.data import Data
from edgekit.errors import DataError, InputError

ALL = {"keep_first_last_8bit": False, "observer": "minmax"}


def test_the_front_is_what_all_combinations_leave() -> None:
    generator = torch.Generator().manual_seed(0)
    costs = [sorted(torch.randint(1, 50, (3,), generator=generator).tolist(), reverse=True) for _ in range(7)]
    noises = [sorted(torch.rand(3, generator=generator).tolist()) for _ in range(7)]
    totals = [
        (sum(c[i] for c, i in zip(costs, choice, strict=True)), sum(n[i] for n, i in zip(noises, choice, strict=True)))
        for choice in itertools.product(range(3), repeat=7)
    ]
    best: list[tuple[float, float]] = []
    for cost, noise in sorted(totals):
        if not best or noise < best[-1][1] - 1e-12:
            best.append((cost, noise))
    found = front(costs, noises)
    assert [p.cost for p in found] == [c for c, _ in best]
    assert [p.noise for p in found] == pytest.approx([n for _, n in best])
    for p in found:
        assert p.cost == sum(c[i] for c, i in zip(costs, p.choice, strict=True))


def test_many_layers_stay_few_points_near_the_best() -> None:
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randint(100, 100_000, (120,), generator=generator).tolist()
    noises = [[1.0, 250.0, 4000.0] for _ in sizes]
    found = front([[s * 8, s * 4, s * 2] for s in sizes], noises)
    assert 100 < len(found) <= 200_000
    assert all(a.cost < b.cost and a.noise > b.noise for a, b in itertools.pairwise(found))


def mixed(kind: type[nn.Module], **how: object) -> tuple[Graph, Plan, nn.Module, torch.Tensor]:
    model, x = build(kind, 48)
    with torch.no_grad():
        y = model(x).argmax(1)
    settings = {k: how.pop(k) for k in ("scopes", "keep_first_last_8bit") if k in how}
    graph = capture(model, (x[:1],))
    ptq = PTQ(**{**ALL, **settings}, mixed=Mixed(**how))
    return *quantize(graph, ptq, Data(x, training=(x, y))), model, x


def size(plan: Plan) -> float:
    return sum(w.integers.numel() * w.bits / 8 for w in plan.weights.values())


@pytest.mark.parametrize("kind", [Modules, Encoder])
@pytest.mark.parametrize("share", [0.5, 0.7, 1.0])
def test_a_budget_of_bytes_is_kept_and_used(kind: type[nn.Module], share: float) -> None:
    _, plan, _, _ = mixed(kind, size=share)
    whole = sum(w.integers.numel() for w in plan.weights.values())
    assert size(plan) <= share * whole
    if share == 1.0:
        assert {w.bits for w in plan.weights.values()} == {8}
    assert plan.facts["budget"] == "size" and len(plan.facts["front"]) > 1
    assert all(int(w.integers.abs().max()) < 1 << (w.bits - 1) for w in plan.weights.values())


@pytest.mark.slow
def test_the_choice_has_less_noise_than_others_of_its_size() -> None:
    graph, plan, model, x = mixed(Modules, size=0.75)
    budget = 0.75 * sum(w.integers.numel() for w in plan.weights.values())
    errors = {}
    for bits in itertools.product(("int8", "int4"), repeat=4):
        scopes = dict(zip((n.replace(".", r"\.") for n in plan.weights), bits, strict=True))
        other = quantize(graph, PTQ(**ALL, scopes=scopes), Data(x))[1]
        if size(other) <= budget:
            with torch.no_grad():
                errors[bits] = float((simulate(graph, other)(x) - model(x)).square().mean())
    mine = tuple(f"int{w.bits}" for w in plan.weights.values())
    assert errors[mine] <= 1.5 * min(errors.values()), "noises are taken to add up, which is nearly so"
    assert errors[mine] < sorted(errors.values())[len(errors) // 2]


def test_a_budget_of_bit_operations() -> None:
    _, plan, _, _ = mixed(Modules, bops=0.8, choices=("int8", "int4", "int2"))
    macs = {"features.0": 216 * 256, "features.3": 72 * 64, "features.6": 128 * 64, "head.3": 80}
    assert sum(macs[n] * w.bits for n, w in plan.weights.items()) <= 0.8 * 8 * sum(macs.values())
    assert plan.facts["cost_share"] == pytest.approx(
        sum(macs[n] * w.bits for n, w in plan.weights.items()) / (8 * sum(macs.values())), abs=1e-4
    )


def test_scopes_and_the_outer_layers_go_before() -> None:
    _, plan, _, _ = mixed(Modules, size=0.9, scopes={r"features\.6": "int2"}, keep_first_last_8bit=True)
    bits = {n: w.bits for n, w in plan.weights.items()}
    assert bits["features.0"] == bits["head.3"] == 8 and bits["features.6"] == 2 and bits["features.3"] in (4, 8)


def test_the_fewest_bytes_within_an_accuracy() -> None:
    def explained(outputs: torch.Tensor, y: torch.Tensor) -> float:
        return float(100 - 100 * (outputs - y).square().mean() / y.var())

    model, x = build(Modules, 48)
    graph = capture(model, (x[:1],))
    with torch.no_grad():
        y = model(x)
    sizes = []
    for drop in (1000.0, 5.0, 0.05):
        how = Mixed(max_accuracy_drop=drop, choices=("int8", "int4", "int2"))
        _, plan = quantize(graph, PTQ(**ALL, mixed=how), Data(x, training=(x, y), metric=explained))
        with torch.no_grad():
            assert 100 - explained(simulate(graph, plan)(x), y) <= drop
        metric = plan.facts["metric"]
        assert isinstance(metric, dict) and metric["float"] - metric["chosen"] <= drop
        sizes.append(size(plan))
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    data = Data(x, training=(x, y), metric=explained)
    with pytest.raises(InputError, match=r"the most bits allowed lose .* more than max_accuracy_drop 0.001"):
        quantize(graph, PTQ(**ALL, mixed=Mixed(max_accuracy_drop=0.001, choices=("int4",))), data)
    with pytest.raises(InputError, match=r"1.000 of int8's instructions, more than 0.8"):
        quantize(graph, PTQ(**ALL, mixed=Mixed(max_accuracy_drop=50, instructions=0.8, target="cortex-m4")), data)


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(InputError, match="raise the budget"):
        mixed(Modules, size=0.2)
    with pytest.raises(ValidationError, match="exactly one"):
        Mixed(size=0.5, bops=0.5)
    model, x = build(Modules, 8)
    with pytest.raises(DataError, match="labelled"):
        quantize(capture(model, (x[:1],)), PTQ(mixed=Mixed(max_accuracy_drop=1.0)), Data(x))


def test_instructions_beside_bytes_are_kept() -> None:
    free = mixed(Modules, size=0.7)[1].facts
    assert "instructions" not in free["shares"]
    dear = mixed(Modules, size=0.7, instructions=10.0, target="cortex-m4")[1].facts
    least = mixed(Modules, size=0.7, instructions=dear["shares"]["instructions"] - 1e-3, target="cortex-m4")[1]
    assert least.facts["shares"]["instructions"] < dear["shares"]["instructions"]
    assert least.facts["shares"]["size"] <= 0.7 and least.facts["budget"] == "size and instructions"
    with pytest.raises(InputError, match=r"within size 0.7 at least \d\.\d+ of int8's instructions are needed") as error:
        mixed(Modules, size=0.7, instructions=1.0, target="cortex-m4")
    enough = float(str(error.value).split("at least ")[1].split()[0])
    assert mixed(Modules, size=0.7, instructions=enough, target="cortex-m4")[1].facts["shares"]["instructions"] <= enough


def test_two_limits_against_all_choices() -> None:
    """The best of all 3^6 choices within both, by the noises that were measured."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        draws = torch.rand(3, 6, 3, generator=generator, dtype=torch.float64).sort(2, descending=True).values
        size, time, noise = draws[0].tolist(), draws[1].flip(1).tolist(), draws[2].flip(1).tolist()
        limits = [Budget(n, tuple(map(tuple, c)), sum(map(max, c)), 0.8) for n, c in (("size", size), ("latency", time))]
        every = [c for c in itertools.product(range(3), repeat=6) if all(x.within(c) for x in limits)]
        best = min(sum(ns[i] for ns, i in zip(noise, c, strict=True)) for c in every)
        found = _picked(limits, noise, "")
        assert all(x.within(found.choice) for x in limits) and found.noise == pytest.approx(best)
    assert least(noise, [Budget("size", limits[0].costs, limits[0].whole, limits[0].least / 2)]) is None


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = {path!r}
import test_mixed
test_mixed.choosing(Path({folder!r}), dies_after={after})
"""


def choosing(folder: Path, dies_after: int = 10**6) -> tuple[Plan, int]:
    """The accuracy-aware choice, its results kept in ``folder``, and how often the metric was taken."""
    model, x = build(Modules, 48)
    with torch.no_grad():
        y = model(x)
    calls = []

    def explained(outputs: torch.Tensor, y: torch.Tensor) -> float:
        calls.append(1)
        if len(calls) > dies_after:
            os.kill(os.getpid(), signal.SIGKILL)
        return float(100 - 100 * (outputs - y).square().mean() / y.var())

    how = Mixed(max_accuracy_drop=0.5, choices=("int8", "int4", "int2"))
    data = Data(x, training=(x, y), metric=explained)
    return quantize(capture(model, (x[:1],)), PTQ(**ALL, mixed=how), data, folder=folder)[1], len(calls)


@pytest.mark.slow
def test_a_killed_choice_goes_on_at_its_last_measurement(tmp_path: Path) -> None:
    whole, calls = choosing(tmp_path / "undisturbed")
    assert calls > 3
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    code = KILLED.format(path=paths, folder=str(tmp_path / "killed"), after=2)
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    with (tmp_path / "killed" / "bits.jsonl").open("a") as file:
        file.write('\n["metric int8')  # cut off while it was written
    again, more = choosing(tmp_path / "killed")
    assert more == calls - 2
    assert {n: w.bits for n, w in again.weights.items()} == {n: w.bits for n, w in whole.weights.items()}
    assert again.facts == whole.facts


def test_only_what_the_target_stores_is_chosen() -> None:
    choices = ("int8", "int4", "int2")
    _, plan, _, _ = mixed(Modules, max_accuracy_drop=1e9, choices=choices, target="executorch")
    assert {n: w.bits for n, w in plan.weights.items()} == {"features.0": 8, "features.3": 8, "features.6": 8, "head.3": 4}
    _, plan, _, _ = mixed(Modules, max_accuracy_drop=1e9, choices=choices, target="tflite")
    assert {n: w.bits for n, w in plan.weights.items()} == {"features.0": 4, "features.3": 4, "features.6": 4, "head.3": 2}


def test_a_cost_that_bits_cannot_reach_is_said() -> None:
    with pytest.raises(InputError, match="bits alone do not make this target faster"):
        mixed(Modules, instructions=0.5, target="cortex-m4")
    with pytest.raises(InputError, match="name one of"):
        mixed(Modules, instructions=1.0)
    with pytest.raises(InputError, match="give latency instead"):
        mixed(Modules, instructions=1.0, target="tflite")
    with pytest.raises(ValidationError, match="not both"):
        Mixed(instructions=1.0, latency=1.0)
