"""Training spiking networks: gradients and memory of the rules, fewer steps, frames of events."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgekit import Data
from edgekit.compress.capture import capture
from edgekit.compress.spiking import Frames, Spiking
from edgekit.compress.spiking.gradients import compared, gradient, through_time
from edgekit.compress.spiking.graph import free_batches, survey
from edgekit.compress.spiking.integer import integer_program
from edgekit.compress.spiking.neurons import SURROGATES, Neuron, fire
from edgekit.compress.spiking.step import make
from edgekit.compress.spiking.train import by_step
from edgekit.compress.spiking.unroll import SpikingNet, unroll
from edgekit.compress.steps import apply
from edgekit.errors import DataError, ModelError
from edgekit.nir import interpret
from edgekit.nir.from_program import to_nir
from edgekit.nir.inference import encode, read_out
from edgekit.recipe import Block

STEPS = (1, 2, 8, 64)


def small() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(54, 3),
    )


def batch(count: int = 16) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 1, 6, 6, generator=generator), torch.randint(0, 3, (count,), generator=generator)


def network(steps: int, **neuron: Any) -> SpikingNet:
    torch.manual_seed(0)
    x, _ = batch(1)
    graph = free_batches(capture(small().eval(), (x,)))
    return unroll(graph, survey(graph), lambda _: Neuron(0.3, steps=steps, **neuron), steps)


def test_sltt_saves_the_same_at_any_number_of_steps_and_bptt_in_proportion() -> None:
    x, y = batch()
    graph = capture(small().eval(), (x[:1],))
    found = {t: compared(graph, x, y, t, tau=2.0) for t in STEPS}
    assert len({f["sltt_bytes"] for f in found.values()}) == 1
    assert [f["bptt_bytes"] for f in found.values()] == [t * found[1]["bptt_bytes"] for t in STEPS]
    assert found[1]["difference"] == 0
    assert all(f["cosine"] > 0.9 for f in found.values())


def test_the_gradients_of_sltt_are_those_of_a_detached_membrane() -> None:
    """Online, step by step, beside one backward through all steps with the carried membrane cut."""
    x, y = batch()
    net = network(5, tau=2.0)
    online, online_bytes = gradient(net, by_step(5), x, y)
    summed, summed_bytes = gradient(net, by_step(5, online=False), x, y)
    assert float((online - summed).abs().max()) < 1e-7
    assert summed_bytes > 4.9 * online_bytes  # detaching alone saves nothing


def test_k_of_the_steps() -> None:
    x, y = batch()
    net = network(6, tau=2.0)
    every, _ = gradient(net, by_step(6), x, y)
    assert torch.allclose(gradient(net, by_step(6, 6), x, y)[0], every, atol=1e-7)
    calls = []
    net.module.register_full_backward_hook(lambda *_: calls.append(1))
    gradient(net, by_step(6, 2), x, y)
    assert len(calls) == 2


def test_bptt_is_autograd_through_a_loop_written_out() -> None:
    x, y = batch(4)
    net = network(3)
    got, _ = gradient(net, through_time(3), x, y)
    module = net.module
    w1, b1, w2, b2, w3, b3 = (module.get_parameter(f"{i}.{k}") for i in (0, 2, 5) for k in ("weight", "bias"))
    v1 = v2 = torch.zeros(())
    loss: Tensor = torch.zeros(())
    module.zero_grad()
    for _ in range(3):
        v1 = v1 + nn.functional.conv2d(x, w1, b1, padding=1)
        s1 = fire(v1, torch.tensor(0.3), SURROGATES["triangle"])
        v1 = v1 - 0.3 * s1
        v2 = v2 + nn.functional.conv2d(s1, w2, b2, stride=2, padding=1)
        s2 = fire(v2, torch.tensor(0.3), SURROGATES["triangle"])
        v2 = v2 - 0.3 * s2
        loss = loss + nn.functional.cross_entropy(nn.functional.linear(s2.flatten(1), w3, b3), y) / 3
    loss.backward()
    assert torch.allclose(got, torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None]), atol=1e-6)


def test_surrogates_integrate_to_one_but_the_narrow_one() -> None:
    u = torch.linspace(-60, 60, 240_001, dtype=torch.float64)
    area = {name: float(f(u).sum() * (u[1] - u[0])) for name, f in SURROGATES.items()}
    assert area.pop("linear") == pytest.approx(0.3, abs=1e-3)
    assert all(a == pytest.approx(1.0, abs=0.01) for a in area.values())


def test_multiple_spikes_and_resets() -> None:
    neuron = Neuron(1.0, steps=3, spikes=4)
    assert neuron(torch.tensor([2.5, 3.6, 9.0]).reshape(3, 1)).flatten().tolist() == [2, 4, 4]
    hard = Neuron(1.0, steps=3, reset="zero")
    assert hard(torch.tensor([1.5, 0.6, 0.3]).reshape(3, 1)).flatten().tolist() == [1, 0, 0]
    soft = Neuron(1.0, steps=3)
    assert soft(torch.tensor([1.5, 0.6, 0.3]).reshape(3, 1)).flatten().tolist() == [1, 1, 0]
    leaky = Neuron(1.0, steps=2, tau=2.0, r="one")  # v = 0.95, then 0.475 + 0.525
    assert leaky(torch.tensor([1.9, 1.05]).reshape(2, 1)).flatten().tolist() == [0, 1]


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"neuron": "plif", "reset": "zero"},
        {"neuron": "lif", "rule": "sltt"},
        {"spikes": 3},
        {"rule": "sltt_k"},
        {"neuron": "cuba_plif", "tau_syn": 1.5},
        {"neuron": "cuba", "rule": "sltt", "reset": "zero"},
    ],
)
def test_training_learns_and_the_frozen_program_is_the_network(how: dict[str, Any]) -> None:
    torch.manual_seed(0)
    x = torch.rand(300, 1, 6, 6)
    y = x[:, 0].reshape(300, 3, 12).mean(2).argmax(1)
    data = Data(calibration=x[:100], evaluation=(x[200:], y[200:]), training=(x[:200], y[:200]))
    settings = Spiking(method="train", steps=4, epochs=25, learning_rate=1e-2, **how)
    made = apply(small().eval(), [Block("spiking", settings)], data)
    (frozen,) = made.program.run(x[200:])
    with torch.no_grad():
        assert torch.allclose(made.simulation(x[200:]), frozen, atol=1e-5)
    assert float((frozen.argmax(1) == y[200:]).float().mean()) > 0.6
    kinds = {layer.op for layer in made.program.layers}
    op = f"{how.get('neuron', 'if').replace('plif', 'lif').replace('cuba_lif', 'cuba').replace('cuba', 'cuba_lif')}_sequence"
    assert op in kinds
    if op == "cuba_lif_sequence":
        taus = [float(layer.args["tau_syn"]) for layer in made.program.layers if layer.op == op]
        assert all((tau == how.get("tau_syn", 2.0)) == (how["neuron"] == "cuba") for tau in taus)
        graph = to_nir(made.program)
        spikes = interpret(graph, encode(graph, [x[200:210].numpy()]), record=None)
        assert np.abs(read_out(graph, spikes.output) - frozen[:10].numpy()).max() < 1e-4
        integers, _ = integer_program(made.program, (x[:100],))
        assert float((integers.run(x[200:])[0].argmax(1) == frozen.argmax(1)).float().mean()) > 0.9


def test_one_step_has_no_state() -> None:
    x, y = batch(60)
    data = Data(calibration=x, evaluation=(x, y), training=(x, y))
    settings = Spiking(method="train", stages=(3, 1), epochs=2, neuron="lif")
    made = apply(small().eval(), [Block("spiking", settings)], data)
    record = made.record["passes"][0]
    assert [s["steps"] for s in record["stages"]] == [3, 1]
    assert {layer.op for layer in made.program.layers} <= {"repeat_steps", "accumulate"}
    assert sum(layer.op == "ge" for layer in made.program.float_layers) == 2
    (one,) = made.program.run(x[:10])
    (again,) = made.program.run(x[:10])
    assert torch.equal(one, again)


def test_scaling_a_layer_of_one_step_changes_nothing() -> None:
    x, _ = batch(8)
    net = network(1)
    before = net.module(x)
    for k in ("weight", "bias"):
        net.module.get_parameter(f"0.{k}").data *= 4
    net.neuron("neurons_1").threshold *= 4
    assert torch.equal(net.module(x), before)


def test_a_network_of_frames() -> None:
    torch.manual_seed(0)
    moving = (torch.rand(240, 5, 1, 6, 6) < 0.2).float()
    y = torch.arange(240) % 3
    for i in range(240):
        for t in range(5):  # a bar at a row that depends on class and step: single frames tell little
            moving[i, t, 0, (int(y[i]) * t) % 6] = 1
    data = Data(calibration=moving[:60], evaluation=(moving[180:], y[180:]), training=(moving[:180], y[:180]))
    settings = Spiking(method="train", frames=True, steps=5, neuron="lif", epochs=12, learning_rate=1e-2)
    made = apply(Frames(small()).eval(), [Block("spiking", settings)], data)
    (frozen,) = made.program.run(moving[180:])
    with torch.no_grad():
        assert torch.allclose(made.simulation(moving[180:]), frozen, atol=1e-5)
    assert made.program.layers[0].op == "fold_steps"
    assert float((frozen.argmax(1) == y[180:]).float().mean()) > 0.8


def test_what_training_needs_is_said() -> None:
    x, y = batch()
    graph = capture(small().eval(), (x[:1],))
    with pytest.raises(DataError, match="method train trains, and the data has no training samples"):
        make(graph, Spiking(method="train"), Data(calibration=x), lambda *_: None)
    with pytest.raises(ModelError, match=r"frames: true needs a model that is an edgekit\.compress\.spiking\.Frames"):
        make(graph, Spiking(method="train", frames=True), Data(calibration=x, training=(x, y)), lambda *_: None)
    for wrong in (
        {"neuron": "lif"},
        {"method": "auto"},
        {"max_timesteps": 3},
        {"method": "train", "rule": "sltt_k", "backward_steps": 9},
        {"method": "train", "backward_steps": 2},
        {"method": "train", "tau_syn": 2.0, "neuron": "lif"},
    ):
        with pytest.raises(ValueError, match=r"method|backward_steps|tau_syn is for neurons cuba"):
            Spiking(**wrong)  # type: ignore[arg-type]
