"""Networks with real-valued inputs on chips: encoders, what the host runs, soft resets, sums; Speck's integers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from neuromorphic_nets import chain, conv_net, ends, if_, nir, spikes
from torch import Tensor, nn
from typer.testing import CliRunner

from edgekit import Data, cli
from edgekit import nir as files
from edgekit.compress.capture import capture
from edgekit.compress.spiking import Spiking, encoders
from edgekit.compress.spiking.input_layer import ENCODER
from edgekit.compress.spiking.step import make
from edgekit.devices import sim, simulators
from edgekit.errors import ModelError, UnsupportedError
from edgekit.in_memory import run_model
from edgekit.targets.neuromorphic import host, loihi2, speck, to_loihi2, to_speck, to_xylo
from edgekit.targets.neuromorphic.chip_rules import check
from edgekit.targets.neuromorphic.loihi2 import LoihiLayer


class Sums(nn.Module):
    """A residual sum between convolutions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem, self.deep = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(x + self.deep(x))
        return self.head(nn.functional.avg_pool2d(x, 2).flatten(1))  # type: ignore[no-any-return]


def data(low: float = 0.0) -> Data:
    x = torch.rand(48, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * (1 - low) + low
    return Data(calibration=x[:32], evaluation=(x[32:], torch.arange(16) % 3), training=(x, torch.arange(48) % 3))


def made(low: float = 0.0, **settings: Any) -> Any:
    given = data(low)
    graph = capture(Sums().eval(), (given.calibration[:1],))
    return make(graph, Spiking(**{"steps": 8, "encoding": "rate"} | settings), given, lambda *_: None)


def recorded(net: Any, x: Tensor) -> Tensor:
    """Spikes of the encoder, (N, T, ...)."""
    name = next(n for n, site in net.sites.items() if site.name == ENCODER)
    kept: list[Tensor] = []
    net.module.get_submodule(name).register_forward_hook(lambda *given: kept.append(given[2]))
    net.run(net.steps)
    with torch.no_grad():
        net.module(x)
    return kept[0].reshape(net.steps, len(x), *kept[0].shape[1:]).transpose(0, 1)


def test_the_encoder_is_deterministic_rate_coding() -> None:
    net, x = made().net, data().evaluation[0]  # type: ignore[index]
    threshold = float(net.neuron(next(iter(net.sites))).threshold)
    assert torch.equal(recorded(net, x), encoders.rate((x / threshold).clamp(max=1), 8))


def test_values_below_zero_have_neurons_of_their_own_and_change_no_answer() -> None:
    given = data(-1.0)
    found = made(-1.0, steps=64, threshold="max")
    x = given.evaluation[0]  # type: ignore[index]
    raster = recorded(found.net, x).mean(1)
    threshold = float(found.net.neuron(next(iter(found.net.sites))).threshold)
    assert torch.allclose((raster[:, :1] - raster[:, 1:]) * threshold, x, atol=threshold / 64)
    with torch.no_grad():
        float_answer, answer = Sums()(x), found.net.module(x)
    assert (float_answer - (answer[0] if isinstance(answer, tuple) else answer)).abs().max() < 0.1 * float_answer.abs().max()
    graph = capture(nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.ReLU(), nn.Linear(3, 3)).eval(), (x[:1],))
    with pytest.raises(ModelError, match=r"values below 0 and .* reads it; let a convolution"):
        make(graph, Spiking(encoding="rate"), given, lambda *_: None)


def test_the_host_runs_the_first_neurons_and_the_chip_the_rest() -> None:
    graph = conv_net()
    given = np.random.default_rng(0).random((6, 3, 1, 8, 8))
    found = host.parts(graph, "loihi2")
    assert found.sender == found.host[-1] == "if1" and len(found.host) == 2
    whole = files.interpret(graph, given, record=None)
    rest = files.interpret(found.chip, whole.values["if1"], record=None)
    assert np.array_equal(rest.output, whole.output)
    ran = sim.run("speck", graph, given)
    assert "if1" not in ran.spikes and "the host runs" in ran.notes[0] and "multiply-accumulates" in ran.notes[0]
    graph.metadata = {**graph.metadata, "encoding": "repeat"}
    fit = check(graph, "speck2f")
    assert any("the host runs" in note for note in fit.notes) and fit.used["layers"][0] == 2


def test_what_cannot_be_cut_off_is_refused_with_a_remedy() -> None:
    source, sink = ends((4,), (4,))
    first, second = if_((4,)), if_((4,))
    graph = chain({"input": source, "w1": nir.Linear(np.eye(4)), "if1": first, "w2": nir.Linear(np.eye(4)), "if2": second})
    graph.nodes |= {"w3": nir.Linear(np.eye(4)), "out": sink}
    graph.edges += [("input", "w3"), ("w3", "if2"), ("if2", "out")]
    with pytest.raises(UnsupportedError, match=r"heard by if1, if2.; make the network with spiking: .encoding: rate"):
        sim.run("loihi2", graph, np.full((4, 1, 4), 0.5))
    graph.metadata = {**graph.metadata, "encoding": "repeat"}
    assert any("encoding: rate" in breach.edit for breach in check(graph, "loihi2").breaches)


def loihi_loops(layer: LoihiLayer, sent: list[list[int]]) -> list[list[int]]:
    """Neurons without leak that subtract, a Python integer at a time; ``sent`` arrives in the step it stands in."""
    raster, v = [], [0 if layer.start is None else int(s) for s in (layer.start if layer.start is not None else layer.bias)]
    for row in sent:
        fired = []
        for n in range(len(v)):
            a = sum(int(w) * s for w, s in zip(layer.weights[n], row, strict=True)) * 2**layer.weight_exp * 64
            v[n] += a + int(layer.bias[n]) * 2**layer.bias_exp
            fired.append(int(v[n] > layer.threshold * 64))
            v[n] -= fired[-1] * layer.threshold * 64
        raster.append(fired)
    return raster


def test_sums_and_soft_resets_on_loihi_are_integer_loops() -> None:
    rng = np.random.default_rng(3)

    def layer(name: str, outputs: int, inputs: int, sources: tuple[str, ...]) -> LoihiLayer:
        weights = (2 * rng.integers(-60, 90, (outputs, inputs))).astype(np.int16)
        start, bias = rng.integers(0, 6000, outputs).astype(np.int32), rng.integers(-50, 50, outputs).astype(np.int16)
        return LoihiLayer(name, weights, bias, 150, 0, 4095, 0, 2, "subtract", start, sources)

    layers = [layer("a", 6, 5, ("",)), layer("b", 4, 6, ("a",)), layer("c", 3, 10, ("a", "b"))]
    given = spikes(12, 2, 5).astype(int)
    traces = loihi2.run(layers, given)
    assert [t.lag for t in traces] == [1, 2, 3] and traces[2].spikes.any()
    for n in range(2):
        a, b, c = (t.spikes[:, n].astype(int) for t in traces)
        late = np.concatenate([given[:, n], np.zeros((3, 5), int)])

        def after(x: Any, steps: int) -> Any:
            return np.concatenate([np.zeros((steps, x.shape[1]), int), x[:-steps]])

        assert loihi_loops(layers[0], after(late, 1).tolist()) == a.tolist()
        assert loihi_loops(layers[1], after(a, 1).tolist()) == b.tolist()
        assert loihi_loops(layers[2], np.concatenate([after(a, 2), after(b, 1)], 1).tolist()) == c.tolist()


def integer_if(weights: Any, bias: float, start: float, threshold: float) -> Any:
    """A layer whose numbers chips hold without rounding, behind one that passes spikes on."""
    count, inputs = weights.shape
    source, sink = ends((inputs,), (count,))
    facts = {"reset": "subtract", "tie": "ge", "v_init": start}
    ones = np.ones(count)
    relay = nir.IF(r=np.ones(inputs), v_threshold=np.ones(inputs), v_reset=np.zeros(inputs), metadata={**facts, "v_init": 0.0})
    last = nir.IF(r=ones, v_threshold=threshold * ones, v_reset=0 * ones, metadata=facts)
    nodes = {"input": source, "w1": nir.Linear(np.eye(inputs)), "relay": relay, "w2": nir.Affine(weights, bias * ones)}
    return chain({**nodes, "last": last, "out": sink}, dt=1.0)


@pytest.mark.parametrize("bias", [0.0, 20.0, -9.0])
def test_a_network_of_the_chips_own_numbers_is_exact_on_loihi(bias: float) -> None:
    """Ties, start and a bias that begins before the input arrives: spikes are the graph's."""
    weights = np.random.default_rng(0).integers(-60, 128, (5, 6)).astype(float)
    weights[0, 0] = 127  # a unit of the chip's 8 bits is 1
    graph, given = integer_if(weights, bias, start=63.5, threshold=127.0), spikes(20, 3, 6).astype(int)
    made = to_loihi2.quantize(graph, given)
    wanted = files.interpret(graph, given, record=None).values["last"]
    assert np.array_equal(to_loihi2.rasters(made.layers, given)["last"], wanted) and wanted.any()
    assert not any("are early" in note for note in made.notes) and made.difference == 0


def speck_loops(layer: speck.SpeckLayer, sent: Any) -> list[list[int]]:
    raster, v = [], [int(s) for s in layer.start]
    for row in sent:
        fired = []
        for n in range(len(v)):
            v[n] += sum(int(w) * int(s) for w, s in zip(layer.weights[n], row, strict=True)) + int(layer.bias[n])
            v[n] = max(-32768, min(32767, v[n]))
            fired.append(max(0, v[n] // layer.threshold))
            v[n] -= fired[-1] * layer.threshold
        raster.append(fired)
    return raster


def test_specks_integers_are_loops_over_neurons() -> None:
    rng = np.random.default_rng(1)
    graph = conv_net()
    given = spikes(10, 2, 1, 8, 8)
    made = to_speck.quantize(graph, given.reshape(10, 2, -1).astype(int))
    traces = speck.run(made.layers, given.reshape(10, 2, -1).astype(int))
    for n in range(2):
        sent: Any = given[:, n].reshape(10, -1)
        for layer, trace in zip(made.layers, traces, strict=True):
            sent = speck_loops(layer, sent)
            assert trace.spikes[:, n].tolist() == sent
    assert made.difference < 0.2 and traces[-1].spikes.any()
    wide = speck.SpeckLayer("wide", ("",), np.full((1, 300), 127, np.int8), np.zeros(1, np.int8), 30000, np.zeros(1, np.int16))
    trace = speck.follow(wide, (rng.random((20, 1, 300)) < 0.95).astype(int), {})
    assert trace.saturated > 0 and speck_loops(wide, np.zeros((0, 300))) == []


if "sinabs" in simulators.installed():

    @pytest.mark.slow
    def test_specks_integers_are_those_of_sinabs() -> None:
        rng = np.random.default_rng(2)
        source, sink = ends((12,), (4,))
        nodes = {"input": source, "w1": nir.Affine(rng.normal(0.2, 1, (9, 12)), rng.normal(0, 0.2, 9)), "if1": if_((9,))}
        nodes |= {"w2": nir.Linear(rng.normal(0.2, 1, (4, 9))), "if2": if_((4,)), "out": sink}
        given = spikes(20, 3, 12).astype(int)
        graph = to_speck.as_graph(to_speck.quantize(chain(nodes), given))
        ran = sim.run("sinabs", graph, given.astype(float))
        assert all(np.array_equal(ran.spikes[n], ran.expected[n]) for n in ("if1", "if2"))


def test_a_run_is_judged_on_chips_beside_its_own_rows(tmp_path: Path) -> None:
    given = data()
    run_model(Sums().eval(), given, tmp_path / "run", compress=[{"spiking": {"steps": 8, "encoding": "rate"}}], targets=["nir"])
    command = ["verify", str(tmp_path / "run"), "--target", "nir", "-d", "sim:loihi2", "-d", "sim:speck"]
    ran = CliRunner().invoke(cli.app, command)
    parity = json.loads((tmp_path / "run" / "parity.json").read_text())
    chips = {a["device"]: a for a in parity["artifacts"] if a["chip"]}
    assert set(chips) == {"sim:loihi2", "sim:speck"} and ran.exit_code in (0, 1)
    for found in chips.values():
        assert any(f"the host runs {ENCODER}" in note for note in found["notes"])
        assert not found["layers"] and not found["untapped"] and found["stage"]["metric"] is not None
        assert not any("LSB" in breach for breach in found["breaches"])
    assert "the host runs encoder" in ran.output and "operators stay in float" not in ran.output


def rows() -> Data:
    x = torch.rand(96, 8, generator=torch.Generator().manual_seed(0))
    return Data(calibration=x[:32], evaluation=(x[64:], x[64:, :3].argmax(1)), training=(x[:64], x[:64, :3].argmax(1)))


CUBA = {"chip": "xylo", "neuron": "cuba_plif", "tau": 5.0, "tau_syn": 3.0, "spikes": 31}
LIF = {"chip": "loihi2", "neuron": "plif", "tau": 3.3, "reset": "zero"}


@pytest.mark.parametrize("how", [CUBA, LIF, {"chip": "speck"}], ids=["xylo", "loihi2", "speck"])
def test_training_ends_on_the_chips_grid_and_the_chip_rounds_nothing(how: dict[str, Any], tmp_path: Path) -> None:
    settings = {"method": "train", "encoding": "rate", "steps": 12, "epochs": 3, "learning_rate": 5e-3, **how}
    torch.manual_seed(2)
    deep = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    model = nn.Sequential(nn.Linear(8, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False)) if how is CUBA else deep
    run_model(model.eval(), rows(), tmp_path / "run", compress=[{"spiking": settings}], targets=["nir"])
    graph = files.read(tmp_path / "run" / "model.nir")
    last = next(name for name, node in graph.nodes.items() if type(node).__name__ in ("CubaLIF", "LIF", "IF") and name != ENCODER)
    node = graph.nodes[last]
    x = files.interpret(
        graph, np.broadcast_to(rows().evaluation[0].numpy(), (12, 32, 8)), record=None  # type: ignore[index]
    ).values[ENCODER].astype(int)  # fmt: skip
    cut = host.parts(graph, how["chip"])
    if how["chip"] == "xylo":
        taus = np.unique(np.concatenate([np.ravel(node.tau_mem), np.ravel(node.tau_syn)]))
        assert np.array_equal(np.log2(taus), np.rint(np.log2(taus))) and np.all(taus >= 2)
        weights = next(n for n in cut.chip.nodes.values() if hasattr(n, "weight") and n.weight.shape == (6, 8)).weight
        scaled = weights / np.abs(weights).max(1, keepdims=True) * 127
        assert np.abs(scaled - np.rint(scaled)).max() < 1e-3
        with_neurons, told = to_xylo.with_output_neurons(cut.chip, x)
        made = to_xylo.quantize(with_neurons, x)
        assert "3 output neurons" in told[0] and not any("on the chip's grid" in note for note in made.notes)
    elif how["chip"] == "loihi2":
        rate = 4096 / np.unique(np.ravel(node.tau))
        assert np.abs(rate - np.rint(rate)).max() < 1e-2
        chip = to_loihi2.quantize(cut.chip, x)
        assert all(clip == 1.0 for clip in chip.clips.values()) or chip.difference < 0.1
    else:
        whole = to_speck.quantize(cut.chip, x)
        assert whole.difference < 0.05
    ran = CliRunner().invoke(cli.app, ["verify", str(tmp_path / "run"), "-t", "nir", "-d", f"sim:{how['chip']}"])
    parity = json.loads((tmp_path / "run" / "parity.json").read_text())
    assert [a["device"] for a in parity["artifacts"] if a["chip"]] == [f"sim:{how['chip']}"], ran.output


def test_what_a_chip_has_not_is_refused_before_training() -> None:
    for settings, words in (
        ({"chip": "xylo", "neuron": "lif"}, "its neurons are neuron: cuba with reset: subtract"),
        ({"chip": "loihi2", "spikes": 3}, "its neurons spike once a step"),
        ({"chip": "speck", "neuron": "lif"}, "its neurons are neuron: if, without a leak"),
        ({"chip": "speck", "method": "calibrate"}, "its grid is for method train"),
    ):
        with pytest.raises(ValueError, match=words):
            Spiking(**{"method": "train"} | settings)
