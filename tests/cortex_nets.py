"""Frozen programs that make firmware move tensors about: layouts, broadcasts, odd pools, two inputs and outputs."""

from __future__ import annotations

from typing import Any

import torch
from nets import conv, linear
from torch import Tensor, nn

from edgekit.frozen import FrozenOp, FrozenProgram, freeze_module
from edgekit.frozen.ops import lut_table

A, B, C, D = (0.05, -3), (0.07, 11), (0.06, -128), (0.031, 4)


def op(kind: str, **values: Any) -> FrozenOp:
    """A FrozenOp of one activation; a pair named ``a`` becomes ``a_scale`` and ``a_zp``, one named ``q`` scale and zero_point."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if key == "q":
            flat |= {"scale": value[0], "zero_point": value[1]}
        elif isinstance(value, tuple):
            flat |= {f"{key}_scale": value[0], f"{key}_zp": value[1]}
        else:
            flat[key] = value
    return FrozenOp(kind, {"qadd": 2, "qmul": 2, "qconcat": 0}.get(kind, 1), {}, **flat)


def lut(function: str, i: tuple[float, int], o: tuple[float, int]) -> FrozenOp:
    """A table of a function."""
    values = {"in_scale": i[0], "in_zp": i[1], "out_scale": o[0], "out_zp": o[1]}
    return FrozenOp("qlut", 1, {"table": lut_table(function, *i, *o)}, function=function, **values)


class Moves(nn.Module):
    """Image operators between a linear layer over channels, channel padding and slicing, and a squeeze-and-excite block."""

    def __init__(self) -> None:
        super().__init__()
        self.quantize = op("quantize", q=A, bits=8)
        self.conv = conv(4, 6, 3, A, B, "relu6")
        self.to_last = op("qpermute", dims=[0, 2, 3, 1], q=B)
        self.mix = linear(6, 10, B, C, "relu")
        self.to_first = op("qpermute", dims=[0, 3, 1, 2], q=C)
        self.odd = op("qavg_pool2d", **{"in": C}, out=D, kernel=[3, 2], stride=[2, 2], padding=[1, 0], ceil_mode=True,
                      count_include_pad=False)  # fmt: skip
        self.wide = op("qmax_pool2d", q=D, kernel=[2, 2], stride=[1, 1], padding=[1, 1], dilation=[2, 1], ceil_mode=False)
        self.part = op("qslice", dim=1, start=1, end=9, step=2, q=D)
        self.more = op("qpad", pad=[0, 0, 0, 0, 1, 3], q=D)
        self.squeeze = op("qmean", **{"in": D}, out=D, out_bits=8)
        self.gate = lut("hardsigmoid", D, (1 / 256, -128))
        self.scale = op("qmul", a=(1 / 256, -128), b=D, out=B, activation="none", out_bits=8)
        self.shift = op("qadd", a=B, b=D, out=A, activation="relu", out_bits=8)
        self.join = op("qconcat", out=D, scales=[A[0], B[0]], zero_points=[A[1], B[1]], dim=3)
        self.group = conv(8, 16, 3, D, C, "none", stride=2, groups=4)
        self.rows = op("qreshape", shape=[1, 16, -1], q=C)
        self.turn = op("qpermute", dims=[0, 2, 1], q=C)
        self.head = linear(16, 5, C, B)
        self.dequantize = op("dequantize", q=B)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.quantize(x))
        x = self.to_first(self.mix(self.to_last(x)))
        x = self.more(self.part(self.wide(self.odd(x))))
        y = self.scale(self.gate(self.squeeze(x)), x)
        x = self.join(self.shift(y, x), y)
        return self.dequantize(self.head(self.turn(self.rows(self.group(x)))))


def moves(seed: int = 0) -> FrozenProgram:
    """Moves as a frozen program, input (1, 4, 9, 7)."""
    torch.manual_seed(seed)
    return freeze_module(Moves(), (torch.zeros(1, 4, 9, 7),), name="moves")


class Borders(nn.Module):
    """Two inputs, one of them int8; two outputs, one of them int8; a change of scale; a padded sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.quantize = op("quantize", q=A, bits=8)
        self.first = linear(6, 8, A, B)
        self.real = op("dequantize", q=B)
        self.again = op("quantize", q=D, bits=8)
        self.longer = op("qpad", pad=[1, 2, 3, 1], q=D)
        self.second = linear(9, 8, (1.0, 0), D)
        self.join = op("qconcat", out=D, scales=[D[0], D[0]], zero_points=[D[1], D[1]], dim=2)
        self.tanh = lut("tanh", D, (1 / 128, 0))
        self.dequantize = op("dequantize", q=(1 / 128, 0))
        self.pad = op("qpad", pad=[1, 2], q=D)

    def forward(self, x: Tensor, integers: Tensor) -> tuple[Tensor, Tensor]:
        x = self.longer(self.again(self.real(self.first(self.quantize(x)))))
        integers = self.second(integers)
        return integers, self.dequantize(self.tanh(self.join(x, self.pad(integers))))


def borders(seed: int = 0) -> FrozenProgram:
    """Borders as a frozen program, inputs (1, 5, 6) float and (1, 9, 9) int8."""
    torch.manual_seed(seed)
    sample = (torch.zeros(1, 5, 6), torch.zeros(1, 9, 9, dtype=torch.int8))
    return freeze_module(Borders(), sample, name="borders")
