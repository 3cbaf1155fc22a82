"""Conversion of rectifier networks: what neurons compute, what is refused, and that the frozen program is the network."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekit import Data
from edgekit.compress.capture import capture
from edgekit.compress.spiking import Spiking
from edgekit.compress.spiking.calibrate import staircase, threshold_of
from edgekit.compress.spiking.graph import free_batches, survey
from edgekit.compress.spiking.measure import course
from edgekit.compress.spiking.neurons import Neuron, carry, set_steps
from edgekit.compress.spiking.qcfs import QCFS
from edgekit.compress.spiking.step import make
from edgekit.compress.steps import apply
from edgekit.errors import InputError, ModelError
from edgekit.recipe import Block


class Residual(nn.Module):
    """Functional and module rectifiers, a pool of each kind, a residual sum, groups."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.deep = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.wide = nn.Conv2d(4, 6, 1)
        self.head = nn.Linear(6 * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(x + self.deep(x))
        x = F.max_pool2d(F.relu6(self.wide(x)), 2)
        return self.head(F.avg_pool2d(x, 2).flatten(1))


def trained(model: nn.Module, shape: tuple[int, ...] = (1, 8, 8)) -> tuple[nn.Module, Data]:
    torch.manual_seed(0)
    x = torch.rand(64, *shape)
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(x)
    y = torch.randint(0, 3, (64,))
    return model.eval(), Data(calibration=x, evaluation=(x, y), training=(x, y))


def network(model: nn.Module, data: Data, **settings: Any) -> Any:
    graph = capture(model, (data.calibration[:1],))
    return make(graph, Spiking(**settings), data, lambda *_: None)


def test_a_neuron_is_the_staircase_for_constant_input() -> None:
    for threshold, steps in ((0.7, 4), (1.3, 8), (2.0, 5)):
        z = torch.rand(20_000) * 2 * threshold - 0.3 * threshold
        neuron = Neuron(threshold, threshold / 2, steps=steps)
        mean = neuron(z.repeat(steps)).reshape(steps, -1).mean(0) * threshold
        h = QCFS(threshold, steps)(z).detach()
        near = ((z * steps / threshold + 0.5) % 1 - 0.5).abs() > 0.499  # ties at the edges of a level
        assert torch.equal((mean - h).abs()[~near] < 1e-5, torch.ones(int((~near).sum()), dtype=torch.bool))
        assert torch.allclose(staircase(z, torch.tensor(threshold), steps)[~near], h[~near], atol=1e-5)


def test_charge_is_conserved_by_subtraction() -> None:
    z = torch.randn(16, 50, dtype=torch.float32)
    neuron = Neuron(1.0, 0.5, steps=16)
    neuron.carried = True
    spikes = neuron(z.reshape(-1)).reshape(16, 50)
    assert neuron.state is not None
    assert torch.allclose(spikes.sum(0), 0.5 + z.sum(0) - neuron.state, atol=1e-4)


def test_qcfs_gradients() -> None:
    z = torch.tensor([-1.0, 0.3, 0.9, 2.5], requires_grad=True)
    activation = QCFS(1.5, 4)
    out = activation(z)
    out.sum().backward()
    assert z.grad is not None and activation.scale.grad is not None
    assert z.grad.tolist() == [0, 1, 1, 0]
    inside = [(float(out[i]) - float(z[i])) / 1.5 for i in (1, 2)]
    assert float(activation.scale.grad) == pytest.approx(sum(inside) + 1, abs=1e-5)


def test_mmse_is_never_worse_than_the_largest_and_grows_with_steps() -> None:
    a = torch.distributions.Exponential(1.0).sample((4000, 5)).abs()
    shares, settings = [], Spiking(v_init=0.0)
    for steps in (4, 8, 16, 32, 64):
        best = threshold_of(a, settings, steps, math.inf)
        error = lambda v, t=steps: float((staircase(a, v, t, 0.0) - a).square().mean())  # noqa: E731
        assert error(best) <= error(a.max())
        shares.append(float(best / a.max()))
    assert shares == sorted(shares) and shares[0] < 0.6
    assert float(threshold_of(a * 9, Spiking(threshold="max"), 8, 6.0)) == 6.0


def test_every_rectifier_is_found_and_many_steps_are_the_network() -> None:
    model, data = trained(Residual())
    graph = free_batches(capture(model, (data.calibration[:1],)))
    found = survey(graph)
    assert [s.cap for s in found.sites] == [math.inf, math.inf, 6.0] and len(found.pools) == 1
    made = network(model, data, steps=512, threshold="max", correct="none", samples=64)
    with torch.no_grad():
        wanted = model(data.calibration)
        got = made.net.module(data.calibration)
    assert float((got - wanted).abs().max()) < 0.02 * float(wanted.abs().max())


@pytest.mark.parametrize("settings", [{"correct": "bias"}, {"per_channel": True, "correct": "membrane"}, {"correct": "weights"}])
def test_the_frozen_program_is_the_network(settings: dict[str, Any]) -> None:
    model, data = trained(Residual())
    made = apply(model, [Block("spiking", Spiking(steps=6, weight_steps=20, **settings))], data)
    (frozen,) = made.program.run(data.calibration[:8])
    with torch.no_grad():
        assert torch.equal(made.simulation(data.calibration[:8]), frozen)
    spikes = [made.program.trace(data.calibration[:1])[x.name] for x in made.program.layers if x.op == "if_sequence"]
    assert len(spikes) == 3 and all(set(s.unique().tolist()) <= {0.0, 1.0} for s in spikes)
    layers = made.record["passes"][0]["layers"]
    assert all(layers[x.name]["threshold"] for x in made.program.layers if x.op == "if_sequence")


def test_amplitudes_in_weights_change_nothing() -> None:
    """Spikes times thresholds through the network, beside spikes of 1 and scaled weights; in float64."""
    from edgekit.compress.spiking.amplitude import fold_amplitudes
    from edgekit.compress.spiking.calibrate import activations, balance
    from edgekit.compress.spiking.graph import rectifiers_first
    from edgekit.compress.spiking.unroll import unroll

    model, data = trained(Residual())
    graph = free_batches(capture(model, (data.calibration[:1],)))
    found = survey(graph)
    net = unroll(rectifiers_first(graph, found.sites), found, lambda _: Neuron(steps=5), 5)
    balance(net, activations(graph, found.sites, (data.calibration,)), Spiking(per_channel=True, threshold="max"))
    net.module.double()
    for name in net.sites:
        amplitude = net.neuron(name).amplitude
        assert amplitude is not None
        net.neuron(name).amplitude = amplitude.double()
    x = data.calibration.double()
    with torch.no_grad():
        before = net.module(x)
        net = type(net)(net.module, net.sites, net.names, (x[:1],), net.sources, net.steps)
        notes = fold_amplitudes(net)
        assert torch.allclose(net.module(x), before, atol=1e-9)
    assert "stem.2" in notes and "multiplied on the way to" in notes["stem.2"]


def test_steps_one_by_one_are_the_sequence() -> None:
    model, data = trained(Residual())
    net = network(model, data, steps=6).net
    x = data.calibration[:4]
    whole = course(net, [(x,)]).outputs * torch.arange(1, 7).view(-1, 1, 1)
    set_steps(net.module, 1)
    carry(net.module, True)
    total = torch.zeros_like(whole[0])
    with torch.no_grad():
        for t in range(6):
            total = total + net.module(x)
            assert torch.allclose(total, whole[t], atol=1e-5), t


def test_synops_are_counted_as_by_hand() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten()
    )
    model.append(nn.Linear(12, 2))
    _, data = trained(model, (1, 4, 4))
    net = network(model, data, steps=3, correct="none").net
    found = course(net, [(data.calibration[:2],)])
    spikes: list[Tensor] = []
    for name in net.sites:
        net.neuron(name).register_forward_hook(lambda _m, _a, out: spikes.append(out.detach()))
    with torch.no_grad():
        net.module(data.calibration[:2])
    by_hand = 0
    for image in spikes[0]:  # every spike reaches the outputs whose 3 x 3 window at stride 2, padding 1, covers it
        for c, row, column in image.nonzero().tolist():
            by_hand += 3 * sum(abs(2 * i - row) <= 1 and abs(2 * j - column) <= 1 for i in range(2) for j in range(2)) + 0 * c
    by_hand += 2 * int(spikes[1].sum())
    assert float(found.synops[-1]) == by_hand / 2
    assert float(found.spikes[-1]) == sum(float(s.sum()) for s in spikes) / 2


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        x = torch.sigmoid(self.b(x))
        return F.softmax(self.c(F.relu(x - 0.4)), 1)


def test_what_has_no_spiking_form_is_listed_or_refused() -> None:
    model, data = trained(Gated(), (5,))
    with pytest.raises(ModelError, match=r"1 layer\(s\) have no spiking form: sigmoid \(sigmoid, test_spiking_convert.py:\d+\)"):
        network(model, data)
    made = network(model, data, allow=(".*sigmoid.*",), steps=256, threshold="max", correct="none")
    rows = {r["operator"]: r["computed"] for r in made.tables["not converted"]}
    assert rows == {"sigmoid": "on the mean over time (allowed)", "softmax": "after the mean over time"}
    assert any("sigmoid" in w for w in made.warnings)
    with torch.no_grad():
        assert torch.allclose(made.net.module(data.calibration), model(data.calibration), atol=0.02)


def test_an_activation_between_the_last_neurons_and_weights_behind_it_is_refused() -> None:
    model, data = trained(
        nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3), nn.Softmax(1)), (5,)
    )
    with pytest.raises(ModelError, match=r"1 layer\(s\) have no spiking form: 3 \(gelu"):
        network(model, data)
    made = network(model, data, allow=("3",))
    assert [r["computed"] for r in made.tables["not converted"]] == [
        "on the mean over time (allowed)",
        "after the mean over time",
    ]
    assert any("3 stay without spikes" in w for w in made.warnings)


def test_a_network_without_rectifiers_is_refused() -> None:
    model, data = trained(nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 3)), (5,))
    with pytest.raises(ModelError, match="nothing to convert, the graph has no ReLU; its activations are 1 \\(gelu\\)"):
        network(model, data)


class Written(nn.Module):
    """A rectifier that is written as a maximum, which is not looked for."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(torch.maximum(x, torch.zeros_like(x)))


def test_what_stands_in_the_place_of_rectifiers_is_named() -> None:
    model, data = trained(Written(), (5,))
    with pytest.raises(ModelError, match=r"no ReLU; its operators without a spiking form are .*maximum \(maximum\)"):
        network(model, data)


def test_nothing_stands_after_spiking_and_no_quantization_before() -> None:
    from edgekit.compress.ptq.settings import PTQ

    model, data = trained(Residual())
    with pytest.raises(InputError, match="`ptq` stands after `spiking`"):
        apply(model, [Block("spiking", Spiking(steps=2)), Block("ptq", PTQ())], data)
    with pytest.raises(InputError, match="works on the float model"):
        apply(model, [Block("ptq", PTQ()), Block("spiking", Spiking(steps=2))], data)


def test_trained_staircases_convert_at_their_number_of_levels() -> None:
    torch.manual_seed(0)
    x = torch.randn(300, 8)
    y = (x[:, 0] * x[:, 1] > 0).long() + (x[:, 2] > 0.5).long()
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3))
    data = Data(calibration=x, evaluation=(x, y), training=(x, y))
    made = network(model, data, method="qcfs", steps=8, epochs=30, learning_rate=1e-2)
    assert made.figures["same class as it %"] >= 95 and made.figures["quantized network without time"] > 85
    assert made.figures["levels"] == 8


def test_a_layered_schedule_is_exact() -> None:
    torch.manual_seed(0)
    x = torch.rand(200, 1, 6, 6).round()  # many equal values: neurons fire together
    y = (x.sum((1, 2, 3)) > 18).long()
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(288, 2)
    )
    data = Data(calibration=x[:64], evaluation=(x, y), training=(x, y))
    settings = {"method": "qcfs", "steps": 4, "epochs": 4, "learning_rate": 5e-3, "correct": "none"}
    exact = network(model, data, schedule="layered", **settings)
    assert exact.figures["same class as it %"] == 100 and exact.figures["latency in steps"] == 8
    made = apply(model, [Block("spiking", Spiking(schedule="layered", **settings))], data)  # type: ignore[arg-type]
    (frozen,) = made.program.run(x[:10])
    with torch.no_grad():
        assert torch.equal(made.simulation(x[:10]), frozen)
    with pytest.raises(ValueError, match="schedule layered is for"):
        Spiking(method="train", schedule="layered")


def test_correction_brings_the_means_together() -> None:
    model, data = trained(Residual())
    for how in ("bias", "membrane"):
        made = network(model, data, steps=8, correct=how, threshold="max")
        assert sum(x.gap for x in made.layers) < 0.7 * sum(x.gap_before for x in made.layers), how


class Tokens(nn.Module):
    """Linear layers over (N, tokens, features), and a convolution over one dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(3, 6, 3, padding=1), nn.BatchNorm1d(6)
        self.up, self.down = nn.Linear(12, 16), nn.Linear(16, 12)
        self.head = nn.Linear(72, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        x = x + self.down(F.relu(self.up(x)))
        return self.head(F.relu(x).flatten(1))


@pytest.mark.parametrize("per_channel", [False, True])
def test_one_dimension_and_tokens(per_channel: bool) -> None:
    model, data = trained(Tokens(), (3, 12))
    made = network(model, data, steps=512, threshold="max", correct="none", per_channel=per_channel)
    with torch.no_grad():
        wanted, got = model(data.calibration), made.net.module(data.calibration)
    assert float((got - wanted).abs().max()) < 0.03 * float(wanted.abs().max())
    program = apply(model, [Block("spiking", Spiking(steps=4, per_channel=per_channel))], data).program
    assert sum(x.op == "if_sequence" for x in program.layers) == 3
