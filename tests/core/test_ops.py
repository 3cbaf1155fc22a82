"""Each ``edgekit::`` operator against loops in Python integers and numpy, written from the rule in the module's docstring."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from edgekit.frozen.binary_ops import BINARY_OPS
from edgekit.frozen.dynamic_ops import DYNAMIC_OPS
from edgekit.frozen.ops import LUT_FUNCTIONS, OPS, activation_bounds, integer_range, lut_table, multiplier
from edgekit.frozen.spiking_ops import SPIKING_OPS

ACTIVATIONS = st.sampled_from(["none", "relu", "relu6"])
ZERO_POINTS = st.one_of(st.sampled_from([-128, 127, 0]), st.integers(-128, 127))
SCALES = st.floats(1e-3, 2.0).map(lambda v: float(np.float32(v)))
SEEDS = st.integers(0, 2**32 - 1)


def integers(rng: np.random.Generator, shape: Sequence[int], bits: int = 8) -> np.ndarray:
    """Random integers of that many bits, a third of them the two extremes."""
    low, high = integer_range(bits)
    values = rng.integers(low, high + 1, shape)
    extreme = rng.integers(0, 6, shape)
    return np.where(extreme == 0, low, np.where(extreme == 1, high, values)).astype(np.int8 if bits <= 8 else np.int16)


def bounds(activation: str, scale: float, zero_point: int, bits: int) -> tuple[int, int]:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    six = round(Fraction(6) / Fraction(scale))  # Python rounds a Fraction half to even
    return (low if activation == "none" else zero_point, min(high, zero_point + six) if activation == "relu6" else high)


def requantized(acc: np.ndarray, in_scale: float, w_scale: np.ndarray, out_scale: float, out_zp: int, limits: Any) -> np.ndarray:
    """The one rounding rule, channel last: float32 accumulator times float32 multiplier, half to even."""
    m = (np.float32(in_scale) * w_scale.astype(np.float32)) / np.float32(out_scale)
    return np.clip(np.rint(acc.astype(np.float32) * m).astype(np.float64) + out_zp, *limits)


def assert_rounded(found: Tensor, exact: np.ndarray, zero_point: int, limits: tuple[int, int]) -> None:
    """``found`` is ``exact`` (Fractions) rounded half to even; within 1e-9 of a tie either neighbour is right."""
    for q, value in zip(found.flatten().tolist(), exact.flatten().tolist(), strict=True):
        allowed = {round(value), round(value + Fraction(1, 10**9)), round(value - Fraction(1, 10**9))}
        assert q in {min(max(v + zero_point, limits[0]), limits[1]) for v in allowed}


def call(name: str, *args: Any) -> Tensor:
    """Run the operator, and its fake kernel on meta tensors: both must agree in shape and dtype."""
    op = getattr(OPS, name).default
    result: Tensor = op(*args)

    def meta(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to("meta")
        return [meta(v) for v in value] if isinstance(value, list) else value

    fake = op(*map(meta, args))
    assert (fake.shape, fake.dtype) == (result.shape, result.dtype)
    assert result.is_contiguous()
    return result


@given(SEEDS, st.data())
def test_qconv2d_equals_integer_loops(seed: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    draw = data.draw
    groups, kh, kw = draw(st.sampled_from([1, 1, 2, 3])), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    cin, cout = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    stride, dilation, pad = ([draw(st.integers(low, 2)) for _ in range(2)] for low in (1, 1, 0))
    h, w = draw(st.integers(3, 6)), draw(st.integers(3, 6))
    bits, out_bits = draw(st.sampled_from([8, 4, 2])), draw(st.sampled_from([8, 8, 16]))
    in_zp, out_zp, in_scale, out_scale, act = draw(ZERO_POINTS), draw(ZERO_POINTS), draw(SCALES), draw(SCALES), draw(ACTIVATIONS)
    oh = (h + 2 * pad[0] - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    ow = (w + 2 * pad[1] - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    assume(oh > 0 and ow > 0)

    x, weight = integers(rng, (2, cin, h, w)), integers(rng, (cout, cin // groups, kh, kw), bits)
    bias = rng.choice([0, 17, -500, 2**30 + 1, -(2**31)], cout).astype(np.int32)
    w_scale = rng.uniform(1e-4, 1e-2, cout).astype(np.float32)

    acc = np.zeros((2, cout, oh, ow), dtype=object)  # Python integers: nothing can overflow
    for n, o, i, j in np.ndindex(acc.shape):
        total = int(bias[o])
        for c, a, b in np.ndindex(cin // groups, kh, kw):
            row, col = i * stride[0] + a * dilation[0] - pad[0], j * stride[1] + b * dilation[1] - pad[1]
            if 0 <= row < h and 0 <= col < w:
                channel = o // (cout // groups) * (cin // groups) + c
                total += (int(x[n, channel, row, col]) - in_zp) * int(weight[o, c, a, b])
        acc[n, o, i, j] = total
    limits = bounds(act, out_scale, out_zp, out_bits)
    wanted = requantized(acc.transpose(0, 2, 3, 1), in_scale, w_scale, out_scale, out_zp, limits).transpose(0, 3, 1, 2)

    found = call(
        "qconv2d", torch.from_numpy(x), torch.from_numpy(weight), torch.from_numpy(w_scale), torch.from_numpy(bias),
        in_scale, in_zp, out_scale, out_zp, act, stride, pad, dilation, groups, bits, out_bits,
    )  # fmt: skip
    np.testing.assert_array_equal(found.numpy(), wanted)


@given(SEEDS, st.data())
def test_qlinear_equals_integer_loops(seed: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    draw = data.draw
    cin, cout = draw(st.sampled_from([1, 7, 700])), draw(st.integers(1, 4))  # 700 * 255 * 128 > 2^24: float32(acc) rounds
    rows = draw(st.sampled_from([(1,), (3,), (2, 3)]))
    bits, out_bits = draw(st.sampled_from([8, 4, 2])), draw(st.sampled_from([8, 8, 16]))
    in_zp, out_zp, in_scale, out_scale, act = draw(ZERO_POINTS), draw(ZERO_POINTS), draw(SCALES), draw(SCALES), draw(ACTIVATIONS)
    x, weight = integers(rng, (*rows, cin)), integers(rng, (cout, cin), bits)
    bias = rng.integers(-(2**31), 2**31, cout).astype(np.int32)
    w_scale = rng.uniform(1e-9, 1e-4, cout).astype(np.float32)

    acc = (x.astype(object) - in_zp) @ weight.T.astype(object) + bias.astype(object)
    wanted = requantized(acc, in_scale, w_scale, out_scale, out_zp, bounds(act, out_scale, out_zp, out_bits))
    found = call(
        "qlinear", torch.from_numpy(x), torch.from_numpy(weight), torch.from_numpy(w_scale), torch.from_numpy(bias),
        in_scale, in_zp, out_scale, out_zp, act, bits, out_bits,
    )  # fmt: skip
    np.testing.assert_array_equal(found.numpy(), wanted)


@pytest.mark.parametrize("name", ["qadd", "qmul"])
@given(seed=SEEDS, data=st.data())
def test_binary_operators_equal_exact_fractions(name: str, seed: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    draw = data.draw
    a_shape, b_shape = draw(st.sampled_from([((2, 3, 2, 2), (2, 3, 2, 2)), ((1, 3, 4, 4), (1, 3, 1, 1)), ((2, 5), (5,))]))
    a, b = integers(rng, a_shape), integers(rng, b_shape)
    (a_s, b_s, o_s), (a_z, b_z, o_z) = (draw(SCALES) for _ in range(3)), (draw(ZERO_POINTS) for _ in range(3))
    act, out_bits = draw(ACTIVATIONS), draw(st.sampled_from([8, 8, 16]))
    left = (a.astype(object) - a_z) * Fraction(a_s)
    right = (b.astype(object) - b_z) * Fraction(b_s)
    exact = (left + right if name == "qadd" else left * right) / Fraction(o_s)
    found = call(name, torch.from_numpy(a), torch.from_numpy(b), a_s, a_z, b_s, b_z, o_s, o_z, act, out_bits)
    assert_rounded(found, exact, o_z, bounds(act, o_s, o_z, out_bits))


def windows(size: int, kernel: int, stride: int, pad: int, ceil_mode: bool) -> list[int]:
    """First input index of each pooling window; with ceil_mode a last window that starts inside the input or its left padding."""
    whole = size + 2 * pad - kernel
    count = (math.ceil(whole / stride) if ceil_mode else whole // stride) + 1
    return [i * stride - pad for i in range(count) if not ceil_mode or i * stride < size + pad]


def pooled(x: np.ndarray, data: st.DataObject, reduce: Callable[[list[int], int], Any]) -> tuple[np.ndarray, tuple[Any, ...]]:
    """Pool by loops: ``reduce(values inside, cells of the window that are input or padding)``."""
    kernel, stride = ([data.draw(st.integers(1, 3)) for _ in range(2)] for _ in range(2))
    pad = [data.draw(st.integers(0, k // 2)) for k in kernel]
    ceil_mode = data.draw(st.booleans())
    (h, w), (tops, lefts) = x.shape[2:], (windows(x.shape[2 + d], kernel[d], stride[d], pad[d], ceil_mode) for d in range(2))
    out = np.zeros((*x.shape[:2], len(tops), len(lefts)), dtype=object)
    for n, c, i, j in np.ndindex(out.shape):
        rows, cols = range(tops[i], min(tops[i] + kernel[0], h + pad[0])), range(lefts[j], min(lefts[j] + kernel[1], w + pad[1]))
        inside = [int(x[n, c, r, q]) for r in rows for q in cols if 0 <= r < h and 0 <= q < w]
        out[n, c, i, j] = reduce(inside, len(rows) * len(cols))
    return out, (kernel, stride, pad, ceil_mode)


@given(SEEDS, st.data())
def test_qmax_pool2d_equals_loops(seed: int, data: st.DataObject) -> None:
    x = integers(np.random.default_rng(seed), (2, 2, data.draw(st.integers(3, 6)), data.draw(st.integers(3, 6))))
    wanted, (kernel, stride, pad, ceil_mode) = pooled(x, data, lambda inside, _: max(inside))
    found = call("qmax_pool2d", torch.from_numpy(x), 0.1, 3, kernel, stride, pad, [1, 1], ceil_mode)
    np.testing.assert_array_equal(found.numpy(), wanted.astype(np.int64))


def test_qmax_pool2d_dilates() -> None:
    x = torch.arange(25, dtype=torch.int8).view(1, 1, 5, 5) - 12
    found = call("qmax_pool2d", x, 0.1, 0, [2, 2], [1, 1], [0, 0], [3, 2], False)
    assert found.tolist() == [[[[int(x[0, 0, i + 3, j + 2]) for j in range(3)] for i in range(2)]]]


@given(SEEDS, st.data())
def test_qavg_pool2d_equals_exact_fractions(seed: int, data: st.DataObject) -> None:
    x = integers(np.random.default_rng(seed), (1, 2, data.draw(st.integers(3, 6)), data.draw(st.integers(3, 6))))
    in_s, out_s, in_z, out_z = data.draw(SCALES), data.draw(SCALES), data.draw(ZERO_POINTS), data.draw(ZERO_POINTS)
    count_pad = data.draw(st.booleans())

    def mean(inside: list[int], cells: int) -> Fraction:  # padding is the real number 0
        return Fraction(sum(v - in_z for v in inside), cells if count_pad else len(inside)) * Fraction(in_s) / Fraction(out_s)

    exact, (kernel, stride, pad, ceil_mode) = pooled(x, data, mean)
    found = call("qavg_pool2d", torch.from_numpy(x), in_s, in_z, out_s, out_z, kernel, stride, pad, ceil_mode, count_pad)
    assert_rounded(found, exact, out_z, (-128, 127))


@given(SEEDS, SCALES, SCALES, ZERO_POINTS, ZERO_POINTS, st.sampled_from([8, 16]))
def test_qmean_equals_exact_fractions(seed: int, in_s: float, out_s: float, in_z: int, out_z: int, bits: int) -> None:
    rng = np.random.default_rng(seed)
    x = integers(rng, (2, 3, rng.integers(1, 6), rng.integers(1, 6)))
    exact = np.zeros((2, 3, 1, 1), dtype=object)
    for n, c in np.ndindex(2, 3):
        values = [int(v) - in_z for v in x[n, c].flatten()]
        exact[n, c, 0, 0] = Fraction(sum(values), len(values)) * Fraction(in_s) / Fraction(out_s)
    found = call("qmean", torch.from_numpy(x), in_s, in_z, out_s, out_z, bits)
    assert_rounded(found, exact, out_z, integer_range(bits))


@given(SEEDS, st.lists(st.tuples(SCALES, ZERO_POINTS), min_size=1, max_size=3), SCALES, ZERO_POINTS, st.sampled_from([1, 2, -1]))
def test_qconcat_requantizes_each_part(seed: int, parts: list[tuple[float, int]], out_s: float, out_z: int, dim: int) -> None:
    rng = np.random.default_rng(seed)
    shapes = [[1, 2, 3, 2] for _ in parts]
    for shape in shapes:
        shape[dim] = int(rng.integers(1, 4))
    xs = [integers(rng, shape) for shape in shapes]
    exact = np.concatenate(
        [(x.astype(object) - z) * Fraction(s) / Fraction(out_s) for x, (s, z) in zip(xs, parts, strict=True)], axis=dim
    )
    scales, zero_points = [s for s, _ in parts], [z for _, z in parts]
    found = call("qconcat", [torch.from_numpy(x) for x in xs], scales, zero_points, out_s, out_z, dim)
    assert_rounded(found, exact, out_z, (-128, 127))


def test_qconcat_with_equal_parameters_copies() -> None:
    xs = [torch.randint(-128, 128, (1, 4, 3, 3), dtype=torch.int8) for _ in range(2)]
    assert torch.equal(call("qconcat", xs, [0.037, 0.037], [-5, -5], 0.037, -5, 1), torch.cat(xs, 1))


@given(SEEDS, SCALES, ZERO_POINTS, st.sampled_from([8, 16]))
def test_quantize_multiplies_by_the_float32_reciprocal(seed: int, scale: float, zero_point: int, bits: int) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((3, 7)) * 100 * scale).astype(np.float32)
    x[0, :4] = [1e30, -1e30, 0.0, -0.0]
    wanted = np.clip(np.rint(x * np.float32(1.0 / scale)).astype(np.float64) + zero_point, *integer_range(bits))
    np.testing.assert_array_equal(call("quantize", torch.from_numpy(x), scale, zero_point, bits).numpy(), wanted)


@given(SCALES, ZERO_POINTS)
def test_quantize_undoes_dequantize(scale: float, zero_point: int) -> None:
    q = torch.arange(-128, 128).to(torch.int8)
    real = call("dequantize", q, scale, zero_point)
    np.testing.assert_array_equal(real.numpy(), (np.arange(-128, 128, dtype=np.float32) - zero_point) * np.float32(scale))
    assert torch.equal(call("quantize", real, scale, zero_point, 8), q)


@given(SEEDS, ZERO_POINTS, st.data())
def test_moves_equal_numpy(seed: int, zero_point: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    x = integers(rng, (2, 3, 4, 5))
    t, q = torch.from_numpy(x), (0.1, zero_point)
    left, right, top, bottom = (data.draw(st.integers(0, 3)) for _ in range(4))
    padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=zero_point)
    np.testing.assert_array_equal(call("qpad", t, [left, right, top, bottom], *q), padded)
    dims = data.draw(st.permutations(range(4)))
    np.testing.assert_array_equal(call("qpermute", t, list(dims), *q), x.transpose(dims))
    np.testing.assert_array_equal(call("qreshape", t, [2, -1], *q), x.reshape(2, -1))
    dim, start, end, step = data.draw(st.tuples(st.integers(0, 3), st.integers(0, 1), st.integers(2, 5), st.integers(1, 3)))
    index = [slice(None)] * 4
    index[dim] = slice(start, end, step)
    np.testing.assert_array_equal(call("qslice", t, dim, start, end, step, *q), x[tuple(index)])


LUT_TRUTH: dict[str, Callable[[float], float]] = {
    "relu": lambda v: max(v, 0.0),
    "relu6": lambda v: min(max(v, 0.0), 6.0),
    "sigmoid": lambda v: 1 / (1 + math.exp(-v)) if v > -700 else 0.0,
    "tanh": math.tanh,
    "silu": lambda v: v / (1 + math.exp(-v)) if v > -700 else 0.0,
    "hardswish": lambda v: v * min(max(v + 3, 0.0), 6.0) / 6,
    "hardsigmoid": lambda v: min(max(v + 3, 0.0), 6.0) / 6,
    "gelu": lambda v: v * (1 + math.erf(v / math.sqrt(2))) / 2,
    "leaky_relu": lambda v: v if v > 0 else 0.01 * v,
    "elu": lambda v: v if v > 0 else math.expm1(v),
}


def test_every_table_function_has_a_truth() -> None:
    assert set(LUT_TRUTH) == set(LUT_FUNCTIONS)


@pytest.mark.parametrize("function", sorted(LUT_TRUTH))
@given(in_s=SCALES, in_z=ZERO_POINTS, out_s=SCALES, out_z=ZERO_POINTS)
def test_qlut_equals_the_function(function: str, in_s: float, in_z: int, out_s: float, out_z: int) -> None:
    q = torch.arange(-128, 128).to(torch.int8)
    exact = np.array([Fraction(LUT_TRUTH[function](in_s * (v - in_z))) / Fraction(out_s) for v in range(-128, 128)], dtype=object)
    table = lut_table(function, in_s, in_z, out_s, out_z)
    found = call("qlut", q.view(2, 128), table, function, in_s, in_z, out_s, out_z)
    assert_rounded(found, exact, out_z, (-128, 127))


def test_ties_go_to_the_even_integer() -> None:
    """Scales that are powers of two make the ties exact: 0.5, 1.5, 2.5, 3.5 and their negatives."""
    even = [-4, -2, -2, 0, 0, 2, 2, 4]
    halves = torch.tensor([-7, -5, -3, -1, 1, 3, 5, 7], dtype=torch.int8)
    assert call("quantize", halves.float(), 2.0, 0, 8).tolist() == even
    assert call("qadd", halves, torch.zeros_like(halves), 1.0, 0, 1.0, 0, 2.0, 0, "none", 8).tolist() == even
    assert call("qmul", halves, torch.ones_like(halves), 1.0, 0, 1.0, 0, 2.0, 0, "none", 8).tolist() == even
    pair = torch.stack([halves, torch.zeros_like(halves)], -1).view(1, 8, 1, 2)
    assert call("qmean", pair, 1.0, 0, 1.0, 0, 8).flatten().tolist() == even
    assert call("qavg_pool2d", pair, 1.0, 0, 1.0, 0, [1, 2], [1, 2], [0, 0], False, True).flatten().tolist() == even
    one, zero = torch.ones(1, 1, dtype=torch.int8), torch.zeros(1, dtype=torch.int32)
    found = call("qlinear", halves.view(8, 1), one, torch.ones(1), zero, 1.0, 0, 2.0, 0, "none", 8, 8)
    assert found.flatten().tolist() == even
    found = call("qconcat", [halves.view(1, 8)], [1.0], [0], 2.0, 0, 1)
    assert found.flatten().tolist() == even


def test_zero_point_is_added_after_rounding() -> None:
    x = torch.tensor([1.0, 3.0])
    assert call("quantize", x, 2.0, 1, 8).tolist() == [1, 3]  # round(0.5) + 1 and round(1.5) + 1, not round(1.5) and round(2.5)


def test_activations_narrow_the_clamp() -> None:
    assert activation_bounds("none", 0.1, -20) == (-128, 127)
    assert activation_bounds("relu", 0.1, -20) == (-20, 127)
    assert activation_bounds("relu6", 0.1, -20) == (-20, 40)
    assert activation_bounds("relu6", 0.01, -128) == (-128, 127)  # 600 steps do not fit
    assert activation_bounds("relu6", 0.01, -128, 16) == (-128, 472)
    assert activation_bounds("none", 0.1, 0, 16) == (-32768, 32767)
    with pytest.raises(ValueError, match=r"'swish'.*none, relu, relu6"):
        activation_bounds("swish", 0.1, 0)


def test_multiplier_is_float32_in_the_stated_order() -> None:
    scale = torch.rand(1000)
    wanted = np.float32(0.037) * scale.numpy() / np.float32(0.11)
    assert torch.equal(multiplier(0.037, scale, 0.11), torch.from_numpy(wanted))


def samples() -> dict[str, tuple[Any, ...]]:
    """Arguments for every operator."""
    x = torch.randint(-128, 128, (1, 4, 6, 6), dtype=torch.int8)
    w, ws, b = torch.randint(-8, 8, (2, 4, 3, 3), dtype=torch.int8), torch.rand(2) + 0.1, torch.arange(2, dtype=torch.int32)
    table = lut_table("tanh", 0.05, 0, 1 / 128, 0)
    pool = ([2, 2], [2, 2], [1, 1])
    return {
        "quantize": (torch.randn(2, 3), 0.1, 3, 8),
        "dequantize": (x, 0.1, 3),
        "qconv2d": (x, w, ws, b, 0.1, 1, 0.2, 2, "relu", [1, 2], [1, 0], [1, 1], 1, 4, 8),
        "qlinear": (x, torch.randint(-8, 8, (2, 6), dtype=torch.int8), ws, b, 0.1, 1, 0.2, 2, "none", 4, 8),
        "qadd": (x, x + 1, 0.1, 1, 0.2, 2, 0.3, 3, "relu", 8),
        "qmul": (x, x + 1, 0.1, 1, 0.2, 2, 0.3, 3, "none", 16),
        "qmean": (x, 0.1, 1, 0.2, 2, 8),
        "qavg_pool2d": (x, 0.1, 1, 0.2, 2, *pool, True, False),
        "qmax_pool2d": (x, 0.1, 1, *pool, [1, 1], True),
        "qconcat": ([x, x + 1], [0.1, 0.2], [0, 1], 0.3, 2, 1),
        "qpad": (x, [1, 0, 2, 1], 0.1, 5),
        "qreshape": (x, [1, -1], 0.1, 5),
        "qpermute": (x, [0, 2, 3, 1], 0.1, 5),
        "qslice": (x, 2, 1, 5, 2, 0.1, 5),
        "qlut": (x, table, "tanh", 0.05, 0, 1 / 128, 0),
    }


def registered() -> list[str]:
    names = (name.split("::") for name in torch._C._dispatch_get_all_op_names())
    return sorted(
        {n for space, n in names if space == "edgekit"} - BINARY_OPS - DYNAMIC_OPS - SPIKING_OPS
    )  # in files of their own


@pytest.mark.parametrize("name", registered())
def test_torch_accepts_the_operator(name: str) -> None:
    """torch's own checks: schema (nothing is mutated or aliased), fake kernel, tracing."""
    given_args = samples()
    assert name in given_args, f"add arguments for {name} to samples()"
    torch.library.opcheck(getattr(OPS, name).default, given_args[name])
