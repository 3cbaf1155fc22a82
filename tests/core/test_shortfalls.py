"""What is less than was asked for is said, with the layers' names, wherever one looks: warnings, the command line, the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from spiking_nets import conv_program
from torch import Tensor, nn

import edgekit
from edgekit import console
from edgekit.errors import InputError
from edgekit.frozen.describe import describe
from edgekit.report import render
from edgekit.shortfalls import in_float, integer_layers_in_float, named

X = torch.randn(64, 1, 6, 6, generator=torch.Generator().manual_seed(0))


class Gates(nn.Module):
    """Functions of one value that no onnxruntime kernel computes in integers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.silu = nn.Conv2d(1, 4, 3, padding=1), nn.SiLU()
        self.conv, self.gelu = nn.Conv2d(4, 4, 3, padding=1), nn.GELU()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.gelu(self.conv(self.silu(self.stem(x)))).mean((2, 3)))
        return y


class Attention(nn.Module):
    """Its projection has the tokens in dimension 0, and a mean of tokens has no integer form."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head((x + self.attention(x, x, x, need_weights=False)[0]).mean(1))
        return y


def run(folder: Path, *targets: Any, **compress: Any) -> edgekit.Outcome:
    torch.manual_seed(0)
    return edgekit.run_model(Gates().eval(), X, folder, compress={"ptq": compress}, targets=targets, resume=False)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path / "cache"))


def test_an_integer_layer_in_float_is_named_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    outcome = run(tmp_path / "run", "onnx")
    said = "onnx: 2 integer layers run in float between integers: silu, gelu; the target option `onnx: {tables: true}`"
    assert [w.startswith(said) for w in outcome.warnings] == [True]
    console.print_outcome(outcome)
    assert " ".join(capsys.readouterr().err.split()).count(said) == 1
    html = render(outcome.folder)
    assert "<b>onnx</b> computes in float, between integers: silu, gelu. Remedy: " in html
    assert "The program leaves nothing in float: every" in html and "<p>Nothing" not in html
    tables = run(tmp_path / "tables", {"onnx": {"tables": True}})
    assert tables.warnings == () and "<p>Nothing: every operator" in render(tables.folder)


@pytest.mark.slow
def test_float_in_a_delegate_is_float(tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.Hardsigmoid(), nn.Conv2d(4, 4, 3, padding=1), nn.Flatten(), nn.Linear(144, 3)
    )
    settings = {"ptq": {"weights": "int4", "keep_first_last_8bit": False}}
    outcome = edgekit.run_model(model.eval(), X, tmp_path / "run", compress=settings, targets=["executorch"], resume=False)
    assert outcome.warnings == (
        "executorch: 1 integer layer runs in float between integers: 1",
        "executorch: weights below 8 bits of 2 layers are stored as int8: 0, 2",
    )
    html = render(outcome.folder)
    assert "Integer layers of the program that this file computes in float: 1" in html
    assert '<span data-run="float">0.0 %</span>, 1 ops' in html


@pytest.mark.slow
def test_functions_that_xnnpack_has_for_integers_are_no_shortfall(tmp_path: Path) -> None:
    pytest.importorskip("executorch")
    assert run(tmp_path / "run", "executorch").warnings == ()


def test_what_stays_in_float_is_named_and_has_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    outcome = edgekit.run_model(Attention().eval(), torch.randn(64, 5, 16), tmp_path / "run", targets=["onnx"])
    left, share = outcome.warnings
    assert left.startswith(
        "2 operators stay in float: attention_scaled_dot_product_attention (scaled_dot_product_attention), mean (mean); "
    )
    products, integers = 2 * 2 * 5 * 5 * 8, 5 * 16 * 48 + 5 * 16 * 16 + 16 * 3
    wanted = f"onnx: {100 * products / (products + integers):.1f} % of the multiply-accumulates run in float: attention_scaled"
    assert share.startswith(wanted)
    found = describe(edgekit.load(outcome.folder / "frozen.pt2"))
    rows = {r.layer: r for r in found.rows}
    assert {layer for layer, _, _ in found.unquantized} <= set(rows) and rows["mean"].kind == "float"
    console.print_description(found)
    assert "5×1×48" in capsys.readouterr().out
    assert '<tr data-layer="mean">' in render(outcome.folder)


def test_words() -> None:
    assert named(["a"]) == "a" and named(list("abc")) == "a, b, c" and named(list("abcde")) == "a, b, c and 2 more"
    assert [in_float({"runs": runs}) for runs in ("float", "delegated", "int8")] == [True, False, False]


@pytest.mark.parametrize("shape", ["1,x", "1,,2", "0,3", "", "1,3;"])
def test_a_shape_that_cannot_be_read_is_shown(shape: str, tmp_path: Path) -> None:
    from edgekit import doctor

    (tmp_path / "m.py").write_text("from torch import nn\ndef build():\n    return nn.Linear(3, 2)\n")
    with pytest.raises(InputError, match=f"--shape is {shape!r}; expected whole numbers"):
        doctor.examine(f"{tmp_path / 'm.py'}:build", shape=shape)


def test_neurons_and_moves_of_steps_are_no_integer_layers() -> None:
    """They are float where the network is; nothing has become worse in a file."""
    program, _ = conv_program("lif")
    rows = [{"layer": layer.name, "runs": "float"} for layer in program.layers]
    assert integer_layers_in_float(rows, program) == []
