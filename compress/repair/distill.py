"""Feature distillation against a frozen original (PELA: Guo et al. 2024, section 3.3), independent of what was compressed.

``loss = features * mean_l |f_l - F_l|^2 / var(F_l) + outputs * |y - Y|^2 / var(Y) + labels * cross entropy + weight penalty``
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekit.compress.repair.settings import Repair
from edgekit.errors import DataError, InputError

__all__ = ["Forward", "Values", "distance", "distill", "max_penalty", "squared_penalty"]

PENALTY_EPS = 1e-3


@dataclass(frozen=True)
class Values:
    """What a model computes from a batch: its outputs, and the intermediate values that are compared."""

    outputs: Sequence[Tensor]
    features: Sequence[Tensor]


Forward = Callable[[Sequence[Tensor]], Values]


def distill(
    student: Forward,
    teacher: Forward,
    groups: Sequence[dict[str, object]],
    epoch: Callable[[torch.Generator], Iterator[tuple[Tensor, ...]]],
    settings: Repair,
    inputs: int,
    penalty: Callable[[], Tensor] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Train the parameters in ``groups`` (under "rate" a relative learning rate): the student shall do what the teacher does.

    Args:
        epoch: makes one pass of batches in an order drawn from the generator; a batch has ``inputs`` inputs, then maybe labels.
        penalty: added to the loss, already weighted.
        progress: called with (steps done, steps).

    Raises:
        InputError: ``device`` is "cuda" and torch sees none.
        DataError: a loss that is not finite, labels that are asked for and not there.
    """
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise InputError("repair: device cuda was asked for, but torch sees no CUDA device; use device: cpu")
    steps = settings.epochs * sum(1 for _ in epoch(torch.Generator()))
    rates = [{"params": g["params"], "lr": settings.learning_rate * float(g.get("rate", 1.0))} for g in groups]  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(rates)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    order = torch.Generator().manual_seed(settings.seed)
    mixed = settings.device == "cuda" and torch.cuda.is_bf16_supported()
    done = 0
    for _ in range(settings.epochs):
        for batch in epoch(order):
            batch = tuple(t.to(settings.device) for t in batch)
            with torch.no_grad():
                wanted = teacher(batch[:inputs])
            with torch.enable_grad(), torch.autocast("cuda", torch.bfloat16) if mixed else nullcontext():
                found = student(batch[:inputs])
                loss = _loss(found, wanted, settings) + _task(found, batch[inputs:], settings)
                loss = loss + penalty() if penalty else loss
            if not torch.isfinite(loss):
                raise DataError(f"repair: the loss was {float(loss)} in step {done}; lower learning_rate")
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
            optimizer.step()
            schedule.step()
            done += 1
            if progress:
                progress(done, steps)


def distance(student: Forward, teacher: Forward, batches: Iterable[Sequence[Tensor]], settings: Repair) -> float:
    """Mean distillation loss (without labels and penalty) over some batches of inputs; no gradient."""
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            batch = tuple(t.to(settings.device) for t in batch)
            total += float(_loss(student(batch), teacher(batch), settings)) * len(batch[0])
            count += len(batch[0])
    return total / max(count, 1)


def _loss(found: Values, wanted: Values, settings: Repair) -> Tensor:
    loss = torch.zeros((), device=wanted.outputs[0].device)
    for weight, a, b in ((settings.features, found.features, wanted.features), (settings.outputs, found.outputs, wanted.outputs)):
        if weight and a:
            loss = loss + weight * torch.stack([_relative(x, y) for x, y in zip(a, b, strict=True)]).mean()
    return loss


def _relative(found: Tensor, wanted: Tensor) -> Tensor:
    wanted = wanted.float()
    return F.mse_loss(found.float(), wanted) / wanted.var().clamp(min=1e-12)


def _task(found: Values, rest: Sequence[Tensor], settings: Repair) -> Tensor | float:
    if not settings.labels:
        return 0.0
    if len(rest) != 1 or len(found.outputs) != 1 or rest[0].is_floating_point():
        raise DataError("repair: `labels` needs training data with class labels and a model with one output")
    return settings.labels * F.cross_entropy(found.outputs[0].float(), rest[0].long())


def squared_penalty(now: Tensor, before: Tensor) -> Tensor:
    """Squared Frobenius distance relative to the original's norm."""
    return (now - before).square().sum() / before.square().sum().clamp(min=1e-30)


def max_penalty(now: Tensor, before: Tensor) -> Tensor:
    """PELA's L_wp of one layer: ``(max |now - before| - eps)^2``."""
    return ((now - before).abs().max() - PENALTY_EPS).square()
