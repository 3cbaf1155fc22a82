"""Spiking programs as ONNX, TFLite and ExecuTorch files: the same spikes in every layer, faults found by name, refusals."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from spiking_nets import STEPS, conv_program, dense_program, neuron, recurrent_program
from torch import Tensor, nn
from typer.testing import CliRunner

from edgekit.cli import app
from edgekit.compress.spiking.integer import integer_program
from edgekit.errors import UnsupportedError
from edgekit.frozen import FrozenOp, FrozenProgram, freeze_module, load, save
from edgekit.frozen.one_step import initial_state, stepping
from edgekit.parity import ArtifactParity
from edgekit.stages import Evaluation
from edgekit.targets import get, preflight
from edgekit.targets.spiking import written_out
from edgekit.verify import verify_artifact

pytestmark = pytest.mark.slow

PROGRAMS: dict[str, Any] = {
    "conv if": lambda: conv_program("if", v_init=0.5),
    "conv lif": lambda: conv_program("lif", v_threshold=0.15, tie="gt"),
    "dense lif": lambda: dense_program("lif", reset="zero", v_threshold=0.7),
    "dense lif to a value": lambda: dense_program("lif", reset="value", v_reset=-0.25, v_leak=0.1),
    "dense cuba": lambda: dense_program("cuba_lif", v_threshold=0.7),
    "dense multi-spike": lambda: dense_program("if", max_spikes=3, v_threshold=0.7),
    "dense recurrent": lambda: recurrent_program("lif", v_threshold=0.7),
    "dense recurrent cuba": lambda: recurrent_program("cuba_lif", reset="zero", v_threshold=0.7),
    "conv recurrent": lambda: recurrent_program("if", image=True, bias=False),
}


def verified(program: FrozenProgram, target: str, path: Path, x: Tensor) -> ArtifactParity:
    return verify_artifact(program, target, path, Evaluation(inputs=(x,), labels=None, metric="accuracy", where="here"))


class Look(torch.fx.Interpreter):
    """Keeps the value of every node by its name."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self.values: dict[str, Any] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        self.values[n.name] = super().run_node(n)
        return self.values[n.name]


@pytest.mark.parametrize("floors", [False, True])
@pytest.mark.parametrize("name", PROGRAMS)
def test_written_out_in_plain_operators_a_program_is_the_same(name: str, floors: bool) -> None:
    program, x = PROGRAMS[name]()
    written = written_out(program, floors)
    assert not written.program.layers and list(written.neurons) == ["spike1", "spike2"]
    assert written.program.macs == program.macs
    for i in range(len(x)):
        wanted = program.trace(x[i : i + 1])
        seen = Look(written.program.module)
        seen.run(x[i : i + 1])
        for layer, node in written.neurons.items():
            assert torch.equal(seen.values[node], wanted[layer])
    assert torch.equal(written.program.run(x)[0], program.run(x)[0])


def test_a_floor_of_the_quotient_is_the_comparison_for_every_neighbour() -> None:
    rng = np.random.default_rng(0)
    threshold = np.abs(rng.standard_normal(300_000)).astype(np.float32) * np.float32(10.0) ** rng.integers(-20, 20, 300_000)
    threshold = threshold[threshold > 0].astype(np.float32)
    below, above = (np.nextafter(threshold, np.float32(end)) for end in (0.0, np.inf))
    for v in (threshold, below, above, -threshold):
        assert np.array_equal(np.clip(np.floor(v / threshold), 0, 1), (v >= threshold).astype(np.float32))


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("onnx", "conv if"),
        ("tflite", "dense lif"),
        ("tflite", "dense recurrent cuba"),
        pytest.param("executorch", "conv recurrent", marks=pytest.mark.slow),
        pytest.param("onnx", "dense cuba", marks=pytest.mark.slow),
        pytest.param("executorch", "dense lif", marks=pytest.mark.slow),
    ],
)
def test_a_file_spikes_as_the_program_in_every_layer(target: str, name: str, tmp_path: Path) -> None:
    module = get(target)
    if module.available():
        pytest.skip(module.available())
    program, x = PROGRAMS[name]()
    path = tmp_path / f"model{module.SUFFIX}"
    artifact = module.lower(program, path, module.Options())
    found = verified(program, target, path, x)
    assert found.ok and not found.mismatches
    assert [(layer.layer, layer.differing, layer.rounded) for layer in found.layers] == [("spike1", 0, 0), ("spike2", 0, 0)]
    rows = {row.layer: row for row in artifact.coverage}
    assert rows["spike1"].note == "8 steps written out" and rows["spike1"].runs == "float"
    assert sum(row.macs for row in artifact.coverage) == program.macs

    weight = next(x for x in program.float_layers if x.name == ("conv2" if name in ("conv if", "conv lif") else "fc2"))
    number = float(next(t for k, t in weight.constants.items() if k.endswith("weight")).reshape(-1)[3])
    data, pattern = path.read_bytes(), struct.pack("<f", number)
    assert data.count(pattern) == 1
    path.write_bytes(data.replace(pattern, struct.pack("<f", -number)))
    assert any(m.layer == weight.name for m in module.readback(path, program))
    assert verified(program, target, path, x).first_diverging == weight.name


class Attention(nn.Module):
    """Three layers of neurons of one shape beside each other, whose order in a file is the partitioner's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.spike0 = FrozenOp("fold_steps", 1, {}), neuron("lif", v_threshold=0.3)
        self.first, self.head = nn.Conv2d(2, 6, 3, padding=1), nn.Linear(54, 4)
        self.branches = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1) for _ in range(3))
        self.spikes = nn.ModuleList(neuron("lif", v_threshold=0.2 + 0.1 * i) for i in range(3))
        for branch in self.branches:
            branch.weight.data.mul_(4)
        self.out, self.mean = neuron("lif", v_threshold=0.4), FrozenOp("accumulate", 1, {}, gain=1 / STEPS, steps=STEPS)

    def forward(self, x: Tensor) -> Tensor:
        s = self.spike0(self.first(self.enter(x)))
        q, k, v = (fire(layer(s)) for fire, layer in zip(self.spikes, self.branches, strict=True))
        y: Tensor = self.mean(self.head((q * self.out((k * v).sum((2, 3), keepdim=True))).flatten(1)))
        return y


@pytest.mark.slow
def test_branches_of_one_shape_are_told_apart_in_a_file(tmp_path: Path) -> None:
    module = get("executorch")
    if module.available():
        pytest.skip(module.available())
    x = (torch.rand(2, STEPS, 2, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    program = freeze_module(Attention(), (x,), name="attention")
    artifact = module.lower(program, tmp_path / "model.pte")
    taps, expected = module.taps(artifact.path, program, [x[:1].numpy()]), program.trace(x[:1])
    assert {"spikes.0", "spikes.1", "spikes.2", "out"} <= set(taps)
    assert all(np.array_equal(taps[n], expected[n].numpy()) for n in taps)
    assert len({expected[f"spikes.{i}"].numpy().tobytes() for i in range(3)}) == 3
    assert verified(program, "executorch", artifact.path, x).ok


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_of_one_step_run_step_by_step_is_the_program(name: str) -> None:
    program, x = PROGRAMS[name]()
    step, state, rows = stepping(program), initial_state(program), []
    for t in range(STEPS):
        y, *state = step.run(x[:1] if name.startswith("conv") else x[:1, t], *state)
        rows.append(y)
    (wanted,) = program.run(x[:1])
    if name in ("conv if", "conv lif"):
        assert torch.allclose(sum(rows[1:], rows[0]) / STEPS, wanted, atol=1e-6)
    else:
        assert torch.equal(torch.stack(rows, 1), wanted)


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("onnx", "dense cuba"),
        ("onnx", "dense recurrent cuba"),
        pytest.param("tflite", "dense recurrent", marks=pytest.mark.slow),
    ],
)
def test_a_file_of_one_step_is_run_with_its_state(
    target: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = get(target)
    if module.available():
        pytest.skip(module.available())
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "cache"))
    program, x = PROGRAMS[name]()
    (tmp_path / "run").mkdir()
    save(program, tmp_path / "run" / "frozen.pt2")
    done = CliRunner().invoke(app, ["step", str(tmp_path / "run"), "--out", str(tmp_path / "step"), "-t", target])
    assert done.exit_code == 0, done.output
    path = tmp_path / "step" / f"model{module.SUFFIX}"
    state, rows = [s.numpy() for s in initial_state(program)], []
    for t in range(STEPS):
        y, *state = module.run(path, [x[:1, t].numpy(), *state])
        rows.append(y)
    assert np.array_equal(np.stack(rows, 1), program.run(x[:1])[0].numpy())
    step = load(tmp_path / "step")
    inputs = (x[:, 0], *(s.repeat(len(x), 1) for s in initial_state(program)))
    found = verify_artifact(step, target, path, Evaluation(inputs=inputs, labels=None, metric="accuracy", where="here"))
    assert found.ok and [layer.layer for layer in found.layers if layer.rounded is not None] == ["spike1.fire", "spike2.fire"]


def test_what_files_cannot_hold_is_refused_by_layer() -> None:
    program, x = dense_program()
    integers, _ = integer_program(program, (x,))
    negative, _ = dense_program("if", v_threshold=-1.0)
    for target in ("tflite", "executorch", "onnx"):
        with pytest.raises(UnsupportedError, match="layer fc1: spiking_linear is of the integer form, which is for firmware"):
            preflight.check_program(integers, target)
        with pytest.raises(UnsupportedError, match="layer spike1: a threshold is not positive"):
            preflight.check_program(negative, target)


def test_state_in_a_buffer_is_refused_before_a_converter_sees_it() -> None:
    """LiteRT would keep the buffer's first value for ever and say nothing."""

    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)
            self.v: Tensor
            self.register_buffer("v", torch.zeros(1, 2))

        def forward(self, x: Tensor) -> Tensor:
            v = self.v * 0.9 + self.fc(x)
            s = (v >= 1).to(torch.float32)
            self.v.copy_(v - s)
            return s

    program = freeze_module(Kept(), (torch.rand(1, 3),))
    for target in ("tflite", "executorch", "onnx"):
        with pytest.raises(UnsupportedError, match="writes to its buffer v at each call; make the state an input and an output"):
            preflight.check_program(program, target)
