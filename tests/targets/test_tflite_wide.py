"""16-bit activations in TFLite: the program's own numbers in the file, layers within one of 65536 steps, faults found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nets import residual_net
from torch import Tensor, nn
from torch.nn import functional as F

from edgekit.compress.ptq import PTQ, quantize_model
from edgekit.data import Data
from edgekit.errors import UnsupportedError
from edgekit.frozen import FrozenProgram
from edgekit.stages import evaluation_set
from edgekit.targets import preflight, tflite
from edgekit.targets.tflite_file import parse, read, serialize
from edgekit.targets.tflite_wide import is_wide, twin
from edgekit.verify import verify_artifact

pytestmark = pytest.mark.slow

pytest.importorskip("litert_torch")

X = torch.randn(40, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Dense, depthwise, strided and 1x1 convolutions, ReLU and ReLU6, add, mul, pad, pool, mean, linear; a concat in float."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.dw = nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pw, self.hidden, self.head = nn.Conv2d(8, 8, 1), nn.Linear(40, 15), nn.Linear(15, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(F.pad(x, (0, 1, 0, 1))))
        x = F.relu(x + self.pw(F.relu6(self.dw(x))))
        x = F.max_pool2d(x, 2)
        x = x * x.mean((2, 3), keepdim=True)
        return self.head(F.relu(self.hidden(torch.cat([x[:, :, ::2, ::2].flatten(1), x.mean((2, 3))], 1))))


@pytest.fixture(scope="module")
def program() -> FrozenProgram:
    return quantize_model(Net().eval(), Data(X), PTQ(activations="int16", observer="minmax"))


@pytest.fixture(scope="module")
def path(program: FrozenProgram, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("wide") / "model.tflite"
    tflite.lower(program, path)
    return path


def test_all_of_it_is_16_bit_with_zero_point_0(program: FrozenProgram) -> None:
    assert is_wide(program) and not is_wide(residual_net())
    assert {x.out_zero_point for x in program.layers if x.op != "dequantize"} == {0}
    assert "qconcat" not in {x.op for x in program.layers}
    narrow = twin(program)
    assert not is_wide(narrow) and [x.name for x in narrow.layers] == [x.name for x in program.layers]
    assert narrow.layer("stem").out_scale == 256 * (program.layer("stem").out_scale or 0)


def test_the_file_holds_the_programs_numbers(program: FrozenProgram, path: Path) -> None:
    assert tflite.readback(path, program) == []
    file = read(path)
    for layer in ("stem", "dw", "pw", "hidden", "head"):
        bias = constant(file, f"{layer}/bias")
        assert bias.dtype == "INT64" and (bias.values() == program.layer(layer).args["bias"].numpy()).all()
        assert file.by_name[layer].dtype == "INT16" and constant(file, f"{layer}/weight").dtype == "INT8"
        in_scale, scales = program.layer(layer).args["in_scale"], program.layer(layer).args["weight_scale"].numpy()
        assert np.allclose(bias.scales, in_scale * scales, rtol=1e-6)
    found = tflite.inspect(path, program)
    assert found.inputs[0].dtype == found.outputs[0].dtype == "int16"
    runs = {row.layer: row.runs for row in found.coverage}
    assert runs["stem"] == "int16" and runs["head"] == "int16" and "float" in runs.values()


@pytest.mark.slow
@pytest.mark.parametrize("options", [tflite.Options(), tflite.Options(io="float"), tflite.Options(channel_last=False)])
def test_every_layer_is_within_one_step(options: tflite.Options, program: FrozenProgram, tmp_path: Path) -> None:
    tflite.lower(program, tmp_path / "model.tflite", options)
    found = verify_artifact(program, "tflite", tmp_path / "model.tflite", evaluation_set(Data(X, (X[:8], None))))
    assert found.ok and not found.breaches
    checked = {layer.layer for layer in found.layers}
    assert {"stem", "dw", "pw", "add", "mul", "mean", "hidden", "head"} <= checked
    assert max(layer.max_lsb for layer in found.layers) <= 1
    (outputs,) = tflite.run(tmp_path / "model.tflite", [X.numpy()])
    (expected,) = program.run(X)
    assert np.abs(outputs - expected.numpy()).max() <= 12 * (program.layer("head").out_scale or 0)  # steps of 65536


def constant(file: Any, name: str) -> Any:
    return next(t for t in file.tensors if t.name == name)


def _flip(file: Any, name: str, byte: int) -> None:
    buffer = file.model.buffers[file.model.subgraphs[0].tensors[constant(file, name).index].buffer]
    data = np.array(buffer.data)
    data[byte] ^= 64
    buffer.data = data


def _scale(file: Any) -> None:
    quantization = file.model.subgraphs[0].tensors[file.by_name["add"].index].quantization
    quantization.scale = np.array(quantization.scale) * np.float32(1.01)


FAULTS: dict[str, tuple[Callable[[Any], None], str, str]] = {
    "weight": (lambda file: _flip(file, "pw/weight", 5), "pw", "weight"),
    "bias": (lambda file: _flip(file, "hidden/bias", 8), "hidden", "bias"),
    "scale": (_scale, "add", "output scale"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str, program: FrozenProgram, path: Path, tmp_path: Path) -> None:
    plant, layer, field = FAULTS[name]
    file = parse(path.read_bytes(), "model.tflite")
    plant(file)
    (tmp_path / "model.tflite").write_bytes(serialize(file.model))
    found = tflite.readback(tmp_path / "model.tflite", program)
    assert {m.layer for m in found} == {layer} and found[0].field.startswith(field)


@pytest.mark.slow
def test_the_same_program_gives_the_same_bytes(program: FrozenProgram, path: Path, tmp_path: Path) -> None:
    tflite.lower(program, tmp_path / "again.tflite")
    assert (tmp_path / "again.tflite").read_bytes() == path.read_bytes()


def test_who_takes_16_bits_is_said_beforehand(program: FrozenProgram) -> None:
    preflight.check_program(program, "tflite")
    with pytest.raises(UnsupportedError, match="activations have 16 bits, executorch takes 8; set activations: int8"):
        preflight.check_program(program, "executorch")
