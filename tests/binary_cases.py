"""Random cases for the 1-bit kernels, beside the sums of products of +1 and -1 that numpy computes."""

from __future__ import annotations

import firmware_reference as reference
import numpy as np
from firmware_cases import Case, Draw, clamps, generator, requantizers, values, zero_points
from hypothesis import strategies as st

from edgekit.firmware_sim.kernels import (
    binary_matmul_scratch,
    binary_planes_scratch,
    binary_rows_scratch,
    binary_vectors_scratch,
)
from edgekit.targets.cortex_m import binary_layout as layout


def signs(draw: Draw, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """bool: evenly, mostly one of the two, or all alike."""
    share = draw(st.sampled_from((0.5, 0.5, 0.5, 0.05, 0.9, 0.0, 1.0)))
    return rng.random(shape) < share


@st.composite
def binarize(draw: Draw) -> Case:
    rng = generator(draw)
    positions, channels = draw(st.integers(1, 5)), draw(st.sampled_from((1, 3, 8, 31, 32, 33, 64, 70)))
    x = values(draw, rng, (positions, channels))
    n = draw(st.sampled_from((1, channels)))
    threshold = np.where(rng.random(n) < 0.2, rng.choice([-128, 128, 300, -300], n), rng.integers(-128, 129, n)).astype(np.int16)
    expected = layout.packed_words(x >= threshold)
    return Case("binarize", (positions, channels, n), (x, threshold), expected)


@st.composite
def window(draw: Draw, size: int) -> tuple[tuple[int, ...], ...]:
    """Image, kernel, stride, dilation, padding and output; the far side may be padded otherwise than the near one."""
    pick = lambda *choices: draw(st.sampled_from(choices))  # noqa: E731
    kernel = pick((1, 1), (1, 1), (3, 3), (3, 3), (2, 3), (1, 5), (4, 2))
    stride, dilation = (pick(1, 1, 2, 3), pick(1, 1, 2)), (pick(1, 1, 2), pick(1, 1, 2))
    reach = [(kernel[i] - 1) * dilation[i] + 1 for i in (0, 1)]
    pad = tuple(draw(st.integers(0, reach[i] - 1)) for i in (0, 1)) if pick(True, True, False) else (0, 0)
    image = tuple(draw(st.integers(max(reach[i] - pad[i], 1), reach[i] + size)) for i in (0, 1))
    far = pad if pick(True, False) else (0, 0)
    out = tuple(max((image[i] + pad[i] + far[i] - reach[i]) // stride[i] + 1, 1) for i in (0, 1))
    return image, kernel, stride, dilation, pad, out


@st.composite
def binary(draw: Draw, kind: str, size: int = 5, most: int = 70) -> Case:
    """A convolution, or a linear layer ("vectors"): a 1x1 convolution."""
    rng = generator(draw)
    image, kernel, stride, dilation, pad, out = draw(window(size))
    if kind == "vectors":
        out, kernel, stride, dilation, pad = image, (1, 1), (1, 1), (1, 1), (0, 0)
    groups = 1 if kind == "vectors" else draw(st.sampled_from((1, 1, 2, 3)))
    per_group = draw(st.sampled_from([c for c in (1, 2, 5, 8, 31, 32, 33, 40, 64, 70) if c * groups <= most]))
    out_c = groups * draw(st.sampled_from([c for c in (1, 3, 10, 32, 33, 64, 100, 130) if c * groups <= most + 60]))
    in_c, packed = per_group * groups, draw(st.booleans())
    x, weight = signs(draw, rng, (*image, in_c)), signs(draw, rng, (out_c, *kernel, per_group))
    zeros = np.zeros(out_c, np.int64)
    acc = reference.conv2d(
        2 * x.astype(np.int64) - 1, 2 * weight.astype(np.int64) - 1, zeros, stride, dilation, pad, out, groups, 0
    )
    k, sums = kernel[0] * kernel[1] * per_group, (2 * weight.astype(np.int64) - 1).reshape(out_c, -1).sum(1)
    transposed = kind == "vectors"
    stored = layout.transposed(weight) if transposed else layout.rows(weight.reshape(out_c, -1, per_group))
    out_zp, (low, high) = draw(zero_points), draw(clamps())
    planes = layout.n_planes(k)
    if packed:
        spread = draw(st.sampled_from((1, k + 2, 3 * k)))
        threshold = rng.integers(-spread, spread + 1, out_c) + draw(st.integers(-2, 2))
        table = layout.threshold_planes(threshold, sums, k) if transposed else threshold.astype(np.int32)
        arrays: tuple[np.ndarray, ...] = (layout.packed_words(x), stored, table)
        expected = layout.packed_words(acc >= threshold)
    else:
        bias = rng.integers(-k, k + 1, out_c) * draw(st.sampled_from((0, 1, 1000)))
        multiplier, shift = requantizers(draw, rng, np.abs(bias) + 4 * k)
        base = np.concatenate([bias - sums - 2 * k, bias + sums + 2 * k]) if transposed else bias
        arrays = (layout.packed_words(x), stored, base.astype(np.int32), multiplier, shift)
        expected = reference.finish(acc + bias, multiplier, shift, out_zp, low, high)

    sizes = (*image, in_c, *out, out_c, *kernel, *stride, *dilation, *pad, groups)

    def scratch(kernel_set: str) -> int:
        if kind == "rows":
            return binary_rows_scratch(in_c, groups, kernel)
        if kind == "vectors":
            return binary_vectors_scratch(kernel_set, in_c, out_c)
        return binary_planes_scratch(kernel_set, in_c, groups, kernel, out, planes)

    return Case(f"binary_{kind}", (int(packed), *sizes, planes, out_zp, low, high), arrays, expected, scratch)


@st.composite
def matmul(draw: Draw, most: int = 300) -> Case:
    """Products of packed matrices; what a sum becomes is any table."""
    rng = generator(draw)
    batch, m = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    n = draw(st.sampled_from((1, 3, 7, 8, 20, 31, 32, 33, 64, 100, 127, 128, 130)))
    k = draw(st.sampled_from([c for c in (1, 5, 16, 31, 32, 33, 64, 100, 126, 127, 130, 255, 256, 300) if c <= most]))
    unsigned = draw(st.booleans())
    a, b = signs(draw, rng, (batch, m, k)), signs(draw, rng, (batch, n, k))
    left, right = a.astype(np.int64), 2 * b.astype(np.int64) - 1
    acc = (left if unsigned else 2 * left - 1) @ right.transpose(0, 2, 1)
    result = rng.integers(-128, 128, 2 * k + 1).astype(np.int8)
    planes = layout.product_planes(k, unsigned)
    table = layout.product_table(result, unsigned)
    arrays = (layout.packed_words(a), layout.packed_words(b), table)
    integers = (batch, m, n, k, planes, int(unsigned))
    return Case(
        "binary_matmul", integers, arrays, result[acc + k], lambda kernel_set: binary_matmul_scratch(kernel_set, n, k, planes)
    )
