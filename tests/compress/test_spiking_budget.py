"""A budget picks method and steps; what does not fit is said with what came nearest."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from edgekit import Data, steps_chart
from edgekit.compress.capture import capture
from edgekit.compress.spiking import Spiking
from edgekit.compress.spiking.step import spiking
from edgekit.errors import InputError


@pytest.fixture(scope="module")
def case() -> tuple[nn.Module, Data]:
    torch.manual_seed(0)
    x = torch.rand(900, 8)
    y = (x[:, :4].sum(1) > x[:, 4:].sum(1)).long() + 2 * (x[:, 0] > 0.6).long()
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(250):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[:600]), y[:600]).backward()
        optimizer.step()
    return model.eval(), Data(calibration=x[:128], evaluation=(x[600:], y[600:]), training=(x[:600], y[:600]))


def chosen(case: tuple[nn.Module, Data], **budget: Any) -> dict[str, Any]:
    model, data = case
    graph = capture(model, (data.calibration[:1],))
    return spiking(graph, Spiking(method="auto", epochs=10, learning_rate=5e-3, **budget), data)[1]


def test_the_cheapest_that_is_good_enough(case: tuple[nn.Module, Data]) -> None:
    found = chosen(case, target_accuracy=85.0)
    rows = found["tried for the budget"]
    fits = [r for r in rows if r["verdict"] != "outside the budget"]
    (taken,) = [r for r in rows if r["verdict"] == "chosen"]
    assert taken["SynOps and MACs a sample"] == min(r["SynOps and MACs a sample"] for r in fits)
    assert found["chosen"] == f"{taken['method']} at {taken['steps']} steps" and found["score needed there"] >= 85
    assert found["by steps"][-1]["score"] >= 83


def test_a_target_asked_of_the_float_models_answers_is_said(case: tuple[nn.Module, Data]) -> None:
    model, data = case
    settings = Spiking(method="auto", target_accuracy=80.0, max_timesteps=4)
    notes = spiking(capture(model, (data.calibration[:1],)), settings, Data(calibration=data.calibration))[2]
    assert any("target_accuracy was asked of same class as the float model on 128 calibration samples" in n for n in notes)


def test_the_best_within_limits(case: tuple[nn.Module, Data]) -> None:
    found = chosen(case, max_timesteps=4)
    rows = found["tried for the budget"]
    assert all(r["steps"] <= 4 for r in rows) and {r["method"] for r in rows} == {"calibrate", "qcfs"}
    (taken,) = [r for r in rows if r["verdict"] == "chosen"]
    assert taken["score"] == max(r["score"] for r in rows)
    few = chosen(case, max_synops=taken["SynOps and MACs a sample"] * 0.7, max_timesteps=8)
    assert few["SynOps a sample"] + few["MACs a sample"] <= taken["SynOps and MACs a sample"] * 0.75


def test_a_budget_that_nothing_meets(case: tuple[nn.Module, Data]) -> None:
    with pytest.raises(
        InputError, match=r"no method meets target_accuracy 100, max_timesteps 2; nearest is \w+ at 2 steps with \d"
    ):
        chosen(case, target_accuracy=100.0, max_timesteps=2)


def test_the_score_is_drawn_by_steps_and_by_synops(case: tuple[nn.Module, Data]) -> None:
    found = chosen(case, max_timesteps=8)
    drawn = steps_chart.drawings(found)
    assert [d["x_title"] for d in drawn] == ["time steps", "SynOps for one sample"]
    for d in drawn:
        xs = [p[0] for p in d["points"]]
        assert xs == sorted(xs) and d["left"] <= xs[0] and xs[-1] <= d["right"] and d["judged"] == found["judged by"]
    assert steps_chart.drawings({"by steps": found["by steps"][:1]}) == [] and steps_chart.drawings({}) == []
