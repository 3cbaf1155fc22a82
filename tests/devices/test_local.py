"""The local device against the targets' own runs, what a profile says of its times, and runners that end badly."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from device_files import lowered
from fake_target import altered
from nets import images, residual_net

from edgekit import devices
from edgekit.devices import linux, timing
from edgekit.devices.target import OnDevice
from edgekit.errors import DeviceError, EdgekitError, FormatError, InputError, MissingTool, UnsupportedError
from edgekit.frozen import FrozenProgram
from edgekit.profile import Settings, load, save
from edgekit.recipe import Verify
from edgekit.stages import Evaluation
from edgekit.targets import get
from edgekit.targets.cuts import EMPTY, Cut
from edgekit.verify import verify_artifact

X = images(3).numpy()


@pytest.fixture(scope="module")
def program() -> FrozenProgram:
    return residual_net()


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lowered(tmp_path_factory.mktemp("file"), "onnx")


def test_it_gives_what_the_targets_own_run_gives(path: Path, program: FrozenProgram) -> None:
    device, seen, target = devices.connect("local"), [], get("onnx")
    (found,) = device.run(path, "onnx", [X], lambda done, total: seen.append((done, total)))
    assert np.array_equal(found, target.run(path, [X])[0])
    assert seen[-1] == (3, 3)
    every = device.taps_each(path, "onnx", program, [X])
    for i, taps in enumerate(every):
        wanted = target.taps(path, program, [X[i : i + 1]])
        assert taps.keys() == wanted.keys() and all(np.array_equal(taps[k], wanted[k]) for k in wanted)
    assert device.taps(path, "onnx", program, [X]).keys() == every[0].keys()
    device.close()
    device.close()


def test_the_parity_contract_holds_there_and_names_an_altered_layer(path: Path, program: FrozenProgram, tmp_path: Path) -> None:
    device = OnDevice("onnx", devices.connect("local"))
    evaluation = Evaluation((images(6),), None, "accuracy", "random")
    settings = Verify(layer_samples=3)
    found = verify_artifact(program, device, path, evaluation, settings=settings)
    assert found.ok and found.device == "local" and len(found.layers) > 10
    at_home = verify_artifact(program, "onnx", path, evaluation, settings=settings)
    assert found.layers == at_home.layers and found.stage.max_lsb == at_home.stage.max_lsb
    changed = tmp_path / "changed.onnx"
    get("onnx").lower(altered(program, "block.pw.weight", (3, 2, 0, 0), 64), changed)
    found = verify_artifact(program, device, changed, evaluation, settings=settings)
    assert not found.ok and found.first_diverging == "block.pw"
    assert [layer.layer for layer in found.layers if not layer.within] == ["block.pw"]


def test_a_profile_is_written_and_read_back(
    path: Path, program: FrozenProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = os.listdir(tmp_path), len(os.listdir("/proc/self/fd"))
    found = devices.connect("local").profile(path, "onnx", program, Settings(num_runs=40, warmup_runs=2), [X])
    assert (os.listdir(tmp_path), len(os.listdir("/proc/self/fd"))) == before  # nothing stays behind
    assert found.unit == "microseconds" and found.figures["timed_runs"] == 40
    assert (
        found.figures["min_microseconds"] <= found.total <= found.figures["p90_microseconds"] <= found.figures["p99_microseconds"]
    )
    assert found.macs == sum(layer.macs for layer in program.layers)
    assert "40 timed calls" in found.method and "1 thread" in found.method
    assert found.fingerprint["machine"]["num_threads"] == 1
    assert [x.layer for x in found.layers if x.macs] == [x.name for x in program.layers if x.macs]
    assert sum(x.share for x in found.layers) == pytest.approx(1) and "cut out of the file" in found.method
    save(tmp_path / "profile.json", found)
    assert load(tmp_path / "profile.json") == (found,)


@pytest.mark.slow
def test_layers_that_tflite_runtime_would_overwrite_are_outputs_of_a_copy(program: FrozenProgram, tmp_path: Path) -> None:
    path, device = lowered(tmp_path, "tflite"), devices.connect("local")
    older = replace(device, machine={"packages": {"tflite-runtime": "2.14.0"}})
    (found,) = older.taps_each(path, "tflite", program, [X[:1]])
    wanted = get("tflite").taps(path, program, [X[:1]])
    assert found.keys() == wanted.keys() - {"quantize"} and len(found) > 10  # that one is the file's input
    assert all(np.abs(found[k].astype(int) - wanted[k].astype(int)).max() <= 1 for k in found)


RESULT: dict[str, Any] = {
    "files": [{"sha256": "0", "runtime": "r", "version": "1", "load_microseconds": 7.0, "first_microseconds": 9.0,
               "rss_before_bytes": 100, "rss_loaded_bytes": 160}],
    "machine": {"governor": "ondemand", "virtual": False, "usable_cores": 4}, "pinned": [3], "peak_rss_bytes": 200,
    "other_load": 0.25,
    "before": {"throttled": "", "temperature_celsius": 40.0}, "after": {"throttled": "throttled", "temperature_celsius": 71.0},
    "series": [
        {"seconds": i + 1.0, "median_microseconds": m, "temperature_celsius": None}
        for i, m in enumerate([10, 10, 11, 12, 13, 14, 15, 15])
    ],
}  # fmt: skip


def test_figures_and_notes_follow_from_the_times() -> None:
    times = np.arange(1, 101, dtype=np.int64) * 1000
    found = timing.profile("d", "onnx", 5, Settings(seconds=8), RESULT, [times])
    assert found.total == pytest.approx(50.5) and found.figures["p90_microseconds"] == pytest.approx(90.1)
    assert found.figures["min_microseconds"] == 1 and found.figures["p99_microseconds"] == pytest.approx(99.01)
    assert found.figures["inferences_a_second"] == pytest.approx(1e6 / 50.5)
    assert found.figures["file_memory_bytes"] == 60 and found.figures["peak_memory_bytes"] == 200
    assert found.figures["drift_percent"] == pytest.approx(50)
    assert found.series[0] == {"seconds": 1.0, "median_microseconds": 10}
    notes = " ".join(found.notes)
    for words in ("25 %", "after the run: throttled", "ondemand", "+50 %", "40 to 71 °C"):
        assert words in notes
    assert "virtual" not in notes and "Not pinned" not in notes


def test_layers_are_timed_alone_less_an_empty_program() -> None:
    whole = timing.profile("d", "onnx", 5, Settings(), RESULT, [np.full(9, 40_000, np.int64)])
    parts = [Cut(name, "Conv", b"", ()) for name in (EMPTY, "a", "b", "c")]
    times = [np.full(5, t, np.int64) for t in (3_000, 13_000, 33_000, 2_000)]
    found = timing.with_layers(whole, parts, times, {"a": 7})
    assert [(x.layer, x.microseconds, x.macs) for x in found.layers] == [("a", 10.0, 7), ("b", 30.0, 0), ("c", 0.0, 0)]
    assert [x.share for x in found.layers] == [0.25, 0.75, 0.0]
    assert "3 µs of a program that computes nothing; together 40 µs, the file itself less the same 37 µs" in found.method


def interpreter(folder: Path, script: str) -> str:
    """A program in Python's place; its second argument is the request."""
    path = folder / "python"
    path.write_text(f'#!/bin/sh\nfolder=$(dirname "$2")\n{script}\n')
    path.chmod(0o755)
    return f"local:python={path}"


ENDS: dict[str, tuple[str, type[EdgekitError], str]] = {
    "killed": ("kill -9 $$", DeviceError, "was killed"),
    "crashed": ("echo oops >&2; kill -11 $$", DeviceError, "crashed (signal 11) in the runtime; its last line was: oops"),
    "out of time": ("kill -14 $$", DeviceError, "not done within 600 s"),
    "no python": ("exit 127", MissingTool, "no Python there"),
    "silent": ("exit 3", DeviceError, "exit code 3; its last line was: it said nothing"),
    "damaged": ("echo '{' > $folder/result.json", DeviceError, "damaged"),
    "32 bits": (
        f"echo '{json.dumps({'ok': True, 'machine': {'bits': 32, 'machine': 'armv7l', 'python': '3.9', 'packages': {}}})}'"
        " > $folder/result.json", UnsupportedError, "32 bits (armv7l)",
    ),
    "empty": (
        f"echo '{json.dumps({'ok': True, 'machine': {'bits': 64, 'python': '3.9', 'packages': {'numpy': '1'}}})}'"
        " > $folder/result.json", MissingTool, "has none of executorch",
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", ENDS)
def test_a_runner_that_ends_badly_is_one_sentence(how: str, tmp_path: Path) -> None:
    script, error, words = ENDS[how]
    spec = interpreter(tmp_path, script)
    with pytest.raises(error) as found:
        devices.connect(spec)
    assert words in str(found.value) and str(found.value).startswith(spec) and "\n" not in str(found.value)


def test_a_runner_that_hangs_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linux, "GRACE", 0.1)
    spec = interpreter(tmp_path, "exec sleep 60") + "&time_limit=0.2"
    with pytest.raises(DeviceError, match="was killed"):
        devices.connect(spec)


@pytest.mark.parametrize("spec", ["local:speed=3", "local:time_limit=soon", "local:time_limit=0", "local:python="])
def test_unknown_options_are_refused(spec: str) -> None:
    with pytest.raises(InputError, match="device 'local"):
        devices.connect(spec)


def test_a_missing_interpreter_and_a_damaged_file_are_named(path: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingTool, match="/nowhere/python cannot be started"):
        devices.connect("local:python=/nowhere/python")
    half = tmp_path / "half.onnx"
    half.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(FormatError, match="half"):
        devices.connect("local").run(half, "onnx", [X])
