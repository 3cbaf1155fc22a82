"""Observers against brute force on the values themselves."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edgekit.compress.ptq.observers import Observer, choose_range, quantization_of

VALUES = torch.cat([torch.randn(20_000, generator=torch.Generator().manual_seed(0)), torch.tensor([9.0, -7.0])])


def observed(values: torch.Tensor, batches: int = 4) -> Observer:
    observer = Observer()
    for step in (observer.extend, observer.count):
        for batch in values.chunk(batches):
            step(batch)
    return observer


def error(low: float, high: float, bits: int = 8) -> float:
    q = quantization_of(low, high, bits)
    integers = (torch.round(VALUES / q.scale) + q.zero_point).clamp(-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
    return float(((integers - q.zero_point) * q.scale - VALUES).square().mean())


def test_minmax_and_histogram_do_not_depend_on_batches() -> None:
    one, many = observed(VALUES, 1), observed(VALUES, 50)
    assert (one.low, one.high) == (many.low, many.high) == (float(VALUES.min()), float(VALUES.max()))
    assert np.array_equal(one.counts, many.counts) and one.counts.sum() == len(VALUES)


def test_percentile_is_that_of_the_values() -> None:
    low, high = choose_range(observed(VALUES), "percentile", 99.0)
    width = (9.0 + 7.0) / 2048
    assert low == pytest.approx(float(VALUES.quantile(0.01)), abs=2 * width)
    assert high == pytest.approx(float(VALUES.quantile(0.99)), abs=2 * width)


@pytest.mark.parametrize("bits", [4, 8])
def test_mse_is_near_the_best_of_a_fine_search(bits: int) -> None:
    low, high = choose_range(observed(VALUES), "mse", 99.99, bits)
    best = min(error(-7.0 * r, 9.0 * r, bits) for r in np.linspace(0.2, 1, 200))
    assert error(low, high, bits) <= 1.05 * best < error(-7.0, 9.0, bits)


def test_entropy_clips_outliers_but_keeps_the_bulk() -> None:
    low, high = choose_range(observed(VALUES), "entropy", 99.99)
    assert -7.0 < low < -2.0 and 2.5 < high < 9.0


def test_moving_average_lies_inside_the_extremes() -> None:
    low, high = choose_range(observed(VALUES, 50), "moving_average", 99.99)
    assert -7.0 < low < 0 < high < 9.0


@pytest.mark.parametrize(("low", "high"), [(0.0, 6.0), (-3.0, 5.0), (-1e-6, 1e6), (2.0, 3.0), (-3.0, -2.0), (0.0, 0.0)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_zero_is_exact_and_the_range_is_covered(low: float, high: float, symmetric: bool) -> None:
    q = quantization_of(low, high, 8, symmetric)
    assert -128 <= q.zero_point <= 127 and q.scale == float(np.float32(q.scale))
    assert (-128 - q.zero_point) * q.scale <= min(low, 0) + q.scale
    assert (127 - q.zero_point) * q.scale >= max(high, 0) - q.scale
    if symmetric and low < 0:
        assert q.zero_point == 0
