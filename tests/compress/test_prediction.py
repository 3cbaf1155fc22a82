"""Prediction difference, distribution correction and augmentations against their formulas."""

from __future__ import annotations

import copy

import pytest
import torch
from float_models import Encoder, Modules, build
from torch import nn

from edgekit.compress.capture import capture
from edgekit.compress.ptq import PTQ
from edgekit.compress.ptq.augment import augmented
from edgekit.compress.ptq.distribution import corrected, has_statistics, statistics_loss
from edgekit.compress.ptq.prediction import prediction_difference
from edgekit.compress.ptq.quantize import quantize
from edgekit.compress.ptq.settings import Reconstruct
from edgekit.data import Data
from edgekit.errors import DataError


def test_the_prediction_difference_of_class_scores() -> None:
    found, wanted = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    p, q = (wanted / 2).softmax(1), (found / 2).softmax(1)
    expected = 4 * (p * (p / q).log()).sum(1).mean()
    torch.testing.assert_close(prediction_difference([found], [wanted], 2.0), expected)
    shifted = found + torch.randn(6, 1, dtype=torch.float64)
    torch.testing.assert_close(prediction_difference([shifted], [wanted], 2.0), expected)
    assert prediction_difference([wanted + 3], [wanted], 4.0).abs() < 1e-12
    assert expected > 0


def test_the_prediction_difference_of_other_outputs_is_the_squared_error_over_the_variance() -> None:
    wanted = torch.randn(4, 3, 8)
    torch.testing.assert_close(prediction_difference([wanted + 1], [wanted], 4.0), 1 / wanted.var())


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.bn(self.conv(x)))


def normed() -> Normed:
    model = Normed()
    model.bn.running_mean.normal_(0, 0.5)
    model.bn.running_var.uniform_(0.3, 2)
    model.bn.weight.data.uniform_(-1.5, 1.5)
    model.bn.bias.data.normal_()
    return model.eval()


def test_statistics_of_folded_batch_norms_are_those_at_their_inputs() -> None:
    model, x = normed(), torch.randn(5, 3, 8, 8)
    graph = capture(model, (x[:1],))
    assert has_statistics(graph.module)
    node = next(n for n in graph.module.graph.nodes if "batch_norm" in n.meta)
    with torch.no_grad():
        inner = model.conv(x)
        folded = model.bn(inner)
    mean, spread = inner.mean((2, 3)), inner.flatten(2).std(2)
    wanted = (mean - model.bn.running_mean).square() + (spread - (model.bn.running_var + 1e-6).sqrt()).square()
    found = statistics_loss([(folded, node.meta["batch_norm"])])
    torch.testing.assert_close(found, wanted.sum() / 5, rtol=1e-3, atol=1e-3)  # the fold has the layer's own eps


def test_distribution_correction_lowers_the_statistics_loss_and_an_anchor_holds() -> None:
    model, x = normed(), torch.randn(8, 3, 8, 8)
    graph = capture(model, (x[:1],))
    before = copy.deepcopy(model.state_dict())
    node = next(n for n in graph.module.graph.nodes if "batch_norm" in n.meta)

    def loss(values: torch.Tensor) -> float:
        with torch.no_grad():
            return float(statistics_loss([(model.bn(model.conv(values)), node.meta["batch_norm"])]))

    moved, held = corrected(graph.module, x, 60, 1.0), corrected(graph.module, x, 60, 1e-7)
    assert loss(moved) < 0.97 * loss(x)
    assert float((held - x).abs().max()) < 1e-2 * float((moved - x).abs().max())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_augmentations_are_what_their_names_say() -> None:
    x, generator = torch.randn(40, 2, 8, 8), torch.Generator().manual_seed(0)
    assert torch.equal(augmented(x, "flip", generator), x.flip(3))
    mixed = augmented(x, "mixup", generator)
    share = torch.stack([(m * o).sum() / (o * o).sum() for m, o in zip(mixed, x, strict=True)])
    assert 0.4 < float(share.mean()) < 0.8, "its own part is the larger one"
    cut = augmented(x, "cutmix", generator)
    own = (cut == x).all(1).flatten(1).float().mean(1)
    assert float(own.min()) >= 1 - (6 / 8) ** 2 - 1e-6
    assert all(any(torch.equal(c[:, i, j], o[:, i, j]) for o in x) for c in cut[:3] for i in range(8) for j in range(8))
    with pytest.raises(DataError, match="float images"):
        augmented(torch.randn(4, 6), "flip", generator)


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        {"prediction": 1.0},
        {"prediction": 1.0, "search_scales": True},
        {"correction_steps": 3},
        {"augment": "flip"},
        {"augment": "cutmix", "prediction": 0.5, "correction_steps": 2},
    ],
    ids=lambda how: "-".join(how),
)
@pytest.mark.parametrize("kind", [Modules, Encoder])
def test_every_setting_gives_a_plan_of_its_own(how: dict[str, object], kind: type[nn.Module]) -> None:
    model, x = build(kind, 32)
    graph = capture(model, (x[:1],))
    if kind is Encoder and "augment" in how:
        with pytest.raises(DataError, match="float images"):
            quantize(graph, PTQ(method="brecq", reconstruct=Reconstruct(**how)), Data(x))
        return
    plans = []
    for settings in ({}, how):
        made = Reconstruct(steps=8, held_out=0.5, **settings)
        four = PTQ(method="brecq", weights="int4", activations="int4", keep_first_last_8bit=False, reconstruct=made)
        plans.append(quantize(graph, four, Data(x))[1])
    same = [
        torch.equal(w.integers, plans[1].weights[n].integers) and torch.equal(w.bias, plans[1].weights[n].bias)
        for n, w in plans[0].weights.items()
    ]
    if kind is Modules:
        assert not all(same)
    assert all(int(w.integers.abs().max()) <= 7 for w in plans[1].weights.values())
