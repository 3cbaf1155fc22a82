"""Models made of edgekit's spiking parts: frozen as they are or trained; delays and spike-driven attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgekit import Data
from edgekit.compress.spiking import Neuron, Spiking
from edgekit.compress.spiking.delays import Delayed, run_synapses
from edgekit.compress.spiking.freeze_network import freeze_network
from edgekit.compress.spiking.integer import integer_program
from edgekit.compress.spiking.metaformer import MetaSpikeFormer
from edgekit.compress.spiking.neurons import Decode, Fold, Repeat
from edgekit.compress.steps import apply
from edgekit.errors import DataError, ModelError
from edgekit.frozen import FrozenProgram
from edgekit.frozen.one_step import initial_state, stepping
from edgekit.frozen.stepping import steps_of
from edgekit.nir import interpret
from edgekit.nir.from_program import to_nir
from edgekit.nir.to_module import to_program
from edgekit.recipe import Block
from edgekit.targets import cortex_m, get
from edgekit.targets.spiking import plain

STEPS = 12


def delayed(seed: int = 0, taps: int = 5) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(seed)
    first = Delayed(3, 10, taps, bias=True, steps=STEPS)
    first.weight.data = first.weight.data.abs() + 0.2
    first.weight.data[0, :2] = 0  # synapses that are not there
    net = nn.Sequential(Fold(), first, Neuron(0.6, steps=STEPS, tau=2.0), nn.Linear(10, 4), Decode(STEPS))
    return net.eval(), (torch.rand(5, STEPS, 3) < 0.3).float()


def test_delays_frozen_are_the_synapses_event_by_event() -> None:
    net, x = delayed()
    program = freeze_network(net, (x,), "delays")
    folded = x.transpose(0, 1)
    current = run_synapses(net[1].synapses(), folded, 10, STEPS) + net[1].bias.detach()
    with torch.no_grad():
        spikes = net[2](current.flatten(0, 1))
        expected = net(x)
    for i in range(len(x)):
        assert torch.equal(program.trace(x[i : i + 1])["2"], spikes.view(STEPS, 5, 10)[:, i])
    assert torch.allclose(program.run(x)[0], expected, atol=1e-6) and 0.05 < float(spikes.mean()) < 0.95
    delays = [layer for layer in program.layers if layer.op == "delay_steps"]
    assert [int(d.args["delay"]) for d in delays] == sorted(set(net[1].synapses().delay.tolist()) - {0})


def test_delays_go_to_every_form(tmp_path: Path) -> None:
    net, x = delayed()
    program = freeze_network(net, (x,), "delays")
    (expected,) = program.run(x)
    assert torch.equal(plain(program).run(x)[0], expected)
    step, state, at, total = stepping(program), initial_state(program), steps_of(program), torch.zeros(1, 4)
    for t in range(STEPS):
        y, *state = step.run(x[:1, t], *state)
        total, sums = total + y, at.step(x[:1])
    assert torch.allclose(total / STEPS, expected[:1], atol=1e-6) and torch.allclose(sums / STEPS, expected[:1], atol=1e-6)
    graph = to_nir(program)
    assert sum(type(n).__name__ == "Delay" for n in graph.nodes.values()) == len(program.layers) - 3
    found = interpret(graph, x.transpose(0, 1).numpy(), record=["2"])
    assert np.array_equal(found.values["2"][:, :1].reshape(STEPS, 10), program.trace(x[:1])["2"].numpy())
    assert torch.allclose(to_program(graph).run(x)[0], expected, atol=1e-6)


@pytest.mark.skipif(cortex_m.M4.available() is not None, reason="needs arm-none-eabi-gcc and qemu-system-arm")
@pytest.mark.parametrize("stream", [False, True])
def test_delays_in_firmware_are_the_frozen_programs(stream: bool, tmp_path: Path) -> None:
    net, x = delayed(taps=3)
    program, _ = integer_program(freeze_network(net, (x,), "delays"), (x,))
    target = get("cortex-m4")
    artifact = target.lower(program, tmp_path / f"model{target.SUFFIX}", target.Options(stream=stream))
    (found,) = target.run(artifact.path, [x.numpy()])
    assert np.array_equal(found, program.run(x)[0].numpy())
    taps, expected = target.taps(artifact.path, program, [x[:1].numpy()]), program.trace(x[:1])
    assert len(taps) > 8 and [k for k, v in taps.items() if not np.array_equal(expected[k].numpy(), v)] == []


@pytest.mark.parametrize("form", ["sdsa1", "sdsa3"])
def test_a_spike_driven_transformer_is_frozen_with_its_norms_folded(form: Any) -> None:
    torch.manual_seed(0)
    net = MetaSpikeFormer(3, dims=(8, 8, 16, 16), depths=(1, 0, 0, 1, 0), heads=2, steps=3, inputs=1, form=form)
    x = 3 * torch.rand(4, 1, 16, 16)
    with torch.no_grad():
        for _ in range(3):
            net.train()(x)
        net.eval()
        expected = net(x)
    program = freeze_network(net, (x,), "former")
    assert not any("batch_norm" in layer.op for layer in program.float_layers)
    assert {"lif_sequence", "repeat_steps", "accumulate"} == {layer.op for layer in program.layers}
    found = torch.cat([program.run(x[i : i + 1])[0] for i in range(4)])
    assert torch.allclose(found, expected, atol=1e-4) and float(expected.std()) > 0
    (written,) = plain(program).run(x[:1])
    assert torch.allclose(written, found[:1], atol=1e-5)


def data(net: nn.Module, x: Tensor) -> Data:
    return Data(calibration=x, evaluation=(x, torch.arange(5) % 4), training=(x, torch.arange(5) % 4))


def trained(net: nn.Module, settings: Spiking, samples: Data) -> FrozenProgram:
    return apply(net, [Block("spiking", settings)], samples).program


@pytest.mark.parametrize("kind", ["delays", "repeat"])
def test_a_recipe_trains_or_freezes_a_network_of_neurons(kind: str) -> None:
    net, x = delayed()
    if kind == "repeat":
        x = torch.rand(5, 6)
        net = nn.Sequential(
            Repeat(4), nn.Linear(6, 8), nn.BatchNorm1d(8), Neuron(0.5, steps=4, tau=2.0, tau_syn=2.0), nn.Linear(8, 4), Decode(4)
        )
    before = net(x).detach() if kind == "delays" else net.eval()(x).detach()
    frozen = trained(net, Spiking(method="freeze"), data(net, x))
    assert torch.allclose(frozen.run(x)[0], before, atol=1e-5)
    made = apply(net, [Block("spiking", Spiking(method="train", epochs=40, learning_rate=2e-2))], data(net, x))
    losses = made.record["passes"][0]["loss by epoch"]
    assert losses[-1] < 0.8 * losses[0] and torch.equal(net(x).detach(), before)  # a copy was trained
    with torch.no_grad():
        assert torch.allclose(made.simulation(x), made.program.run(x)[0], atol=1e-5)
    if kind == "repeat":  # one step at a time
        sltt = trained(net, Spiking(method="train", rule="sltt", epochs=2), data(net, x))
        assert sltt.layer("3").op == "cuba_lif_sequence" and not any("norm" in layer.op for layer in sltt.float_layers)
    else:
        assert made.record["passes"][0]["layers"]["1"]["delays in steps"] == sorted(
            {int(layer.args["delay"]) for layer in made.program.layers if layer.op == "delay_steps"}
            | ({0} if "1.weight_0" in {layer.name for layer in made.program.float_layers} else set())
        )


def test_what_does_not_fit_a_network_of_neurons_is_said() -> None:
    net, x = delayed()
    for settings, error, sentence in (
        (Spiking(), ModelError, "method calibrate makes one of a network with ReLUs"),
        (Spiking(method="train", neuron="lif"), ModelError, "spiking: neuron: the model .* decides this itself"),
        (Spiking(method="freeze", steps=7), ModelError, "steps 7, and the network runs 12"),
        (Spiking(method="train", rule="sltt"), ModelError, "delays are learned over many; take bptt"),
    ):
        with pytest.raises(error, match=sentence):
            trained(net, settings, data(net, x))
    with pytest.raises(DataError, match="no training samples"):
        trained(net, Spiking(method="train"), Data(calibration=x))
    with pytest.raises(ModelError, match="method freeze is for a model of edgekit's neurons"):
        trained(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), Spiking(method="freeze"), Data(calibration=torch.rand(4, 3)))
    net[2].steps = 7
    with pytest.raises(ModelError, match="parts of the network run 7 and 12 steps"):
        freeze_network(net, (x,))
    with pytest.raises(ModelError, match="a Delayed runs sequences"):
        freeze_network(nn.Sequential(Delayed(3, 3, 2), Neuron(1.0)), (x,))
    with pytest.raises(ModelError, match="the network has no neurons"):
        freeze_network(nn.Linear(3, 3), (x,))
