"""The command line: exit codes, JSON on stdout and nothing else, one sentence for each error."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_recipe
from typer.testing import CliRunner

from edgekit import cli
from edgekit.errors import InputError

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    old = os.environ.get("EDGEKIT_CACHE")
    os.environ["EDGEKIT_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("EDGEKIT_CACHE") if old is None else os.environ.update(EDGEKIT_CACHE=old)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_recipe.write(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def finished(recipe: Path) -> Path:
    out = recipe.parent / "finished"
    assert call("run", recipe, "--out", out)[0] == 0
    return out


def call(*args: object) -> tuple[int, str]:
    """Exit code and stdout of a verb in this process; an EdgekitError gives its code, as main() does."""
    from edgekit.errors import EdgekitError

    result = CliRunner().invoke(cli.app, [str(a) for a in args])
    if isinstance(result.exception, EdgekitError):
        return result.exception.exit_code, str(result.exception)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout


def process(*args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    code = "from edgekit.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_every_verb_is_there_with_its_common_options() -> None:
    code, text = call("--help")
    verbs = {"init", "doctor", "targets", "describe", "compress", "export", "verify", "run", "report", "profile"}
    verbs |= {"analyze", "attack", "compare", "deploy", "import", "predict", "setup-sim", "step"}
    assert code == 0 and {c.name or c.callback.__name__ for c in cli.app.registered_commands if c.callback} == verbs
    assert all(verb in text for verb in verbs)
    for verb in verbs:
        code, text = call(verb, "--help")
        assert code == 0 and "--json" in text and "--verbose" in text


def test_the_verbs_one_after_the_other(recipe: Path) -> None:
    out = recipe.parent / "steps"
    for args in (["compress", recipe, "--out", out], ["export", out], ["verify", out], ["report", out]):
        code, text = call(*args, "--json")
        found = json.loads(text)
        assert code == 0 and found["ok"] and found["run"] == str(out) and found["warnings"] == []
    assert set(found["files"]) == {p.name for p in out.iterdir()} - {"manifest.json"}
    code, text = call("verify", out)
    assert code == 0 and "onnx" in text and "computes what the frozen program computes" in text


def test_an_export_with_options_is_remembered_by_the_run(recipe: Path) -> None:
    pytest.importorskip("litert_torch")
    out = recipe.parent / "options"
    call("compress", recipe, "--out", out)
    assert call("export", out, "--target", "tflite", "--io", "float")[0] == 0
    assert "tflite:\n    io: float" in (out / "recipe.yaml").read_text()
    assert json.loads((out / "export_tflite.json").read_text())["inputs"][0]["dtype"] == "float32"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["export", "OUT", "--target", "tflit"], "found 'tflit'; did you mean 'tflite'?"),
        (["export", "OUT", "--target", "tflite", "--io", "int4"], "found 'int4'"),
        (["export", "OUT", "--target", "onnx", "--io", "int8"], "unknown option 'io'"),
        (["export", "OUT", "--io", "int8"], "need a --target"),
        (["verify", "NONE"], "not a run folder"),
        (["report", "NONE"], "not a run folder"),
        (["describe", "NONE"], "no such file"),
        (["run", "NONE"], "no such recipe; write one with `edgekit init`"),
        (["doctor", "--model", "nowhere.py:f"], "nowhere.py: no such file"),
    ],
)
def test_bad_input_is_exit_code_2_and_one_sentence(args: list[str], words: str, finished: Path, tmp_path: Path) -> None:
    code, text = call(*(str(finished) if a == "OUT" else str(tmp_path / "none") if a == "NONE" else a for a in args))
    assert code == 2 and words in text and "\n" not in text


@pytest.mark.slow
def test_a_failed_check_is_exit_code_1(recipe: Path, tmp_path: Path) -> None:
    text = recipe.read_text().replace("max_accuracy_drop: 10", "max_accuracy_drop: 0")
    (recipe.parent / "strict.yaml").write_text(text.replace("observer: minmax", "weights: int2, keep_first_last_8bit: false"))
    done = process("run", recipe.parent / "strict.yaml", "--out", tmp_path / "run")
    assert done.returncode == 1, done.stderr
    assert "error:" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "run" / "report.html").is_file()


@pytest.mark.slow
def test_errors_stand_on_stderr_without_a_traceback_unless_asked_for(tmp_path: Path) -> None:
    done = process("verify", tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "Traceback" in process("verify", tmp_path, "-v").stderr


def test_a_missing_extra_is_exit_code_3(monkeypatch: pytest.MonkeyPatch, recipe: Path) -> None:
    from edgekit.targets import onnx

    monkeypatch.setattr(onnx, "available", lambda: "onnx is not installed")
    code, text = call("run", recipe, "--out", recipe.parent / "none")
    assert code == 3 and "pip install 'edgekit[onnx]'" in text


@pytest.mark.slow
def test_a_bug_is_exit_code_70_with_its_traceback(recipe: Path) -> None:
    (recipe.parent / "sitecustomize.py").write_text("import edgekit.recipe\nedgekit.recipe.load = lambda *a: 1 / 0\n")
    done = process("run", recipe, PYTHONPATH=str(recipe.parent))
    assert done.returncode == 70 and "ZeroDivisionError" in done.stderr and "this is a bug in edgekit" in done.stderr


def test_a_line_for_each_stage_where_there_is_no_terminal(recipe: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(cli.app, ["run", str(recipe), "--out", str(tmp_path / "run")])
    begun = re.findall(r"^\[ *\d+\.\d s\] (.+)$", done.stderr, re.MULTILINE)
    assert {"load", "compress", "verify", "report"} <= {*begun} and len(begun) == len({*begun}) < 12
    done = CliRunner().invoke(cli.app, ["run", str(recipe), "--out", str(tmp_path / "run"), "--json"])
    assert done.exit_code == 0 and done.stderr == ""


@pytest.mark.slow
def test_no_warnings_of_other_packages(recipe: Path, tmp_path: Path) -> None:
    code = f"import edgekit; edgekit.run({str(recipe)!r}, {str(tmp_path / 'run')!r}, resume=False)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("content", "words"), [(None, "not a run folder (no manifest.json)"), ("{", "manifest.json: damaged")])
def test_describe_wants_a_whole_run(content: str | None, words: str, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "manifest.json").unlink()
    if content is not None:
        (tmp_path / "run" / "manifest.json").write_text(content)
    code, text = call("describe", tmp_path / "run")
    assert code == 2 and words in text and "\n" not in text


def test_a_run_that_cannot_be_written_is_told_before_the_work(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode, **_: mode != os.W_OK)  # root may write anywhere
    code, text = call("verify", finished)
    assert code == 2 and text.startswith(f"cannot write {finished}: ") and "go on with the copy" in text and "\n" not in text


def test_describe_says_what_it_reads(finished: Path, tmp_path: Path) -> None:
    (tmp_path / "model.pte").write_bytes(b"x")
    code, text = call("describe", tmp_path / "model.pte")
    assert code == 2 and "describe reads frozen programs (.pt2), .nir files and run folders" in text


def test_describe(finished: Path) -> None:
    code, text = call("describe", finished / "frozen.pt2")
    assert code == 0 and "qconv2d" in text and "total" in text
    found = json.loads(call("describe", finished, "--json")[1])
    conv = next(r for r in found["rows"] if r["op"] == "qconv2d")
    assert (conv["layer"], conv["weight_bits"], conv["activation_bits"]) == ("conv", 8, 8)
    assert (conv["parameters"], conv["macs"]) == (4 * 9 + 4, 8 * 8 * 4 * 9)
    assert found["macs"] == 8 * 8 * 4 * 9 + 64 * 3 == found["macs_by_bits"]["w8a8"]
    assert found["bytes"] == 4 * 9 + 4 * 4 + 4 * 4 + 64 * 3 + 3 * 4 + 3 * 4


def test_targets_and_doctor(finished: Path, recipe: Path) -> None:
    found = json.loads(call("targets", "--json")[1])
    cores = {(f"cortex-m{n}", f".cortex-m{n}/model.c") for n in (0, 3, 4, 7, 33, 55)}
    others = {("executorch", ".pte"), ("tflite", ".tflite"), ("onnx", ".onnx"), ("nir", ".nir")}
    assert {(t["name"], t["suffix"]) for t in found} == others | cores
    assert call("targets")[0] == 0
    code, text = call("doctor")
    assert code == 0 and "torch" in text and "onnx" in text
    for args in (["--shape", "1,1,8,8"], ["--data", f"{recipe.parent}/data.py:load"]):
        checked = json.loads(call("doctor", "--model", f"{recipe.parent}/model.py:build", *args, "--json")[1])["model"]
        assert checked["float"] == [] and all(t["takes"] or t["target"] == "nir" for t in checked["targets"])
    checked = json.loads(call("doctor", "--model", finished / "frozen.pt2", "--json")[1])["model"]
    assert checked["parameters"] == 4 * 9 + 4 + 64 * 3 + 3
    assert call("doctor", "--model", f"{recipe.parent}/model.py:build")[0] == 2


def test_init_writes_a_starter_that_runs(tmp_path: Path) -> None:
    code, text = call("init", tmp_path / "new", "--yes", "--target", "onnx")
    assert code == 0 and f"next: edgekit run {tmp_path}/new/recipe.yaml" in text
    found = json.loads(call("run", tmp_path / "new" / "recipe.yaml", "--out", tmp_path / "run", "--json")[1])
    float_stage = found["parity"]["stages"][0]
    assert found["ok"] and float_stage["metric"] > 95
    code, text = call("init", tmp_path / "new", "--yes")
    assert code == 2 and "is there already" in text


def test_init_with_a_model_checks_it_and_writes_a_valid_recipe(recipe: Path, tmp_path: Path) -> None:
    from edgekit import recipe as recipes

    model, data = f"{recipe.parent}/model.py:build", f"{recipe.parent}/data.py:load"
    assert call("init", tmp_path, "--model", model, "--data", data, "--weights", "int4", "--yes")[0] == 0
    found = recipes.load(tmp_path / "recipe.yaml")
    assert (found.model, found.data, found.compress[0].settings.weights) == (model, data, "int4")
    code, text = call("init", tmp_path / "x", "--model", model, "--yes")
    assert code == 2 and "both --model and --data" in text


def test_init_asks_little(tmp_path: Path) -> None:
    from edgekit import init

    asked: list[str] = []

    def ask(question: str, default: str = "", **_: object) -> str:
        asked.append(question)
        return default

    assert [p.name for p in init.write(tmp_path, ask=ask)] == ["recipe.yaml", "starter.py"]
    assert len(asked) == 3
    with pytest.raises(InputError, match="weights 'int5'; expected int8 or int4"):
        init.write(tmp_path / "x", weights="int5")
