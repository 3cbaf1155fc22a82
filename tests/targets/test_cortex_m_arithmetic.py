"""The firmware's arithmetic against TensorFlow Lite for Microcontrollers, exact fractions, and the frozen operators."""

from __future__ import annotations

from fractions import Fraction
from math import floor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import conv, linear
from torch import nn

from edgekit.frozen import FrozenOp, FrozenProgram, freeze_module
from edgekit.targets.cortex_m.fixedpoint import high_multiply, multiply, quantize_multiplier, round_shift
from edgekit.targets.cortex_m.kernels import packed
from edgekit.targets.cortex_m.preparation import prepare, simulate
from edgekit.targets.cortex_m.readback import unpacked

INT32 = st.integers(-(2**31), 2**31 - 1)


@given(st.floats(2**-30, 255.9))
def test_a_multiplier_is_q31_and_a_shift(real: float) -> None:
    mantissa, shift = quantize_multiplier(real)
    assert 2**30 <= mantissa < 2**31
    assert abs(Fraction(mantissa) * Fraction(2) ** (shift - 31) / Fraction(real) - 1) <= Fraction(1, 2**31)


@pytest.mark.parametrize("real", [-0.1, float("nan"), float("inf"), 256.0])
def test_a_multiplier_that_kernels_do_not_take(real: float) -> None:
    with pytest.raises(ValueError, match="multiplier"):
        quantize_multiplier(real)


def test_tiny_multipliers_are_zero() -> None:
    assert quantize_multiplier(0.0) == (0, 0) and quantize_multiplier(2.0**-40) == (0, 0)
    assert quantize_multiplier(1.0) == (1 << 30, 1) and quantize_multiplier(1 - 2.0**-40) == (1 << 30, 1)


@given(INT32, st.integers(2**30, 2**31 - 1))
def test_high_multiply_rounds_ties_up(a: int, b: int) -> None:
    assert int(high_multiply(a, b)) == floor(Fraction(a * b, 2**31) + Fraction(1, 2))


@given(INT32, st.integers(0, 31))
def test_round_shift_rounds_ties_away_from_zero(x: int, bits: int) -> None:
    exact = Fraction(x, 2**bits)
    assert int(round_shift(x, bits)) == (floor(exact + Fraction(1, 2)) if x >= 0 else -floor(-exact + Fraction(1, 2)))


@given(st.integers(-(2**21), 2**21), st.floats(2**-25, 200.0))
def test_two_roundings_are_within_one_of_the_real_product(x: int, real: float) -> None:
    assert abs(int(multiply(x, *quantize_multiplier(real))) - Fraction(real) * x) <= 1 + abs(Fraction(real) * x) / 2**29


@given(st.sampled_from((4, 2)), st.integers(1, 5), st.integers(1, 9), st.integers(0, 99))
def test_packed_rows_are_what_was_packed(bits: int, rows: int, width: int, seed: int) -> None:
    weight = np.random.default_rng(seed).integers(-(1 << (bits - 1)), 1 << (bits - 1), (rows, width)).astype(np.int8)
    stored = packed(weight, bits)
    each = 4 * -(-width * bits // 32)  # whole groups of 32 bits
    assert stored.shape == (rows * each,)
    first = stored.reshape(rows, -1)[:, 0].astype(np.int64)  # byte 0: weights 0, 4, ...
    assert np.array_equal(first & ((1 << bits) - 1), weight[:, 0].astype(np.int64) & ((1 << bits) - 1))
    assert np.array_equal(unpacked(stored, bits).reshape(rows, -1)[:, :width], weight)


def program(*layers: nn.Module, shape: tuple[int, ...], i: tuple[float, int], o: tuple[float, int]) -> FrozenProgram:
    """quantize, the layers one after the other, dequantize."""
    ends = (
        FrozenOp("quantize", 1, {}, scale=i[0], zero_point=i[1], bits=8),
        FrozenOp("dequantize", 1, {}, scale=o[0], zero_point=o[1]),
    )
    return freeze_module(nn.Sequential(ends[0], *layers, ends[1]), (torch.zeros(shape),))


def computed(made: FrozenProgram, x: np.ndarray) -> np.ndarray:
    """The last layer's integers by the reference, channel-last if it is an image; ``x`` int8 in the program's layout."""
    taps, _ = simulate(prepare(made, "portable"), [x])
    last = taps[made.layers[-2].name]
    return last.transpose(0, 2, 3, 1) if last.ndim == 4 else last


@pytest.mark.parametrize(("groups", "stride", "bits"), [(1, 1, 8), (1, 2, 8), (8, 1, 8), (8, 2, 8)])
def test_convolutions_equal_tflm(groups: int, stride: int, bits: int) -> None:
    tflm = pytest.importorskip("tflm", reason="tflite-micro is not installed")
    torch.manual_seed(groups + stride)
    i, o = (0.02, -7), (0.9, 3)
    layer = conv(8, 8, 3, i, o, "none", stride=stride, groups=groups, bits=bits)
    made = program(layer, shape=(1, 8, 9, 9), i=i, o=o)
    x = np.random.default_rng(0).integers(-128, 128, (1, 8, 9, 9)).astype(np.int8)
    ours = computed(made, x)
    weight, scale = layer.weight.numpy(), layer.weight_scale.numpy()
    stored = weight.transpose(1, 2, 3, 0) if groups > 1 else weight.transpose(0, 2, 3, 1)
    kind = "DepthwiseConv2DOptions" if groups > 1 else "Conv2DOptions"
    same = {"padding": 0, "strideH": stride, "strideW": stride, "dilationHFactor": 1, "dilationWFactor": 1}
    inputs = [
        tflm.T((1, 9, 9, 8), i[0], i[1]),
        tflm.T(stored.shape, scale, 0, np.ascontiguousarray(stored), 3 if groups > 1 else 0),
        tflm.T((8,), np.float32(i[0]) * scale, 0, layer.bias.numpy()),
    ]
    operator = "DEPTHWISE_CONV_2D" if groups > 1 else "CONV_2D"
    options = {kind: same | ({"depthMultiplier": 1} if groups > 1 else {})}
    theirs = tflm.run_one(operator, options, inputs, tflm.T(ours.shape, *o), [x.transpose(0, 2, 3, 1)])
    assert np.array_equal(ours, theirs) and len(np.unique(ours)) > 50


def test_a_linear_layer_equals_tflm() -> None:
    tflm = pytest.importorskip("tflm", reason="tflite-micro is not installed")
    torch.manual_seed(0)
    i, o = (0.04, 9), (0.31, -20)
    layer = linear(48, 33, i, o)
    layer.weight_scale.fill_(float(layer.weight_scale[0]))
    x = np.random.default_rng(0).integers(-128, 128, (1, 48)).astype(np.int8)
    ours = computed(program(layer, shape=(1, 48), i=i, o=o), x)
    scale = float(layer.weight_scale[0])
    inputs = [
        tflm.T((1, 48), *i),
        tflm.T((33, 48), scale, 0, layer.weight.numpy()),
        tflm.T((33,), np.float32(i[0]) * np.float32(scale), 0, layer.bias.numpy()),
    ]
    theirs = tflm.run_one("FULLY_CONNECTED", {"FullyConnectedOptions": {}}, inputs, tflm.T((1, 33), *o), [x])
    assert np.array_equal(ours, theirs) and len(np.unique(ours)) > 20


class Twice(nn.Module):
    """An operator of two operands, both from inputs."""

    def __init__(self, kind: str, a: tuple[float, int], b: tuple[float, int], o: tuple[float, int]) -> None:
        super().__init__()
        self.qa = FrozenOp("quantize", 1, {}, scale=a[0], zero_point=a[1], bits=8)
        self.qb = FrozenOp("quantize", 1, {}, scale=b[0], zero_point=b[1], bits=8)
        names: dict[str, Any] = {"a_scale": a[0], "a_zp": a[1], "b_scale": b[0], "b_zp": b[1], "out_scale": o[0], "out_zp": o[1]}
        self.op = FrozenOp(kind, 2, {}, **names, activation="none", out_bits=8)
        self.real = FrozenOp("dequantize", 1, {}, scale=o[0], zero_point=o[1])

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.real(self.op(self.qa(a), self.qb(b)))


@pytest.mark.parametrize(("kind", "o"), [("qadd", (0.11, -4)), ("qadd", (0.04, 90)), ("qmul", (0.03, 5)), ("qmul", (0.2, -128))])
def test_sums_and_products_equal_tflm(kind: str, o: tuple[float, int]) -> None:
    tflm = pytest.importorskip("tflm", reason="tflite-micro is not installed")
    a, b, every = (0.07, -5), (0.021, 13), np.arange(-128, 128, dtype=np.int8)
    x, y = (np.ascontiguousarray(v).reshape(1, 256, 256) for v in np.meshgrid(every, every))
    made = freeze_module(Twice(kind, a, b, o), (torch.zeros(1, 256, 256),) * 2)
    taps, _ = simulate(prepare(made, "portable"), [x, y])
    operator = {"qadd": "ADD", "qmul": "MUL"}[kind]
    options = {f"{operator.capitalize()}Options": {}}
    inputs = [tflm.T((1, 256, 256), *a), tflm.T((1, 256, 256), *b)]
    theirs = tflm.run_one(operator, options, inputs, tflm.T((1, 256, 256), *o), [x, y])
    assert np.array_equal(taps["op"], theirs)


def test_a_mean_is_within_one_of_tflm_and_of_the_frozen_operator() -> None:
    """TFLM divides after requantizing; here the division is in the multiplier, as in newer TFLite."""
    tflm = pytest.importorskip("tflm", reason="tflite-micro is not installed")
    i, o = (0.05, -8), (0.02, -3)
    layer = FrozenOp("qmean", 1, {}, in_scale=i[0], in_zp=i[1], out_scale=o[0], out_zp=o[1], out_bits=8)
    x = np.random.default_rng(0).integers(-128, 128, (1, 64, 5, 7)).astype(np.int8)
    made = program(layer, shape=x.shape, i=i, o=o)
    ours = computed(made, x)
    axes = tflm.T((2,), None, 0, np.array([1, 2], np.int32))
    inputs = [tflm.T((1, 5, 7, 64), *i), axes]
    options = {"ReducerOptions": {"keepDims": True}}
    theirs = tflm.run_one("MEAN", options, inputs, tflm.T((1, 1, 1, 64), *o), [x.transpose(0, 2, 3, 1)])
    assert np.abs(ours.astype(int) - theirs).max() <= 1


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 200), st.floats(0.002, 0.5), st.floats(0.002, 0.5), st.integers(-128, 127), st.integers(-128, 127))
def test_a_mean_is_within_one_of_the_exact_one(count: int, s: float, t: float, z: int, w: int) -> None:
    layer = FrozenOp("qmean", 1, {}, in_scale=s, in_zp=z, out_scale=t, out_zp=w, out_bits=8)
    x = np.random.default_rng(count).integers(-128, 128, (1, 3, 1, count)).astype(np.int8)
    made = program(layer, shape=x.shape, i=(s, z), o=(t, w))
    exact = np.clip(np.rint((x.astype(np.float64) - z).mean((2, 3)) * s / t) + w, -128, 127)
    assert np.abs(computed(made, x).reshape(1, 3) - exact).max() <= 1


POOL = {"kernel": [3, 2], "stride": [2, 2], "padding": [0, 0], "ceil_mode": False}


@pytest.mark.parametrize("kind", ["AVERAGE_POOL_2D", "MAX_POOL_2D"])
def test_pools_against_tflm(kind: str) -> None:
    """TFLM's average rounds the quotient of integers, ties away from zero; here it is a fixed-point product, within one of it."""
    tflm = pytest.importorskip("tflm", reason="tflite-micro is not installed")
    q = (0.05, -8)
    average = FrozenOp(
        "qavg_pool2d", 1, {}, in_scale=q[0], in_zp=q[1], out_scale=q[0], out_zp=q[1], **POOL, count_include_pad=True
    )
    maximum = FrozenOp("qmax_pool2d", 1, {}, scale=q[0], zero_point=q[1], **POOL, dilation=[1, 1])
    layer = average if kind == "AVERAGE_POOL_2D" else maximum
    x = np.random.default_rng(0).integers(-128, 128, (1, 16, 9, 8)).astype(np.int8)
    ours = computed(program(layer, shape=x.shape, i=q, o=q), x)
    options = {"Pool2DOptions": {"padding": 1, "strideH": 2, "strideW": 2, "filterHeight": 3, "filterWidth": 2}}
    theirs = tflm.run_one(kind, options, [tflm.T((1, 9, 8, 16), *q)], tflm.T(ours.shape, *q), [x.transpose(0, 2, 3, 1)])
    gap = np.abs(ours.astype(int) - theirs)
    assert gap.max() <= (1 if kind == "AVERAGE_POOL_2D" else 0) and (gap > 0).mean() < 0.1 and len(np.unique(ours)) > 40


@pytest.mark.parametrize("dim", [1, 3])
def test_concatenation_equals_tflm(dim: int) -> None:
    tflm = pytest.importorskip("tflm", reason="tflite-micro is not installed")
    q = (0.05, -8)
    chance = np.random.default_rng(0)
    x, y = (chance.integers(-128, 128, (1, 5, 6, 7)).astype(np.int8) for _ in range(2))

    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qa, self.qb = (FrozenOp("quantize", 1, {}, scale=q[0], zero_point=q[1], bits=8) for _ in range(2))
            self.op = FrozenOp("qconcat", 0, {}, scales=[q[0]] * 2, zero_points=[q[1]] * 2, out_scale=q[0], out_zp=q[1], dim=dim)
            self.real = FrozenOp("dequantize", 1, {}, scale=q[0], zero_point=q[1])

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return self.real(self.op(self.qa(a), self.qb(b)))

    taps, _ = simulate(prepare(freeze_module(Joined(), (torch.zeros(x.shape),) * 2), "portable"), [x, y])
    axis = {1: 3, 3: 2}[dim]  # channels last there
    inputs = [tflm.T((1, 6, 7, 5), *q), tflm.T((1, 6, 7, 5), *q)]
    last = [v.transpose(0, 2, 3, 1) for v in (x, y)]
    shape = np.concatenate(last, axis).shape
    theirs = tflm.run_one("CONCATENATION", {"ConcatenationOptions": {"axis": axis}}, inputs, tflm.T(shape, *q), last)
    assert np.array_equal(taps["op"].transpose(0, 2, 3, 1), theirs)
