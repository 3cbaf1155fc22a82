"""A plain nn.Module and tensors become verified files, without a recipe or modules on disk."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import tiny_recipe
import torch
from core.sources import ROOT
from torch import nn

import edgekit
from edgekit import pipeline
from edgekit.compress.ptq import PTQ, quantize_model
from edgekit.errors import EdgekitError, FormatError, ModelError, RecipeError

pytest.importorskip("onnxruntime")

X = torch.randn(96, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).train()


@pytest.fixture
def data(model: nn.Module) -> edgekit.Data:
    with torch.no_grad():
        labels = model.eval()(X).argmax(1)
    model.train()
    return edgekit.Data(calibration=X[:64], evaluation=(X[64:], labels[64:]))


@pytest.mark.slow
def test_run_model_makes_what_the_recipe_makes(tmp_path: Path) -> None:
    recipe = tiny_recipe.write(tmp_path / "r")
    by_recipe = pipeline.run(recipe, tmp_path / "recipe")
    found: dict[str, object] = {}
    exec(tiny_recipe.MODEL, found)
    model, source = found["build"](), found["build"]  # type: ignore[operator]
    x = torch.randn(96, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = source()(x).argmax(1)  # type: ignore[operator]
    data = edgekit.Data(calibration=x[:64], evaluation=(x[64:], y[64:]))
    settings = {"max_lsb": 1, "max_accuracy_drop": 10}
    outcome = edgekit.run_model(
        model, data, tmp_path / "api", compress={"ptq": {"observer": "minmax"}}, targets="onnx", verify=settings, name="tiny"
    )
    assert outcome.ok and outcome.parity is not None and by_recipe.parity is not None
    assert (tmp_path / "api" / "model.onnx").read_bytes() == (tmp_path / "recipe" / "model.onnx").read_bytes()
    assert outcome.parity.stages == by_recipe.parity.stages
    again = edgekit.verify_files(tmp_path / "api")
    assert again.ok and again.parity is not None and again.parity.samples == 32 and not again.warnings
    assert (tmp_path / "api" / "report.html").is_file()


def test_stage_by_stage_and_the_model_is_left_as_it_is(model: nn.Module, data: edgekit.Data, tmp_path: Path) -> None:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    compressed = edgekit.compress_model(model, data, PTQ(weights="int4", keep_first_last_8bit=False), name="small")
    assert model.training and all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert {x.weight_bits for x in compressed.program.layers if x.weight_bits} == {4} and compressed.program.name == "small"
    made = edgekit.export_program(compressed, tmp_path / "run", ["onnx"])
    checked = edgekit.verify_files(tmp_path / "run", data)
    assert made.folder == tmp_path / "run" and checked.ok and checked.parity is not None
    assert [s.name for s in checked.parity.stages] == ["frozen", "onnx"]
    (expected,) = compressed.program.run(X[64:])
    labels = data.evaluation[1].numpy()
    assert checked.parity.stages[0].metric == pytest.approx(100 * float(np.mean(expected.argmax(1).numpy() == labels)))
    pipeline.export(tmp_path / "run")  # the folder is an ordinary run
    again = edgekit.export_program(edgekit.load(tmp_path / "run" / "frozen.pt2"), tmp_path / "bare", "onnx")
    assert (again.folder / "model.onnx").read_bytes() == (tmp_path / "run" / "model.onnx").read_bytes()
    assert edgekit.verify_files(again.folder).ok


def test_the_result_is_that_of_the_parts(model: nn.Module, data: edgekit.Data) -> None:
    (mine,) = edgekit.compress_model(model, X[:64], "static_wi8_ai8").program.run(X)
    (wanted,) = quantize_model(model.eval(), edgekit.Data(X[:64])).run(X)
    assert torch.equal(mine, wanted)


def test_mistakes_are_the_errors_of_the_command_line(model: nn.Module, data: edgekit.Data, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(RecipeError, match=r"the arguments: compress\.0\.ptq\.weights: found 'int5'; did you mean"):
        edgekit.compress_model(model, data, {"ptq": {"weights": "int5"}})
    with pytest.raises(RecipeError, match=r"targets\.0\.tflit: found 'tflit'; did you mean 'tflite'"):
        edgekit.run_model(model, data, out, targets=["tflit"])
    with pytest.raises(RecipeError, match=r"verify\.max_lsb: found -1"):
        edgekit.run_model(model, data, out, targets=["onnx"], verify={"max_lsb": -1})
    with pytest.raises(ModelError, match="the model is int; expected"):
        edgekit.compress_model(3, data)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"0\.weight is float64"):
        edgekit.run_model(model.double(), data, out, targets=["onnx"])
    with pytest.raises(FormatError, match="not a run folder"):
        edgekit.verify_files(out)
    with pytest.raises(EdgekitError, match="torch sees no CUDA device"):
        if torch.cuda.is_available():
            pytest.skip("there is a CUDA device")
        edgekit.compress_model(model, data, device="cuda")
    assert not out.exists()


@pytest.mark.slow
def test_the_example_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("litert_torch")
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).eval()
    images = torch.randn(400, 1, 8, 8)
    with torch.no_grad():
        labels = model(images).argmax(1)
    monkeypatch.chdir(tmp_path)
    exec(
        code.replace("targets=[", 'verify={"max_accuracy_drop": 20}, targets=['),
        {"model": model, "images": images, "labels": labels},
    )
    assert capsys.readouterr().out.strip().endswith("True")
    assert (tmp_path / "runs" / "mine" / "model.tflite").is_file() and (tmp_path / "runs" / "small" / "model.tflite").is_file()
