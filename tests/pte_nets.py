"""Frozen programs that need the less common rules of the ExecuTorch target (random integers, seeded by the caller)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from nets import Q, _op, conv, linear
from torch import Tensor, nn

from edgekit.frozen import FrozenOp, FrozenProgram, freeze_module
from edgekit.frozen.ops import LUT_FUNCTIONS, lut_table

END = (1 << 63) - 1
IN: Q = (0.03, -3)
A: Q = (0.05, -128)
B: Q = (0.07, -20)


def quantize(q: Q) -> FrozenOp:
    return FrozenOp("quantize", 1, {}, scale=q[0], zero_point=q[1], bits=8)


def dequantize(q: Q) -> FrozenOp:
    return FrozenOp("dequantize", 1, {}, scale=q[0], zero_point=q[1])


def slice_(q: Q, dim: int, start: int, end: int, step: int) -> FrozenOp:
    return FrozenOp("qslice", 1, {}, dim=dim, start=start, end=end, step=step, scale=q[0], zero_point=q[1])


class Functions(nn.Module):
    """Every table function on one tensor, then a concatenation of ten."""

    def __init__(self) -> None:
        super().__init__()
        out: Q = (0.06, -10)
        self.quantize, self.conv = quantize(IN), conv(3, 8, 3, IN, B, "none")
        for name in LUT_FUNCTIONS:
            table = {"table": lut_table(name, *B, *out)}
            attributes = {"in_scale": B[0], "in_zp": B[1], "out_scale": out[0], "out_zp": out[1]}
            setattr(self, name, FrozenOp("qlut", 1, table, function=name, **attributes))
        n = len(LUT_FUNCTIONS)
        self.cat = _op("qconcat", 0, out=out, scales=[out[0]] * n, zero_points=[out[1]] * n, dim=1)
        self.dequantize = dequantize(out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.quantize(x))
        return self.dequantize(self.cat(*(getattr(self, name)(x) for name in LUT_FUNCTIONS)))


class Shapes(nn.Module):
    """Groups, a depth multiplier, padded pools, unequal concatenation, clamped add and mul, slices, permute, int4 linear."""

    def __init__(self) -> None:
        super().__init__()
        c, d, e = (0.03, -128), (0.04, -100), (0.06, -128)
        self.quantize = quantize(IN)
        self.grouped = conv(4, 8, 3, IN, B, "none", groups=2)
        self.depthwise = conv(8, 8, 3, B, A, groups=8)
        self.multiplied = conv(8, 16, 3, A, B, "relu6", groups=8)
        window = {"kernel": [3, 3], "stride": [2, 2], "padding": [1, 1], "ceil_mode": False}
        self.pool_padded = _op("qavg_pool2d", 1, **{"in": A}, out=c, **window, count_include_pad=True)
        self.pool = _op("qavg_pool2d", 1, **{"in": B}, out=B, **window, count_include_pad=False)
        self.cat = _op("qconcat", 0, out=B, scales=[c[0], B[0]], zero_points=[c[1], B[1]], dim=1)
        self.add = _op("qadd", 2, a=B, b=B, out=d, activation="relu6", out_bits=8)
        self.mul = _op("qmul", 2, a=d, b=d, out=e, activation="relu", out_bits=8)
        self.permute = FrozenOp("qpermute", 1, {}, dims=[0, 2, 3, 1], scale=e[0], zero_point=e[1])
        self.reshape = FrozenOp("qreshape", 1, {}, shape=[1, 16, 24], scale=e[0], zero_point=e[1])
        self.fc = linear(24, 7, e, B, "relu", bits=4)
        self.dequantize = dequantize(B)
        self.channels, self.columns = slice_(B, 1, 4, 12, 1), slice_(B, 3, 1, END, 2)
        self.rows, self.thirds = slice_(B, -2, 0, END, 2), slice_(B, 1, 0, END, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.depthwise(self.grouped(self.quantize(x)))
        z = self.multiplied(y)
        c = self.cat(self.pool_padded(y), self.pool(z))
        c = self.reshape(self.permute(self.mul(self.add(c, c), self.add(c, c))))
        return self.dequantize(self.fc(c)), self.dequantize(self.thirds(self.rows(self.columns(self.channels(z)))))


class OptionA(nn.Module):
    """A residual block whose shortcut is ``F.pad(x[:, :, ::2, ::2], channels)`` (He et al. 2015, option A)."""

    def __init__(self) -> None:
        super().__init__()
        b: Q = (0.07, -128)
        self.quantize, self.first, self.second = quantize(IN), conv(3, 16, 3, IN, A), conv(16, 32, 3, A, b, "none", stride=2)
        self.rows, self.columns = slice_(A, 2, 0, END, 2), slice_(A, 3, 0, END, 2)
        self.pad = FrozenOp("qpad", 1, {}, pad=[0, 0, 0, 0, 8, 8], scale=A[0], zero_point=A[1])
        self.add = _op("qadd", 2, a=b, b=A, out=b, activation="relu", out_bits=8)
        self.dequantize = dequantize(b)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.quantize(x))
        return self.dequantize(self.add(self.second(x), self.pad(self.columns(self.rows(x)))))


class Dense(nn.Module):
    """Linear layers of 4, 4, 2 and 8 bits; the third has an odd number of inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.quantize, self.dequantize = quantize(IN), dequantize(B)
        self.even, self.narrow = linear(640, 128, IN, A, "relu", bits=4), linear(128, 31, A, B, bits=4)
        self.odd, self.last = linear(31, 64, B, A, "relu", bits=4), linear(64, 10, A, B, bits=8)

    def forward(self, x: Tensor) -> Tensor:
        return self.dequantize(self.last(self.odd(self.narrow(self.even(self.quantize(x))))))


class IntegerLinear(nn.Module):
    """quantize, qlinear, dequantize: a linear layer between float operators."""

    def __init__(self, inputs: int, outputs: int, i: Q, o: Q) -> None:
        super().__init__()
        self.quantize, self.linear, self.dequantize = quantize(i), linear(inputs, outputs, i, o), dequantize(o)

    def forward(self, x: Tensor) -> Tensor:
        return self.dequantize(self.linear(self.quantize(x)))


class Attention(nn.Module):
    """One pre-norm encoder block; query, key and value read one tensor with one scale, as a calibration gives it."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused, n = fused, (0.03, -5)
        self.query, self.key = IntegerLinear(32, 32, n, (0.031, 3)), IntegerLinear(32, 32, n, (0.032, 4))
        self.value, self.out = IntegerLinear(32, 32, n, (0.033, -5)), IntegerLinear(32, 32, (0.02, -1), (0.03, 2))
        self.up, self.down = IntegerLinear(32, 64, n, (0.04, 7)), IntegerLinear(64, 32, (0.02, -90), (0.03, 1))
        self.norm1, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (f(y).reshape(1, 8, 4, 8).transpose(1, 2) for f in (self.query, self.key, self.value))
        if self.fused:
            a = F.scaled_dot_product_attention(q, k, v)
        else:
            a = torch.softmax(q @ k.transpose(-1, -2) * 8**-0.5, -1) @ v
        x = x + self.out(a.transpose(1, 2).reshape(1, 8, 32))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Encoder(nn.Module):
    """Two blocks with float softmax, LayerNorm and GELU; input (1, 8, 8), output (1, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = IntegerLinear(8, 32, (0.03, 0), (0.03, 0)), nn.LayerNorm(32)
        self.blocks, self.head = nn.Sequential(Attention(False), Attention(True)), IntegerLinear(32, 5, (0.03, 0), (0.05, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(x))).mean(1))


def program(kind: type[nn.Module], *shape: int) -> FrozenProgram:
    """The net with seed 0 as a frozen program, for inputs of that shape (without batch)."""
    torch.manual_seed(0)
    return freeze_module(kind(), (torch.zeros(1, *shape),), name=kind.__name__.lower())
