"""Ordinary augmentations of calibration images (flips; mixup, Zhang et al. 2018; cutmix, Yun et al. 2019), without labels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from edgekit.errors import DataError

__all__ = ["augmented"]


def augmented(x: Tensor, kind: str, generator: torch.Generator) -> Tensor:
    """As many changed images (N, C, H, W) as there are.

    ``flip``: mirrored left to right; ``mixup``: each mixed with another by a share from Beta(4, 4), the larger part its own;
    ``cutmix``: a rectangle of each, half of its area on average, from another.

    Raises:
        DataError: ``x`` is not float images.
    """
    if x.dim() != 4 or not x.is_floating_point():
        raise DataError(
            f"augment: {kind} takes float images (N, C, H, W), the calibration samples have shape {tuple(x.shape)}; use none"
        )
    if kind == "flip":
        return x.flip(3)
    other = x[torch.randperm(len(x), generator=generator)]
    if kind == "mixup":
        share = torch.stack([_share(generator) for _ in range(len(x))]).view(-1, 1, 1, 1)
        return share * x + (1 - share) * other
    result = x.clone()
    for i in range(len(x)):
        top, bottom = _interval(x.shape[2], generator)
        left, right = _interval(x.shape[3], generator)
        result[i, :, top:bottom, left:right] = other[i, :, top:bottom, left:right]
    return result


def _share(generator: torch.Generator) -> Tensor:
    """The larger part of a split by Beta(4, 4): the ratio of sums of four exponential variables."""
    a, b = (-torch.log(torch.rand(4, generator=generator).clamp(min=1e-9)).sum() for _ in range(2))
    share = a / (a + b)
    return torch.maximum(share, 1 - share)


def _interval(size: int, generator: torch.Generator) -> tuple[int, int]:
    """Begin and end of a piece that is sqrt(1/2) of ``size`` long, rounded, somewhere in it."""
    length = max(1, round(size * math.sqrt(0.5)))
    start = int(torch.randint(size - length + 1, (), generator=generator))
    return start, start + length
