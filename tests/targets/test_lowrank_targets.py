"""The low-rank digits example through the whole pipeline: every target, the emulated firmware included, proven layer by layer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import edgekit
from edgekit.parity import Parity
from edgekit.targets import get

pytestmark = pytest.mark.slow
TARGETS = ("executorch", "tflite", "onnx", "cortex-m4")
FOLDER = Path(__file__).parents[2] / "examples" / "digits"


@pytest.fixture(autouse=True)
def _tools() -> None:
    pytest.importorskip("sklearn")
    if missing := [t for t in TARGETS if get(t).available()]:
        pytest.skip(f"needs {', '.join(missing)}")


def test_two_quantized_layers_in_every_target(tmp_path: Path) -> None:
    outcome = edgekit.run(FOLDER / "lowrank.yaml", tmp_path / "run")
    assert outcome.ok
    program = edgekit.load(tmp_path / "run" / "frozen.pt2")
    record = json.loads((tmp_path / "run" / "compress.json").read_text())["passes"][0]
    split = list(record["layers"])
    assert split and record["macs after"] <= 0.8 * record["macs before"]
    for name in split:
        parts = [layer for layer in program.layers if layer.name.startswith(f"{name}.") and layer.op == "qconv2d"]
        assert len(parts) >= 2 and parts[0].out_scale != parts[-1].out_scale  # the value between has a quantizer of its own
    parity = Parity.load(tmp_path / "run" / "parity.json")
    stages = {s.name: s for s in parity.stages}
    assert set(TARGETS) == {a.target for a in parity.artifacts}
    assert all(a.ok and a.layers for a in parity.artifacts)
    assert stages["executorch"].max_lsb == 0 and stages["onnx"].max_lsb == 0


def test_thin_layers_of_one_bit_in_every_target(tmp_path: Path) -> None:
    """The head's first part reads the signs of a vector that a mean and a reshape made."""
    text = (FOLDER / "lowrank_binary.yaml").read_text()
    for old, new in (("epochs: 20", "epochs: 1"), ("max_accuracy_drop: 2.5", "max_accuracy_drop: null")):
        assert old in text
        text = text.replace(old, new)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text.replace("model.py:", f"{FOLDER}/model.py:").replace("data.py:", f"{FOLDER}/data.py:"))
    assert edgekit.run(recipe, tmp_path / "run").ok
    program = edgekit.load(tmp_path / "run" / "frozen.pt2")
    one_bit = {layer.name for layer in program.layers if layer.weight_bits == 1}
    assert one_bit == {"block2.pointwise.0", "block2.pointwise.1", "head.0"} and program.unquantized == ()
    parity = Parity.load(tmp_path / "run" / "parity.json")
    assert set(TARGETS) == {a.target for a in parity.artifacts}
    for found in parity.artifacts:
        compared = {row.layer: row.max_lsb for row in found.layers}
        signs = {layer.name for layer in program.layers if layer.packed}
        assert found.ok and {"mean", "head.0_sign", *one_bit, *signs} <= compared.keys()
        assert all(compared[name] == 0 for name in signs)
