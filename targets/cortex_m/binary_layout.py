"""1-bit weights and thresholds as the kernels read them (``firmware_sim/runtime/edgekit.h``, "1-bit layers").

Signs are bool arrays here, True for +1. In ``transposed`` weights a word holds those of 32 outputs to one input, so that a kernel
counts 32 outputs at once in bit planes; their thresholds are bit planes too.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "from_rows",
    "from_transposed",
    "n_planes",
    "packed_words",
    "product_planes",
    "product_table",
    "rows",
    "threshold_planes",
    "transposed",
    "unpacked_bytes",
    "words",
]

Bits = NDArray[np.bool_]
Words = NDArray[np.uint32]


def words(count: int) -> int:
    """Words of 32 bits for so many signs."""
    return -(-count // 32)


def packed_words(bits: Bits) -> Words:
    """(..., n) signs as (..., ceil(n / 32)) words, the first in the lowest bit; what is left over is 0."""
    wide = np.pad(bits, [(0, 0)] * (bits.ndim - 1) + [(0, -bits.shape[-1] % 32)])
    stored: Words = np.ascontiguousarray(np.packbits(wide, axis=-1, bitorder="little")).view("<u4")
    return stored


def _unpacked_words(stored: Words, count: int) -> Bits:
    found: Bits = np.unpackbits(np.ascontiguousarray(stored).view(np.uint8), axis=-1, bitorder="little")[..., :count].astype(bool)
    return found


def unpacked_bytes(packed: NDArray[np.uint8], count: int) -> Bits:
    """The program's packed bytes (..., ceil(count / 8)) as signs (..., count)."""
    found: Bits = np.unpackbits(packed, axis=-1, bitorder="little")[..., :count].astype(bool)
    return found


def transposed(weight: Bits) -> Words:
    """Signs (O, ...) as (inputs, ceil(O / 32)) words, inputs in the order of the other axes."""
    return packed_words(np.ascontiguousarray(weight.reshape(len(weight), -1).T))


def from_transposed(stored: Words, outputs: int) -> Bits:
    """The signs (outputs, inputs) of :func:`transposed` words."""
    return np.ascontiguousarray(_unpacked_words(stored.reshape(-1, words(outputs)), outputs).T)


def rows(weight: Bits) -> Words:
    """Signs (O, taps, C) as (O, taps, ceil(C / 32)) words."""
    return packed_words(weight)


def from_rows(stored: Words, taps: int, channels: int) -> Bits:
    """The signs (O, taps, channels) of :func:`rows` words."""
    return _unpacked_words(stored.reshape(-1, taps, words(channels)), channels)


def n_planes(k: int) -> int:
    """Bit planes that a count over k inputs takes in the kernels."""
    bits = (2 * k + 2).bit_length()
    return max(8, bits + bits % 2)


def product_planes(k: int, unsigned: bool) -> int:
    """Bit planes of ``ek_binary_matmul_s8``: counts of twice k, or of k."""
    return n_planes(k // 2 if unsigned else k)


def product_table(results: NDArray[np.int8], unsigned: bool) -> NDArray[np.int8]:
    """Results of the sums -k to k in the kernel's order: every second one first, with ``unsigned`` the others behind."""
    return np.concatenate([results[::2], results[1::2]]) if unsigned else np.ascontiguousarray(results[::2])


def threshold_planes(threshold: NDArray[np.int64], sums: NDArray[np.int64], k: int) -> Words:
    """Both tables of a transposed layer's thresholds, (2 * planes, ceil(O / 32)) words.

    Args:
        threshold: acc >= threshold is +1; any integers.
        sums: of each output's weights, +1 and -1.
        k: how many there are.
    """
    t = np.clip(threshold, -k, k + 1)
    t = t + (t - sums) % 2
    low, high = k + (t + sums) // 2, k + 1 + (sums - t) // 2
    spare = -len(t) % 32
    tables = [np.pad(low, (0, spare), constant_values=2 * k + 1), np.pad(high, (0, spare))]
    planes = np.arange(n_planes(k))[:, None]
    return np.concatenate([packed_words((table >> planes & 1).astype(bool)) for table in tables])
