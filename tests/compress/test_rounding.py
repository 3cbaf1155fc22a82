"""GPTQ, GPFQ and learned rounding: layer errors, settings kept, integers where they belong, and the same ones again."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from float_models import SHAPES, Encoder, Functional, Modules, Waves, build, related
from torch import nn

from edgekit.compress.capture import Graph, capture
from edgekit.compress.ptq import PTQ
from edgekit.compress.ptq.brevitas_twin import layers_of, twin
from edgekit.compress.ptq.freeze import freeze
from edgekit.compress.ptq.quantize import quantize
from edgekit.compress.ptq.simulate import simulate
from edgekit.data import Data

METHODS = ["gptq", "gpfq", "learned_round"]
FOUR = {"weights": "int4", "keep_first_last_8bit": False, "observer": "minmax"}


@cache
def ready(kind: type[nn.Module]) -> tuple[Graph, torch.Tensor]:
    """A captured model and inputs; nothing changes a graph, so tests share it."""
    model, x = build(kind, 32)
    return capture(model, (x[:1],)), x


def output_error(model: nn.Module, x: torch.Tensor, method: str) -> float:
    graph, plan = quantize(capture(model, (x[:1],)), PTQ(method=method, samples=len(x), **FOUR), Data(x))
    with torch.no_grad():
        real = model(x)
        return float((simulate(graph, plan)(x) - real).square().mean() / real.var())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(24, 16), (24,)),
        (nn.Conv2d(4, 8, 3, padding=1), (4, 6, 6)),
        (nn.Conv2d(8, 8, 3, groups=8), (8, 6, 6)),
        (nn.Conv2d(8, 8, 3, 2, 1, groups=2), (8, 6, 6)),
    ],
    ids=["linear", "conv", "depthwise", "grouped"],
)
def test_one_layer_has_less_error_than_rounded_to_nearest(method: str, layer: nn.Module, shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, 0, 0.3)
    model = nn.Sequential(layer).eval()
    x = related(shape)
    assert output_error(model, x, method) < 0.9 * output_error(model, x, "nearest")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", SHAPES)
def test_every_kind_of_graph_can_be_rounded(method: str, kind: type[nn.Module]) -> None:
    graph, x = ready(kind)
    graph, plan = quantize(graph, PTQ(method=method, learned_round_steps=3, **FOUR), Data(x))
    _, nearest = quantize(graph, PTQ(**FOUR), Data(x))
    moved = 0
    for name, w in plan.weights.items():
        assert torch.equal(w.scale, nearest.weights[name].scale), "scales are the plan's"
        assert w.integers.dtype == torch.int8 and int(w.integers.abs().max()) <= 7
        moved += int((w.integers != nearest.weights[name].integers).sum() + (w.bias != nearest.weights[name].bias).sum())
    assert moved > 0
    assert torch.isfinite(freeze(graph, plan).run(x[:2])[0]).all()
    assert all(method in text for text in plan.changes.values())


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_integers(method: str) -> None:
    plans = []
    for _ in range(2):
        graph, x = ready(Modules)
        plans.append(quantize(graph, PTQ(method=method, learned_round_steps=5, seed=3, **FOUR), Data(x))[1])
    for name, w in plans[0].weights.items():
        assert torch.equal(w.integers, plans[1].weights[name].integers)
        assert torch.equal(w.bias, plans[1].weights[name].bias)


def test_bits_of_each_layer_are_kept() -> None:
    graph, x = ready(Modules)
    settings = PTQ(weights="int4", method="gptq", scopes={r"features\.6": "int2"})
    _, plan = quantize(graph, settings, Data(x))
    limits = {name: (w.bits, int(w.integers.abs().max())) for name, w in plan.weights.items()}
    assert {name: bits for name, (bits, _) in limits.items()} == {
        "features.0": 8, "features.3": 4, "features.6": 2, "head.3": 8,
    }  # fmt: skip
    assert all(largest <= (1 << (bits - 1)) - 1 for bits, largest in limits.values())


def test_learned_rounding_only_chooses_between_the_two_neighbours() -> None:
    graph, x = ready(Functional)
    graph, plan = quantize(graph, PTQ(method="learned_round", learned_round_steps=20, **FOUR), Data(x))
    layers = layers_of(twin(graph, plan), plan)
    for name, w in plan.weights.items():
        exact = layers[name].get_parameter("weight") / w.scale.view(-1, *[1] * (w.integers.dim() - 1))
        assert float((exact - w.integers).abs().max()) <= 1 + 1e-4


@pytest.mark.parametrize("kind", [Modules, Functional, Waves, Encoder])
def test_the_twin_computes_what_the_simulation_computes(kind: type[nn.Module]) -> None:
    graph, x = ready(kind)
    graph, plan = quantize(graph, PTQ(weights="int4"), Data(x))
    step = plan.activations[plan.units[-1].output.name].scale
    with torch.no_grad():
        difference = (twin(graph, plan)(x) - simulate(graph, plan)(x)).abs().max()
    assert float(difference) <= 2.01 * step


def test_progress_counts_layers() -> None:
    graph, x = ready(Modules)
    seen: list[tuple[str, int, int]] = []
    settings = PTQ(method="gptq", bias_correction=True)
    quantize(graph, settings, Data(x), progress=lambda *call: seen.append(call))
    assert [c[1:] for c in seen if c[0] == "gptq"] == [(i, 4) for i in range(1, 5)]
    assert [c[1:] for c in seen if c[0] == "correct biases"] == [(i, 4) for i in range(1, 5)]
