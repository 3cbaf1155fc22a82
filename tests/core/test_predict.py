"""Predictions: the figures of the files that a recipe really makes, warnings where bits buy nothing, the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_recipe
from typer.testing import CliRunner

from edgekit import analyze, cli, costs, predict
from edgekit.errors import InputError


def prediction(tmp_path: Path, compress: str, *names: str) -> predict.Predictions:
    path = tiny_recipe.write(tmp_path)
    path.write_text(path.read_text().replace("{observer: minmax}", compress))
    return predict.predict(path, targets=list(names))


def test_few_bits_buy_no_speed_on_a_cortex_m_and_it_is_said(tmp_path: Path) -> None:
    found = prediction(tmp_path, "{weights: int4, keep_first_last_8bit: false}", "cortex-m4", "executorch")
    m4, executorch = found.targets
    assert m4.row("float") is None and m4.ratio("recipe", "int8", "bytes") < 1 < m4.ratio("recipe", "int8", "cost")
    assert any("buy no speed" in w for w in m4.warnings)
    assert any("wider than asked for" in w for w in executorch.warnings)
    said = predict.remarks(found)
    assert any("modelled, not measured" in line and costs.table("cortex-m4").machine in line for line in said)


def test_an_int8_recipe_has_no_int8_row_of_its_own(tmp_path: Path) -> None:
    (found,) = prediction(tmp_path, "{method: gptq}", "tflite").targets
    assert [r.form for r in found.rows] == ["float", "recipe"]
    assert found.ratio("recipe", "float", "cost") < 1
    assert found.error == costs.table("tflite").error


def test_the_command(tmp_path: Path) -> None:
    path = tiny_recipe.write(tmp_path)
    result = CliRunner().invoke(cli.app, ["predict", str(path), "--target", "cortex-m4", "--json"])
    assert result.exit_code == 0, result.output
    (target,) = json.loads(result.stdout)["targets"]
    assert target["unit"] == "instructions" and target["rows"][-1]["cost"] > 0
    shown = CliRunner().invoke(cli.app, ["predict", str(path), "--target", "cortex-m4"])
    assert "predicted, not measured" in shown.stdout and "modelled, not measured" in shown.stdout


def test_no_table(tmp_path: Path) -> None:
    path = tiny_recipe.write(tmp_path)
    with pytest.raises(InputError, match="no table of costs"):
        predict.predict(path, targets=["cortex-m4"], tables=tmp_path)


def test_what_no_row_is_for_has_a_size_and_no_cost(tmp_path: Path) -> None:
    found = prediction(tmp_path / "a", "{activations: dynamic, keep_first_last_8bit: false, skip: [conv]}", "cortex-m4")
    (wide,) = found.targets
    assert any("left out of the cost, their code also of the bytes: " in said for said in predict.remarks(found))
    assert wide.row("recipe").cost is None and "dynamic_qlinear" in wide.row("recipe").left_out
    assert wide.ratio("recipe", "int8") is None and wide.row("recipe").bytes > 0


def test_analyzing_dynamic_activations_is_refused(tmp_path: Path) -> None:
    path = tiny_recipe.write(tmp_path)
    path.write_text(path.read_text().replace("{observer: minmax}", "{activations: dynamic}"))
    with pytest.raises(InputError, match="no activation is quantized ahead"):
        analyze.analyze(path)
