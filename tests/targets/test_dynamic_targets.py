"""Dynamic and weight-only linear layers in .pte and .tflite: run, stored, tapped, read back, and a planted fault found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgekit import targets
from edgekit.compress.ptq import PTQ
from edgekit.compress.steps import apply
from edgekit.data import Data
from edgekit.errors import UnsupportedError
from edgekit.frozen import FrozenProgram
from edgekit.recipe import Block


class Mixer(nn.Module):
    """Pre-norm linear layers of 64 features on (6, 64) rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(64, 64), nn.LayerNorm(64)
        self.up, self.down, self.last = nn.Linear(64, 128), nn.Linear(128, 64, bias=False), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return self.last(x.mean(1))


def program(**how: Any) -> tuple[FrozenProgram, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(4, 6, 64)
    return apply(Mixer().eval(), [Block("ptq", PTQ(**{"activations": "dynamic", **how}))], Data(calibration=x)).program, x


CASES = (
    ("executorch", {}, {"int8"}),
    ("executorch", {"weights": "int4", "group_size": 32, "method": "gptq"}, {"int8", "int4"}),
    ("tflite", {}, {"int8"}),
    ("tflite", {"weights": "int4", "activations": "float"}, {"int8", "int4"}),
)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "how", "storage"), CASES)
def test_a_file_computes_and_stores_what_the_program_does(
    target: str, how: dict[str, Any], storage: set[str], tmp_path: Path
) -> None:
    made, x = program(**how)
    module, path = targets.get(target), tmp_path / f"model{targets.get(target).SUFFIX}"
    artifact = module.lower(made, path)
    names = {layer.name for layer in made.layers}
    rows = [c for c in artifact.coverage if c.layer in names]
    assert {c.layer for c in rows} == names == {"first", "up", "down", "last"} and {c.storage for c in rows} == storage
    if how.get("activations") != "float":
        assert {c.runs for c in rows} == {"delegated"}, "integer kernels, in XNNPACK"
    found = module.run(path, [x.numpy()])[0]
    wanted = torch.cat([made.run(x[i : i + 1])[0] for i in range(len(x))]).numpy()
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()
    taps = module.taps(path, made, [x[:1].numpy()])
    forced = made.forced({k: torch.from_numpy(np.array(v)) for k, v in taps.items()}, x[:1])
    assert set(taps) == names
    for name, value in taps.items():
        assert np.abs(value - forced[name].numpy()).max() <= 1e-4 * np.abs(value).max(), name
    assert module.readback(path, made) == []
    other = {layer: program(**how, seed=0)[0] for layer in ("up",)}["up"]
    weight = other.layer("up").args["weight"]
    weight[3, 5] += 1 if weight[3, 5] < 7 else -1
    (mismatch,) = module.readback(path, other)
    assert mismatch.layer == "up" and "weight" in mismatch.field


def test_what_a_target_does_not_take_is_refused_with_the_layer(tmp_path: Path) -> None:
    grouped, plain = program(weights="int4", group_size=16)[0], program(activations="float")[0]
    for target, made, match in (
        ("executorch", grouped, "groups of 16"),
        ("tflite", grouped, "one weight scale for each output channel"),
        ("executorch", plain, "activations: dynamic"),
        ("onnx", plain, "executorch or tflite"),
        ("cortex-m4", plain, "float"),
    ):
        module = targets.get(target)
        with pytest.raises(UnsupportedError, match=match):
            module.lower(made, tmp_path / f"x{module.SUFFIX}")
