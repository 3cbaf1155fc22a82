"""The sign and the slopes that stand for its gradient.

sign(0) = +1. With ``b = sign(z)``, ``dL/dz = dL/db * slope(z)``:

    ste          1 where |z| <= 1                                            Hubara et al. 2016
    polynomial   max(0, 2 - 2|z|)                                            Liu et al. 2018 (Bi-Real), section 3.3
    reste        0 where |z| > t; (1/o)|z|^((1-o)/o) where m < |z| <= t;
                 m^(1/o - 1) where |z| <= m                                  Wu et al. 2023 (ReSTE), section 4
    identity     1

ReSTE's slope is that of ``f(z) = sign(z)|z|^(1/o)``, replaced by ``f(m)/m`` where it would have a pole.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "estimating_error",
    "exponent",
    "frequency_for",
    "laplace_error",
    "power",
    "sign",
    "slope",
]


def slope(z: Tensor, kind: str, o: float = 1.0, clip: float = 1.5, linear_below: float = 0.1) -> Tensor:
    """The estimator's slope at z, float32, same shape; see the module."""
    size = z.abs()
    if kind == "identity":
        return torch.ones_like(z)
    if kind == "ste":
        return (size <= 1).to(z.dtype)
    if kind == "polynomial":
        return (2 - 2 * size).clamp(min=0)
    outer = size.clamp(min=linear_below).pow((1 - o) / o) / o
    inner = torch.where(size <= linear_below, linear_below ** (1 / o - 1), outer)
    return inner * (size <= clip)


class _Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, kind: str, o: float, clip: float, linear_below: float) -> Tensor:
        ctx.save_for_backward(z)
        ctx.how = (kind, o, clip, linear_below)
        return torch.where(z >= 0, 1.0, -1.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (z,) = ctx.saved_tensors
        return grads[0] * slope(z, *ctx.how), None, None, None, None


def sign(z: Tensor, kind: str, o: float = 1.0, clip: float = 1.5, linear_below: float = 0.1) -> Tensor:
    """-1 and +1 (float32, shape of z), with the slope of that kind as gradient."""
    found: Tensor = _Sign.apply(z, kind, o, clip, linear_below)  # type: ignore[no-untyped-call]
    return found


def exponent(done: float, end: float, schedule: str) -> float:
    """ReSTE's o when a share ``done`` (0 to 1) of the epochs is over: from 1 to ``end``."""
    share = 1 - math.cos(math.pi / 2 * done) if schedule == "cos" else done
    return 1 + (end - 1) * share


def power(z: Tensor, o: float) -> Tensor:
    """``sign(z)|z|^(1/o)``: z for o = 1, towards the sign for large o."""
    return torch.where(z >= 0, 1.0, -1.0) * z.abs().pow(1 / o)


def estimating_error(z: Tensor, o: float) -> float:
    """``|| f(z) - sign(z) ||_2``: how far the estimator is from the sign (ReSTE, section 4.2)."""
    return float((power(z, o) - torch.where(z >= 0, 1.0, -1.0)).norm())


def laplace_error(x: float) -> float:
    """Mean of 1 - |sin(w omega)| for Laplacian w of scale b, x = omega b: ``1 - x / (1 + x^2) coth(pi / (2x))``.

    It falls from 1 (x -> 0) to 1 - 2/pi (x -> infinity).
    """
    return 1 - x / (1 + x * x) / math.tanh(math.pi / (2 * x))


def frequency_for(error: float, mean_size: float) -> float:
    """The sine's frequency with which Laplacian weights of mean |w| ``mean_size`` have that :func:`laplace_error`."""
    low, high = 1e-3, 1e3
    for _ in range(80):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if laplace_error(middle) > error else (low, middle)
    return high / max(mean_size, 1e-12)
