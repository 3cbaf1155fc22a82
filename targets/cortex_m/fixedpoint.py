"""TFLite's fixed-point requantization in numpy: a real multiplier as Q31 and a shift, applied with its two roundings.

``multiply(x, m, shift)`` is gemmlowp's ``MultiplyByQuantizedMultiplier`` as TFLite and its version for microcontrollers use it: a
rounding doubling high multiplication (ties up), then a rounding right shift (ties away from zero). Rounding twice may differ
from one rounding by one; firmware does exactly this, so that it can be compared bit by bit.
Source: B. Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", 2018.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["MAX_SHIFT", "Ints", "high_multiply", "multiply", "quantize_multiplier", "round_shift"]

Ints = NDArray[np.int64]

MAX_SHIFT = 8
"""Largest left shift of a multiplier that the firmware's kernels take: real multipliers are below 2 ** 8."""


def quantize_multiplier(real: float) -> tuple[int, int]:
    """``(mantissa, shift)`` with ``real ~ mantissa * 2 ** (shift - 31)``; mantissa in [2**30, 2**31), 0 for what is too small.

    Raises:
        ValueError: not a finite number >= 0, or 2 ** MAX_SHIFT or more.
    """
    if not math.isfinite(real) or real < 0:
        raise ValueError(f"multiplier {real}: expected a finite number >= 0")
    if real == 0:
        return 0, 0
    fraction, shift = math.frexp(real)
    mantissa = math.floor(fraction * (1 << 31) + 0.5)
    if mantissa == 1 << 31:
        mantissa, shift = mantissa // 2, shift + 1
    if shift < -31:
        return 0, 0
    if shift > MAX_SHIFT:
        raise ValueError(f"multiplier {real:.6g}: not below {1 << MAX_SHIFT}")
    return mantissa, shift


def high_multiply(a: ArrayLike, b: ArrayLike) -> Ints:
    """``round(a * b / 2 ** 31)`` for values of 32 bits, ties up: gemmlowp's SaturatingRoundingDoublingHighMul."""
    product: Ints = np.asarray(a, np.int64) * np.asarray(b, np.int64)
    return (product + (1 << 30)) >> 31


def round_shift(x: ArrayLike, exponent: ArrayLike) -> Ints:
    """``round(x / 2 ** exponent)``, half away from zero, for exponents 0 to 31."""
    value, bits = np.asarray(x, np.int64), np.asarray(exponent, np.int64)
    mask = (np.int64(1) << bits) - 1
    threshold = (mask >> 1) + (value < 0)
    return (value >> bits) + ((value & mask) > threshold)


def multiply(x: ArrayLike, mantissa: ArrayLike, shift: ArrayLike) -> Ints:
    """``x * mantissa * 2 ** (shift - 31)`` with TFLite's two roundings; ``x << shift`` must be below 2 ** 30."""
    power = np.asarray(shift, np.int64)
    left = np.asarray(x, np.int64) << np.maximum(power, 0)
    return round_shift(high_multiply(left, mantissa), np.maximum(-power, 0))
