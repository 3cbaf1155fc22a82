"""Frozen programs with 1-bit layers for tests of targets: random signs, thresholds and scales (seeded, no calibration)."""

from __future__ import annotations

import torch
from nets import conv, linear
from torch import Tensor, nn

from edgekit.compress.ptq.settings import PTQ
from edgekit.compress.steps import apply
from edgekit.data import Data
from edgekit.frozen import FrozenOp, FrozenProgram, freeze_module
from edgekit.frozen.binary_ops import pack_signs
from edgekit.recipe import Block

Q = tuple[float, int]


def binarize(channels: int, dim: int = 1) -> FrozenOp:
    return FrozenOp("binarize", 1, {"threshold": torch.randint(-40, 40, (channels,), dtype=torch.int16)}, dim=dim)


def _signs(*shape: int) -> Tensor:
    return pack_signs(torch.rand(*shape) < 0.5)


def binary_conv(
    cin: int, cout: int, k: int, o: Q | None = None, stride: int = 1, padding: int | None = None, groups: int = 1
) -> FrozenOp:
    """Packed out, or int8 at scale and zero point ``o``."""
    window = {
        "stride": [stride] * 2,
        "padding": [k // 2 if padding is None else padding] * 2,
        "dilation": [1, 1],
        "groups": groups,
    }
    weight, spread = _signs(cout, k, k, cin // groups), int((cin // groups * k * k) ** 0.5)
    if o is None:
        threshold = torch.randint(-spread, spread + 1, (cout,), dtype=torch.int32)
        return FrozenOp("binary_conv2d", 1, {"weight": weight, "threshold": threshold}, channels=cin, **window)
    return FrozenOp(
        "binary_qconv2d", 1, {"weight": weight, **_scales(cout, spread, o)}, channels=cin, **_ends(o), **window, out_bits=8
    )


def binary_linear(cin: int, cout: int, o: Q | None = None) -> FrozenOp:
    """Packed out, or int8 at scale and zero point ``o``."""
    weight, spread = _signs(cout, cin), int(cin**0.5)
    if o is None:
        threshold = torch.randint(-spread, spread + 1, (cout,), dtype=torch.int32)
        return FrozenOp("binary_linear", 1, {"weight": weight, "threshold": threshold}, features=cin)
    return FrozenOp("binary_qlinear", 1, {"weight": weight, **_scales(cout, spread, o)}, features=cin, **_ends(o), out_bits=8)


def _scales(cout: int, spread: int, o: Q) -> dict[str, Tensor]:
    scale = (torch.rand(cout) + 0.5) * 50 * o[0] / spread
    return {"weight_scale": scale, "bias": torch.randint(-spread, spread + 1, (cout,), dtype=torch.int32)}


def _ends(o: Q) -> dict[str, object]:
    return {"out_scale": o[0], "out_zp": o[1], "activation": "none"}


class BinaryNet(nn.Module):
    """An int8 stem, a chain of three packed convolutions, a Bi-Real shortcut, packed and integer linear layers, an int8 head."""

    def __init__(self) -> None:
        super().__init__()
        i, a, b, c, d, e = (0.03, -3), (0.05, 4), (0.06, 1), (0.09, -2), (0.05, -7), (0.2, 3)
        self.quantize = FrozenOp("quantize", 1, {}, scale=i[0], zero_point=i[1], bits=8)
        self.stem = conv(3, 20, 3, i, a, "none")
        self.signs = binarize(20)
        self.first = binary_conv(20, 40, 3)
        self.grouped = binary_conv(40, 36, 3, stride=2, groups=2)
        self.point = binary_conv(36, 33, 1)
        self.chain = binary_conv(33, 20, 2, b, padding=0)
        self.again = binarize(20)
        self.shortcut = binary_conv(20, 20, 3, a)
        self.add = FrozenOp(
            "qadd",
            2,
            {},
            a_scale=b[0],
            a_zp=b[1],
            b_scale=a[0],
            b_zp=a[1],
            out_scale=c[0],
            out_zp=c[1],
            activation="none",
            out_bits=8,
        )
        self.flatten = FrozenOp("qreshape", 1, {}, shape=[1, 180], scale=c[0], zero_point=c[1])
        self.vector = binarize(1, dim=-1)
        self.hidden = binary_linear(180, 70)
        self.small = binary_linear(70, 6, d)
        self.head = linear(6, 5, d, e)
        self.dequantize = FrozenOp("dequantize", 1, {}, scale=e[0], zero_point=e[1])

    def forward(self, x: Tensor) -> Tensor:
        x = self.chain(self.point(self.grouped(self.first(self.signs(self.stem(self.quantize(x)))))))
        x = self.add(x, self.shortcut(self.again(x)))
        x = self.small(self.hidden(self.vector(self.flatten(x))))
        return self.dequantize(self.head(x))


def binary_net(seed: int = 0) -> FrozenProgram:
    """BinaryNet as a frozen program, input (1, 3, 8, 8)."""
    torch.manual_seed(seed)
    return freeze_module(BinaryNet(), (torch.zeros(1, 3, 8, 8),), name="binary")


class HardAttention(nn.Module):
    """Attention without a float operator: (N, 12, 20) to (N, 4).

    Two heads of 24; queries, keys and values of 1-bit weights; a score is a sum of signs, kept (1) or not (0) by its size.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(20, 48), nn.Linear(12 * 48, 4)
        self.query, self.key, self.value = (nn.Linear(48, 48) for _ in range(3))
        for layer in (self.query, self.key, self.value):
            layer.weight.data = torch.where(layer.weight >= 0, 0.1, -0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.where(self.embed(x) >= 0.0, 1.0, -1.0)
        parts = (layer(x).view(-1, 12, 2, 24).transpose(1, 2) for layer in (self.query, self.key, self.value))
        q, k, v = (torch.where(part >= 0.0, 1.0, -1.0) for part in parts)
        scores = torch.matmul(q, k.transpose(-1, -2)) * 0.2
        context = torch.matmul(torch.where(scores >= 0.4, 1.0, 0.0), v) * 0.25
        result: Tensor = self.head(context.transpose(1, 2).flatten(1))
        return result


def attention_net() -> tuple[FrozenProgram, Tensor]:
    """HardAttention, quantized after training, and 40 samples."""
    torch.manual_seed(0)
    model, x = HardAttention().eval(), torch.randn(40, 12, 20)
    return apply(model, [Block("ptq", PTQ())], Data(calibration=x, evaluation=(x, None))).program, x
