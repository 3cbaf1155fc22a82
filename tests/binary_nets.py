"""Frozen nets of 1-bit layers for tests: every operator, chains that stay packed, int8 beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgekit.frozen import FrozenOp, FrozenProgram, freeze_module
from edgekit.frozen.binary_ops import pack_signs

__all__ = ["ChainNet", "PlainNet", "ResidualNet", "binary_net"]


def _signs(rng: np.random.Generator, *shape: int) -> Tensor:
    """Random packed weights; the last of ``shape`` counts inputs."""
    return pack_signs(torch.from_numpy(rng.integers(0, 2, shape).astype(bool)))


def _int32(rng: np.random.Generator, largest: int, count: int) -> Tensor:
    return torch.from_numpy(rng.integers(-largest, largest + 1, count).astype(np.int32))


def _geometry(kernel: int, stride: int, groups: int = 1) -> dict[str, Any]:
    return {"stride": [stride] * 2, "padding": [kernel // 2] * 2, "dilation": [1, 1], "groups": groups}


def _int8(rng: np.random.Generator, inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> FrozenOp:
    """An int8 convolution from scale 0.05, zero point 3 to scale 0.1, zero point -5."""
    weight = torch.from_numpy(rng.integers(-127, 128, (outputs, inputs, kernel, kernel)).astype(np.int8))
    buffers = {"weight": weight, "weight_scale": _scale(rng, outputs, 0.01 / inputs), "bias": _int32(rng, 200, outputs)}
    ends = {"in_scale": 0.05, "in_zp": 3, "out_scale": 0.1, "out_zp": -5, "activation": "none"}
    return FrozenOp("qconv2d", 1, buffers, **ends, **_geometry(kernel, stride), weight_bits=8, out_bits=8)


def _scale(rng: np.random.Generator, count: int, size: float) -> Tensor:
    return torch.from_numpy((size * rng.uniform(0.5, 1.5, count)).astype(np.float32))


def _sign(rng: np.random.Generator, channels: int, dim: int = 1) -> FrozenOp:
    threshold = torch.from_numpy(rng.integers(-20, 21, channels).astype(np.int16))
    return FrozenOp("binarize", 1, {"threshold": threshold}, dim=dim)


def _conv(rng: np.random.Generator, inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> FrozenOp:
    buffers = {"weight": _signs(rng, outputs, kernel, kernel, inputs // groups)}
    buffers["threshold"] = _int32(rng, int((kernel * kernel * inputs // groups) ** 0.5), outputs)
    return FrozenOp("binary_conv2d", 1, buffers, channels=inputs, **_geometry(kernel, stride, groups))


def _qconv(rng: np.random.Generator, inputs: int, outputs: int, kernel: int = 3, activation: str = "none") -> FrozenOp:
    buffers = {
        "weight": _signs(rng, outputs, kernel, kernel, inputs),
        "weight_scale": _scale(rng, outputs, 4.0 / (kernel * kernel * inputs) ** 0.5),
        "bias": _int32(rng, 10, outputs),
    }
    ends = {"out_scale": 0.1, "out_zp": -5, "activation": activation, "out_bits": 8}
    return FrozenOp("binary_qconv2d", 1, buffers, channels=inputs, **ends, **_geometry(kernel, 1))


def _linear(rng: np.random.Generator, inputs: int, outputs: int) -> FrozenOp:
    buffers = {"weight": _signs(rng, outputs, inputs), "threshold": _int32(rng, int(inputs**0.5), outputs)}
    return FrozenOp("binary_linear", 1, buffers, features=inputs)


def _qlinear(rng: np.random.Generator, inputs: int, outputs: int) -> FrozenOp:
    scale, bias = _scale(rng, outputs, 1.0 / inputs**0.5), _int32(rng, 10, outputs)
    buffers = {"weight": _signs(rng, outputs, inputs), "weight_scale": scale, "bias": bias}
    return FrozenOp("binary_qlinear", 1, buffers, features=inputs, out_scale=0.02, out_zp=1, activation="none", out_bits=8)


class ResidualNet(nn.Module):
    """A Bi-Real net: int8 stem, sign, binary convolution to int8, added to the stream, twice; mean, int8 classifier."""

    def __init__(self, channels: int = 32, seed: int = 0) -> None:
        super().__init__()
        rng = np.random.default_rng(seed)
        self.quantize = FrozenOp("quantize", 1, {}, scale=0.05, zero_point=3, bits=8)
        self.stem = _int8(rng, 3, channels)
        self.sign1, self.conv1 = _sign(rng, channels), _qconv(rng, channels, channels)
        same = {"a_scale": 0.1, "a_zp": -5, "b_scale": 0.1, "b_zp": -5, "out_scale": 0.1, "out_zp": -5, "out_bits": 8}
        self.add1 = FrozenOp("qadd", 2, {}, **same, activation="none")
        self.sign2, self.conv2 = _sign(rng, channels), _qconv(rng, channels, channels, activation="relu")
        self.add2 = FrozenOp("qadd", 2, {}, **same, activation="none")
        self.mean = FrozenOp("qmean", 1, {}, in_scale=0.1, in_zp=-5, out_scale=0.05, out_zp=3, out_bits=8)
        self.flat = FrozenOp("qreshape", 1, {}, shape=[1, channels], scale=0.05, zero_point=3)
        weight = torch.from_numpy(rng.integers(-127, 128, (10, channels)).astype(np.int8))
        buffers = {"weight": weight, "weight_scale": _scale(rng, 10, 0.01), "bias": _int32(rng, 100, 10)}
        ends = {"in_scale": 0.05, "in_zp": 3, "out_scale": 0.1, "out_zp": 0, "activation": "none"}
        self.classifier = FrozenOp("qlinear", 1, buffers, **ends, weight_bits=8, out_bits=8)
        self.dequantize = FrozenOp("dequantize", 1, {}, scale=0.1, zero_point=0)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(self.quantize(x))
        x = self.add1(self.conv1(self.sign1(x)), x)
        x = self.add2(self.conv2(self.sign2(x)), x)
        result: Tensor = self.dequantize(self.classifier(self.flat(self.mean(x))))
        return result


class ChainNet(nn.Module):
    """int8 stem, sign, three binary convolutions that hand on signs (one strided, one grouped), a fourth to int8."""

    def __init__(self, channels: int = 64, seed: int = 0) -> None:
        super().__init__()
        rng = np.random.default_rng(seed)
        self.quantize = FrozenOp("quantize", 1, {}, scale=0.05, zero_point=3, bits=8)
        self.stem, self.sign = _int8(rng, 3, channels), _sign(rng, channels)
        self.conv1, self.conv2 = _conv(rng, channels, channels), _conv(rng, channels, 2 * channels, stride=2)
        self.conv3, self.conv4 = _conv(rng, 2 * channels, 20, 1, groups=2), _qconv(rng, 20, 10)
        self.dequantize = FrozenOp("dequantize", 1, {}, scale=0.1, zero_point=-5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv3(self.conv2(self.conv1(self.sign(self.stem(self.quantize(x))))))
        result: Tensor = self.dequantize(self.conv4(x))
        return result


class PlainNet(nn.Module):
    """Float tokens, sign, two binary linear layers to signs and one to int8, then attention's product of signs with signs."""

    def __init__(self, features: int = 100, seed: int = 0) -> None:
        super().__init__()
        rng = np.random.default_rng(seed)
        self.sign = FrozenOp("binarize", 1, {"threshold": torch.zeros(1)}, dim=-1)
        self.first, self.second = _linear(rng, features, 130), _linear(rng, 130, 64)
        self.third = _qlinear(rng, 64, 24)
        self.again = _sign(rng, 24, dim=-1)
        product = {"features": 24, "a_unsigned": False, "scale": 0.3, "out_scale": 0.2, "out_zp": 2, "out_bits": 8}
        self.product = FrozenOp("binary_qmatmul", 2, {}, **product)
        self.dequantize = FrozenOp("dequantize", 1, {}, scale=0.2, zero_point=2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.again(self.third(self.second(self.first(self.sign(x)))))
        result: Tensor = self.dequantize(self.product(tokens, tokens))
        return result


_SAMPLES: Mapping[type[nn.Module], tuple[int, ...]] = {ResidualNet: (3, 8, 8), ChainNet: (3, 10, 10), PlainNet: (7, 100)}


def binary_net(kind: type[nn.Module], count: int = 4) -> tuple[FrozenProgram, Tensor]:
    """A net as a frozen program, and samples for it."""
    x = torch.randn(count, *_SAMPLES[kind], generator=torch.Generator().manual_seed(0))
    return freeze_module(kind(), (x,), name=kind.__name__.lower()), x
