"""NIR files on simulators: agreement counted, faults named, chips' arithmetic beside the float graph."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from neuromorphic_nets import chain, conv_net, cuba, cuba_net, ends, lif_net, nir, recurrent_net, spikes
from typer.testing import CliRunner

from edgekit import agreement, cli
from edgekit import nir as files
from edgekit.agreement import Spikes, compare, load_spikes, random_spikes
from edgekit.devices import connect, sim, simulators
from edgekit.errors import InputError, MissingTool, UnsupportedError
from edgekit.targets.neuromorphic.nest import populations


def test_devices_are_known_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert connect("sim:xylo").targets == ("nir",)
    with pytest.raises(InputError, match="no such simulator; choose one of: sim:nir, sim:spikingjelly"):
        connect("sim:brian")
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path))
    with pytest.raises(MissingTool, match="the simulator is not set up; run: edgekit setup-sim nest"):
        connect("sim:nest")


def altered(graph: Any, change: Callable[[dict[str, Any]], None]) -> Any:
    """A copy of a graph with other nodes."""
    other = copy.deepcopy(graph)
    change(other.nodes)
    return other


def flipped(nodes: dict[str, Any]) -> None:
    nodes["fc2"].weight[:, 3] = -nodes["fc2"].weight[:, 3]


def wrong_tau(nodes: dict[str, Any]) -> None:
    nodes["lif1"].tau = nodes["lif1"].tau * 1.05


def no_reset(nodes: dict[str, Any]) -> None:
    nodes["lif2"].metadata = {**nodes["lif2"].metadata, "reset": "subtract"}


@pytest.mark.parametrize(("fault", "node"), [(flipped, "lif2"), (wrong_tau, "lif1"), (no_reset, "lif2")])
def test_a_fault_in_a_file_is_found_and_its_first_layer_named(tmp_path: Path, fault: Any, node: str) -> None:
    graph = lif_net()
    given = random_spikes(graph)
    expected = sim.run("nir", graph, given.values)
    path = tmp_path / "net.nir"
    for change, first in ((None, None), (fault, node)):
        other = graph if change is None else altered(graph, change)
        files.write(path, other)
        ran = sim.run("nir", files.read(path), given.values)
        found = compare(path, sim.Rasters("nir", "", ran.spikes, expected.spikes, ran.lag, True, ran.outputs), given)
        assert found.first == first and found.ok == (change is None)
        if change is not None:
            layer = next(x for x in found.layers if x.name == node)
            t, n, i = layer.first or (-1, -1, -1)
            assert ran.spikes[node][t, n, i] != expected.spikes[node][t, n, i]
            assert np.array_equal(ran.spikes[node][:t], expected.spikes[node][:t])
            assert f"first in layer {node}" in found.verdict()


def test_the_xylo_chip_is_counted_beside_the_graph(tmp_path: Path) -> None:
    graph = cuba_net(
        reset="subtract", tie="ge", spikes=31, tau_syn=8e-3, tau_mem=8e-3, hidden=40, outputs=6, last={"spikes": 1, "tie": "ge"}
    )
    path = tmp_path / "net.nir"
    files.write(path, graph)
    (found,) = agreement.verify_file(path, ["sim:xylo"]).agreements
    assert found.ok and not found.exact and [x.name for x in found.layers] == ["c1", "c2"]
    for layer in found.layers:
        assert layer.expected > 100 and abs(layer.found - layer.expected) < 0.05 * layer.expected
    assert [x.lag for x in found.layers] == [0, 1] and any("calibrated on 2 samples" in note for note in found.notes)
    assert "the chip's integers are not the float graph's" in found.verdict()


def test_the_command_line_verifies_a_file(tmp_path: Path) -> None:
    path, given = tmp_path / "net.nir", tmp_path / "given.npz"
    graph = lif_net(tie="gt")
    files.write(path, graph)
    values = spikes(24, 6, 16, seed=5)
    labels = files.interpret(graph, values).output.sum(0).argmax(1)
    np.savez(given, spikes=values, labels=labels)
    ended = CliRunner().invoke(
        cli.app, ["verify", str(path), "-d", "sim:loihi2", "-d", "sim:nir", "--inputs", str(given), "--json"]
    )
    chip, own = json.loads(ended.stdout)
    assert ended.exit_code == 0 and own["differing"] == 0 and own["accuracy"] == 100 and chip["expected_accuracy"] == 100
    assert chip["simulator"] == "loihi2" and not chip["exact"] and chip["accuracy"] >= 50
    ended = CliRunner().invoke(cli.app, ["verify", str(path), "-d", "sim:nir"])
    assert ended.exit_code == 0 and "random spikes, 30% of the steps, seed 0" in ended.stdout
    ended = CliRunner().invoke(cli.app, ["verify", str(path), "-d", "local"])
    assert isinstance(ended.exception, InputError) and "no simulator; use --device sim:NAME" in str(ended.exception)


def test_inputs_that_do_not_fit_are_named(tmp_path: Path) -> None:
    for name, values, words in (
        ("flat.npy", np.zeros((4, 3)), "expected an array `spikes` of numbers"),
        ("text.npy", np.array([[["a"]]]), "expected an array `spikes` of numbers"),
        ("none.npy", None, "no .npy or .npz file that can be read"),
    ):
        if values is not None:
            np.save(tmp_path / name, values)
        with pytest.raises(InputError, match=words):
            load_spikes(tmp_path / name)
    for simulator in ("spikingjelly", "nest", "xylo", "nir"):
        with pytest.raises(InputError, match=r"input input: shape \(4, 2, 5\) given, \(T, N, 16\) expected"):
            sim.run(simulator, cuba_net(reset="subtract", tie="ge", spikes=31, last={"spikes": 1}), np.zeros((4, 2, 5)))
    np.savez(tmp_path / "labels.npz", spikes=np.zeros((4, 3, 2)), labels=np.zeros(5))
    with pytest.raises(InputError, match=r"labels have shape \(5,\), expected \(3,\)"):
        load_spikes(tmp_path / "labels.npz")


def test_what_nest_and_chips_cannot_do_is_refused_by_name() -> None:
    for graph, words in (
        (lif_net(reset="subtract"), "nest: node lif1 .* reset 'subtract'"),
        (cuba_net(), "nest: node c1 .* an IF or a LIF"),
    ):
        with pytest.raises(UnsupportedError, match=words):
            populations(graph)
    for simulator, graph, words in (
        ("xylo", lif_net(reset="subtract"), "xylo: node lif1 .* train with CubaLIF"),
        ("xylo", cuba_net(), "xylo: node c1 .* reset 'zero': the chip subtracts"),
        ("loihi2", lif_net(leak=0.5), "loihi2: node lif1 .* is reset to it"),
        ("loihi2", recurrent_net(), "loihi2: node lif .* without cycles on it"),
        ("speck", lif_net(), "speck: node lif1 .* train with neuron: if"),
    ):
        shape = (16,) if "input" not in graph.nodes else tuple(int(n) for n in graph.nodes["input"].input_type["input"])
        with pytest.raises(UnsupportedError, match=words):
            sim.run(simulator, graph, spikes(4, 2, *shape))


def test_populations_of_nest_carry_lags_delays_and_biases() -> None:
    """NEST's exact solution with these numbers is the graph's Euler step: run in numpy as NEST's documentation has it."""
    graph = recurrent_net()
    made = populations(graph)
    given = spikes(12, 1, 16)
    expected = files.interpret(graph, given, record=None).values
    lags = {layer["name"]: layer["lag"] for layer in made.settings["layers"]}
    assert lags == {"lif": 1, "last": 2}
    total = 12 + 2
    sent = {"input": np.zeros((total, 16)), "lif": np.zeros((total, 20)), "last": np.zeros((total, 6))}
    sent["input"][:12] = given[:, 0]
    v = {name: made.arrays[f"start:{name}"].copy() for name in lags}
    for t in range(1, total):
        for layer in made.settings["layers"]:
            name = layer["name"]
            x = made.arrays[f"bias:{name}"] * (0 <= t - layer["lag"] < 12)
            for at, source in enumerate(layer["sources"]):
                if t - source["delay"] >= 0:
                    x = x + made.arrays[f"weights:{name}:{at}"] @ sent[source["name"]][t - source["delay"]]
            if t < layer["lag"]:
                continue
            leak = made.arrays[f"leak:{name}"]
            v[name] = leak + (v[name] - leak) * np.exp(-1 / made.arrays[f"tau:{name}"]) + x
            sent[name][t] = v[name] >= made.arrays[f"threshold:{name}"]
            v[name] = np.where(sent[name][t] > 0, made.arrays[f"reset:{name}"], v[name])
    for name, lag in lags.items():
        assert np.array_equal(sent[name][lag : lag + 12], expected[name][:, 0])


# the others are run by benchmarks/snn_simulators.py
CASES = {
    "lif": (lambda: lif_net(tie="gt"), ("spikingjelly", "nest")),
    "conv": (lambda: conv_net(groups=2), ("spikingjelly",)),
    "recurrent": (recurrent_net, ("nest",)),
    "xylo": (
        lambda: cuba_net(reset="subtract", tie="ge", spikes=31, tau_syn=8e-3, tau_mem=8e-3, last={"spikes": 1}),
        ("xylosim",),
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("case", "simulator"), [(case, name) for case, (_, names) in CASES.items() for name in names])
def test_simulators_agree_in_every_spike(tmp_path: Path, case: str, simulator: str) -> None:
    if simulator not in simulators.installed():
        simulators.setup(simulator)  # seconds, by the user's pip
    path = tmp_path / "net.nir"
    files.write(path, CASES[case][0]())
    (found,) = agreement.verify_file(path, [f"sim:{simulator}"]).agreements
    assert found.exact and found.differing == 0 and found.version
    assert sum(layer.found for layer in found.layers) > 100


def test_the_approximation_of_other_neurons_is_asked_for() -> None:
    from edgekit.targets.neuromorphic import to_xylo

    graph = lif_net(reset="subtract")
    given = spikes(20, 4, 16).astype(int)
    made = to_xylo.quantize(graph, given, approximate=True)
    assert any("a LIF has no synaptic current" in note for note in made.notes) and made.difference > 0
    source, sink = ends((16,), (6,))
    alone = chain({"input": source, "fc": nir.Linear(np.ones((6, 16))), "c": cuba(6, reset="subtract", tie="ge"), "out": sink})
    with pytest.raises(UnsupportedError, match="output neurons hear hidden neurons only"):
        to_xylo.quantize(alone, given)


def test_random_spikes_are_the_same_each_time() -> None:
    first, again = random_spikes(lif_net()), random_spikes(lif_net())
    assert isinstance(first, Spikes) and np.array_equal(first.values, again.values) and 0.25 < first.values.mean() < 0.35
    graph = lif_net()
    assert len(first.values) == 32
    graph.metadata["steps"] = 5  # as edgekit's files say
    assert len(random_spikes(graph).values) == 5


def test_a_run_is_verified_and_profiled_on_a_simulator(tmp_path: Path) -> None:
    """The members of a device: outputs, each neuron's spikes in the program's layout, and a profile."""
    from edgekit.nir.to_module import to_program
    from edgekit.profile import Settings
    from edgekit.targets import nir as target

    graph = conv_net()
    graph.metadata = {"dt": 1e-3, "steps": 6, "encoding": "repeat", "readout": "accumulate"}
    program = to_program(graph)
    path = tmp_path / "model.nir"
    target.lower(program, path)
    device = connect("sim:nir")
    samples = np.random.default_rng(0).random((3, 1, 8, 8), np.float32)
    (outputs,), (expected,) = device.run(path, "nir", [samples]), target.run(path, [samples])
    assert np.array_equal(outputs, expected)
    for i, taps in enumerate(device.taps_each(path, "nir", program, [samples])):
        own = target.taps(path, program, [samples[i : i + 1]])
        spiking = {name: value for name, value in own.items() if name in taps}
        assert len(spiking) == 3 and all(np.array_equal(taps[name], value) for name, value in spiking.items())
    made = device.profile(path, "nir", program, Settings(), [samples])
    assert made.unit == "synaptic operations" and made.total == made.figures["synaptic_operations"] > 0
    assert {layer.op for layer in made.layers} == {"Conv2d", "IF", "Affine"} and made.macs == made.figures[
        "dense_macs_of_one_pass"
    ]
    assert any("of one dense pass" in note for note in made.notes) and any("not a measurement" in note for note in made.notes)


def test_a_file_is_profiled_on_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "net.nir"
    files.write(path, lif_net())
    (made,) = json.loads(CliRunner().invoke(cli.app, ["profile", str(path), "-d", "sim:nir", "--json"]).stdout)
    assert made["figures"]["steps"] == 32 and made["file"] == "net.nir" and len(made["layers"]) == 4
    shown = CliRunner().invoke(cli.app, ["profile", str(path), "-d", "sim:loihi2"]).stdout
    assert "nir on sim:loihi2" in shown and "synaptic operations an inference" in shown and "one dense pass" in shown


def two_outputs() -> Any:
    """A graph whose second output is that of its first layer."""
    graph = lif_net()
    graph.nodes["early"] = nir.Output({"output": np.array([20])})
    graph.edges.append(("lif1", "early"))
    return graph


def test_one_refusal_does_not_keep_other_simulators_from_running(tmp_path: Path) -> None:
    path = tmp_path / "net.nir"
    files.write(path, lif_net())
    ran = CliRunner().invoke(cli.app, ["verify", str(path), "-d", "sim:speck", "-d", "sim:nir", "-d", "sim:loihi2", "--json"])
    found = {one["simulator"]: one for one in json.loads(ran.stdout)}
    assert ran.exit_code == 2 and set(found) == {"nir", "loihi2", "speck"} and found["nir"]["ok"]
    assert "speck: node lif1" in found["speck"]["error"] and not found["speck"]["ok"]
    shown = CliRunner().invoke(cli.app, ["verify", str(path), "-d", "sim:speck", "-d", "sim:nir"])
    assert "every spike of 2 layers" in shown.output and "speck: node lif1" in shown.output and shown.exit_code == 2


def test_a_graph_with_two_outputs_is_verified_at_the_one_that_is_chosen(tmp_path: Path) -> None:
    path = tmp_path / "net.nir"
    files.write(path, two_outputs())
    with pytest.raises(InputError, match=r"2 outputs \(early, out\); choose one by --output NAME"):
        agreement.verify_file(path, ["sim:nir"])
    with pytest.raises(UnsupportedError, match="no output 'late'; choose one of: early, out"):
        agreement.verify_file(path, ["sim:nir"], output="late")
    for output, layers in (("out", ["lif1", "lif2"]), ("early", ["lif1"])):
        ran = CliRunner().invoke(cli.app, ["verify", str(path), "-d", "sim:loihi2", "--output", output, "--json"])
        assert [x["name"] for x in json.loads(ran.stdout)[0]["layers"]] == layers and ran.exit_code == 0
    run = str(tmp_path / "run")
    ran = CliRunner().invoke(cli.app, ["import", str(path), "--out", run, "--steps", "4", "--output", "early", "--json"])
    assert ran.exit_code == 0, ran.output
