"""Numbers of layers left in float: each is found in every format, and one altered bit of one names its layer.

The faults are planted by searching a file's bytes for the numbers themselves, so nothing of edgekit's own readers takes part.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgekit.compress.ptq import PTQ, quantize_model
from edgekit.data import Data
from edgekit.frozen import FrozenProgram
from edgekit.targets import get
from edgekit.targets.float_constants import Stored, compare_floats

TOKENS, FEATURES, WIDTH = 6, 8, 12


class Mixture(nn.Module):
    """An integer linear, positions, a norm, an LSTM and a linear left in float, an integer head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.positions = nn.Linear(FEATURES, WIDTH), nn.Parameter(torch.randn(1, 9, WIDTH))
        self.norm, self.memory = nn.LayerNorm(WIDTH), nn.LSTM(WIDTH, 5, batch_first=True)
        self.hidden, self.head = nn.Linear(5, 7), nn.Linear(7, 3)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.embed(x) + self.positions[:, :TOKENS])
        return self.head(torch.relu(self.hidden(self.memory(torch.relu(x))[0][:, -1])))


@pytest.fixture(scope="module")
def program() -> FrozenProgram:
    torch.manual_seed(0)
    return quantize_model(Mixture().eval(), Data(torch.randn(32, TOKENS, FEATURES)), PTQ(samples=32, skip=("hidden",)))


@pytest.fixture(scope="module", params=["executorch", "tflite", "onnx"])
def lowered(request: pytest.FixtureRequest, program: FrozenProgram, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    target = get(request.param)
    if target.available() is not None:
        pytest.skip(target.available())
    path = tmp_path_factory.mktemp(request.param) / f"model{target.SUFFIX}"
    target.lower(program, path)
    return request.param, path


def constant(program: FrozenProgram, name: str) -> np.ndarray:
    """A float tensor of the program by the end of its name."""
    (found,) = (t for x in program.float_layers for key, t in x.constants.items() if key.endswith(name))
    return found.numpy()


NEEDLES: dict[str, tuple[str, Callable[[FrozenProgram], np.ndarray]]] = {
    # layer, and numbers that lie side by side in every format
    "gamma": ("norm", lambda p: constant(p, "norm_weight")),
    "beta": ("norm", lambda p: constant(p, "norm_bias")),
    "table of positions": ("add", lambda p: constant(p, "positions")[0, :TOKENS]),
    "gate": ("memory", lambda p: constant(p, "weight_hh_l0")[5:10]),
    "row of a skipped layer": ("hidden", lambda p: constant(p, "hidden_weight")[2]),
    "bias of a skipped layer": ("hidden", lambda p: constant(p, "hidden_bias")),
}


@pytest.mark.slow
@pytest.mark.parametrize("where", NEEDLES)
def test_one_altered_bit_names_its_layer(where: str, program: FrozenProgram, lowered: tuple[str, Path], tmp_path: Path) -> None:
    name, path = lowered
    target, (layer, numbers) = get(name), NEEDLES[where]
    assert target.readback(path, program) == []
    needle, content = numbers(program).tobytes(), bytearray(path.read_bytes())
    assert content.count(needle) >= 1, "the float numbers are in the file bit for bit"
    content[content.index(needle) + 4] ^= 1  # the last bit of the second number
    copy = tmp_path / path.name
    copy.write_bytes(bytes(content))
    (mismatch,) = target.readback(copy, program)
    assert mismatch.layer == layer and "merged" not in "".join(target.inspect(copy, program).notes)
    wanted = numbers(program).reshape(-1)[1]
    assert np.float32(mismatch.expected) == wanted
    assert np.float32(mismatch.found.split()[0]).view(np.uint32) == wanted.view(np.uint32) ^ 1


@pytest.mark.slow
def test_rounded_numbers_are_found(program: FrozenProgram, lowered: tuple[str, Path], tmp_path: Path) -> None:
    name, path = lowered
    weight = constant(program, "norm_weight")
    content = path.read_bytes()
    copy = tmp_path / path.name
    copy.write_bytes(content.replace(weight.tobytes(), weight.astype(np.float16).astype(np.float32).tobytes()))
    (mismatch,) = get(name).readback(copy, program)
    assert mismatch.layer == "norm" and f"of {WIDTH} differ" in mismatch.found


class Neighbours(nn.Module):
    """A norm directly before a linear layer in float."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.hidden = nn.Linear(FEATURES, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 7)
        self.head = nn.Linear(7, 3)
        nn.init.normal_(self.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(self.norm(self.embed(x)))))


@pytest.mark.slow
def test_numbers_that_a_converter_merged_are_noted(tmp_path: Path) -> None:
    tflite = get("tflite")
    if tflite.available() is not None:
        pytest.skip(tflite.available())
    torch.manual_seed(0)
    data = Data(torch.randn(32, TOKENS, FEATURES))
    frozen = quantize_model(Neighbours().eval(), data, PTQ(samples=32, skip=("hidden",)))
    artifact = tflite.lower(frozen, tmp_path / "model.tflite")
    assert [n for n in artifact.notes if "merged" in n], "TFLite's converter multiplies gamma into the weight"
    assert all(n.startswith(("norm: ", "hidden: ")) for n in artifact.notes if "merged" in n)
    assert tflite.readback(artifact.path, frozen) == []


def everything(program: FrozenProgram) -> list[Stored]:
    """What a file with the program's constants as they are would hold."""
    return [Stored(key, t.numpy()) for x in program.float_layers for key, t in x.constants.items()]


def test_forms_that_count_as_kept(program: FrozenProgram) -> None:
    kept = everything(program)
    assert compare_floats(program, kept) == ([], [])
    turned = [Stored("", np.ascontiguousarray(s.values.T)) for s in kept]
    assert compare_floats(program, turned) == ([], [])
    order = [0, 3, 1, 2]  # ONNX has the gates as i, o, f, c
    gated = [Stored("", s.values.reshape(4, -1)[order].reshape(1, *s.values.shape)) if "memory" in s.hint else s for s in kept]
    assert compare_floats(program, gated) == ([], [])


def test_what_is_gone_or_other_is_named(program: FrozenProgram) -> None:
    kept = everything(program)
    (gone,) = compare_floats(program, [s for s in kept if not s.hint.endswith("norm_bias")])[0]
    assert (gone.layer, gone.field, gone.found) == ("norm", "bias", "missing")
    other = [Stored(s.hint, s.values[::-1].copy()) if s.hint.endswith("hidden_weight") else s for s in kept]
    (mismatch,) = compare_floats(program, other)[0]
    assert mismatch.layer == "hidden"
