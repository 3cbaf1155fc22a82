"""Every operator that firmware promises, from PyTorch: quantized, planned, within one step of the frozen program by layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekit.compress.ptq import PTQ, quantize_model
from edgekit.data import Data
from edgekit.frozen import FrozenProgram
from edgekit.targets import cortex_m, get
from edgekit.targets.cortex_m import rules
from edgekit.targets.cortex_m.preparation import prepare, simulate


class Block(nn.Module):
    """Layers, joined by a function of the input and their outputs."""

    def __init__(self, join: Callable[..., Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.join = nn.ModuleList(layers), join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(x, *(layer(x) for layer in self.layers))


def conv(inputs: int = 4, outputs: int = 8, kernel: int = 3, **more: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, **more)


class Padded(nn.Module):
    """TensorFlow's padding of an even image at stride 2: the odd pixel behind."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(F.pad(x, (0, 1, 0, 1))))


IMAGE, ROW = (4, 10, 10), (3, 24)
CASES: dict[str, tuple[nn.Module, tuple[int, ...], set[str]]] = {
    "dense": (nn.Sequential(conv(padding=1), nn.ReLU()), IMAGE, {"conv2d"}),
    "strided": (nn.Sequential(conv(stride=2, padding=1), nn.ReLU6()), IMAGE, {"conv2d"}),
    "depthwise": (conv(4, 4, padding=1, groups=4), IMAGE, {"depthwise"}),
    "pointwise": (conv(kernel=1), IMAGE, {"conv2d"}),
    "grouped": (conv(groups=2), IMAGE, {"conv2d"}),
    "dilated": (conv(dilation=2), IMAGE, {"conv2d"}),
    "TF padding": (Padded(), IMAGE, {"conv2d"}),
    "conv1d": (
        nn.Sequential(nn.Conv1d(3, 8, 5, stride=2, padding=2), nn.ReLU()),
        ROW,
        {"gather", "conv2d"},
    ),  # gather: the sequence is put channel-last once
    "linear": (nn.Linear(24, 7), ROW, {"linear"}),
    "add": (Block(lambda x, a, b: F.relu(a + b), conv(), conv()), IMAGE, {"conv2d", "add"}),
    "mul": (Block(lambda x, a, b: a * b, conv(), conv()), IMAGE, {"conv2d", "mul"}),
    "average pool": (nn.Sequential(conv(), nn.AvgPool2d(2)), IMAGE, {"conv2d", "avg_pool"}),
    "maximum pool": (nn.Sequential(conv(), nn.MaxPool2d(3, 2, 1)), IMAGE, {"conv2d", "max_pool"}),
    "global pool": (nn.Sequential(conv(), nn.AdaptiveAvgPool2d(1)), IMAGE, {"conv2d", "mean"}),
    "concat": (Block(lambda x, a, b: torch.cat([a, b], 1), conv(), conv()), IMAGE, {"conv2d", "concat"}),
    "reshape": (nn.Sequential(conv(), nn.Flatten(), nn.Linear(512, 5)), IMAGE, {"conv2d", "linear"}),
    "sigmoid": (nn.Sequential(conv(), nn.Sigmoid()), IMAGE, {"conv2d", "lut"}),
    "tanh": (nn.Sequential(conv(), nn.Tanh()), IMAGE, {"conv2d", "lut"}),
    "softmax": (nn.Sequential(nn.Linear(24, 9), nn.Softmax(-1)), ROW, {"linear", "softmax"}),
}


def frozen(name: str, weights: str = "int8") -> FrozenProgram:
    torch.manual_seed(0)
    model, shape, _ = CASES[name]
    samples = torch.randn(32, *shape, generator=torch.Generator().manual_seed(0))
    return quantize_model(model.eval(), Data(samples), PTQ(weights=weights, observer="minmax"), name="operator")


@pytest.mark.parametrize("name", CASES)
def test_operator(name: str) -> None:
    program, (_, shape, kinds) = frozen(name), CASES[name]
    firmware = prepare(program, "dsp")
    assert {step.kind for step in firmware.steps} == kinds  # no other moves and conversions
    for x in torch.randn(4, *shape, generator=torch.Generator().manual_seed(1)).split(1):
        taps, (output,) = simulate(firmware, [x.numpy()])
        forced, (following,) = program.forced_outputs({k: torch.from_numpy(v) for k, v in taps.items()}, x)
        assert max(np.abs(forced[k].numpy().astype(int) - taps[k]).max() for k in taps) <= 1
        assert np.abs(output - following.numpy()).max() <= (1 / 256 if name == "softmax" else 1e-6)


@pytest.mark.slow
@pytest.mark.skipif(cortex_m.M4.available() is not None, reason="needs arm-none-eabi-gcc and qemu-system-arm")
@pytest.mark.parametrize(("name", "core", "weights"), [("conv1d", "cortex-m4", "int4"), ("grouped", "cortex-m55", "int2")])
def test_operator_on_a_board(name: str, core: str, weights: str, tmp_path: Path) -> None:
    program, x = frozen(name, weights), torch.randn(2, *CASES[name][1], generator=torch.Generator().manual_seed(1)).numpy()
    path = get(core).lower(program, tmp_path / "model.c").path
    (found,) = get(core).run(path, [x])
    firmware = prepare(program, {"cortex-m4": "dsp", "cortex-m55": "mve"}[core])
    assert all(np.array_equal(found[i : i + 1], simulate(firmware, [x[i : i + 1]])[1][0]) for i in range(2))


def few_levels(weights: str) -> tuple[FrozenProgram, Tensor]:
    """A network whose inner activations have 16 levels, and samples."""
    torch.manual_seed(0)
    inner = [conv(8, 8, padding=1), nn.ReLU(), conv(8, 8, padding=1, groups=8), nn.ReLU(), conv(8, 8, 1), nn.ReLU()]
    model = nn.Sequential(conv(padding=1), nn.ReLU(), *inner, nn.Flatten(), nn.Linear(800, 5)).eval()
    x = torch.randn(32, *IMAGE, generator=torch.Generator().manual_seed(1))
    return quantize_model(model, Data(x), PTQ(weights=weights, activations="int4", observer="minmax")), x  # type: ignore[arg-type]


def level_gaps(program: FrozenProgram, x: Tensor) -> float:
    """Share of values of layers that give or read 16 levels which firmware and the frozen program compute otherwise."""
    few = [layer.name for layer in program.layers if layer.args.get("out_zp") == 112 or layer.args.get("in_zp") == 112]
    assert len(few) == 4
    firmware, apart, count = prepare(program, "dsp"), 0, 0
    for one in x[:8].split(1):
        taps, _ = simulate(firmware, [one.numpy()])
        forced, _ = program.forced_outputs({k: torch.from_numpy(v) for k, v in taps.items()}, one)
        apart += sum(int((forced[n].numpy() != taps[n]).sum()) for n in few)
        count += sum(taps[n].size for n in few)
    return apart / count


def test_few_levels_are_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert level_gaps(*few_levels("int4")) < 1e-3
    monkeypatch.setattr(rules, "rounded_once", lambda real, fixed: fixed)
    assert level_gaps(*few_levels("int4")) > 0.005, "rounding twice is felt, or this test shows nothing"


@pytest.mark.skipif(cortex_m.M4.available() is not None, reason="needs arm-none-eabi-gcc and qemu-system-arm")
@pytest.mark.parametrize("core", [pytest.param("cortex-m4"), pytest.param("cortex-m55", marks=pytest.mark.slow)])
def test_few_levels_on_a_board(core: str, tmp_path: Path) -> None:
    program, x = few_levels("int2")
    path = get(core).lower(program, tmp_path / "model.c").path
    (found,) = get(core).run(path, [x[:2].numpy()])
    firmware = prepare(program, {"cortex-m4": "dsp", "cortex-m55": "mve"}[core])
    assert all(np.array_equal(found[i : i + 1], simulate(firmware, [x[i : i + 1].numpy()])[1][0]) for i in range(2))
