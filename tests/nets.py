"""Small frozen programs with random integers, for tests of targets and of the program itself (seeded, no calibration)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from edgekit.frozen import FrozenOp, FrozenProgram, freeze_module
from edgekit.frozen.ops import integer_range, lut_table

Q = tuple[float, int]


def _constants(weight: Tensor, scale: float) -> dict[str, Tensor]:
    bias = torch.randint(-500, 500, (len(weight),), dtype=torch.int32)
    return {"weight": weight, "weight_scale": (torch.rand(len(weight)) + 0.5) * scale, "bias": bias}


def conv(cin: int, cout: int, k: int, i: Q, o: Q, act: str = "relu", stride: int = 1, groups: int = 1, bits: int = 8) -> FrozenOp:
    """A qconv2d with random weights, 'same' padding for odd kernels."""
    low, high = integer_range(bits)
    weight = torch.randint(low + 1, high + 1, (cout, cin // groups, k, k), dtype=torch.int8)
    fan = (cin // groups * k * k) ** 0.5 * high * 30 * i[0]
    return FrozenOp(
        "qconv2d", 1,
        _constants(weight, o[0] * 60 / fan),
        in_scale=i[0], in_zp=i[1], out_scale=o[0], out_zp=o[1], activation=act, stride=[stride] * 2, padding=[k // 2] * 2,
        dilation=[1, 1], groups=groups, weight_bits=bits, out_bits=8,
    )  # fmt: skip


def linear(cin: int, cout: int, i: Q, o: Q, act: str = "none", bits: int = 8) -> FrozenOp:
    low, high = integer_range(bits)
    weight = torch.randint(low + 1, high + 1, (cout, cin), dtype=torch.int8)
    fan = cin**0.5 * high * 30 * i[0]
    return FrozenOp(
        "qlinear", 1,
        _constants(weight, o[0] * 60 / fan),
        in_scale=i[0], in_zp=i[1], out_scale=o[0], out_zp=o[1], activation=act, weight_bits=bits, out_bits=8,
    )  # fmt: skip


def _op(kind: str, activations: int, **values: object) -> FrozenOp:
    """A FrozenOp without constants; a pair (scale, zero point) named ``a`` becomes ``a_scale`` and ``a_zp``."""
    flat: dict[str, object] = {}
    for key, value in values.items():
        flat |= {f"{key}_scale": value[0], f"{key}_zp": value[1]} if isinstance(value, tuple) else {key: value}
    return FrozenOp(kind, activations, {}, **flat)


class ResidualNet(nn.Module):
    """Conv (dense, depthwise, strided), add, concat, mul, max and average pool, asymmetric pad, lut, mean, linear."""

    def __init__(self, bits: int = 8) -> None:
        super().__init__()
        i, a, b, c, d, e = (0.03, -3), (0.05, -128), (0.07, -128), (0.06, 5), (0.11, -128), (0.02, -128)
        f, g = (0.25, 3), (1 / 256, -128)
        self.quantize = FrozenOp("quantize", 1, {}, scale=i[0], zero_point=i[1], bits=8)
        self.stem = conv(3, 8, 3, i, a)
        self.pad = FrozenOp("qpad", 1, {}, pad=[0, 1, 0, 1], scale=a[0], zero_point=a[1])
        self.down = conv(8, 16, 3, a, b, "relu6", stride=2, bits=bits)
        self.down.attributes["padding"] = [0, 0]
        self.block = nn.Module()
        self.block.dw = conv(16, 16, 3, b, b, groups=16, bits=8)
        self.block.pw = conv(16, 16, 1, b, c, "none", bits=bits)
        self.add = _op("qadd", 2, a=b, b=c, out=d, activation="relu", out_bits=8)
        pool = {"kernel": [2, 2], "stride": [2, 2], "padding": [0, 0], "ceil_mode": False}
        self.maxpool = FrozenOp("qmax_pool2d", 1, {}, scale=d[0], zero_point=d[1], dilation=[1, 1], **pool)
        self.avgpool = _op("qavg_pool2d", 1, out=d, **{"in": d}, **pool, count_include_pad=True)
        self.cat = _op("qconcat", 0, out=d, scales=[d[0], d[0]], zero_points=[d[1], d[1]], dim=1)
        self.gate = FrozenOp(
            "qlut", 1, {"table": lut_table("sigmoid", *d, *g)}, function="sigmoid",
            in_scale=d[0], in_zp=d[1], out_scale=g[0], out_zp=g[1],
        )  # fmt: skip
        self.mul = _op("qmul", 2, a=d, b=g, out=d, activation="none", out_bits=8)
        self.mean = _op("qmean", 1, out=e, **{"in": d}, out_bits=8)
        self.flatten = FrozenOp("qreshape", 1, {}, shape=[1, 32], scale=e[0], zero_point=e[1])
        self.head = linear(32, 10, e, f)
        self.dequantize = FrozenOp("dequantize", 1, {}, scale=f[0], zero_point=f[1])

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(self.pad(self.stem(self.quantize(x))))
        x = self.add(x, self.block.pw(self.block.dw(x)))
        x = self.cat(self.maxpool(x), self.avgpool(x))
        x = self.mul(x, self.gate(x))
        return self.dequantize(self.head(self.flatten(self.mean(x))))


def residual_net(bits: int = 8, seed: int = 0) -> FrozenProgram:
    """ResidualNet as a frozen program, input (1, 3, 16, 16)."""
    torch.manual_seed(seed)
    return freeze_module(ResidualNet(bits), (torch.zeros(1, 3, 16, 16),), name=f"residual{bits}")


def images(n: int, seed: int = 1) -> Tensor:
    """n standard-normal inputs of shape (3, 16, 16)."""
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
