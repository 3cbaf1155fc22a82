"""Comparing profiles: ratios, refusals of machines that differ, and the trace of what was measured."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgekit.compare import compare_runs, differences
from edgekit.errors import InputError
from edgekit.profile import LayerCost, Profile, save
from edgekit.trace import events, write_trace

MACHINE: dict[str, Any] = {"processor": "A76", "governor": "performance", "packages": {"onnxruntime": "1.20"}}
COOL = {"throttled": "", "temperature_celsius": 41.0}
ONE = Profile(
    "local", "onnx", "model.onnx", "0" * 64, "microseconds", 80.0, 500, (),
    {"p90_microseconds": 90.0, "load_microseconds": 300.0, "first_microseconds": 200.0},
    {"machine": MACHINE, "before": COOL, "after": COOL},
)  # fmt: skip
TWO = replace(ONE, total=100.0, figures={"p90_microseconds": 120.0})


def runs(folder: Path, one: Profile, two: Profile) -> tuple[Path, Path]:
    for name, profile in (("a", one), ("b", two)):
        (folder / name).mkdir()
        save(folder / name / "profile.json", profile)
    return folder / "a", folder / "b"


def test_a_ratio_of_the_same_machine(tmp_path: Path) -> None:
    (row,) = compare_runs(*runs(tmp_path, ONE, TWO))
    assert (row.ratio, row.p90_ratio, row.differences, row.notes) == (0.8, 0.75, (), ())


def test_machines_that_differ_are_refused_without_force(tmp_path: Path) -> None:
    other = {**MACHINE, "governor": "ondemand", "packages": {"onnxruntime": "1.21"}}
    first, second = runs(tmp_path, ONE, replace(TWO, fingerprint={"machine": other}))
    words = r"governor: performance / ondemand; packages.onnxruntime: 1.20 / 1.21.*--force"
    with pytest.raises(InputError, match=words):
        compare_runs(first, second)
    (row,) = compare_runs(first, second, force=True)
    assert row.ratio == 0.8 and len(row.differences) == 2
    command = [sys.executable, "-m", "edgekit", "compare", str(first), str(second)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "governor: performance / ondemand" in done.stderr and not done.stdout
    done = subprocess.run([*command, "--force"], capture_output=True, text=True)
    assert done.returncode == 0 and "the machines differ" in done.stderr.replace("\n", " ") and "0.8" in done.stdout
    done = subprocess.run([*command, "--force", "--json"], capture_output=True, text=True)
    assert json.loads(done.stdout)[0]["ratio"] == 0.8


def test_the_state_of_the_machine_is_a_doubt_not_a_difference(tmp_path: Path) -> None:
    hot = {"throttled": "frequency capped", "temperature_celsius": 80.0}
    busy = replace(TWO, fingerprint={**TWO.fingerprint, "after": hot}, figures={"other_load_percent": 40.0})
    (row,) = compare_runs(*runs(tmp_path, ONE, busy))
    assert row.differences == ()
    text = "; ".join(row.notes)
    assert "40 % of the machine during the second" in text and "frequency capped after the second" in text
    assert "41 °C after the first, 80 °C after the second" in text


def test_nothing_measured_and_nothing_in_common_are_said(tmp_path: Path) -> None:
    first, second = runs(tmp_path, ONE, replace(TWO, device="ssh://pi@pi"))
    with pytest.raises(InputError, match="nothing in common"):
        compare_runs(first, second)
    with pytest.raises(InputError, match="nothing was measured"):
        compare_runs(first, tmp_path)


def test_differences_are_named_by_path() -> None:
    assert differences({"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}, "d": None}) == ("b.c: 2 / 3",)
    assert differences({"a": None}, {"a": 1}) == ("a: none / 1",)


def test_a_trace_has_every_time_once_and_no_instructions(tmp_path: Path) -> None:
    layers = (LayerCost("stem", "conv", 400, microseconds=60.0), LayerCost("head", "linear", 100, microseconds=40.0))
    timed = replace(ONE, layers=layers, series=({"seconds": 1.0, "median_microseconds": 80.0, "temperature_celsius": 50.0},))
    counted = replace(ONE, device="qemu:x", unit="instructions")
    found = events([timed, counted])
    assert {e["pid"] for e in found} == {1}
    slices = {e["name"]: (e["ts"], e["dur"]) for e in found if e["ph"] == "X"}
    assert slices["load"] == (0, 300) and slices["first call"] == (300, 200) and slices["inference (median)"] == (500, 80)
    assert slices["stem"] == (500, 48) and slices["head"] == (548, 32)  # drawn inside the inference
    assert [e["args"] for e in found if e["ph"] == "C"] == [{"median_microseconds": 80.0}, {"temperature_celsius": 50.0}]
    save(tmp_path / "profile.json", counted)
    assert write_trace(tmp_path) is None
    save(tmp_path / "profile.json", timed)
    path = write_trace(tmp_path)
    assert path and len(json.loads(path.read_text())["traceEvents"]) == len(found)
