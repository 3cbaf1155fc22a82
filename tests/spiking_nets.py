"""Small spiking networks as modules of frozen operators, for the tests of programs, files and firmware."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from edgekit.frozen import FrozenOp, FrozenProgram, freeze_module

__all__ = [
    "STEPS",
    "Conv",
    "Dense",
    "Residual",
    "conv_program",
    "dense_program",
    "neuron",
    "recurrent_neuron",
    "recurrent_program",
    "residual_program",
]

STEPS = 8


def neuron(kind: str, steps: int = STEPS, **changes: Any) -> FrozenOp:
    """A layer of neurons: thresholds 1, subtracting, dt 1, tau 2; ``changes`` of constants and rules."""
    constants = {"r": 1.0, "v_threshold": 1.0, "v_reset": 0.0, "v_init": 0.0}
    if kind != "if":
        constants = {"v_leak": 0.0, **constants}
        constants |= {"tau_syn": 1.6, "tau_mem": 2.5, "w_in": 1.5} if kind == "cuba_lif" else {"tau": 2.0}
    rules: dict[str, Any] = {"dt": 1.0, "reset": "subtract", "tie": "ge", "max_spikes": 1}
    rules |= {k: v for k, v in changes.items() if k in rules}
    values = {k: torch.as_tensor(changes.get(k, v), dtype=torch.float32) for k, v in constants.items()}
    return FrozenOp(f"{kind}_sequence", 1, values, steps=steps, **rules)


def recurrent_neuron(kind: str, weight: Tensor, bias: Tensor | None, **changes: Any) -> FrozenOp:
    """The same with a layer from their spikes back to themselves."""
    plain = neuron(kind, **changes)
    buffers = {**dict(plain.named_buffers()), "weight": weight} | ({} if bias is None else {"bias": bias})
    rules = {**plain.attributes, "feedback": "back"} | ({"bias": None} if bias is None else {})
    return FrozenOp(f"{kind}_recurrent", 1, buffers, **rules)


class Conv(nn.Module):
    """8x8 images held for all steps, two convolutions with a pool between, the mean current of 5 classes."""

    def __init__(self, kind: str = "if", groups: int = 2, **changes: Any) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.encode = FrozenOp("repeat_steps", 1, {}, steps=STEPS)
        self.conv1, self.spike1 = nn.Conv2d(1, 4, 3, padding=1), neuron(kind, **changes)
        self.pool = nn.AvgPool2d(2)
        self.conv2, self.spike2 = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=groups), neuron(kind, **changes)
        self.head = nn.Linear(24, 5)
        self.mean = FrozenOp("accumulate", 1, {}, gain=1 / STEPS, steps=STEPS)
        with torch.no_grad():
            for layer in (self.conv1, self.conv2):
                layer.weight.mul_(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.spike1(self.conv1(self.encode(x)))
        y = self.spike2(self.conv2(self.pool(y)))
        out: Tensor = self.mean(self.head(y.flatten(1)))
        return out


class Residual(nn.Module):
    """Sums into neurons and the readout: spikes that skip a layer, an amplitude for each channel; two layers; two and a skip."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.encode = FrozenOp("repeat_steps", 1, {}, steps=STEPS)
        self.stem, self.spike0 = nn.Conv2d(1, 6, 3, padding=1), neuron("if")
        self.conv1, self.spike1 = nn.Conv2d(6, 6, 3, padding=1), neuron("if", v_threshold=0.3)
        self.conv2, self.short2, self.spike2 = nn.Conv2d(6, 7, 3, 2, 1), nn.Conv2d(6, 7, 1, 2), neuron("lif", v_threshold=0.4)
        self.conv3, self.conv4, self.spike3 = (
            nn.Conv2d(7, 7, 3, 1, 1, groups=7),
            nn.Conv2d(7, 7, 1),
            neuron("if", v_threshold=0.4),
        )
        self.head, self.second = nn.Linear(7 * 16, 5), nn.Linear(7 * 16, 5)
        self.mean = FrozenOp("accumulate", 1, {}, gain=1 / STEPS, steps=STEPS)
        self.amplitude: Tensor
        self.register_buffer("amplitude", torch.linspace(0.3, 0.9, 6).reshape(6, 1, 1))
        with torch.no_grad():
            self.stem.weight.mul_(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.spike0(self.stem(self.encode(x)))
        y = self.spike1(self.conv1(y) + y * self.amplitude)
        y = self.spike2(self.conv2(y) + self.short2(y))
        z = self.spike3(self.conv3(y) + self.conv4(y) + y * 0.5)
        out: Tensor = self.mean(self.head(z.flatten(1)) + self.second(y.flatten(1)))
        return out


class Dense(nn.Module):
    """Sequences (N, T, 6) through two layers of neurons; the spikes of all steps."""

    def __init__(self, kind: str = "lif", **changes: Any) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.fold = FrozenOp("fold_steps", 1, {})
        self.fc1, self.spike1 = nn.Linear(6, 12), neuron(kind, **changes)
        self.fc2, self.spike2 = nn.Linear(12, 5, bias=False), neuron(kind, **changes)
        self.unfold = FrozenOp("unfold_steps", 1, {}, steps=STEPS)
        with torch.no_grad():
            for layer in (self.fc1, self.fc2):
                layer.weight.mul_(6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.unfold(self.spike2(self.fc2(self.spike1(self.fc1(self.fold(x))))))
        return y


class Recurrent(nn.Module):
    """Sequences (N, T, 6), or images for all steps, through recurrent neurons and plain ones; the spikes of all steps."""

    def __init__(self, kind: str = "lif", image: bool = False, bias: bool = True, **changes: Any) -> None:
        super().__init__()
        torch.manual_seed(7)
        shape = (5, 1, 3, 3) if image else (12, 12)
        self.enter = FrozenOp("repeat_steps", 1, {}, steps=STEPS) if image else FrozenOp("fold_steps", 1, {})
        self.fc1: nn.Module = nn.Conv2d(1, 5, 3, padding=1) if image else nn.Linear(6, 12)
        self.spike1 = recurrent_neuron(kind, 0.5 * torch.randn(shape), 0.1 * torch.randn(shape[0]) if bias else None, **changes)
        self.fc2 = nn.Linear(80 if image else 12, 5, bias=False)
        self.spike2 = neuron(kind, **changes)
        self.unfold = FrozenOp("unfold_steps", 1, {}, steps=STEPS)
        if image:  # depthwise
            self.spike1.weight = 2 * self.spike1.weight
        with torch.no_grad():
            self.fc1.weight.mul_(4)
            self.fc2.weight.mul_(6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.unfold(self.spike2(self.fc2(self.spike1(self.fc1(self.enter(x))).flatten(1))))
        return y


def recurrent_program(kind: str = "lif", image: bool = False, bias: bool = True, **changes: Any) -> tuple[FrozenProgram, Tensor]:
    """The program of :class:`Recurrent` and 6 samples."""
    numbers = torch.Generator().manual_seed(2)
    x = torch.rand(6, 1, 4, 4, generator=numbers) if image else (torch.rand(6, STEPS, 6, generator=numbers) < 0.3).float()
    return freeze_module(Recurrent(kind, image, bias, **changes), (x,), name="recurrent"), x


def conv_program(kind: str = "if", **changes: Any) -> tuple[FrozenProgram, Tensor]:
    """The program of :class:`Conv` and 4 samples."""
    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return freeze_module(Conv(kind, **changes), (x,), name="conv"), x


def residual_program() -> tuple[FrozenProgram, Tensor]:
    """The program of :class:`Residual` and 4 samples."""
    x = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(6))
    return freeze_module(Residual(), (x,), name="residual"), x


def dense_program(kind: str = "lif", **changes: Any) -> tuple[FrozenProgram, Tensor]:
    """The program of :class:`Dense` and 6 samples."""
    x = (torch.rand(6, STEPS, 6, generator=torch.Generator().manual_seed(2)) < 0.3).float()
    return freeze_module(Dense(kind, **changes), (x,), name="dense"), x
