"""What each kernel of ``edgekit.h`` must compute, in numpy's 64-bit integers, written from its contract and not from its code."""

from __future__ import annotations

import numpy as np

Array = np.ndarray


def requantize(acc: Array, multiplier: Array | int, shift: Array | int) -> Array:
    """gemmlowp: saturating rounding doubling high multiplication, then a rounding division by a power of two."""
    acc, multiplier, shift = np.broadcast_arrays(
        np.asarray(acc, np.int64), np.asarray(multiplier, np.int64), np.asarray(shift, np.int64)
    )
    product = (acc << np.maximum(shift, 0)) * multiplier
    high = (product + (1 << 30)) >> 31
    right = np.maximum(-shift, 0)
    away = np.where(right > 0, (np.abs(high) + (np.int64(1) << np.maximum(right, 1) >> 1)) >> right, np.abs(high))
    return np.sign(high) * away


def finish(acc: Array, multiplier: Array | int, shift: Array | int, zero: int, low: int, high: int) -> Array:
    return np.clip(requantize(acc, multiplier, shift) + zero, low, high).astype(np.int8)


def conv2d(
    x: Array, weight: Array, bias: Array, stride: tuple[int, int], dilation: tuple[int, int], pad: tuple[int, int],
    out: tuple[int, int], groups: int, in_zp: int,
) -> Array:  # fmt: skip
    """Accumulators (out_h, out_w, out_c) of x (h, w, in_c) and weight (out_c, kh, kw, in_c / groups); bias is not folded here."""
    out_c, kh, kw, n = weight.shape
    reach = [(out[i] - 1) * stride[i] + (weight.shape[1 + i] - 1) * dilation[i] + 1 for i in (0, 1)]
    after = [max(reach[i] - x.shape[i] - pad[i], 0) for i in (0, 1)]
    real = np.pad(x.astype(np.int64) - in_zp, ((pad[0], after[0]), (pad[1], after[1]), (0, 0)))
    acc = np.zeros((*out, out_c), np.int64) + bias
    per = out_c // groups
    for i in range(kh):
        for j in range(kw):
            window = real[i * dilation[0] :, j * dilation[1] :][: (out[0] - 1) * stride[0] + 1 : stride[0]]
            window = window[:, : (out[1] - 1) * stride[1] + 1 : stride[1]]
            for g in range(groups):
                block = slice(g * per, (g + 1) * per)
                acc[..., block] += window[..., g * n : (g + 1) * n] @ weight[block, i, j].astype(np.int64).T
    return acc


def pack(weights: Array, bits: int) -> Array:
    """Rows (rows, k) of small integers as groups of four bytes, filled up with zeros: weight 4 * f + i is field f of byte i."""
    if bits == 8:
        return weights.astype(np.int8).view(np.uint8)
    rows, k = weights.shape
    stored = np.zeros((rows, -(-k * bits // 32) * 4), np.uint8)
    for j in range(k):
        group, within = divmod(j, 32 // bits)
        stored[:, 4 * group + within % 4] |= ((weights[:, j].astype(np.int64) & ((1 << bits) - 1)) << within // 4 * bits).astype(
            np.uint8
        )
    return stored


def average_pool(
    x: Array, kernel: tuple[int, int], stride: tuple[int, int], pad: tuple[int, int, int, int], out: tuple[int, int],
    include: bool, in_zp: int,
) -> tuple[Array, Array]:  # fmt: skip
    """Sums (out_h, out_w, c) of x - in_zp over windows, and the divisor (out_h, out_w) of each. pad: top, left, bottom, right."""
    h, w, c = x.shape
    sums, divisors = np.zeros((*out, c), np.int64), np.zeros(out, np.int64)
    for i in range(out[0]):
        for j in range(out[1]):
            rows = [r for r in range(i * stride[0] - pad[0], i * stride[0] - pad[0] + kernel[0])]
            cols = [q for q in range(j * stride[1] - pad[1], j * stride[1] - pad[1] + kernel[1])]
            real = x[np.ix_([r for r in rows if 0 <= r < h], [q for q in cols if 0 <= q < w])].astype(np.int64) - in_zp
            sums[i, j] = real.sum((0, 1))
            divisors[i, j] = (
                sum(r < h + pad[2] for r in rows) * sum(q < w + pad[3] for q in cols)
                if include
                else real.shape[0] * real.shape[1]
            )
    return sums, divisors


def max_pool(
    x: Array,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    pad: tuple[int, int],
    out: tuple[int, int],
) -> Array:
    h, w, c = x.shape
    y = np.full((*out, c), -128, np.int8)
    for i in range(out[0]):
        for j in range(out[1]):
            rows = [i * stride[0] - pad[0] + k * dilation[0] for k in range(kernel[0])]
            cols = [j * stride[1] - pad[1] + k * dilation[1] for k in range(kernel[1])]
            part = x[np.ix_([r for r in rows if 0 <= r < h], [q for q in cols if 0 <= q < w])]
            if part.size:
                y[i, j] = part.max((0, 1))
    return y


def add(a: Array, b: Array, scales: dict[str, int], out_zp: int, low: int, high: int) -> Array:
    """TFLite's add: left shift by 20, both inputs to twice the greater scale, then to the output's."""
    u = requantize((a.astype(np.int64) - scales["a_zp"]) << 20, scales["a_m"], scales["a_s"])
    v = requantize((b.astype(np.int64) - scales["b_zp"]) << 20, scales["b_m"], scales["b_s"])
    return finish(u + v, scales["o_m"], scales["o_s"], out_zp, low, high)
