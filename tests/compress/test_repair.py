"""Repair: what is trained, what is not, and that it helps, on digits and on small nets."""

from __future__ import annotations

import copy

import pytest
import torch
from float_models import SHAPES, build
from torch import nn

from edgekit.compress.capture import capture, tensor_of
from edgekit.compress.lowrank import LowRank, factorize
from edgekit.compress.lowrank.step import lowrank
from edgekit.compress.ptq import PTQ
from edgekit.compress.repair import Repair, repair_module
from edgekit.compress.repair.distill import max_penalty
from edgekit.compress.repair.step import _changed, _product, points, repair
from edgekit.compress.steps import apply
from edgekit.data import Data
from edgekit.errors import InputError
from edgekit.recipe import Block

ENCODER = next(k for k in SHAPES if k.__name__ == "Encoder")


def digits_mlp() -> tuple[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A net of three wide hidden layers trained on digits, its 1197 training inputs, 600 others and their labels."""
    found = pytest.importorskip("sklearn.datasets").load_digits()
    order = torch.randperm(1797, generator=torch.Generator().manual_seed(0))
    x, y = torch.from_numpy(found.data).float()[order] / 16, torch.from_numpy(found.target)[order]
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )
    optimizer = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(15):
        for part in torch.randperm(1197).split(64):
            optimizer.zero_grad()
            torch.autograd.backward(nn.functional.cross_entropy(net(x[part]), y[part]))
            optimizer.step()
    return net.eval(), x[:1197], x[1197:], y[1197:]


def test_unlabelled_repair_brings_back_what_an_eighth_of_the_parameters_lost() -> None:
    net, x, other, labels = digits_mlp()
    small, _ = factorize(net, 0.125, solver="svd", multiple=1, exclude=("6",))
    state = [copy.deepcopy(m.state_dict()) for m in (net, small)]
    better, record = repair_module(small, net, x[:256], epochs=50, points="layers")

    def accuracy(m: nn.Module) -> float:
        return 100 * float((m(other).argmax(1) == labels).float().mean())

    assert accuracy(net) > 95 and accuracy(better) >= accuracy(small) + 5 and accuracy(better) > 88
    assert record.figures["loss after"] < record.figures["loss before"]
    for module, before in zip((net, small), state, strict=True):  # neither is touched
        assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    small.load_state_dict(better.state_dict(), strict=True)


def test_blocks_are_the_residual_sums_and_nothing_is_lost_before_training() -> None:
    model, x = build(ENCODER)
    graph = capture(model, (x[:2],))
    assert len(points(graph, graph, "blocks")) == 2 and len(points(graph, graph, "layers")) == 5
    data = Data(calibration=x)
    made, record = repair(graph, Repair(epochs=1), data, graph)
    assert made is graph and record.warnings and record.figures["loss before"] == 0  # nothing to gain: kept as it was
    low, _ = lowrank(graph, LowRank(rank=0.4, min_features=1, multiple=2), data)
    again, record = repair(low, Repair(epochs=40, train_batch_size=16, learning_rate=3e-3, seed=1), data, graph)
    wanted = model(x).detach()
    errors = [float((g.module(x) - wanted).norm()) for g in (low, again)]
    assert errors[1] < 0.7 * errors[0] and not record.warnings
    twice, _ = repair(low, Repair(epochs=40, train_batch_size=16, learning_rate=3e-3, seed=1), data, graph)
    assert all(torch.equal(a, b) for a, b in zip(again.module.parameters(), twice.module.parameters(), strict=True))


@pytest.mark.parametrize("scheme", ["ced", "spatial", "tucker"])
@pytest.mark.parametrize("norm", ["frobenius", "max"])
def test_the_penalty_sees_the_product_of_the_parts(scheme: str, norm: str) -> None:
    model, x = build(next(k for k in SHAPES if k.__name__ == "Functional"))
    graph = capture(model, (x[:2],))
    low, record = lowrank(graph, LowRank(rank=4, scheme=scheme, min_features=1, multiple=1), Data(calibration=x))
    changed = list(_changed(graph, low))
    assert {graph.names[chain[-1].name] for _, chain in changed} == set(record.layers) or len(changed) == len(record.layers)
    inputs = torch.randn(2, 8, 9, 9)
    for source, chain in changed:
        whole = _product(low.module, chain)
        assert whole.shape == tensor_of(graph.module, source).shape
        if whole.dim() == 4 and whole.shape[1] == 8:
            y = inputs
            for node in chain:
                geometry = node.args[3:]
                y = torch.conv2d(y, tensor_of(low.module, node.args[1]), None, geometry[0], 0, geometry[2], geometry[3])
            assert torch.allclose(torch.conv2d(inputs, whole.float()), y, atol=1e-4)
    strong = Repair(epochs=4, weight_penalty=100.0, penalty_norm=norm, learning_rate=1e-3)
    weak = Repair(epochs=4, learning_rate=1e-3)
    kept = []
    for settings in (strong, weak):
        made, _ = repair(low, settings, Data(calibration=x), graph)
        moved = [_product(made.module, c) - tensor_of(graph.module, s).double() for s, c in _changed(graph, made)]
        kept.append(sum(float(m.square().sum()) if norm == "frobenius" else float(m.abs().max()) for m in moved))
    assert kept[0] < kept[1]


def test_the_max_penalty_reaches_one_entry() -> None:
    a, b = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5)
    loss = max_penalty(a, b)
    torch.autograd.backward(loss)
    assert loss >= 0 and int((a.grad != 0).sum()) == 1 and int(a.grad.abs().argmax()) == int((a - b).abs().argmax())


def test_low_bits_are_repaired_with_their_quantizers() -> None:
    model, x = build(next(k for k in SHAPES if k.__name__ == "Functional"), 128)
    data, wanted = Data(calibration=x), model(x).detach()
    ptq = Block("ptq", PTQ(weights="int4", keep_first_last_8bit=False))
    plain = apply(model, [ptq], data)
    better = apply(model, [ptq, Block("repair", Repair(epochs=10, learning_rate=1e-3, train_batch_size=32))], data)
    errors = [float((m.simulation(x) - wanted).norm()) for m in (plain, better)]
    assert errors[1] < 0.8 * errors[0]
    assert [p["kind"] for p in better.record["passes"]] == ["ptq", "repair"] and not better.record["warnings"]
    assert {layer.args["weight_bits"] for layer in better.program.layers if layer.op == "qconv2d"} == {4}
    frozen = torch.from_numpy(better.program.run(x[:16])[0]) if not torch.is_tensor(y := better.program.run(x[:16])[0]) else y
    assert (frozen - better.simulation(x[:16])).abs().max() <= 1.01 * better.program.layers[-1].args.get("scale", 1)


def test_wrong_settings_are_sentences() -> None:
    net = nn.Sequential(nn.Linear(4, 4))
    for wrong in ({"epochs": 0}, {"weight_penalty": 1.0}, {"device": "tpu"}):
        with pytest.raises(InputError, match=f"repair: {next(iter(wrong))}[^\n]*$"):
            repair_module(net, net, torch.randn(8, 4), **wrong)
