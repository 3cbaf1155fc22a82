"""Exported firmware on emulated boards: equal to its numpy reference to the last bit, read back, the same bytes every time."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from cortex_nets import borders, moves
from nets import images, residual_net
from tiny_recipe import write
from torch import nn

from edgekit import pipeline, verify
from edgekit.compress.ptq import PTQ, quantize_model
from edgekit.data import Data
from edgekit.errors import FirmwareFault, FormatError, InputError, UnsupportedError
from edgekit.frozen import FrozenProgram
from edgekit.recipe import Verify
from edgekit.stages import Evaluation
from edgekit.targets import cortex_m, get
from edgekit.targets.cortex_m import host
from edgekit.targets.cortex_m.emit import model_c, model_h
from edgekit.targets.cortex_m.preparation import prepare, simulate
from edgekit.targets.cortex_m.project import load

pytestmark = pytest.mark.skipif(cortex_m.M4.available() is not None, reason="needs arm-none-eabi-gcc and qemu-system-arm")
SETS = {"cortex-m0": "portable", "cortex-m3": "portable", "cortex-m55": "mve"}


def firmware_equals_reference(core: str, program: FrozenProgram, folder: Path, inputs: list[np.ndarray]) -> None:
    """Outputs and every layer, bit by bit."""
    target = get(core)
    artifact = target.lower(program, folder / f"model{target.SUFFIX}")
    outputs = target.run(artifact.path, inputs)
    firmware = prepare(program, SETS.get(core, "dsp"))
    for i in range(len(inputs[0])):
        sample = [x[i : i + 1] for x in inputs]
        layers, expected = simulate(firmware, sample)
        for found, wanted in zip(outputs, expected, strict=True):
            assert np.array_equal(found[i : i + 1], wanted)
        if i == 0:
            taps = target.taps(artifact.path, program, sample)
            assert taps.keys() == layers.keys()
            assert [name for name in layers if not np.array_equal(layers[name], taps[name])] == []


@pytest.mark.slow
@pytest.mark.parametrize("core", ["cortex-m0", "cortex-m4", "cortex-m55"])
def test_residual_networks_run_as_their_reference_says(core: str, tmp_path: Path) -> None:
    for bits in (8, 4):
        firmware_equals_reference(core, residual_net(bits), tmp_path / str(bits), [images(3).numpy()])


CORES = ("cortex-m0", "cortex-m3", "cortex-m4", "cortex-m7", "cortex-m33", "cortex-m55")
CASES = [(core, "moves") for core in CORES] + [
    (core, name) for core in ("cortex-m0", "cortex-m4", "cortex-m55") for name in ("borders", "residual2")
]


@pytest.mark.slow
@pytest.mark.parametrize(("core", "name"), CASES)
def test_every_operator_on_every_core(core: str, name: str, tmp_path: Path) -> None:
    program = {"moves": moves, "borders": borders, "residual2": lambda: residual_net(2)}[name]()
    g = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(3, *s[1:], generator=g) if t == torch.float32 else torch.randint(-128, 128, (3, *s[1:]), generator=g, dtype=t)
        for s, t in zip(program.input_shapes, program.input_dtypes, strict=True)
    ]
    firmware_equals_reference(core, program, tmp_path, [x.numpy() for x in inputs])


@pytest.fixture(scope="module")
def program() -> FrozenProgram:
    return residual_net(4)


@pytest.fixture(scope="module")
def exported(program: FrozenProgram, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of residual4 for cortex-m4."""
    folder = tmp_path_factory.mktemp("project")
    cortex_m.M4.lower(program, folder / "model.c")
    return folder


def test_the_artifact_says_what_it_takes(program: FrozenProgram, exported: Path) -> None:
    artifact = cortex_m.M4.inspect(exported / "model.c", program)
    memory = artifact.memory
    assert artifact.bytes == memory["flash"] > memory["flash_weights"] + memory["flash_code"] - 1
    assert memory["arena"] == load(exported).arena <= 1.1 * memory["arena_bound"]
    assert 0 < memory["stack_used"] < memory["stack_reserved"] == 4096
    weights = sum(layer.weight_bytes for layer in program.layers)
    assert weights < memory["flash_weights"] < weights + 1200  # multipliers and shifts instead of scales, alignment
    rows = {c.layer: c for c in artifact.coverage}
    assert rows["block.pw"].storage == "int4" and "not time" in rows["block.pw"].note and rows["stem"].storage == "int8"
    assert "padding" in rows["pad"].note and "same bytes" in rows["flatten"].note
    assert artifact.share_of_macs == {"int8": 1.0} and sum(c.macs for c in artifact.coverage) == sum(
        x.macs for x in program.layers
    )
    assert artifact.inputs[0].shape == (1, 16, 16, 3) and artifact.outputs[0].zero_point == 3


GOLDEN = {
    "residual8": "83e6bb404c3070befcc40e9ca748e03f",
    "residual4": "449af9982a2ae9cf62ab36dfb0ccc0b7",
    "moves": "933351a8937e132f47205cd033a07bdc",
}
"""First half of the SHA-256 of model.c and model.h; a change of the emitter must be meant."""


@pytest.mark.parametrize("name", GOLDEN)
def test_the_text_is_the_same_as_ever(name: str) -> None:
    made = {"residual8": residual_net, "residual4": lambda: residual_net(4), "moves": moves}[name]()
    firmware = prepare(made, "portable")
    assert hashlib.sha256((model_c(firmware) + model_h(firmware)).encode()).hexdigest()[:32] == GOLDEN[name]


def test_two_exports_are_the_same_bytes(program: FrozenProgram, exported: Path, tmp_path: Path) -> None:
    cortex_m.M4.lower(residual_net(4), tmp_path / "model.c")
    names = sorted(p.relative_to(exported) for p in exported.rglob("*") if p.is_file())
    assert [n for n in names if (exported / n).read_bytes() != (tmp_path / n).read_bytes()] == []
    assert "malloc" not in (exported / "model.c").read_text()


def altered(exported: Path, folder: Path, file: str, pattern: str, text: str) -> Path:
    """A copy of the project with the first match of a pattern replaced."""
    shutil.copytree(exported, folder)
    before = (folder / file).read_text()
    after = re.sub(pattern, text, before, count=1, flags=re.S)
    assert after != before
    (folder / file).write_text(after)
    return folder / "model.c"


FAULTS = {
    "weight": ("model.c", r"(model_3_weights\[\d+\] EK_WEIGHTS = \{\s+)\d+", r"\g<1>200", "block.pw", "weights[0]"),
    "bias": ("model.c", r"(model_3_bias\[\d+\] EK_WEIGHTS = \{\s+)-?\d+", r"\g<1>30000", "block.pw", "bias[0]"),
    "multiplier": (
        "model.c",
        r"(model_3_multiplier\[\d+\] EK_WEIGHTS = \{\s+)\d+",
        r"\g<1>1073741824",
        "block.pw",
        "multiplier[0]",
    ),
    "zero point": ("model.c", r"(const ek_conv2d model_3_p0 = .*?\.out_zp = )5", r"\g<1>9", "block.pw", "ek_conv2d.out_zp"),
    "stride": ("model.c", r"(const ek_conv2d model_1_p0 = .*?\.stride_h = )2", r"\g<1>1", "down", "ek_conv2d.stride_h"),
    "input scale": ("model.json", r'("name": "quantize".*?"scale": )0.03', r"\g<1>0.04", "quantize", "input or output"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_read_back(fault: str, program: FrozenProgram, exported: Path, tmp_path: Path) -> None:
    file, pattern, text, layer, field = FAULTS[fault]
    path = altered(exported, tmp_path / "project", file, pattern, text)
    found = cortex_m.M4.readback(path, program)
    assert [m.layer for m in found] == [layer] and field in found[0].field
    assert cortex_m.M4.readback(exported / "model.c", program) == []


def test_verify_names_the_layer_of_a_planted_fault(program: FrozenProgram, exported: Path, tmp_path: Path) -> None:
    file, pattern, text, layer, _ = FAULTS["weight"]
    path = altered(exported, tmp_path / "project", file, pattern, text)
    samples = Evaluation((images(4),), None, "accuracy", "test images")
    found = verify.verify_artifact(program, "cortex-m4", path, samples, settings=Verify(layer_samples=2, max_accuracy_drop=None))
    assert found.first_diverging == layer and not found.ok
    sound = verify.verify_artifact(
        program, "cortex-m4", exported / "model.c", samples, settings=Verify(layer_samples=2, max_accuracy_drop=None)
    )
    assert sound.ok and max(x.max_lsb for x in sound.layers) <= 1


def test_damaged_weights_stop_the_firmware(exported: Path, tmp_path: Path) -> None:
    file, pattern, text, *_ = FAULTS["weight"]
    path = altered(exported, tmp_path / "project", file, pattern, text)
    _, built = host.built(path.parent)
    from edgekit.firmware_sim.qemu import run

    with pytest.raises(FirmwareFault, match="the weights in flash are damaged"):
        run(built, bytes(768)).checked()


def test_a_folder_that_is_no_project(exported: Path, program: FrozenProgram, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"no exported firmware \(no model.json\)"):
        cortex_m.M4.run(tmp_path / "model.c", [images(1).numpy()])
    shutil.copytree(exported, tmp_path / "a")
    (tmp_path / "a" / "model.json").write_text("{}")
    with pytest.raises(FormatError, match="damaged"):
        cortex_m.M4.readback(tmp_path / "a" / "model.c", program)
    shutil.copytree(exported, tmp_path / "b")
    (tmp_path / "b" / "runtime" / "pool.c").unlink()
    with pytest.raises(FormatError, match=r"runtime/pool\.c is missing"):
        cortex_m.M4.inspect(tmp_path / "b" / "model.c", program)


def test_inputs_that_do_not_fit(exported: Path) -> None:
    with pytest.raises(InputError, match=r"takes samples of shape \(3, 16, 16\), found \(3, 8, 8\)"):
        cortex_m.M4.run(exported / "model.c", [np.zeros((1, 3, 8, 8), np.float32)])


def test_a_model_larger_than_the_board_is_refused(tmp_path: Path) -> None:
    from nets import ResidualNet

    from edgekit.frozen import freeze_module

    program = freeze_module(ResidualNet(), (torch.zeros(1, 3, 64, 64),))
    with pytest.raises(
        UnsupportedError, match=r"stm32vldiscovery: stack, data and arena need \d+ bytes more than its 8192 bytes of RAM"
    ):
        cortex_m.M3.lower(program, tmp_path / "model.c", cortex_m.Options(board="stm32vldiscovery"))
    assert not (tmp_path / "model.c").exists()


def test_options(program: FrozenProgram, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"board 'microbit' is no cortex-m4 board; choose one of: mps2-an386, netduinoplus2"):
        cortex_m.M4.lower(program, tmp_path / "model.c", cortex_m.Options(board="microbit"))
    with pytest.raises(InputError, match="cortex-m3 cannot run the mve kernels"):
        cortex_m.M3.lower(program, tmp_path / "model.c", cortex_m.Options(kernels="mve"))
    options = cortex_m.Options(board="netduinoplus2", kernels="portable", optimize="Os", stack_bytes=2048)
    artifact = cortex_m.M4.lower(program, tmp_path / "model.c", options)
    assert artifact.memory["stack_reserved"] == 2048 and "portable kernels, -Os" in artifact.notes[0]
    x = images(1).numpy()
    expected = simulate(prepare(program, "portable"), [x])[1]
    assert np.array_equal(cortex_m.M4.run(artifact.path, [x])[0], expected[0])


@pytest.mark.parametrize("tool", ["make", "cmake"])
def test_the_project_builds_by_itself(tool: str, exported: Path, program: FrozenProgram, tmp_path: Path) -> None:
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    folder = tmp_path / "project"
    shutil.copytree(exported, folder)
    commands = {"make": [["make", "-s"]], "cmake": [["cmake", "-B", "build"], ["cmake", "--build", "build"]]}[tool]
    for command in commands:
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    elf = folder / ("firmware.elf" if tool == "make" else "build/firmware.elf")
    x = images(2).numpy()
    facts = load(folder)
    data = b"".join(host.to_stored(facts.inputs, [x[i : i + 1]])[0].tobytes() for i in range(2))
    (folder / "in.bin").write_bytes(data)
    if tool == "make":
        subprocess.run(["make", "-s", "run"], cwd=folder, check=True, capture_output=True)
        out = np.frombuffer((folder / "out.bin").read_bytes(), np.int8)
        assert np.array_equal(
            (out.reshape(2, 10).astype(np.float32) - 3) * np.float32(0.25), cortex_m.M4.run(folder / "model.c", [x])[0]
        )
    _, ours = host.built(exported)
    from edgekit.targets.cortex_m import elf as reader

    theirs, known = reader.read(elf), reader.read(ours.elf)
    assert all(theirs.bytes_of(n) == known.bytes_of(n) for n in known.symbols if n.endswith("_weights"))


def test_a_recipe_exports_and_verifies_firmware(tmp_path: Path) -> None:
    recipe = write(tmp_path / "recipe", "cortex-m4")
    outcome = pipeline.run(recipe, tmp_path / "run")
    assert outcome.ok and outcome.parity is not None
    names = {p.name for p in (tmp_path / "run" / "model.cortex-m4").iterdir()}
    assert names == {"model.c", "model.h", "model.json", "main.c", "Makefile", "CMakeLists.txt", "README.md", "runtime"}
    found = outcome.parity.artifacts[0]
    assert found.target == "cortex-m4" and found.mismatches == () and max(x.max_lsb for x in found.layers) <= 1
    facts = json.loads((tmp_path / "run" / "export_cortex-m4.json").read_text())
    assert facts["memory"]["arena"] > 0 and facts["target"] == "cortex-m4"
    again = pipeline.run(recipe, tmp_path / "again")
    assert all(s.state == "cached" for s in again.stages if s.name == "lower cortex-m4")
    content = [
        {p.name: p.read_bytes() for p in (tmp_path / run / "model.cortex-m4").rglob("*") if p.is_file()}
        for run in ("run", "again")
    ]
    assert content[0] == content[1]


@pytest.mark.slow
def test_a_digits_network_keeps_its_accuracy_on_the_board(tmp_path: Path) -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    pixels, labels = datasets.load_digits(return_X_y=True)
    x, y = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1, torch.tensor(labels)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[:1200]), y[:1200]).backward()
        optimizer.step()
    made = quantize_model(model.eval(), Data(x[:256]), PTQ(weights="int8", observer="mse"), name="digits")
    path = cortex_m.M4.lower(made, tmp_path / "model.c").path
    test = x[1200:]
    found = cortex_m.M4.run(path, [test.numpy()])[0].argmax(1)
    frozen = made.run(test)[0].argmax(1).numpy()
    right = [float((p == y[1200:].numpy()).mean()) for p in (found, frozen, model(test).argmax(1).numpy())]
    assert right[2] > 0.85 and abs(right[0] - right[1]) < 0.01 and right[0] > right[2] - 0.02


def test_targets_are_registered() -> None:
    assert get("cortex-m4") is cortex_m.M4 and cortex_m.M55.SUFFIX == ".cortex-m55/model.c"
