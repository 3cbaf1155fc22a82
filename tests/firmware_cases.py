"""Random cases for the kernels: shapes, zero points, strides and extreme values, with the reference's answer beside each."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import firmware_reference as reference
import numpy as np
from hypothesis import strategies as st

from edgekit.firmware_sim.boards import BOARDS, CORES
from edgekit.firmware_sim.kernels import conv2d_scratch, depthwise_scratch, linear_scratch
from edgekit.firmware_sim.qemu import run
from edgekit.firmware_sim.toolchain import Firmware, Project, build

OPERATIONS = (
    "conv2d", "depthwise", "linear", "add", "mul", "requant", "clamp", "lut", "softmax", "average", "maximum", "mean", "concat",
    "pad", "gather", "quantize", "dequantize", "crc", "scale", "binarize", "binary_vectors", "binary_planes", "binary_rows",
    "binary_matmul",
)  # fmt: skip
SOURCE = Path(__file__).parent / "firmware_sim" / "kernels.c"
Draw = Callable[[st.SearchStrategy[Any]], Any]


@dataclass(frozen=True)
class Case:
    """One call of a kernel. ``scratch`` gives the bytes for a kernel set."""

    operation: str
    integers: tuple[int, ...]
    arrays: tuple[np.ndarray, ...]
    expected: np.ndarray
    scratch: Callable[[str], int] = lambda kernel_set: 0
    in_place: bool = False

    def packed(self, kernel_set: str) -> bytes:
        head = (
            OPERATIONS.index(self.operation),
            self.in_place,
            self.expected.nbytes,
            self.scratch(kernel_set),
            len(self.integers),
            len(self.arrays),
        )
        parts = [struct.pack("<6I", *head), struct.pack(f"<{len(self.integers)}i", *self.integers)]
        for array in self.arrays:
            data = array.tobytes()
            parts += [struct.pack("<I", len(data)), data.ljust(-(-len(data) // 4) * 4, b"\x5a")]
        return b"".join(parts)


def firmware(board: str, folder: Path, memory: int, kernel_set: int | None = None, *defines: str) -> Firmware:
    """The test firmware for a board, with ``memory`` bytes for the arrays of a case."""
    chosen = (*defines, *(() if kernel_set is None else (f"-DEK_SET={kernel_set}",)))
    return build(Project(BOARDS[board], (SOURCE,), defines=(f"-DMEMORY={memory}", *chosen), stack_bytes=1536), folder)


def check(built: Firmware, cases: list[Case], kernel_set: str | None = None) -> None:
    """Runs all cases in one boot and compares each."""
    kernel_set = kernel_set or CORES[built.board.core].kernel_set
    result = run(built, b"".join(case.packed(kernel_set) for case in cases), limit=60)
    at = 0
    for index, case in enumerate(cases):
        got = np.frombuffer(result.output[at : at + case.expected.nbytes], np.uint8)
        want = np.frombuffer(case.expected.tobytes(), np.uint8)
        at += want.size
        assert got.size == want.size, f"case {index}, {case.operation} {case.integers}: ended by {result.code:#x}, {result.fault}"
        wrong = np.flatnonzero(got != want)
        assert not wrong.size, (
            f"case {index}, {case.operation} {case.integers}: {wrong.size} of {want.size} bytes, first {wrong[0]}"
        )
    result.checked()


def values(draw: Draw, rng: np.random.Generator, shape: tuple[int, ...], bits: int = 8) -> np.ndarray:
    """int8 values of a width: anything, or one of the extremes everywhere, or the two by chance."""
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    kind = draw(st.sampled_from(("any", "any", "any", "low", "high", "both")))
    if kind == "any":
        return rng.integers(low, high + 1, shape).astype(np.int8)
    return rng.choice({"low": [low], "high": [high], "both": [low, high]}[kind], shape).astype(np.int8)


def generator(draw: Draw) -> np.random.Generator:
    return np.random.default_rng(draw(st.integers(0, 2**32 - 1)))


zero_points = st.one_of(st.sampled_from((-128, 0, 127)), st.integers(-128, 127))


@st.composite
def clamps(draw: Draw) -> tuple[int, int]:
    low = draw(st.sampled_from((-128, -128, -128, -100, 0, 3)))
    return low, draw(st.sampled_from((127, 127, 127, 100, 3)).filter(lambda high: high >= low))


def requantizers(draw: Draw, rng: np.random.Generator, bound: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Multipliers and shifts whose outputs fill int8 mostly, and the extremes; no accumulator shifted left reaches 2^30."""
    n = bound.size
    multiplier = rng.integers(1 << 30, 1 << 31, n)
    aim = np.log2(np.maximum(bound, 1)) - rng.uniform(6, 11, n)
    shift = -np.round(aim).astype(np.int64)
    kind = draw(st.sampled_from(("fill", "fill", "fill", "largest", "extremes", "right")))
    if kind == "largest":
        multiplier[:] = (1 << 31) - 1
    if kind == "extremes":
        shift = rng.choice([-31, -1, 0, 1, 8], n)
        multiplier = rng.choice([0, 1 << 30, (1 << 31) - 1], n)
    if kind == "right":  # all to the right, some further than the kernels' short way goes
        shift = rng.choice([-31, -17, -16, -1], n, p=[0.2, 0.2, 0.3, 0.3])
        multiplier = rng.choice([1 << 30, 3 << 29, (1 << 31) - 1], n)  # the first two meet ties
    most = np.floor(np.log2(((1 << 30) - 1) / np.maximum(bound, 1))).astype(np.int64)
    shift = np.clip(shift, -31, np.minimum(8, most))
    return multiplier.astype(np.int32), shift.astype(np.int8)


def biases(draw: Draw, rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.integers(-1, 2, n) * rng.integers(0, draw(st.sampled_from((1, 1000, 1 << 20, 1 << 26))), n)


def weighted(draw: Draw, rng: np.random.Generator, weight: np.ndarray, in_zp: int, bits: int) -> tuple[np.ndarray, ...]:
    """bias, folded bias, multiplier, shift for the rows of a weight of ``bits`` bits."""
    rows = weight.reshape(weight.shape[0], -1).astype(np.int64)
    bias = np.clip(biases(draw, rng, rows.shape[0]), -(1 << (21 + bits)), 1 << (21 + bits))
    folded = bias - in_zp * rows.sum(1)
    return bias, folded.astype(np.int32), *requantizers(draw, rng, np.abs(folded) + 128 * np.abs(rows).sum(1))


@st.composite
def conv2d(draw: Draw, depthwise: bool = False, size: int = 9) -> Case:
    rng = generator(draw)
    pick = lambda *choices: draw(st.sampled_from(choices))  # noqa: E731
    pointwise = not depthwise and pick(False, False, True)
    kernel = (1, 1) if pointwise else (pick(1, 2, 3, 4), pick(1, 2, 3, 5))
    groups = 1 if pointwise or depthwise else pick(1, 1, 1, 2, 3)
    per_group = pick(1, 2, 3, 4, 5, 8, 16, 17, 20)
    in_c = per_group * groups
    out_c = in_c if depthwise else groups * pick(1, 2, 3, 4, 5, 7, 8)
    if depthwise:
        groups = in_c
    stride, dilation = (pick(1, 1, 2, 3), pick(1, 1, 2)), (pick(1, 1, 2), pick(1, 1, 2))
    pad = (
        (0, 0)
        if pointwise
        else (draw(st.integers(0, kernel[0] * dilation[0] - 1)), draw(st.integers(0, kernel[1] * dilation[1] - 1)))
    )
    h, w = draw(st.integers(1, size)), draw(st.integers(1, size))
    # the far side may be padded by up to a window less one, whatever the near side is
    most = [
        ((h, w)[i] + pad[i] + (kernel[i] - 1) * dilation[i] - ((kernel[i] - 1) * dilation[i] + 1)) // stride[i] + 1
        for i in (0, 1)
    ]
    if pointwise:
        most = [((h, w)[i] - 1) // stride[i] + 1 for i in (0, 1)]
    out = (max(most[0] - pick(0, 0, 1), 1), max(most[1] - pick(0, 0, 1), 1))
    bits = pick(8, 8, 4, 2)
    in_zp, out_zp = draw(zero_points), draw(zero_points)
    low, high = draw(clamps())
    x = values(draw, rng, (h, w, in_c))
    weight = values(draw, rng, (out_c, *kernel, in_c // groups), bits)
    bias, folded, multiplier, shift = weighted(draw, rng, weight, in_zp, bits)
    acc = reference.conv2d(x, weight, bias, stride, dilation, pad, out, groups, in_zp)
    stored = weight[..., 0].transpose(1, 2, 0) if depthwise else weight
    rows = reference.pack(stored.reshape(-1, in_c) if depthwise else stored.reshape(out_c, -1), bits)
    integers = (h, w, in_c, *out, out_c, *kernel, *stride, *dilation, *pad, groups, bits, in_zp, out_zp, low, high)

    def scratch(kernel_set: str) -> int:
        if depthwise:
            return depthwise_scratch(kernel_set, in_c, kernel, bits)
        return conv2d_scratch(kernel_set, in_c, groups, kernel, bits, pointwise)

    expected = reference.finish(acc, multiplier, shift, out_zp, low, high)
    name = "depthwise" if depthwise else "conv2d"
    return Case(name, integers, (x, rows, folded, multiplier, shift), expected, scratch)


@st.composite
def linear(draw: Draw, size: int = 70) -> Case:
    rng = generator(draw)
    in_n, out_n, rows = draw(st.integers(1, size)), draw(st.integers(1, 13)), draw(st.sampled_from((1, 1, 2, 3)))
    bits = draw(st.sampled_from((8, 8, 4, 2)))
    in_zp, out_zp = draw(zero_points), draw(zero_points)
    low, high = draw(clamps())
    x, weight = values(draw, rng, (rows, in_n)), values(draw, rng, (out_n, in_n), bits)
    bias, folded, multiplier, shift = weighted(draw, rng, weight, in_zp, bits)
    acc = (x.astype(np.int64) - in_zp) @ weight.astype(np.int64).T + bias
    integers = (rows, in_n, out_n, bits, out_zp, low, high)
    arrays = (x, reference.pack(weight, bits), folded, multiplier, shift)
    expected = reference.finish(acc, multiplier, shift, out_zp, low, high)
    return Case("linear", integers, arrays, expected, lambda kernel_set: linear_scratch(kernel_set, in_n, bits))


def quantized(real: float) -> tuple[int, int]:
    """A positive real as (multiplier, shift), as TFLite's QuantizeMultiplier."""
    mantissa, exponent = np.frexp(real)
    multiplier = round(float(mantissa) * (1 << 31))
    return (1 << 30, int(exponent) + 1) if multiplier == 1 << 31 else (multiplier, int(exponent))


@st.composite
def operands(draw: Draw, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, int]:
    """a of n elements, b of b_n, and b_n."""
    b_n = draw(st.integers(1, 40))
    n = b_n * draw(st.sampled_from((1, 1, 2, 5)))
    return values(draw, rng, (n,)), values(draw, rng, (b_n,)), b_n


@st.composite
def add(draw: Draw) -> Case:
    rng = generator(draw)
    a, b, b_n = draw(operands(rng))
    scales = 2.0 ** rng.uniform(-8, 0, 3)
    twice = 2 * max(scales[0], scales[1])
    pairs = quantized(scales[0] / twice), quantized(scales[1] / twice), quantized(twice / ((1 << 20) * scales[2]))
    (a_m, a_s), (b_m, b_s), (o_m, o_s) = pairs
    a_zp, b_zp, out_zp = draw(zero_points), draw(zero_points), draw(zero_points)
    low, high = draw(clamps())
    numbers = {"a_zp": a_zp, "b_zp": b_zp, "a_m": a_m, "a_s": a_s, "b_m": b_m, "b_s": b_s, "o_m": o_m, "o_s": o_s}
    expected = reference.add(a, np.resize(b, a.shape), numbers, out_zp, low, high)
    integers = (a.size, b_n, a_m, b_m, o_m, a_s, b_s, o_s, a_zp, b_zp, out_zp, low, high)
    return Case("add", integers, (a, b), expected, in_place=draw(st.booleans()))


@st.composite
def mul(draw: Draw) -> Case:
    rng = generator(draw)
    a, b, b_n = draw(operands(rng))
    (multiplier,), (shift,) = requantizers(draw, rng, np.array([255 * 255]))
    a_zp, b_zp, out_zp = draw(zero_points), draw(zero_points), draw(zero_points)
    low, high = draw(clamps())
    acc = (a.astype(np.int64) - a_zp) * (np.resize(b, a.shape).astype(np.int64) - b_zp)
    integers = (a.size, b_n, int(multiplier), int(shift), a_zp, b_zp, out_zp, low, high)
    return Case(
        "mul", integers, (a, b), reference.finish(acc, multiplier, shift, out_zp, low, high), in_place=draw(st.booleans())
    )


@st.composite
def requant(draw: Draw) -> Case:
    rng = generator(draw)
    x = values(draw, rng, (draw(st.integers(1, 60)),))
    (multiplier,), (shift,) = requantizers(draw, rng, np.array([255]))
    in_zp, out_zp = draw(zero_points), draw(zero_points)
    low, high = draw(clamps())
    expected = reference.finish(x.astype(np.int64) - in_zp, multiplier, shift, out_zp, low, high)
    integers = (x.size, int(multiplier), int(shift), in_zp, out_zp, low, high)
    return Case("requant", integers, (x,), expected, in_place=draw(st.booleans()))


@st.composite
def simple(draw: Draw) -> Case:
    """Clamp, table, CRC, and the conversions of floats."""
    rng = generator(draw)
    x = values(draw, rng, (draw(st.integers(1, 60)),))
    kind = draw(st.sampled_from(("clamp", "lut", "crc", "quantize", "dequantize")))
    if kind == "clamp":
        low, high = draw(clamps())
        return Case("clamp", (x.size, low, high), (x,), np.clip(x, low, high), in_place=draw(st.booleans()))
    if kind == "lut":
        table = values(draw, rng, (256,))
        return Case("lut", (x.size,), (x, table), table[x.astype(int) + 128], in_place=draw(st.booleans()))
    if kind == "crc":
        return Case("crc", (x.size,), (x,), np.array([zlib.crc32(x.tobytes())], np.uint32))
    zero, scale = draw(zero_points), np.float32(2.0 ** rng.uniform(-9, 2))
    if kind == "dequantize":
        return Case("dequantize", (x.size, zero), (x, np.array([scale])), (x.astype(np.float32) - np.float32(zero)) * scale)
    real = (rng.normal(0, 200, x.size) * scale).astype(np.float32)
    real[: x.size // 3] = ((rng.integers(-300, 300, x.size // 3) + 0.5) * 0.25).astype(np.float32)  # ties where the scale is 1/4
    if draw(st.booleans()):
        scale = np.float32(0.25)
    real[-1] = draw(st.sampled_from((0.0, np.inf, -np.inf, np.nan, 3e38)))
    inverse = np.float32(1) / scale
    with np.errstate(invalid="ignore", over="ignore"):
        exact = np.clip(np.nan_to_num(np.round(real * inverse), nan=-1e6, posinf=1e6, neginf=-1e6), -1e6, 1e6)
    expected = np.where(np.isnan(real), -128, np.clip(exact + zero, -128, 127)).astype(np.int8)
    return Case("quantize", (x.size, zero), (real, np.array([inverse])), expected)


@st.composite
def softmax(draw: Draw) -> Case:
    rng = generator(draw)
    n = draw(st.integers(1, 40))
    x = values(draw, rng, (draw(st.integers(1, 3)), n))
    scale = 2.0 ** rng.uniform(-7, 0)
    table = np.round(2.0**22 * np.exp(-np.arange(256) * scale)).astype(np.uint32)
    e = table[(x.max(1, keepdims=True).astype(int) - x)].astype(np.int64)
    multiplier, shift = quantized(256 / (1 << 20))
    share = (e * ((1 << 53) // e.sum(1, keepdims=True))) >> 33
    expected = reference.finish(share, multiplier, shift, -128, -128, 127)
    real = np.exp(x * scale) / np.exp(x * scale).sum(1, keepdims=True)
    assert np.abs(np.clip(np.round(real * 256) - 128, -128, 127) - expected).max() <= 1
    return Case("softmax", (x.shape[0], n, multiplier, shift, -128), (x, table), expected, in_place=draw(st.booleans()))


@st.composite
def pool(draw: Draw, size: int = 9) -> Case:
    rng = generator(draw)
    average = draw(st.booleans())
    kernel = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    stride = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    dilation = (1, 1) if average else (draw(st.integers(1, 2)), draw(st.integers(1, 2)))
    pad = tuple(draw(st.integers(0, kernel[i % 2] // 2)) for i in range(4))
    reach = [(kernel[i] - 1) * dilation[i] + 1 for i in (0, 1)]
    h, w = (draw(st.integers(max(reach[i] - pad[i] - pad[i + 2], 1), reach[i] + size - 4)) for i in (0, 1))
    x = values(draw, rng, (h, w, draw(st.sampled_from((1, 3, 4, 5, 16, 17)))))
    out = tuple(((h, w)[i] + pad[i] + pad[i + 2] - reach[i]) // stride[i] + 1 for i in (0, 1))
    low, high = draw(clamps())
    in_zp, out_zp, include = draw(zero_points), draw(zero_points), draw(st.booleans())
    integers = [h, w, x.shape[2], *out, *kernel, *stride, *dilation, *pad, int(include), in_zp, out_zp, low, high]
    if not average:
        best = reference.max_pool(x, kernel, stride, dilation, pad[:2], out)
        return Case("maximum", (0, *integers), (x, np.zeros(0, np.int8)), np.clip(best, low, high).astype(np.int8))
    sums, divisors = reference.average_pool(x, kernel, stride, pad, out, include, in_zp)
    ratio = 2.0 ** rng.uniform(-1, 1)
    table = [(*quantized(ratio / max(int(d), 1)), int(d)) for d in np.unique(divisors)]
    rows = b"".join(struct.pack("<ibxH", *row) for row in table)
    multiplier, shift = np.zeros(out, np.int64), np.zeros(out, np.int64)
    for m, s, d in table:
        multiplier[divisors == d], shift[divisors == d] = m, s
    expected = reference.finish(sums, multiplier[..., None], shift[..., None], out_zp, low, high)
    return Case("average", (len(table), *integers), (x, np.frombuffer(rows, np.uint8)), expected)


@st.composite
def mean(draw: Draw) -> Case:
    rng = generator(draw)
    x = values(draw, rng, (draw(st.integers(1, 70)), draw(st.integers(1, 21))))
    multiplier, shift = quantized(2.0 ** rng.uniform(-1, 1) / x.shape[0])
    in_zp, out_zp = draw(zero_points), draw(zero_points)
    low, high = draw(clamps())
    expected = reference.finish((x.astype(np.int64) - in_zp).sum(0), multiplier, shift, out_zp, low, high)
    return Case("mean", (*x.shape, multiplier, shift, in_zp, out_zp, low, high), (x,), expected)


@st.composite
def move(draw: Draw) -> Case:
    """Concatenation of one input, padding, and gathering."""
    rng = generator(draw)
    kind = draw(st.sampled_from(("concat", "pad", "gather")))
    if kind == "concat":
        x = values(draw, rng, (draw(st.integers(1, 5)), draw(st.integers(1, 30))))
        gap = draw(st.integers(0, 9))
        (multiplier,), (shift,) = requantizers(draw, rng, np.array([255]))
        multiplier = int(multiplier) * draw(st.booleans())
        in_zp, out_zp = draw(zero_points), draw(zero_points)
        part = reference.finish(x.astype(np.int64) - in_zp, multiplier, shift, out_zp, -128, 127) if multiplier else x
        expected = np.full((x.shape[0], x.shape[1] + gap), 0x5A, np.int8)
        expected[:, : x.shape[1]] = part
        return Case("concat", (*x.shape, x.shape[1] + gap, multiplier, int(shift), in_zp, out_zp, -128, 127), (x,), expected)
    if kind == "pad":
        x = values(draw, rng, (draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.integers(1, 9))))
        sides = [draw(st.integers(0, 3)) for _ in range(4)]
        value = draw(zero_points)
        expected = np.pad(x, ((sides[0], sides[1]), (sides[2], sides[3]), (0, 0)), constant_values=value)
        return Case("pad", (*x.shape, *sides, value), (x,), expected)
    x = values(draw, rng, tuple(draw(st.integers(1, 6)) for _ in range(4)))
    view = x.transpose(draw(st.permutations(range(4))))
    start = [draw(st.integers(0, n - 1)) for n in view.shape]
    part = view[tuple(slice(s, None, draw(st.integers(1, 2))) for s in start)]
    offset = sum(s * t for s, t in zip(start, view.strides, strict=True))
    return Case("gather", (*part.shape, *part.strides, offset), (x,), np.ascontiguousarray(part))


@st.composite
def scale(draw: Draw) -> Case:
    """The requantization itself, at ties and ends."""
    rng = generator(draw)
    n = 64
    shift = rng.choice([-31, -20, -8, -1, 0, 1, 8], n)
    most = (1 << (30 - np.maximum(shift, 0))) - 1
    acc = np.where(rng.random(n) < 0.3, rng.choice([-1, 1], n) * most, rng.integers(-most, most + 1))
    multiplier = rng.choice([0, 1 << 30, 3 << 29, (1 << 31) - 1, int(rng.integers(1 << 30, 1 << 31))], n)
    small = rng.random(n) < 0.4
    acc = np.where(small, rng.integers(-40, 41, n), acc)  # with 2^30 and 3 * 2^29 these meet every tie
    shift = np.where(small, rng.choice([-3, -2, -1, 0], n), shift)
    expected = reference.requantize(acc, multiplier, shift).astype(np.int32)
    return Case("scale", (n,), (acc.astype(np.int32), multiplier.astype(np.int32), shift.astype(np.int8)), expected)


def everything(size: int = 9) -> st.SearchStrategy[list[Case]]:
    """Some cases of every kind."""
    kinds = [
        conv2d(size=size), conv2d(depthwise=True, size=size), linear(), add(), mul(), requant(), simple(), softmax(),
        pool(size=size), mean(), move(), scale(),
    ]  # fmt: skip
    return st.lists(st.one_of(kinds), min_size=3 * len(kinds), max_size=3 * len(kinds))
