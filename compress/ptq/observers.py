"""Ranges of activations from calibration data, in memory that does not grow with the number of samples.

Each observer sees the same values twice: first for the extremes, then, where the method needs it, for a histogram of fixed size
between them. Methods: minmax; moving average over batches (Jacob et al. 2018); percentile and entropy (Migacz 2017); mse, the
clip with the least quantization error (as in Banner et al. 2019, found by search instead of in closed form).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from edgekit.frozen.ops import activation_bounds

__all__ = ["ActQ", "Observer", "choose_range", "narrowed", "quantization_of"]

BINS = 2048
_MOMENTUM = 0.1

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class ActQ:
    """Quantization of one activation: ``real = scale * (q - zero_point)``, signed integers of ``bits`` bits.

    Attributes:
        few: only the top ``2 ** few`` integers are used; 0: all.
        floor: the least scale with which whatever the layer can make is no lower than the lowest of them.
    """

    scale: float
    zero_point: int
    bits: int = 8
    few: int = 0
    floor: float = 0.0

    def bounds(self, activation: str, scale: float | None = None) -> tuple[int, int]:
        """Least and greatest integer after a fused activation; ``scale``: another one than its own."""
        low, high = activation_bounds(activation, self.scale if scale is None else scale, self.zero_point, self.bits)
        return (max(low, high + 1 - (1 << self.few)) if self.few else low), high

    def scaled(self, scale: float) -> ActQ:
        """The same with a learned scale, not below ``floor``."""
        return replace(self, scale=max(scale, _float32(self.floor)))


class Observer:
    """Extremes and a histogram of all values shown to it.

    Attributes:
        low, high: extremes over everything; ``mean_low``, ``mean_high``: their moving averages over batches.
        counts: histogram between ``low`` and ``high`` (:data:`BINS` bins), all zero before :meth:`count`.
    """

    def __init__(self) -> None:
        self.low, self.high = float("inf"), float("-inf")
        self.mean_low, self.mean_high = 0.0, 0.0
        self.counts: Floats = np.zeros(BINS)

    def extend(self, values: Tensor) -> None:
        """First pass: extremes of one batch."""
        low, high = (float(v) for v in torch.aminmax(values))
        if self.low > self.high:
            self.mean_low, self.mean_high = low, high
        else:
            self.mean_low += _MOMENTUM * (low - self.mean_low)
            self.mean_high += _MOMENTUM * (high - self.mean_high)
        self.low, self.high = min(self.low, low), max(self.high, high)

    def count(self, values: Tensor) -> None:
        """Second pass: histogram of one batch."""
        if self.high > self.low:
            self.counts += torch.histc(values.float(), BINS, self.low, self.high).double().numpy()

    def centers(self) -> Floats:
        """Middle of each bin."""
        width = (self.high - self.low) / BINS
        return np.asarray(self.low + width * (np.arange(BINS) + 0.5), np.float64)


def quantization_of(low: float, high: float, bits: int = 8, symmetric: bool = False) -> ActQ:
    """Scale and zero point for a range; zero is always exactly representable, and the scale is a float32 value.

    A range that is never negative keeps the whole integer range for its positive part also when ``symmetric``. With 16 bits the
    zero point is always 0, as kernels for them demand; half of the range of what is never negative is not missed.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    qmin, qmax = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    if high == low:
        return ActQ(1.0, 0, bits)
    if (symmetric and low < 0) or bits == 16:
        return ActQ(_float32(max(-low, high) / qmax), 0, bits)
    scale = _float32((high - low) / (qmax - qmin))
    return ActQ(scale, int(np.clip(round(qmin - low / scale), qmin, qmax)), bits)


def narrowed(low: float, high: float, bits: int, least: float) -> ActQ:
    """8-bit quantization with only the top ``2 ** bits`` integers: ``narrowed(0.0, 3.0, 4, 0.0).zero_point == 112``.

    What a ReLU made is held on them by its own clamp and by the saturation of int8: no operator and no target needs to know. So
    is what a function made that has a least value, since the range goes down to it. What enters from float has to be clamped.

    Args:
        least: the least value that the layer can make: 0 after a ReLU, -0.17 after a GELU, -inf for what enters from float.
    """
    low, high = (min(low, 0.0) if least == -np.inf else least), max(high, 0.0)
    steps = (1 << bits) - 1
    if high == low:
        return ActQ(1.0, 127 - steps, 8, bits)
    scale = _float32((high - low) / steps)
    below = int(np.clip(round(-low / scale), 0, steps))
    return ActQ(scale, 127 - steps + below, 8, bits, -least / (below + 0.49) if -np.inf < least < 0 else 0.0)


def choose_range(
    observer: Observer, method: str, percentile: float, bits: int = 8, symmetric: bool = False
) -> tuple[float, float]:
    """The range (low, high) that ``method`` takes from an observer; see :class:`edgekit.compress.ptq.settings.Quantization`."""
    if method == "minmax" or observer.high <= observer.low:
        return observer.low, observer.high
    if method == "moving_average":
        return observer.mean_low, observer.mean_high
    if method == "percentile":
        return _percentile(observer, percentile)
    score = _mse if method == "mse" else _divergence
    ratios = np.linspace(0.3, 1.0, 71) if bits >= 8 else np.linspace(0.05, 1.0, 96)
    candidates = [(observer.low * r, observer.high * r) for r in ratios]
    errors = [score(observer, quantization_of(low, high, bits, symmetric)) for low, high in candidates]
    return candidates[int(np.argmin(errors))]


def _float32(value: float) -> float:
    return float(np.float32(max(value, 1e-9)))


def _percentile(observer: Observer, percentile: float) -> tuple[float, float]:
    share = np.cumsum(observer.counts) / max(observer.counts.sum(), 1)
    cut = (100 - percentile) / 100
    centers = observer.centers()
    low = observer.low if observer.low >= 0 else float(centers[int(np.searchsorted(share, cut))])
    high = observer.high if observer.high <= 0 else float(centers[min(int(np.searchsorted(share, 1 - cut)), BINS - 1)])
    return min(low, 0.0), max(high, 0.0)


def _quantized(observer: Observer, q: ActQ) -> Floats:
    qmin, qmax = -(1 << (q.bits - 1)), (1 << (q.bits - 1)) - 1
    integers = np.clip(np.round(observer.centers() / q.scale) + q.zero_point, qmin, qmax)
    result: Floats = (integers - q.zero_point) * q.scale
    return result


def _mse(observer: Observer, q: ActQ) -> float:
    return float((observer.counts * (_quantized(observer, q) - observer.centers()) ** 2).sum())


def _divergence(observer: Observer, q: ActQ) -> float:
    """Kullback-Leibler divergence of the clipped distribution from its quantized form (zeros excluded: they are exact)."""
    counts = observer.counts.copy()
    centers = observer.centers()
    counts[np.abs(centers) < 0.5 * (centers[1] - centers[0]) + 1e-12] = 0
    levels = _quantized(observer, q)
    inside = np.abs(levels - centers) <= 0.5 * q.scale * (1 + 1e-9)
    reference = np.where(inside, counts, 0.0)
    for edge in np.flatnonzero(inside)[[0, -1]] if inside.any() else ():
        outside = counts[:edge].sum() if edge == np.flatnonzero(inside)[0] else counts[edge + 1 :].sum()
        reference[edge] += outside
    _, group = np.unique(levels[inside], return_inverse=True)
    held = counts[inside]
    sums = np.bincount(group, held)
    filled = np.bincount(group, held > 0)
    spread = np.where(held > 0, (sums / np.maximum(filled, 1))[group], 0.0)
    p, approx = reference[inside] / max(reference.sum(), 1e-12), spread / max(spread.sum(), 1e-12)
    used = p > 0
    return float((p[used] * np.log(p[used] / np.maximum(approx[used], 1e-9))).sum())
