"""NIR files of frozen programs: written, read back, run, imported again; faults found by name, bad files refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import h5py
import nir
import numpy as np
import pytest
import torch
from core.test_nir_interpreter import chain, recurrent
from spiking_nets import STEPS, conv_program, dense_program, recurrent_program
from torch import nn
from typer.testing import CliRunner

from edgekit.cli import app
from edgekit.compress.spiking.integer import integer_program
from edgekit.errors import EdgekitError, FormatError, InputError, UnsupportedError
from edgekit.frozen import FrozenOp, FrozenProgram, freeze_module
from edgekit.nir import interpret, read, write
from edgekit.nir.file import same, to_bytes
from edgekit.nir.from_program import to_nir
from edgekit.nir.to_module import to_module, to_program
from edgekit.parity import ArtifactParity, Parity
from edgekit.recipe import TargetName
from edgekit.stages import Evaluation
from edgekit.targets import TARGETS, get
from edgekit.verify import verify_artifact

NIR = get("nir")
PROGRAMS = {
    "conv if": lambda: conv_program("if", v_init=0.5),
    "conv lif": lambda: conv_program("lif", tie="gt", v_threshold=0.15),
    "dense lif": lambda: dense_program("lif", reset="zero"),
    "dense lif to a value": lambda: dense_program("lif", reset="value", v_reset=-0.25),
    "dense cuba": lambda: dense_program("cuba_lif"),
    "dense multi-spike": lambda: dense_program("if", max_spikes=3),
    "dense recurrent": lambda: recurrent_program("lif", v_threshold=0.7),
    "dense recurrent cuba": lambda: recurrent_program("cuba_lif", reset="zero", v_threshold=0.7),
    "conv recurrent": lambda: recurrent_program("if", image=True, bias=False),
    "dense, dt 1 ms": lambda: dense_program("lif", dt=1e-3, tau=2e-3),
}


def verified(program: FrozenProgram, path: Path, x: torch.Tensor) -> ArtifactParity:
    return verify_artifact(program, "nir", path, Evaluation(inputs=(x,), labels=None, metric="accuracy", where="here"))


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_file_computes_the_programs_spikes_and_comes_back_equal(name: str, tmp_path: Path) -> None:
    program, x = PROGRAMS[name]()
    path = tmp_path / "model.nir"
    artifact = NIR.lower(program, path)
    found = verified(program, path, x)
    assert found.ok and not found.mismatches
    spikes = [layer for layer in found.layers if layer.op != "accumulate"]
    assert [layer.layer for layer in spikes] == ["spike1", "spike2"]
    assert all(layer.differing == 0 for layer in spikes)
    fired = program.trace(x[:1])
    assert all(0.02 < float((fired[n] > 0).float().mean()) < 0.98 for n in ("spike1", "spike2"))  # not all, not none
    assert sum(row.macs for row in artifact.coverage) == program.macs
    again = to_program(read(path))
    assert torch.equal(again.run(x)[0], program.run(x)[0])
    assert same(to_nir(again), read(path)) == []
    write(tmp_path / "again.nir", read(path))
    assert same(read(tmp_path / "again.nir"), to_nir(program)) == []
    assert to_bytes(to_nir(program)) == path.read_bytes()


def test_a_saved_file_is_what_the_nir_package_reads(tmp_path: Path) -> None:
    program, _ = conv_program(groups=1)  # nir 1.0.8 takes the groups of a convolution for a mistake
    NIR.lower(program, tmp_path / "model.nir")
    graph = nir.read(tmp_path / "model.nir")  # with its own type check
    assert {type(n).__name__ for n in graph.nodes.values()} == {
        "Input",
        "Conv2d",
        "IF",
        "AvgPool2d",
        "Flatten",
        "Affine",
        "Output",
    }
    assert graph.metadata["steps"] == STEPS and graph.nodes["spike1"].metadata["reset"] == "subtract"


def flip(graph: Any) -> None:
    graph.nodes["head"].weight[2, 3] *= -1


def grow(graph: Any) -> None:
    graph.nodes["spike2"].tau[...] *= 1.1


def drop(graph: Any) -> None:
    del graph.nodes["spike1"].metadata["reset"]


def tie(graph: Any) -> None:
    graph.nodes["spike1"].metadata["tie"] = "gt"


def step(graph: Any) -> None:
    graph.metadata["dt"] = 0.5


@pytest.mark.parametrize(
    ("fault", "layer", "sentence"),
    [
        (flip, "head", "layer head: weight[2, 3] is "),
        (
            grow,
            "spike2",
            "layer spike2: tau[0, 0, 0] is 2.20000005 (24 of 24 values differ) in the file, 2 in the frozen program",
        ),
        (drop, "spike1", "layer spike1: metadata reset is not there in the file, subtract in the frozen program"),
        (tie, "spike1", "layer spike1: metadata tie is gt in the file, ge in the frozen program"),
        (step, "of the graph", "metadata dt is 0.5 in the file, 1 in the frozen program"),
    ],
)
def test_a_planted_fault_is_found_and_its_node_named(
    fault: Callable[[Any], None], layer: str, sentence: str, tmp_path: Path
) -> None:
    program, x = conv_program("lif")
    path = tmp_path / "model.nir"
    graph = to_nir(program)
    fault(graph)
    write(path, graph)
    found = verified(program, path, x)
    assert any(sentence in breach for breach in found.breaches), found.breaches
    assert found.first_diverging in (layer, "spike1")


def test_a_fault_that_only_a_run_shows_is_found_layer_by_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read back is switched off: what is left is the comparison of spikes, each layer fed the file's own inputs."""
    program, x = conv_program("lif", v_threshold=0.4)
    path = tmp_path / "model.nir"
    for fault in (grow, step):
        graph = to_nir(program)
        fault(graph)
        write(path, graph)
        monkeypatch.setattr("edgekit.targets.nir.readback", lambda path, program: [])
        found = verified(program, path, x)
        first = "spike2" if fault is grow else "spike1"
        assert found.first_diverging == first
        assert f"layer {first} (lif_sequence) differs from the frozen program in " in found.breaches[0]
        assert "rounding explains 0 of them" in found.breaches[0]


def test_rounding_is_told_from_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight one unit in the last place off flips spikes whose membrane meets the threshold, and these only."""

    class Edge(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fold = FrozenOp("fold_steps", 1, {})
            self.fc = nn.Linear(1, 2, bias=False)
            constants = {k: torch.tensor(v) for k, v in {"r": 1.0, "v_threshold": 0.75, "v_reset": 0.0, "v_init": 0.0}.items()}
            rules = {"dt": 1.0, "steps": 4, "reset": "subtract", "tie": "ge", "max_spikes": 1}
            self.spike = FrozenOp("if_sequence", 1, constants, **rules)
            self.out = FrozenOp("unfold_steps", 1, {}, steps=4)
            self.fc.weight = nn.Parameter(torch.tensor([[0.25], [0.6]]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.out(self.spike(self.fc(self.fold(x))))
            return y

    program, path, x = freeze_module(Edge(), (torch.ones(1, 4, 1),)), tmp_path / "model.nir", torch.ones(1, 4, 1)
    assert program.run(x)[0][0].T.tolist() == [[0, 0, 1, 0], [0, 1, 1, 1]]
    graph = to_nir(program)
    graph.nodes["fc"].weight[0, 0] = np.nextafter(np.float32(0.25), np.float32(0))
    write(path, graph)
    monkeypatch.setattr("edgekit.targets.nir.readback", lambda path, program: [])
    (layer,) = verified(program, path, x).layers
    assert (layer.differing, layer.rounded, layer.within) == (2, 2, True)
    graph.nodes["fc"].weight[1, 0] = 0.3
    write(path, graph)
    (layer,) = verified(program, path, x).layers
    assert layer.differing > 2 and layer.rounded == 2 and not layer.within


def test_a_recurrent_graph_runs_as_a_program() -> None:
    rng = np.random.default_rng(1)
    graph = recurrent(*(rng.standard_normal(shape).astype(np.float32) for shape in ((3, 3), (3, 2))))
    x = rng.standard_normal((5, 20, 2)).astype(np.float32)
    program = to_program(graph, 20, readout="sequence")
    wanted = interpret(graph, x.transpose(1, 0, 2)).output.transpose(1, 0, 2)
    assert 0.1 < wanted.mean() < 0.5
    assert np.array_equal(program.run(torch.from_numpy(x))[0].numpy(), wanted)
    assert np.array_equal(interpret(to_nir(program), x.transpose(1, 0, 2)).output.transpose(1, 0, 2), wanted)
    assert [layer.op for layer in program.layers] == ["fold_steps", "lif_recurrent", "unfold_steps"]
    module = to_module(graph, 20, readout="sequence")
    again = module.graph()
    assert sorted(again.nodes) == ["cell.lif", "cell.rec", "cell.w", "input", "output"]
    assert np.array_equal(interpret(again, x.transpose(1, 0, 2)).output.transpose(1, 0, 2), wanted)
    assert same(to_module(again).graph(), again) == []  # steps, dt and readout are in it now
    with torch.no_grad():
        module.layer("cell.lif").weight.zero_()
    assert not module.graph().nodes["cell.rec"].weight.any()


def populations(steps: int) -> nir.NIRGraph:
    """Excitatory neurons with synapses and inhibitory ones with another reset; each hears the other, the first themselves too."""
    rng = np.random.default_rng(0)
    p, full = (lambda *s: rng.normal(size=s).astype(np.float32)), (lambda n, v: np.full(n, v, np.float32))
    exc = [full(8, v) for v in (3.0, 4.0, 2.0, 0.1, 0.6)]
    inh = [full(5, v) for v in (2.0, 2.0, 0.0, 0.7, -0.2)]
    nodes = {
        "x": nir.Input({"input": np.array([6])}), "fc": nir.Affine(p(8, 6), p(8) / 9), "ei": nir.Linear(p(5, 8)),
        "exc": nir.CubaLIF(*exc, w_in=full(8, 1.5), metadata={"reset": "subtract", "tie": "ge", "v_init": 0.125}),
        "inh": nir.LIF(*inh, metadata={"reset": "value", "tie": "gt"}), "ie": nir.Affine(p(8, 5) / 2, p(8) / 9),
        "ee": nir.Linear(p(8, 8) / 3), "out": nir.LI(*(full(8, v) for v in (2.0, 1.0, 0.0))), "ot": nir.Linear(p(8, 8) / 9),
        "output": nir.Output({"output": np.array([8])}),
    }  # fmt: skip
    edges = [("x", "fc"), ("fc", "exc"), ("exc", "ei"), ("ei", "inh"), ("inh", "ie"), ("ie", "exc"), ("exc", "ee"), ("ee", "exc")]
    edges += [("exc", "out"), ("out", "ot"), ("ot", "out"), ("out", "output")]  # integrators that hear themselves
    facts = {"dt": 1.0, "steps": steps, "encoding": "sequence", "readout": "sequence"}
    return nir.NIRGraph(nodes, edges, metadata=facts, type_check=False)


def test_loops_over_several_layers_come_back_from_a_program_that_wrote_them_out() -> None:
    graph, x = populations(12), (np.random.default_rng(1).random((12, 3, 6)) < 0.4).astype(np.float64)
    program = to_program(graph)
    trace, again = interpret(graph, x, record=None), to_nir(program)
    assert all(0.1 < trace.values[n].mean() < 0.6 for n in ("exc", "inh"))
    found = interpret(again, x, record=None)
    assert all(np.array_equal(found.values[n], trace.values[n]) for n in ("exc", "inh"))
    assert np.abs(found.output - trace.output).max() < 1e-9
    assert {n: type(node) for n, node in again.nodes.items()} == {n: type(node) for n, node in graph.nodes.items()}
    assert {tuple(e) for e in again.edges} == {tuple(e) for e in graph.edges}
    assert np.abs(program.run(torch.from_numpy(x.swapaxes(0, 1)).float())[0].numpy() - trace.output.swapaxes(0, 1)).max() < 1e-5
    with pytest.raises(UnsupportedError, match="runs one step, which does not show what comes back; run more steps"):
        to_nir(to_program(graph, 1))


def test_nodes_of_every_kind_run_as_a_module() -> None:
    rng = np.random.default_rng(2)
    p = lambda *shape: rng.uniform(0.5, 1.5, shape).astype(np.float32)  # noqa: E731
    nodes = [
        nir.Scale(p(2, 6, 5)),
        nir.Conv2d((6, 5), p(4, 1, 3, 2) - 1, 1, "same", 1, 2, p(4) - 1),
        nir.LI(*(p(4, 6, 5) for _ in range(3))),
        nir.SumPool2d(*(np.array(v) for v in ([2, 2], [2, 1], [0, 1]))),
        nir.I(p(4, 3, 6)),
        nir.Flatten({"input": np.array([4, 3, 6])}, 1, 2),
        nir.Conv1d(18, p(3, 4, 3) - 1, 2, 1, 1, 1, p(3)),
        nir.CubaLI(*(p(3, 9) for _ in range(4)), w_in=0.5),
        nir.Linear(p(3, 4, 9) - 1),
        nir.Delay(np.array([[0, 1, 2, 3]] * 3, np.float32)),
        nir.Threshold(p(3, 4)),
    ]
    image = chain(*nodes, shape=(2, 6, 5))
    x = rng.standard_normal((3, 7, 2, 6, 5)).astype(np.float32)
    trace = interpret(image, x.swapaxes(0, 1), record=None)
    module = to_module(image, 7, readout="sequence")
    found = module(torch.from_numpy(x)).detach().numpy()
    assert 0.1 < found.mean() < 0.9
    assert np.array_equal(found, trace.output.swapaxes(0, 1))
    assert np.array_equal(to_program(image, 7, readout="sequence").run(torch.from_numpy(x))[0].numpy(), found)


class Turned(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(len(x), 4, 2, 4)


class Joined(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, 2 * x], 1)


def test_what_nir_cannot_hold_is_refused_by_layer() -> None:
    class Net(nn.Module):
        def __init__(self, *middle: nn.Module) -> None:
            super().__init__()
            self.encode = FrozenOp("repeat_steps", 1, {}, steps=4)
            self.middle = nn.Sequential(*middle)
            self.out = FrozenOp("accumulate", 1, {}, gain=1.0, steps=4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.out(self.middle(self.encode(x)))
            return y

    x = torch.rand(1, 2, 4, 4)
    for part, sentence in (
        (nn.MaxPool2d(2), r"layer middle\.0: a max pool has no form in NIR .*; use an average pool"),
        (nn.ReLU(), "convert the activation to neurons"),
        (nn.BatchNorm2d(2), "fold the batch normalization"),
        (nn.AvgPool2d(3, padding=1, count_include_pad=False), "its average leaves padding out"),
        (Joined(), r"layer middle\.0.*: operator aten\.cat\.default has no form in NIR; sum the branches instead"),
        (Turned(), "it reshapes \\(2, 4, 4\\) to \\(4, 2, 4\\), and NIR has Flatten only"),
    ):
        with pytest.raises(UnsupportedError, match=sentence):
            to_nir(freeze_module(Net(part).eval(), (x,)))
    with pytest.raises(UnsupportedError, match="it has no time steps; target nir takes spiking programs"):
        to_nir(freeze_module(nn.Linear(3, 3), (torch.rand(1, 3),)))


def test_a_network_of_one_step_is_a_network_of_thresholds(tmp_path: Path) -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 3)
            self.register_buffer("level", torch.full((8,), 0.1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.b((self.a(x) >= self.level).to(torch.float32))
            return y

    x = torch.rand(5, 6)
    net = One()
    program = freeze_module(net, (x,))
    NIR.lower(program, tmp_path / "model.nir")
    graph = read(tmp_path / "model.nir")
    assert sorted(type(n).__name__ for n in graph.nodes.values()) == ["Affine", "Affine", "Input", "Output", "Threshold"]
    assert graph.metadata["steps"] == 1 and verified(program, tmp_path / "model.nir", x).ok
    np.testing.assert_allclose(NIR.run(tmp_path / "model.nir", [x.numpy()])[0], program.run(x)[0], atol=1e-6)
    integers, _ = integer_program(program, (x,))
    assert torch.equal(integers.trace(x[:1])["ge"].float(), (net.a(x[:1]) >= 0.1).float())


def test_steps_must_be_known_and_inputs_fit(tmp_path: Path) -> None:
    graph = chain(nir.I(np.ones(2, np.float32)), shape=(2,))
    with pytest.raises(InputError, match="does not say how many time steps"):
        to_module(graph)
    write(tmp_path / "x.nir", graph)
    with pytest.raises(FormatError, match="metadata do not say steps"):
        NIR.run(tmp_path / "x.nir", [np.zeros((1, 2))])
    program, _ = dense_program()
    NIR.lower(program, tmp_path / "d.nir")
    with pytest.raises(InputError, match="3 time steps given, 8 expected"):
        NIR.run(tmp_path / "d.nir", [np.zeros((1, 3, 6))])


@pytest.mark.parametrize("steps", [-3, 0, 10**9, 2.5, "many"])
def test_numbers_of_steps_that_nothing_can_run_are_refused(steps: Any) -> None:
    graph = chain(nir.I(np.ones(2, np.float32)), shape=(2,))
    graph.metadata = {"steps": steps, "encoding": "repeat", "readout": "accumulate"}
    with pytest.raises(UnsupportedError, match=r"metadata steps is .*, a whole number from 1 to 65,536 expected"):
        to_module(graph)
    if isinstance(steps, int):
        with pytest.raises(UnsupportedError, match=r"the number of steps is -?\d+, a whole number"):
            to_module(chain(nir.I(np.ones(2, np.float32)), shape=(2,)), steps)


def test_numbers_that_make_no_network_are_refused_by_node() -> None:
    def fire(threshold: float, reset: str, value: float = 0.0) -> Any:
        full = {k: np.full(2, v, np.float32) for k, v in {"r": 1.0, "v_threshold": threshold, "v_reset": value}.items()}
        return nir.IF(**full, metadata={"reset": reset})

    for node, words in (
        (fire(0.0, "subtract"), "v_threshold is 0, not above 0"),
        (fire(-1.0, "zero"), "v_threshold is -1, not above 0"),
        (fire(-0.5, "value", 0.0), "v_threshold is -0.5, not above v_reset 0"),
    ):
        with pytest.raises(UnsupportedError, match=words):
            to_program(chain(node, shape=(2,)), 4)
    assert to_program(chain(fire(-0.5, "value", -1.0), shape=(2,)), 4).layers
    for wrong in (nir.Linear(np.ones((3, 5), np.float32)), nir.Affine(np.ones((3, 2), np.float32), np.ones(4, np.float32))):
        with pytest.raises(UnsupportedError, match=r"does not take a value of shape \(2,\)"):
            to_program(chain(wrong, shape=(2,)), 4)


@pytest.mark.parametrize(
    ("tau", "dt", "words"),
    [
        (0.0, 1.0, r"node n0 \(LIF\): tau is 0, a positive number expected"),
        (-3.0, 1.0, "tau is -3, a positive number"),
        (0.3, 1.0, "a step of 1 is more than twice as long: its values grow without bound"),
        (0.02, 1e-3, ""),
        (0.5, 1.0, ""),
    ],
)
def test_a_step_that_the_time_constants_cannot_follow_is_refused(tau: float, dt: float, words: str) -> None:
    full = {k: np.full(2, v, np.float32) for k, v in {"tau": tau, "r": 1.0, "v_leak": 0.0, "v_threshold": 1.0}.items()}
    graph = chain(nir.LIF(**full), shape=(2,))
    if not words:
        assert to_program(graph, 4, dt=dt).layers
        return
    with pytest.raises(UnsupportedError, match=words):
        to_program(graph, 4, dt=dt)
    if tau <= 0:  # a file that does not say its dt can still be looked at
        with pytest.raises(UnsupportedError, match=words):
            interpret(graph, np.zeros((4, 1, 2)), dt=dt)


def edit(path: Path, change: Callable[[h5py.File], None]) -> None:
    with h5py.File(path, "r+") as file:
        change(file)


def kind_of(name: str, value: str) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[f"node/nodes/{name}/type"]
        file[f"node/nodes/{name}/type"] = value

    return change


def newer(file: h5py.File) -> None:
    del file["version"]
    file["version"] = "2.1.0"


def outside(file: h5py.File) -> None:
    del file["node/nodes/head/weight"]
    file["node/nodes/head/weight"] = h5py.ExternalLink("/etc/hostname", "/x")


def without(key: str) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file[key]

    return change


def more(file: h5py.File) -> None:
    file["node/nodes/spike1/refractory"] = 3.0


def ragged(file: h5py.File) -> None:
    del file["node/nodes/spike1/r"]
    file["node/nodes/spike1/r"] = np.ones(3)


def no_number(file: h5py.File) -> None:
    file["node/metadata/gain"][...] = np.nan


def holed(file: h5py.File) -> None:
    file["node/nodes/head/weight"][0, 0] = np.nan


@pytest.mark.parametrize(
    ("change", "kind", "sentence"),
    [
        (no_number, FormatError, "/node/metadata/gain holds 1 NaN values of 1; make the file again"),
        (holed, FormatError, r"/node/nodes/head/weight holds 1 NaN values of \d+; make the file again"),
        (newer, FormatError, r"written by nir 2\.1\.0; this edgekit reads files of nir 1\.x and older"),
        (kind_of("pool", "MaxPool2d"), UnsupportedError, r"node pool is a 'MaxPool2d', which NIR 1\.0\.8 does not have"),
        (without("node/nodes/head/weight"), FormatError, r"node head \(Affine\) cannot be made: missing .*'weight'"),
        (without("node/nodes/head/type"), UnsupportedError, "node head is a None"),
        (more, FormatError, r"node spike1 \(IF\) cannot be made: got an unexpected keyword argument 'refractory'"),
        (ragged, FormatError, r"node spike1 \(IF\) cannot be made: All parameters must have the same shape"),
        (outside, FormatError, "points to another place; edgekit does not follow it"),
        (without("node"), FormatError, "without a NIR graph"),
        (without("node/nodes/conv2"), UnsupportedError, "there is no node conv2"),
    ],
)
def test_damaged_and_foreign_files_are_refused_in_a_sentence(
    change: Callable[[h5py.File], None], kind: type[Exception], sentence: str, tmp_path: Path
) -> None:
    path = tmp_path / "model.nir"
    NIR.lower(conv_program()[0], path)
    edit(path, change)
    with pytest.raises(kind, match=sentence) as error:
        read(path)
    assert str(error.value).startswith(f"{path}: ")


def test_random_damage_never_gives_another_error(tmp_path: Path) -> None:
    path = tmp_path / "model.nir"
    NIR.lower(dense_program()[0], path)
    good, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(60):
        data = bytearray(good[: rng.integers(1, len(good))] if rng.random() < 0.3 else good)
        for at in rng.integers(0, len(data), 8):
            data[at] = rng.integers(256)
        path.write_bytes(bytes(data))
        try:
            read(path)
        except EdgekitError as error:
            assert "\n" not in str(error)


def test_a_file_becomes_a_run_that_verifies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the command line, a file that does not say its rules; and a recipe may name the target."""
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "cache"))
    lif = nir.LIF(*(np.full(3, v, np.float32) for v in (2e-3, 3.0, 0.0, 1.0)))
    write(tmp_path / "net.nir", chain(nir.Linear(np.eye(3, 4, dtype=np.float32)), lif, shape=(4,)))
    call = ["import", str(tmp_path / "net.nir"), "--out", str(tmp_path / "run"), "-t", "nir"]
    missing = CliRunner().invoke(app, call)
    assert isinstance(missing.exception, InputError) and "give them (--steps)" in str(missing.exception)
    facts = ["--steps", "6", "--dt", "1e-3", "--reset", "subtract", "--readout", "sequence", "--encoding", "repeat"]
    assert CliRunner().invoke(app, [*call, *facts]).exit_code == 0
    assert read(tmp_path / "run" / "model.nir").metadata["dt"] == 1e-3
    done = CliRunner().invoke(app, ["verify", str(tmp_path / "run")])
    assert done.exit_code == 0 and "every file computes what the frozen program computes" in done.output
    parity = Parity.load(tmp_path / "run" / "parity.json")
    assert [layer.rounded for layer in parity.artifacts[0].layers] == [0]
    assert set(get_args(TargetName)) == set(TARGETS)
