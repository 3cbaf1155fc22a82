"""The operators and chains of layers that ``benchmarks/costs.py`` measures; shapes are those of small networks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["CHAINS", "SMALL", "Within", "cases"]

Case = tuple[str, str, Callable[[], nn.Module], Sequence[Sequence[int]]]
"""Name, kind, what makes the module, shapes of its inputs without batch."""

CONVS = (  # input channels, output channels, size, kernel, stride
    (3, 16, 32, 3, 1), (3, 32, 48, 3, 2), (1, 24, 28, 5, 1), (16, 16, 32, 3, 1), (16, 32, 32, 3, 2), (24, 24, 20, 3, 1),
    (32, 32, 16, 3, 1), (32, 48, 16, 3, 2), (40, 40, 10, 5, 1), (64, 64, 8, 3, 1), (96, 64, 8, 3, 1), (128, 128, 4, 3, 1),
)  # fmt: skip
POINTWISE = (
    (16, 32, 32, 1), (32, 64, 16, 1), (16, 32, 32, 2), (64, 64, 16, 1), (64, 128, 8, 1), (128, 128, 8, 1), (128, 256, 4, 1),
    (24, 96, 20, 1), (96, 24, 20, 1), (10, 20, 12, 1),
)  # fmt: skip
DEPTHWISE = (
    (16, 32, 3, 1), (32, 16, 3, 1), (64, 16, 3, 1), (64, 16, 3, 2), (96, 20, 3, 1), (128, 8, 3, 1), (48, 12, 5, 1), (20, 9, 3, 1),
)  # fmt: skip
LINEAR = (  # rows (0: a vector), inputs, outputs
    (0, 64, 10), (0, 64, 64), (0, 128, 128), (0, 256, 256), (0, 512, 128), (0, 128, 512), (0, 640, 128), (16, 64, 64),
    (64, 192, 192), (32, 64, 256), (48, 96, 48),
)  # fmt: skip
IMAGES = ((16, 32, 32), (64, 8, 8), (32, 16, 16))


class Function(nn.Module):
    """A function of tensors as a module."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *xs: Tensor) -> Tensor:
        return self.function(*xs)


class Classed(nn.Module):
    """A convolution and what follows it, so that integer operators have integers to read."""

    def __init__(self, channels: int, after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.after = nn.Conv2d(channels, channels, 1), after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.conv(x))


class Joined(nn.Module):
    """Two convolutions of the same values and what joins them; the join alone would have nothing integer to read."""

    def __init__(self, channels: int, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.join = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1), join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self.a(x), self.b(x))


class Within(nn.Module):
    """A module with the name that layers of real networks have: names are in files, and take bytes."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([module])

    def forward(self, *xs: Tensor) -> Tensor:
        found: Tensor = self.blocks[0](*xs)
        return found


def cases() -> Iterator[Case]:
    """Every operator to be measured alone on a host."""

    def conv(c: int, o: int, k: int, s: int, g: int = 1) -> Callable[[], nn.Module]:
        return lambda: nn.Sequential(nn.Conv2d(c, o, k, s, k // 2, groups=g), nn.ReLU())

    for c, o, size, k, s in CONVS:
        yield f"conv {k}x{k} {c}->{o} {size} /{s}", "conv", conv(c, o, k, s), [(c, size, size)]
    for c, o, size, s in POINTWISE:
        yield f"pointwise {c}->{o} {size} /{s}", "pointwise", conv(c, o, 1, s), [(c, size, size)]
    for c, size, k, s in DEPTHWISE:
        yield f"depthwise {k}x{k} {c} {size} /{s}", "depthwise", conv(c, c, k, s, c), [(c, size, size)]
    for rows, c, o in LINEAR:
        shape = (rows, c) if rows else (c,)
        yield f"linear {rows} {c}->{o}", "linear", lambda c=c, o=o: nn.Linear(c, o), [shape]  # type: ignore[misc]
    for shape in IMAGES:
        for join in (torch.add, torch.mul):
            yield f"{join.__name__} {shape}", f"q{join.__name__}", _joined(shape[0], join), [shape]
        yield f"max_pool {shape}", "qmax_pool2d", _after(shape[0], lambda x: F.max_pool2d(x, 2)), [shape]
        yield f"avg_pool {shape}", "qavg_pool2d", _after(shape[0], lambda x: F.avg_pool2d(x, 2)), [shape]
        yield f"mean {shape}", "qmean", _after(shape[0], lambda x: x.mean((2, 3))), [shape]
        yield f"flatten {shape}", "qreshape", _after(shape[0], lambda x: x.flatten(1)), [shape]
        for f in (torch.sigmoid, F.silu, F.gelu, F.hardswish):
            yield f"{f.__name__} {shape}", "qlut", _after(shape[0], f), [shape]
    for t, d in ((16, 64), (64, 192), (49, 32)):
        yield f"softmax {t} {d}", "softmax", lambda: Function(lambda x: torch.softmax(x, -1)), [(t, d)]
        yield f"layer_norm {t} {d}", "layer_norm", lambda d=d: nn.LayerNorm(d), [(t, d)]  # type: ignore[misc]
        yield f"matmul {t} {d}", "matmul", lambda: Function(lambda a, b: a @ b.transpose(-2, -1)), [(4, t, d), (4, t, d)]


def _after(channels: int, f: Callable[..., Any]) -> Callable[[], nn.Module]:
    return lambda: Classed(channels, f)


def _joined(channels: int, join: Callable[[Tensor, Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: Joined(channels, join)


class Residual(nn.Module):
    """Two convolutions around a sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.b(F.relu(self.a(x))))


class Shortcut(nn.Module):
    """Every other pixel with as many channels of zeros around, beside a convolution: ResNet's shortcut without weights."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 2 * channels, 3, 2, 1)
        self.half = channels // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.half, self.half)))


class Gated(nn.Module):
    """A product with a sigmoid, and a concatenation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.a(x) * torch.sigmoid(self.b(x)), F.relu(self.a(x))], 1)


def _conv(c: int, o: int, k: int = 3, s: int = 1, g: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(c, o, k, s, k // 2, groups=g), nn.ReLU())


def _mean() -> nn.Module:
    return Function(lambda x: x.mean((2, 3)))


SMALL: tuple[tuple[str, Callable[[], nn.Module], tuple[int, ...]], ...] = (
    ("convs", lambda: nn.Sequential(
        _conv(3, 8), _conv(8, 8, 3, 1, 8), _conv(8, 16, 1), _conv(16, 12, 3, 2), _conv(12, 12, 3, 1, 12), _conv(12, 32, 1),
        _conv(32, 32), nn.AvgPool2d(2), _conv(32, 24, 1), _mean(), nn.Linear(24, 10)), (3, 12, 12)),
    ("residual", lambda: nn.Sequential(
        _conv(1, 12, 5), Residual(12), nn.MaxPool2d(2), _conv(12, 20, 3, 2), Residual(20), _mean(), nn.Linear(20, 7)),
     (1, 16, 16)),
    ("shortcut", lambda: nn.Sequential(
        _conv(2, 8), Shortcut(8), Shortcut(16), nn.Sigmoid(), nn.Flatten(), nn.Linear(288, 5)), (2, 12, 12)),
    ("gated", lambda: nn.Sequential(
        _conv(2, 6), Gated(6), nn.MaxPool2d(2), Gated(12), nn.SiLU(), _mean(), nn.Linear(24, 6)), (2, 10, 10)),
    ("dense", lambda: nn.Sequential(
        nn.Linear(96, 128), nn.ReLU(), nn.Linear(128, 64), nn.Sigmoid(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)), (96,)),
    ("mobile", lambda: nn.Sequential(
        _conv(2, 16, 3, 2), _conv(16, 16, 3, 1, 16), _conv(16, 24, 1), _conv(24, 24, 3, 2, 24), _conv(24, 40, 1),
        _conv(40, 40, 3, 1, 40), _conv(40, 40, 1), nn.Flatten(), nn.Linear(640, 12)), (2, 16, 16)),
)  # fmt: skip
"""Chains that fit the smallest board, with the shape of their input."""

CHAINS = (*SMALL, ("large", lambda: nn.Sequential(
    _conv(3, 16), Residual(16), Shortcut(16), _conv(32, 32, 3, 1, 32), _conv(32, 64, 1), nn.MaxPool2d(2), Residual(64),
    _conv(64, 96, 1), _conv(96, 96, 5, 1, 96), _conv(96, 48, 1), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(768, 128), nn.ReLU(),
    nn.Linear(128, 20)), (3, 32, 32)))  # fmt: skip
