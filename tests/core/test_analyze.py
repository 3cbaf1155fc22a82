"""Sensitivity: measured figures against a separate computation, remedies that help, and what the command makes of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_recipe
import torch
from float_models import Encoder, Functional, Modules, build
from torch import nn
from typer.testing import CliRunner

from edgekit import analyze, cli, pipeline
from edgekit.compress.capture import capture
from edgekit.compress.ptq import PTQ
from edgekit.compress.ptq.plan import make_plan
from edgekit.compress.ptq.quantize import calibration_stream
from edgekit.compress.ptq.sensitivity import Layer, hurting, sensitivity, sqnr_db
from edgekit.compress.ptq.simulate import simulate
from edgekit.compress.ptq.units import find_units, weight_of
from edgekit.data import Data
from edgekit.errors import FormatError, InputError


def measured(kind: type[nn.Module], n: int = 32, **settings: object) -> tuple[tuple[Layer, ...], nn.Module, torch.Tensor, PTQ]:
    model, x = build(kind, n)
    how = PTQ(**settings)
    graph = capture(model, (x[:1],))
    return sensitivity(graph, how, calibration_stream(graph, how, Data(x)), samples=n), model, x, how


def test_decibels() -> None:
    assert sqnr_db(100.0, 1.0) == 20.0
    assert sqnr_db(1.0, 0.0) == 120.0


def test_weights_alone_are_the_float_model_with_that_layers_weights_replaced() -> None:
    found, model, x, how = measured(Modules, weights="int4", keep_first_last_8bit=False)
    graph = capture(model, (x[:1],))
    units, floats = find_units(graph)
    plan = make_plan(graph, units, floats, how, calibration_stream(graph, how, Data(x)))
    by_name = {f.name: f for f in found}
    for unit in units:
        if unit.weight is None:
            continue
        w = plan.weights[unit.name]
        weight = weight_of(graph, unit)[0]
        with torch.no_grad():
            real = graph.module(x)
            kept = weight.clone()
            weight.copy_(w.integers * w.scale.view(-1, *[1] * (weight.dim() - 1)))
            noise = (graph.module(x) - real).double().square().sum()
            weight.copy_(kept)
        db = sqnr_db(float(real.double().square().sum()), float(noise))
        assert by_name[unit.name].weights_db == pytest.approx(db, abs=0.3), "the bias is at its own grid too"
        assert by_name[unit.name].predicted_db == pytest.approx(db, abs=6), "curvature tells the order of it"


def test_the_last_cumulative_figure_is_the_whole_simulation() -> None:
    found, model, x, how = measured(Functional, weights="int4")
    graph = capture(model, (x[:1],))
    units, floats = find_units(graph)
    plan = make_plan(graph, units, floats, how, calibration_stream(graph, how, Data(x)))
    with torch.no_grad():
        real = model(x)
        noise = (simulate(graph, plan)(x) - real).double().square().sum()
    assert found[-1].together_db == pytest.approx(sqnr_db(float(real.double().square().sum()), float(noise)), abs=0.01)
    assert sum(f.share for f in found) == pytest.approx(1)


def test_an_outlier_channel_is_named_with_a_remedy_that_helps() -> None:
    model, x = build(Modules, 64)
    with torch.no_grad():
        model.features[6].weight[0] *= 60  # one channel makes a per-tensor scale useless
    how = PTQ(weights="int4", per_channel=False, keep_first_last_8bit=False)
    graph = capture(model, (x[:1],))
    found = sensitivity(graph, how, calibration_stream(graph, how, Data(x)))
    worst = hurting(found)[0]
    assert worst.name == "features.6" and worst.weights_db < worst.output_db
    assert {"per_channel: true", "keep it at 8 bits"} & {r.setting for r in worst.remedies[:2]}
    assert all(r.alone_db >= worst.alone_db + 0.5 for r in worst.remedies)


def test_eight_bits_are_tried_where_a_scope_chose_fewer() -> None:
    """As a budget's choice does, by a scope of the layer's own name."""
    found, _, _, _ = measured(Modules, scopes={r"features\.6": "int2"})
    assert "keep it at 8 bits" in {r.setting for r in hurting(found)[0].remedies}


def test_a_transformers_linears_are_measured() -> None:
    found, *_ = measured(Encoder, weights="int4")
    assert sum(f.weight_bits > 0 for f in found) == 6


def test_a_run_folder_gets_json_and_a_heat_map(tmp_path: Path) -> None:
    recipe = tiny_recipe.write(tmp_path / "tiny", "onnx")
    run = tmp_path / "run"
    assert pipeline.run(recipe, run).ok
    runner = CliRunner()
    shown = runner.invoke(cli.app, ["analyze", str(run), "--samples", "16"])
    assert shown.exit_code == 0 and "conv" in shown.stdout and "head" in shown.stdout
    value = json.loads((run / "analysis.json").read_text())
    assert [x["name"] for x in value["layers"] if x["weight_bits"]] == ["conv", "head"]
    assert 'id="heat-map"' in (run / "report.html").read_text()
    again = runner.invoke(cli.app, ["analyze", str(recipe), "--samples", "16", "--json"])
    assert json.loads(again.stdout)["layers"] == value["layers"]
    loaded = analyze.load(run)
    assert loaded is not None and loaded.to_json() == value
    assert pipeline.verify(run).ok, "the manifest knows the new file"
    (run / "analysis.json").write_text("{")
    with pytest.raises(FormatError, match="damaged"):
        analyze.load(run)


def test_bits_that_a_budget_chose_are_those_that_are_measured(tmp_path: Path) -> None:
    recipe = tiny_recipe.write(tmp_path / "tiny", "onnx")
    text = recipe.read_text()
    recipe.write_text(text.replace("observer: minmax", "mixed: {size: 0.6}, keep_first_last_8bit: false"))
    found = analyze.analyze(recipe, samples=16, worst=0)
    whole = 8 * sum(x.weight_bytes / x.weight_bits for x in found.layers if x.weight_bits)
    assert 0.5 * whole <= sum(x.weight_bytes for x in found.layers) <= 0.6 * whole


def test_a_recipe_that_quantizes_nothing_is_refused(tmp_path: Path) -> None:
    recipe = tiny_recipe.write(tmp_path / "tiny", "onnx")
    recipe.write_text(recipe.read_text().replace("ptq: {observer: minmax}", "lowrank: {rank: '0.5'}"))
    with pytest.raises(InputError, match="no ptq or qat"):
        analyze.analyze(recipe)
