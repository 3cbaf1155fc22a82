"""Quantization-aware training on scikit-learn digits, scored with the frozen program."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekit.compress.capture import Graph, capture
from edgekit.compress.ptq import PTQ, QAT
from edgekit.compress.ptq.freeze import freeze
from edgekit.compress.ptq.plan import Plan
from edgekit.compress.ptq.quantize import quantize, train
from edgekit.compress.ptq.simulate import simulate
from edgekit.data import Data
from edgekit.errors import DataError, InputError

FOUR = {"weights": "int2", "keep_first_last_8bit": False}


class Net(nn.Module):
    """Conv, residual block, pool, linear; small enough that 2-bit weights hurt."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.c, self.fc = nn.Conv2d(8, 16, 3, 2, 1), nn.Linear(16, 10)
        self.bn = nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = F.relu(x + self.b(x))
        return self.fc(F.relu6(self.bn(self.c(x))).mean((2, 3)))


@cache
def digits() -> tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]:
    """A trained net and training and test samples."""
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x = torch.from_numpy(images).float().view(-1, 1, 8, 8)[order] / 16
    y = torch.from_numpy(labels).long()[order]
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(12):
        for i in torch.randperm(1300).split(50):
            optimizer.zero_grad()
            F.cross_entropy(model(x[i]), y[i]).backward()
            optimizer.step()
    return model.eval(), x[:1300], y[:1300], x[1300:], y[1300:]


def data() -> Data:
    _, x, y, _, _ = digits()
    return Data(x[:128], training=(x, y))


def captured() -> Graph:
    return capture(digits()[0], (digits()[1][:1],))


def accuracy(graph: Graph, plan: Plan) -> float:
    _, _, _, x, y = digits()
    return float((freeze(graph, plan).run(x)[0].argmax(1) == y).float().mean())


@pytest.mark.slow
def test_training_beats_rounding_to_nearest() -> None:
    graph, nearest = quantize(captured(), PTQ(**FOUR), data())
    _, trained = train(graph, QAT(epochs=3, learning_rate=1e-3, **FOUR), data())
    assert accuracy(graph, trained) > accuracy(graph, nearest) + 0.1
    assert {w.bits for w in trained.weights.values()} == {2}
    assert max(int(w.integers.abs().max()) for w in trained.weights.values()) == 1
    moved = [name for name, q in trained.activations.items() if q.scale != nearest.activations[name].scale]
    assert moved, "activation scales are learned"
    assert {n: q.zero_point for n, q in trained.activations.items()} == {n: q.zero_point for n, q in nearest.activations.items()}


def test_training_goes_on_from_a_plan() -> None:
    graph, learned = quantize(captured(), PTQ(method="gptq", **FOUR), data())
    _, same = train(graph, QAT(learning_rate=1e-12), data(), learned)
    for name, w in learned.weights.items():
        assert same.weights[name].bits == 2
        assert float((same.weights[name].integers == w.integers).float().mean()) > 0.99, "nothing learned, nothing moved"
    _, better = train(graph, QAT(learning_rate=1e-3), data(), learned)
    assert accuracy(graph, better) > accuracy(graph, learned)


def test_the_simulation_of_a_trained_plan_is_what_the_frozen_program_computes() -> None:
    graph, plan = train(captured(), QAT(weights="int4", epochs=1), data())
    x = digits()[3][:64]
    with torch.no_grad():
        simulated = simulate(graph, plan)(x)
    exact = freeze(graph, plan).run(x)[0]
    step = plan.activations[plan.units[-1].output.name].scale
    assert float((simulated - exact).abs().max()) <= 2.01 * step
    assert torch.equal(simulated.argmax(1), exact.argmax(1))


def test_the_same_seed_gives_the_same_integers() -> None:
    plans = [train(captured(), QAT(weights="int4", epochs=1), data())[1] for _ in range(2)]
    for name, w in plans[0].weights.items():
        assert torch.equal(w.integers, plans[1].weights[name].integers)
        assert torch.equal(w.scale, plans[1].weights[name].scale)
    assert plans[0].activations == plans[1].activations


def test_squared_error_for_float_targets() -> None:
    model, x, _, test, _ = digits()
    with torch.no_grad():
        source = Data(x[:128], training=(x, model(x)))
        graph, nearest = quantize(captured(), PTQ(**FOUR), source)
        _, trained = train(graph, QAT(epochs=2, learning_rate=1e-3, **FOUR), source)
        errors = [float((simulate(graph, p)(test) - model(test)).square().mean()) for p in (nearest, trained)]
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize(
    ("training", "message"),
    [
        (None, "no training samples"),
        ("x", "1 tensors; expected 1 inputs and the targets"),
        ("high", "labels below the number of outputs"),
        ("float", r"targets have shape \(32,\)"),
    ],
)
def test_training_data_that_does_not_fit(training: str | None, message: str) -> None:
    _, x, y, _, _ = digits()
    sources = {None: None, "x": (x,), "high": (x, y + 1), "float": (x, y.float())}
    with pytest.raises(DataError, match=message):
        train(captured(), QAT(), Data(x[:32], training=sources[training]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_named() -> None:
    with pytest.raises(InputError, match="no CUDA device; use device: cpu"):
        train(captured(), QAT(device="cuda"), data())
