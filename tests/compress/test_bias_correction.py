"""Bias correction: the means of a quantized net's layers against the float net's."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from float_models import SHAPES, Modules, build
from torch import nn

from edgekit.compress.capture import Graph, capture
from edgekit.compress.ptq import PTQ
from edgekit.compress.ptq.brevitas_twin import layers_of
from edgekit.compress.ptq.plan import Plan
from edgekit.compress.ptq.quantize import quantize
from edgekit.compress.ptq.simulate import simulate, taps
from edgekit.data import Data

FOUR = {"weights": "int4", "keep_first_last_8bit": False, "observer": "minmax"}


def channel_means(values: torch.Tensor) -> torch.Tensor:
    return values.mean((0, 2, 3)) if values.dim() == 4 else values.flatten(0, -2).mean(0)


@pytest.mark.parametrize("kind", SHAPES)
def test_each_layers_mean_is_the_float_models(kind: type[nn.Module]) -> None:
    """Of all layers: a later correction does not undo an earlier one."""
    model, x = build(kind)
    errors = {}
    captured = capture(model, (x[:1],))
    for flag in (False, True):
        graph, plan = quantize(captured, PTQ(bias_correction=flag, **FOUR), Data(x))
        seen: dict[str, torch.Tensor] = {}
        simulation = simulate(graph, plan)
        for name, layer in layers_of(simulation, plan).items():
            layer.register_forward_hook(partial(_keep, seen, name))
        with torch.no_grad():
            simulation(x)
            real = _float_means(graph, plan, x)
        errors[flag] = max(float((seen[n] - real[n]).abs().max()) for n in seen)
        steps = [float(w.scale.max()) * plan.activations[u.inputs[0].name].scale for u in plan.units if u.weight is not None
                 for w in [plan.weights[u.name]]]  # fmt: skip
    assert errors[True] <= max(steps), "within a step of the bias"
    assert errors[True] < 0.1 * errors[False]


def _keep(seen: dict[str, torch.Tensor], name: str, _module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
    seen[name] = channel_means(output)


def _float_means(graph: Graph, plan: Plan, x: torch.Tensor) -> dict[str, torch.Tensor]:
    nodes = {u.name: u.nodes[0].name for u in plan.units if u.weight is not None}
    values = taps(graph.module, list(nodes.values()), (x,))
    return {name: channel_means(values[node]) for name, node in nodes.items()}


def test_weights_and_scales_stay() -> None:
    model, x = build(Modules)
    graph = capture(model, (x[:1],))
    plans = [quantize(graph, PTQ(bias_correction=flag, **FOUR), Data(x))[1] for flag in (False, True)]
    for name, w in plans[0].weights.items():
        assert torch.equal(w.integers, plans[1].weights[name].integers)
        assert torch.equal(w.scale, plans[1].weights[name].scale)
        assert not torch.equal(w.bias, plans[1].weights[name].bias)
    assert all("bias corrected" in text for text in plans[1].changes.values())


def test_a_batch_at_a_time_gives_what_all_at_once_gives() -> None:
    model, x = build(Modules)
    biases = []
    graph = capture(model, (x[:1],))
    for size in (7, 64):
        settings = PTQ(bias_correction=True, batch_size=size, **FOUR)
        _, plan = quantize(graph, settings, Data(x))
        biases.append(plan.weights)
    for name, w in biases[0].items():
        torch.testing.assert_close(w.bias, biases[1][name].bias, rtol=1e-3, atol=1e-3)
