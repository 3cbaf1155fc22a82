"""Prediction difference (Liu et al. 2023, PD-Quant, section 3.2): how much a block's error matters to what the model says."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["prediction_difference"]


def prediction_difference(found: Sequence[Tensor], wanted: Sequence[Tensor], temperature: float) -> Tensor:
    """A scalar, 0 where the outputs say the same.

    Class scores (N, classes): ``T^2 KL(softmax(wanted / T) || softmax(found / T))``, the mean over samples; adding a constant to
    all scores of a sample changes nothing. Any other output: squared error over the variance.
    """
    parts = [_one(a, b, temperature) for a, b in zip(found, wanted, strict=True)]
    return torch.stack(parts).sum()


def _one(found: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    if found.dim() == 2 and found.shape[1] > 1:
        target = F.softmax(wanted / temperature, 1)
        return F.kl_div(F.log_softmax(found / temperature, 1), target, reduction="batchmean") * temperature**2
    return (found - wanted).square().mean() / wanted.var().clamp(min=1e-12)
