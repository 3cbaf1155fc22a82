"""Dynamic Confidence: what a threshold gives, offline and in the runner of the frozen program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from edgekit import Data
from edgekit.compress.spiking import Spiking
from edgekit.compress.spiking.confidence import (
    NEVER,
    Exit,
    choose_threshold,
    confidences,
    exit_of,
    front,
    points_of,
    replay,
    run_early,
    temperature_of,
)
from edgekit.compress.spiking.settings import EarlyExit
from edgekit.compress.steps import apply
from edgekit.errors import InputError
from edgekit.frozen import load, save
from edgekit.recipe import Block


def recorded(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Sums of noisy outputs (20, 200, 5) whose evidence grows, and labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 5, (200,), generator=generator)
    signal = nn.functional.one_hot(labels, 5).float() * torch.rand(200, 1, generator=generator)
    return (signal + 0.8 * torch.randn(20, 200, 5, generator=generator)).cumsum(0), labels


def test_latency_rises_with_the_threshold_and_its_ends_are_known() -> None:
    sums, _ = recorded()
    steps = [float(replay(sums, Exit(1.0, c / 100))[0].double().mean()) for c in range(0, 102, 3)]
    assert steps == sorted(steps)
    assert replay(sums, Exit(1.0, 0.1))[0].tolist() == [1] * 200
    taken, outputs = replay(sums, Exit(1.0, NEVER))
    assert taken.tolist() == [20] * 200 and torch.equal(outputs, sums[-1])
    warmer, cooler = (replay(sums, Exit(t, 0.8))[0] for t in (3.0, 1.0))
    assert bool((warmer >= cooler).all())


def test_a_constant_on_all_outputs_changes_nothing() -> None:
    sums, _ = recorded()
    assert torch.allclose(confidences(sums, 2.0), confidences(sums + 7, 2.0), atol=1e-5)


def test_the_front_is_sorted_and_nothing_on_it_is_beaten() -> None:
    sums, labels = recorded()
    score = lambda out: 100 * float((out.argmax(1) == labels).float().mean())  # noqa: E731
    tried = points_of(sums, score, temperature_of(sums, labels))
    points = front(tried)
    for i, p in enumerate(points[:-1]):
        assert p.steps < points[i + 1].steps and (p.score < points[i + 1].score or points[i + 1].threshold == NEVER)
    never = next(p for p in points if p.threshold == NEVER)
    assert never.score == score(sums[-1]) and never.steps == 20
    chosen = choose_threshold(tried, 5.0)
    assert chosen.score >= never.score - 5 and chosen.same >= 94.9 and chosen.steps < never.steps
    strict = choose_threshold(tried, 0.0)
    assert strict.score >= never.score and strict.same == 100 and strict.steps >= chosen.steps


@pytest.fixture(scope="module")
def made() -> tuple[Any, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.rand(400, 1, 6, 6)
    y = (x[:, 0, :3].mean((1, 2)) > x[:, 0, 3:].mean((1, 2))).long()
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, 2)
    )
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    data = Data(calibration=x[:100], evaluation=(x[300:], y[300:]), training=(x[:300], y[:300]))
    settings = Spiking(steps=12, early_exit=EarlyExit(max_drop=0.5))
    return apply(model.eval(), [Block("spiking", settings)], data), x[300:], y[300:]


def test_the_runner_stops_where_replay_does(made: tuple[Any, Tensor, Tensor], tmp_path: Path) -> None:
    compressed, x, y = made
    rule = exit_of(compressed.record)
    save(compressed.program, tmp_path / "frozen.pt2")
    assert load(tmp_path).exit == rule
    outputs, steps = run_early(load(tmp_path), x)
    figures = compressed.record["passes"][0]["early exit"]
    assert float(steps.double().mean()) == pytest.approx(figures["mean steps"], abs=1e-3)
    assert 100 * float((outputs.argmax(1) == y).float().mean()) == pytest.approx(figures["score"], abs=1e-3)
    assert 1 <= figures["oracle mean steps"] <= figures["mean steps"] < 12
    for i in range(5):  # a sample alone, and among others
        alone, at = run_early(compressed.program, x[i : i + 1], rule)
        assert int(at) == int(steps[i]) and torch.allclose(alone[0], outputs[i], atol=1e-5)


def test_all_steps_one_by_one_are_the_program(made: tuple[Any, Tensor, Tensor]) -> None:
    compressed, x, _ = made
    outputs, steps = run_early(compressed.program, x[:20], Exit(1.0, NEVER))
    (whole,) = compressed.program.run(x[:20])
    assert steps.tolist() == [12] * 20 and torch.allclose(outputs, whole, atol=1e-5)


def test_a_run_without_early_exit_says_so() -> None:
    with pytest.raises(InputError, match="no early exit"):
        exit_of({"passes": [{"kind": "spiking"}]})
