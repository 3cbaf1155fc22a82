"""How far two results are apart: task metric, top-1 agreement, LSBs, signal to noise. Plain numpy, no state.

Accuracy and agreement are percentages (0 to 100). Outputs are arrays (N, ...) with classes on axis 1 where there are classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgekit.errors import DataError, cause

__all__ = ["HUGE", "Difference", "Metric", "accuracy", "difference", "metric_name", "score", "sqnr_db", "top1", "top1_agreement"]

HUGE = 3.0e38
"""The difference between a number and something that is none."""

Metric = str | Callable[[Any, Any], float]
"""``"accuracy"``, or a function ``(outputs, labels) -> float`` of two Tensors where more is better."""


@dataclass(frozen=True)
class Difference:
    """Two arrays compared element by element.

    Attributes:
        largest: largest absolute difference, in LSBs or in the arrays' own unit (the caller knows which).
        mean: mean absolute difference, same unit.
        share: share of elements that differ, 0 to 1.
        elements: number of elements compared.
    """

    largest: float
    mean: float
    share: float
    elements: int


def difference(found: ArrayLike, expected: ArrayLike, lsb: float = 1.0) -> Difference:
    """Compare element by element, in units of ``lsb`` (the scale of a quantized tensor; 1 for integers).

    A NaN or Inf where the other has none counts as :data:`HUGE`: it must never pass for small, and JSON knows no infinity.
    """
    a, b = np.asarray(found, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    if a.shape != b.shape:
        raise DataError(f"outputs of shapes {a.shape} and {b.shape} cannot be compared")
    with np.errstate(invalid="ignore"):
        gap = np.abs(a - b)
    gap = np.nan_to_num(gap / lsb, nan=HUGE, posinf=HUGE)
    gap[(a == b) | (np.isnan(a) & np.isnan(b))] = 0.0  # equal infinities and NaNs
    if gap.size == 0:
        return Difference(0.0, 0.0, 0.0, 0)
    return Difference(float(gap.max()), float(gap.mean()), float((gap > 0).mean()), int(gap.size))


def sqnr_db(reference: ArrayLike, value: ArrayLike) -> float | None:
    """Signal to quantization noise ratio, ``10 log10(sum(r^2) / sum((r - v)^2))`` in dB; None where the two are equal."""
    r, v = np.asarray(reference, dtype=np.float64), np.asarray(value, dtype=np.float64)
    noise = float(np.square(r - v).sum())
    if noise == 0.0:
        return None
    if not np.isfinite(noise):
        return -999.0
    return max(-999.0, float(10.0 * np.log10(max(float(np.square(r).sum()), 1e-300) / noise)))


def top1(outputs: ArrayLike) -> NDArray[np.int64]:
    """Index of the largest value on axis 1, for each sample (and position, of a dense prediction)."""
    return np.asarray(np.argmax(np.asarray(outputs), axis=1), dtype=np.int64)


def top1_agreement(a: ArrayLike, b: ArrayLike) -> float | None:
    """Percentage of samples on which both choose the same class; None without classes (one value a sample)."""
    first, second = np.asarray(a), np.asarray(b)
    if first.ndim < 2 or first.shape[1] < 2:
        return None
    return float(100.0 * (top1(first) == top1(second)).mean())


def accuracy(outputs: ArrayLike, labels: ArrayLike) -> float:
    """Percentage of samples whose largest output is the label.

    Raises:
        DataError: labels that are not integers, not one for each sample, or no class of the outputs.
    """
    chosen, wanted = top1(outputs), np.asarray(labels)
    if wanted.ndim == chosen.ndim + 1 and wanted.shape[-1] == 1:
        wanted = wanted[..., 0]
    if wanted.shape != chosen.shape or not np.issubdtype(wanted.dtype, np.integer):
        raise DataError(
            f"evaluation labels: {wanted.dtype} of shape {wanted.shape}, expected integer classes of shape {chosen.shape}"
            " for the metric accuracy; give data.metric a function for another task"
        )
    classes = np.asarray(outputs).shape[1]
    low, high = (int(wanted.min()), int(wanted.max())) if wanted.size else (0, 0)
    if low < 0 or high >= classes:
        raise DataError(
            f"evaluation labels: they go from {low} to {high}, the model has {classes} outputs; expected classes 0 to "
            f"{classes - 1}, or give data.metric a function for another task"
        )
    return float(100.0 * (chosen == wanted).mean())


def metric_name(metric: Metric) -> str:
    """What tables call the metric: its string, or the function's name."""
    return metric if isinstance(metric, str) else getattr(metric, "__name__", "metric")


def score(metric: Metric, outputs: NDArray[Any], labels: NDArray[Any]) -> float:
    """The task metric of one output (N, ...).

    Raises:
        DataError: an unknown name, labels that do not fit, or a function that does not return a finite number.
    """
    if metric == "accuracy":
        return accuracy(outputs, labels)
    if isinstance(metric, str):
        raise DataError(f"data.metric is {metric!r}; expected 'accuracy' or a function (outputs, labels) -> float")
    import torch

    try:
        value = float(metric(torch.as_tensor(outputs), torch.as_tensor(labels)))
    except Exception as error:
        raise DataError(
            f"data.metric: {metric_name(metric)} failed on outputs of shape {outputs.shape} and labels of shape {labels.shape}: "
            f"{cause(error)}"
        ) from error
    if not np.isfinite(value):
        raise DataError(f"data.metric: {metric_name(metric)} returned {value}; expected a finite number")
    return value
