"""The spiking examples do what they say: places without hyperactive neurons, motion seen from the order of events."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from edgekit import recipe
from edgekit.compress.steps import apply

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def loaded(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, EXAMPLES / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_removing_hyperactive_neurons_helps() -> None:
    found = loaded("places/places.py").main()
    assert found["hyperactive removed"] > found["all neurons"] + 5 and found["removed"] > 0


def test_planted_hyperactive_neurons_ruin_recall_and_are_removed() -> None:
    places = loaded("places/places.py")
    reference, calibration, query = places.route(8)
    modules = [places.train(reference, range(i * 4, i * 4 + 4), 24, 10, seed=i) for i in range(2)]
    every = [torch.ones(24, dtype=torch.bool)] * 2
    before = places.scores(modules, query, 8, every)
    alone = places.scores(modules[:1], query, 8, every[:1])
    assert torch.equal(before[:, :4], alone[:, :4])  # a module more changes no other's scores
    restless = replace(modules[0], weights=modules[0].weights.mean(0, keepdim=True).expand(24, -1) + torch.rand(24, 196))
    planted = [*modules, replace(restless, places=torch.arange(24) % 8)]
    threshold, kept = places.choose(planted, reference, calibration, 8)
    cases = ((modules, every), (planted, [*every, every[0]]), (planted, kept))
    alone, ruined, cured = (places.recall(places.scores(m, query, 8, k)) for m, k in cases)
    assert threshold > 0 and float(kept[2].float().mean()) < float(torch.cat(kept[:2]).float().mean())
    assert ruined < cured - 10 and cured >= alone - 15
    with pytest.raises(ValueError, match="every neuron is hyperactive"):
        places.mask([torch.ones(3)], 1)


def test_the_order_of_events_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES / "events"))
    settings = recipe.load(EXAMPLES / "events" / "recipe.yaml")
    bars = loaded("events/bars.py")
    made = apply(bars.build(), settings.compress, bars.load())
    found = made.record["passes"][0]
    assert found["early exit"]["score of all steps"] > 95
    assert found["early exit"]["fewer steps %"] > 30 and found["early exit"]["score"] > 95
