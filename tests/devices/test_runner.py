"""The runner against the frozen program, and everything it has to refuse."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from device_files import ask, entry, lowered
from nets import images, residual_net

from edgekit.devices import runner
from edgekit.targets import get

SOURCE = Path(runner.__file__)
X = images(3).numpy()


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lowered(tmp_path_factory.mktemp("file"), "onnx")


def test_it_is_python_3_9_and_imports_only_the_standard_library() -> None:
    tree = ast.parse(SOURCE.read_text(), feature_version=(3, 9))
    at_import = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    names = {a.name for n in at_import if isinstance(n, ast.Import) for a in n.names}
    names |= {str(n.module) for n in at_import if isinstance(n, ast.ImportFrom)}
    assert {n.split(".")[0] for n in names} <= sys.stdlib_module_names
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and getattr(n.func, "id", "") == "zip"]
    assert calls and not any(k.arg == "strict" for n in calls for k in n.keywords)


@pytest.mark.parametrize(
    "target", ["onnx", pytest.param("tflite", marks=pytest.mark.slow), pytest.param("executorch", marks=pytest.mark.slow)]
)
def test_outputs_are_the_frozen_programs(target: str, tmp_path: Path) -> None:
    path, program = lowered(tmp_path, target), residual_net()
    code, result = ask(tmp_path, "run", [entry(tmp_path, path, target, [X])])
    assert code == 0 and result["ok"] and result["files"][0]["samples"] == 3
    with np.load(tmp_path / "model_out.npz") as archive:
        (found,) = get(target).decode(path, [archive["output0"]])
    (wanted,) = program.run(images(3))
    step = program.layer("head").out_scale
    assert step and np.abs(found - wanted.numpy()).max() <= 2 * step + 1e-6  # kernel families round differently
    assert np.array_equal(found, get(target).run(path, [X])[0])

    taps = get(target).tap_file(path, program)
    copy = tmp_path / f"copy{path.suffix}"
    copy.write_bytes(taps.data or path.read_bytes())
    request = (
        entry(tmp_path, copy, target, [X[:1]], tensors=list(taps.tensors))
        if taps.tensors
        else _as_is(tmp_path, copy, path, target)
    )
    code, result = ask(tmp_path, "run", [request])
    assert code == 0, result
    with np.load(tmp_path / "copy_out.npz") as archive:
        results = [archive[name] for name in archive.files]
    local = get(target).taps(path, program, [X[:1]])
    remote = taps.layers(results)
    assert local and remote.keys() == local.keys() and all(np.array_equal(remote[k], local[k]) for k in local)


def _as_is(folder: Path, copy: Path, path: Path, target: str) -> dict[str, Any]:
    """An entry for a copy whose inputs are those of the file itself."""
    made = entry(folder, path, target, [X[:1]])
    return {**made, "file": copy.name, "sha256": runner.sha256(str(copy)), "outputs": "copy_out.npz"}


def test_as_a_module_it_takes_and_gives_real_numbers(onnx_file: Path) -> None:
    (found,) = runner.open_program(str(onnx_file))([X[:1]])
    assert np.array_equal(found, get("onnx").run(onnx_file, [X[:1]])[0])
    with pytest.raises(runner.Refused, match="takes 1 inputs"):
        runner.open_program(str(onnx_file))([X[:1], X[:1]])
    spec = runner.Spec("x", (1, 4), "int8", 0.5, -3)
    assert spec.quantize(np.array([[0.24, 0.26, 1e9, -1e9]], np.float32)).tolist() == [[-3, -2, 127, -128]]
    assert spec.dequantize(np.array([-3, 127], np.int8)).tolist() == [0.0, 65.0]


def test_a_profile_has_every_run_and_what_it_ran_on(onnx_file: Path, tmp_path: Path) -> None:
    files = [entry(tmp_path, onnx_file, "onnx", [X])] * 2
    start = time.perf_counter_ns()
    code, result = ask(tmp_path, "profile", files, settings={"num_runs": 30, "warmup_runs": 3, "num_threads": 1})
    wall = time.perf_counter_ns() - start
    assert code == 0
    with np.load(tmp_path / "times.npz") as archive:
        times = [archive["file0"], archive["file1"]]
    assert [len(t) for t in times] == [30, 30] and all((t > 0).all() for t in times) and sum(t.sum() for t in times) < wall
    facts = result["files"][0]
    assert facts["runtime"] == "onnxruntime" and facts["version"] == runner.version("onnxruntime")
    assert facts["load_microseconds"] > 0 and facts["first_microseconds"] > 0
    assert 0 < facts["rss_before_bytes"] <= facts["rss_loaded_bytes"] <= result["peak_rss_bytes"]
    assert result["machine"]["packages"]["numpy"] == np.__version__
    assert result["machine"]["usable_cores"] == len(os.sched_getaffinity(0))
    assert result["pinned"] is None or len(result["pinned"]) == 1
    assert 0 <= result["other_load"] <= 1.5


def test_describe_tells_the_machine(tmp_path: Path) -> None:
    code, result = ask(tmp_path, "describe", [])
    assert code == 0 and result["machine"]["cores"] == os.cpu_count() and "load" in result["before"]


REFUSALS = {
    "sha256": (lambda e: {"files": [{**e, "sha256": "0" * 64}]}, "is not the file of the request"),
    "protocol": (lambda e: {"files": [e], "protocol": 99}, "protocol 99"),
    "request": (lambda e: {"files": [e], "action": "dance"}, "none of run, profile"),
    "missing": (
        lambda e: {"files": [{**e, "target": "tflite", "runtime": "tflite-runtime"}]},
        "tflite-runtime is not installed here",
    ),
    "file": (lambda e: {"files": [{**e, "file": "absent.onnx"}]}, "absent.onnx: No such file"),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_what_cannot_be_done_is_refused_with_its_kind(kind: str, onnx_file: Path, tmp_path: Path) -> None:
    change, words = REFUSALS[kind]
    code, result = ask(tmp_path, **({"action": "run"} | change(entry(tmp_path, onnx_file, "onnx", [X]))))
    assert code == 2 and result["ok"] is False
    assert result["error"]["kind"] == kind and words in result["error"]["message"]
    assert not list(tmp_path.glob("*_out.npz")) and not list(tmp_path.glob("*.tmp"))


def test_damaged_files_wrong_shapes_and_pickles_are_refused(onnx_file: Path, tmp_path: Path) -> None:
    good = entry(tmp_path, onnx_file, "onnx", [X])
    half = tmp_path / "half.onnx"
    half.write_bytes(onnx_file.read_bytes()[: onnx_file.stat().st_size // 2])
    code, result = ask(tmp_path, "run", [{**good, "file": half.name, "sha256": runner.sha256(str(half))}])
    assert (code, result["error"]["kind"]) == (2, "load") and "refuses half.onnx" in result["error"]["message"]
    np.savez(tmp_path / "wide.npz", input0=np.zeros((1, 3, 16, 17), np.float32))
    code, result = ask(tmp_path, "run", [{**good, "inputs": "wide.npz"}])
    assert (code, result["error"]["kind"]) == (2, "input")
    np.savez(tmp_path / "evil.npz", input0=np.array([{"a": 1}], dtype=object))
    code, result = ask(tmp_path, "run", [{**good, "inputs": "evil.npz"}])
    assert code == 2 and "allow_pickle=False" in result["error"]["message"]


def test_a_runtime_that_cannot_be_loaded_is_not_called_missing(
    onnx_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken" / "onnxruntime").mkdir(parents=True)
    (tmp_path / "broken" / "onnxruntime" / "__init__.py").write_text("raise ImportError('wrong ELF class: ELFCLASS32')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "broken"))
    code, result = ask(tmp_path, "run", [entry(tmp_path, onnx_file, "onnx", [X])])
    assert (code, result["error"]["kind"]) == (2, "missing")
    assert "is installed but cannot be loaded (wrong ELF class: ELFCLASS32)" in result["error"]["message"]


def test_it_ends_with_its_input_and_at_its_time_limit(onnx_file: Path, tmp_path: Path) -> None:
    request = {"protocol": 1, "action": "profile", "files": [entry(tmp_path, onnx_file, "onnx", [X])], "times": "times.npz"}
    request["settings"] = {"seconds": 60}
    (tmp_path / "request.json").write_text(json.dumps(request))
    command = [sys.executable, str(SOURCE), str(tmp_path / "request.json"), "--watch"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    time.sleep(1)
    assert process.poll() is None and process.stdin is not None
    process.stdin.close()
    assert process.wait(10) == 4

    (tmp_path / "request.json").write_text(json.dumps(request | {"time_limit": 1.5}))
    assert subprocess.run(command[:-1], timeout=20).returncode == -signal.SIGALRM
    assert {p.name for p in tmp_path.iterdir()} == {"request.json", "model.onnx", "model_in.npz"}


def test_a_sustained_run_has_a_row_a_second_and_bounded_times(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0]

    def call() -> None:
        now[0] += 500_000

    monkeypatch.setattr(runner.time, "perf_counter_ns", lambda: now[0])
    monkeypatch.setattr(runner, "TIMES_KEPT", 400)
    program = runner.Program("none", "", lambda x: None, call, list)
    (times,), rows = runner.measure([program], num_runs=1, warmup_runs=20, seconds=2.3)
    assert [r["seconds"] for r in rows] == pytest.approx([1, 2], abs=0.01)
    assert all(r["median_microseconds"] == 500 for r in rows)
    assert len(times) == 384 and now[0] // 500_000 == 20 + 384 * 12  # every twelfth is timed


def test_throttling_is_told_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "vcgencmd"
    program.write_text("#!/bin/sh\necho throttled=0x50005\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert runner.throttled() == "under-voltage, throttled, under-voltage since boot, throttled since boot"
    program.write_text("#!/bin/sh\necho throttled=0x0\n")
    assert runner.throttled() == ""
