"""The low-rank digits example through the whole pipeline: every target, the emulated firmware included, proven layer by layer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import edgekit
from edgekit.parity import Parity
from edgekit.targets import get

pytestmark = pytest.mark.slow
RECIPE = Path(__file__).parents[2] / "examples" / "digits" / "lowrank.yaml"


def test_two_quantized_layers_in_every_target(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    missing = [t for t in ("executorch", "tflite", "onnx", "cortex-m4") if get(t).available()]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    outcome = edgekit.run(RECIPE, tmp_path / "run")
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
    assert {"executorch", "tflite", "onnx", "cortex-m4"} == {a.target for a in parity.artifacts}
    assert all(a.ok and a.layers for a in parity.artifacts)
    assert stages["executorch"].max_lsb == 0 and stages["onnx"].max_lsb == 0
