"""``edgekit profile`` and the recipe's ``profile:`` with a device made by the test: choice of files, run folder, errors."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_recipe
from core.test_cli import call

from edgekit import devices, measure, pipeline, profile, profile_table, runfolder
from edgekit.errors import EdgekitError, FormatError, InputError, RecipeError
from edgekit.files import sha256
from edgekit.profile import LayerCost, Profile, Settings
from edgekit.recipe import parse
from edgekit.targets import get

pytest.importorskip("onnxruntime")


class Abacus:
    """Measures what it is told to."""

    targets = ("onnx", "cortex-m4")

    def __init__(self, name: str) -> None:
        self.name, self.closed, self.seen = name, False, []
        self.fail: EdgekitError | None = None
        self.error, self.shift = 0.0, 0

    def profile(self, path: Path, target: str, program: Any, settings: Settings, inputs: Any, progress: Any = None) -> Profile:
        self.seen.append((path.name, target, settings, [x.shape for x in inputs]))
        if self.fail:
            raise self.fail
        layers = tuple(LayerCost(x.name, x.op, x.macs, microseconds=2.0, share=0.5, note="[bold]") for x in program.layers[:2])
        return Profile(self.name, target, "", "", "microseconds", 4.0, 10, layers, {"p90_microseconds": 4.5}, method="by hand")

    def run(self, path: Path, target: str, inputs: Any, progress: Any = None) -> list[np.ndarray]:
        return [y + self.error for y in get(target).run(path, inputs, progress=progress)]

    def taps(self, path: Path, target: str, program: Any, sample: Any) -> dict[str, np.ndarray]:
        found = get(target).taps(path, program, sample)
        return {k: np.roll(v, self.shift, -1) if k == "head" else v for k, v in found.items()}

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def abacus(monkeypatch: pytest.MonkeyPatch) -> list[Abacus]:
    made: list[Abacus] = []

    def connect(spec: str) -> Abacus:
        made.append(Abacus(spec))
        return made[-1]

    monkeypatch.setitem(sys.modules, "test_abacus", SimpleNamespace(connect=connect))  # type: ignore[arg-type]
    monkeypatch.setitem(devices.DEVICES, "abacus", "test_abacus")
    return made


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = tiny_recipe.write(tmp_path_factory.mktemp("tiny"))
    return pipeline.run(recipe, recipe.parent / "run").folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished run beside it, where its data are found."""
    return Path(shutil.copytree(finished, finished.parent / tmp_path.name))


def test_a_profile_is_written_kept_and_shown(run: Path, abacus: list[Abacus]) -> None:
    code, text = call("profile", run, "--device", "abacus:1", "--num_runs", 7, "--num_threads", 2, "--no-layers")
    assert code == 0 and abacus[0].closed
    name, target, settings, shapes = abacus[0].seen[0]
    assert (name, target, settings) == ("model.onnx", "onnx", Settings(2, 7, 5, None, False))
    assert shapes == [(measure.SAMPLES, 1, 8, 8)]
    assert "4 microseconds" in text and "p90: 4.5 microseconds" in text and "[bold]" in text and "by hand" in text
    code, text = call("profile", run, "-d", "abacus:2", "--json")
    found = json.loads(text)
    assert code == 0 and [p["device"] for p in found["profiles"]] == ["abacus:2"]
    stored = profile.load(run / "profile.json")
    assert [p.device for p in stored] == ["abacus:1", "abacus:2"]
    assert stored[0].file == "model.onnx" and stored[0].sha256 == runfolder.names(run)["model.onnx"]
    assert runfolder.altered(run) == [] and "profile.json" in runfolder.names(run)
    assert (run / "parity.json").exists() and 'id="profile"' in (run / "report.html").read_text()


def test_a_device_of_many_names_is_measured_once(run: Path, abacus: list[Abacus], monkeypatch: pytest.MonkeyPatch) -> None:
    with measure.connected(["abacus:1", "abacus:1"]) as found:
        assert len(found) == 1
    assert all(a.closed for a in abacus)


def test_a_device_verifies_what_it_runs_and_earlier_results_stay(run: Path, abacus: list[Abacus]) -> None:
    code, text = call("verify", run, "--device", "abacus:1", "--json")
    found = json.loads(text)["parity"]
    assert code == 0 and [(a["target"], a["device"], a["exact"]) for a in found["artifacts"]] == [
        ("onnx", "", None), ("onnx", "abacus:1", None),
    ]  # fmt: skip
    assert found["stages"][-1]["name"] == "onnx on abacus:1" and found["stages"][-1]["max_lsb"] == 0
    code, text = call("verify", run, "--json")
    assert code == 0 and len(json.loads(text)["parity"]["artifacts"]) == 2
    write_recipe(run, lambda text: text.replace("max_lsb: 1", "max_lsb: 2"))
    code, text = call("verify", run, "--device", "abacus:1", "--json")
    found = json.loads(text)["parity"]
    assert [a["device"] for a in found["artifacts"]] == ["abacus:1"]  # the other was judged otherwise
    assert found["unchecked"] == []
    code, text = call("verify", run, "--device", "abacus:1", "--device", "abacus:2")
    assert code == 0 and "onnx on abacus:2" in text and all(a.closed for a in abacus)


def write_recipe(run: Path, change: Any) -> None:
    """Another recipe in a run, known to its manifest."""
    path = run / "recipe.yaml"
    path.write_text(change(path.read_text()))
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["files"]["recipe.yaml"] = sha256(path)
    (run / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("fault", ["error", "shift"])
def test_a_device_that_computes_otherwise_is_a_breach(
    fault: str, run: Path, abacus: list[Abacus], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Abacus, "close", lambda self: setattr(self, fault, 0))
    made = devices.connect("abacus:1")
    setattr(made, fault, 1)
    monkeypatch.setattr(devices, "connect", lambda spec: made)
    outcome = pipeline.verify(run, devices=["abacus:1"])
    assert not outcome.ok and outcome.parity is not None
    (breach, *_) = outcome.parity.breaches
    assert breach.startswith("onnx on abacus:1: " + {"error": "the file's outputs", "shift": "layer head"}[fault])


def test_a_file_that_is_not_there_is_exported_first(run: Path, abacus: list[Abacus], monkeypatch: pytest.MonkeyPatch) -> None:
    (run / "model.onnx").unlink()
    runfolder_names = json.loads((run / "manifest.json").read_text())
    del runfolder_names["files"]["model.onnx"]
    (run / "manifest.json").write_text(json.dumps(runfolder_names))
    outcome = pipeline.profile(run, ["abacus:1"])
    assert (run / "model.onnx").exists() and not (run / "parity.json").exists()
    assert outcome.warnings[-1] == "exported onnx first; `edgekit verify` proves what it computes"


def test_without_stored_samples_random_ones_are_used_and_said(run: Path, abacus: list[Abacus]) -> None:
    for name in ("stage_float.npz",):
        (run / name).unlink()
    (found,) = pipeline.profile(run, ["abacus:1"]).profiles
    assert "random inputs" in found.notes[-1] and abacus[0].seen[0][3] == [(measure.SAMPLES, 1, 8, 8)]


@pytest.mark.parametrize(
    ("names", "targets", "sentence"),
    [
        (["abacus:1"], ["tflite"], "device abacus:1 runs onnx, cortex-m4, not tflite"),
        (["abacus:1"], ["onnx", "tflite"], "^tflite: runs on none of abacus:1$"),
        (["abacus:1"], ["onyx"], "target 'onyx' is unknown"),
        (["sundial"], None, "device 'sundial' is unknown; choose one of: .*abacus"),
        (None, None, "its recipe profiles on no device; name one with --device"),
    ],
)
def test_bad_input_is_one_sentence(
    run: Path, abacus: list[Abacus], names: list[str] | None, targets: list[str] | None, sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        pipeline.profile(run, names, targets)
    assert not (run / "profile.json").exists() and all(a.closed for a in abacus)


def test_an_altered_file_is_not_measured(run: Path, abacus: list[Abacus]) -> None:
    with (run / "model.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(FormatError, match=r"model\.onnx was altered after it was written; run `edgekit verify`"):
        pipeline.profile(run, ["abacus:1"])


def test_a_folder_without_a_program_is_refused(tmp_path: Path, abacus: list[Abacus]) -> None:
    with pytest.raises(FormatError, match="not a run folder"):
        pipeline.profile(tmp_path, ["abacus:1"])


def test_a_failing_device_is_named_and_leaves_the_run_as_it_was(run: Path, abacus: list[Abacus]) -> None:
    before = tiny_recipe.content(run)
    connect = devices.connect("abacus:1")
    connect.fail = InputError("out of beads")
    with pytest.raises(InputError, match=r"^abacus:1: out of beads$"):
        measure.profile_run(run, [(connect, "onnx")])
    assert tiny_recipe.content(run) == before


def test_a_recipe_profiles(finished: Path, tmp_path: Path, abacus: list[Abacus]) -> None:
    recipe = tiny_recipe.write(tmp_path / "recipe")
    text = recipe.read_text()
    recipe.write_text(text + "profile: abacus:1\n")
    outcome = pipeline.run(recipe, tmp_path / "run")
    assert [p.target for p in outcome.profiles] == ["onnx"] and 'id="profile"' in (tmp_path / "run" / "report.html").read_text()
    again = pipeline.profile(tmp_path / "run")
    assert again.profiles[0].device == "abacus:1"
    recipe.write_text(text.replace("[onnx]", "[tflite]") + "profile: [abacus:1]\n")
    with pytest.raises(InputError, match="device abacus:1 runs onnx, cortex-m4; add one of them to the recipe's targets"):
        pipeline.run(recipe, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_recipe_names_devices_that_are_there() -> None:
    base = "model: a.b:c\ndata: a.b:c\ncompress: static_wi8_ai8\n"
    assert parse(base + "profile: qemu:mps2-an386").profile == ("qemu:mps2-an386",)
    with pytest.raises(RecipeError, match=r"recipe.yaml:5: profile.1: found 'sundial:3'; allowed: .*qemu"):
        parse(base + "profile: [qemu:microbit,\n  sundial:3]")
    with pytest.raises(RecipeError, match="'qemu:microbit' stands twice"):
        parse(base + "profile: [qemu:microbit, qemu:microbit]")
    with pytest.raises(RecipeError, match="found a mapping; expected a list of devices"):
        parse(base + "profile: {a: b}")


def test_figures_carry_their_units() -> None:
    assert profile_table.figure("flash_code_bytes", 8664) == ("flash code", "8,664 bytes")
    assert profile_table.figure("p90_microseconds", 4.51239) == ("p90", "4.512 microseconds")
    assert profile_table.figure("bytes", 3) == ("bytes", "3")
    row = profile_table.layer_row(LayerCost("a", "conv", 100, instructions=150, share=0.25, library_instructions=7))
    assert row == ("a", "conv", 100, 150, 1.5, 7, None, None, None, 25.0, None)
    without = Profile("d", "t", "f", "", "instructions", 30, 0, (LayerCost("a", "move", 0, instructions=30, share=1.0),))
    assert profile_table.title(without) == "t on d: 30 instructions an inference"
    assert profile_table.layers(without).columns == ("layer", "operator", "instructions", "share %")
