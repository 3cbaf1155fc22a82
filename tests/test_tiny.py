"""The whole path in a few seconds: a float net, compressed, frozen, saved, loaded, run, lowered to a file, and verified."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekit.compress.ptq.quantize import quantize_model
from edgekit.compress.ptq.settings import PTQ
from edgekit.data import Data
from edgekit.frozen import FrozenProgram, load, save
from edgekit.targets import get


class TinyNet(nn.Module):
    """Input (N, 1, 8, 8), output (N, 4): batch norm, functional and module ReLU, a residual sum, a mean, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = F.relu(x + self.body(x))
        logits: Tensor = self.head(F.max_pool2d(x, 2).mean((2, 3)))
        return logits


@pytest.fixture(scope="module")
def float_net() -> nn.Module:
    torch.manual_seed(0)
    net = TinyNet().train()
    for _ in range(5):
        net(torch.randn(16, 1, 8, 8))  # batch statistics that are not 0 and 1
    return net.eval()


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def program(float_net: nn.Module, x: Tensor) -> FrozenProgram:
    return quantize_model(float_net, Data(calibration=x), PTQ(observer="minmax"), name="tiny")


def test_int8_follows_float(float_net: nn.Module, program: FrozenProgram, x: Tensor) -> None:
    with torch.no_grad():
        wanted = float_net(x)
    (found,) = program.run(x)
    noise = (found - wanted).square().mean() / wanted.square().mean()
    assert 10 * noise.log10() < -25  # decibels
    assert (found.argmax(1) == wanted.argmax(1)).float().mean() > 0.9
    assert [layer.op for layer in program.layers if layer.macs] == ["qconv2d", "qconv2d", "qlinear"]
    assert not program.unquantized


def test_int4_keeps_the_outer_layers_at_8_bits(float_net: nn.Module, x: Tensor) -> None:
    program = quantize_model(float_net, Data(calibration=x), PTQ(weights="int4"))
    assert [layer.weight_bits for layer in program.layers if layer.macs] == [8, 4, 8]


def test_saved_and_loaded_it_computes_the_same(program: FrozenProgram, x: Tensor, tmp_path: Path) -> None:
    save(program, tmp_path / "tiny.pt2")
    assert torch.equal(load(tmp_path / "tiny.pt2").run(x)[0], program.run(x)[0])


@pytest.mark.skipif(get("onnx").available() is not None, reason="the onnx extra is not installed")
def test_lowered_to_onnx_it_computes_the_same(program: FrozenProgram, x: Tensor, tmp_path: Path) -> None:
    target = get("onnx")
    artifact = target.lower(program, tmp_path / "tiny.onnx")
    assert artifact.bytes == (tmp_path / "tiny.onnx").stat().st_size
    assert artifact.share_of_macs == {"int8": pytest.approx(1.0)}
    assert target.readback(tmp_path / "tiny.onnx", program) == []
    (found,) = target.run(tmp_path / "tiny.onnx", [x.numpy()])
    (wanted,) = program.run(x)
    step = program.layer("head").out_scale
    assert step and (torch.from_numpy(found) - wanted).abs().max() <= 2 * step + 1e-6
