"""Distribution correction (Liu et al. 2023, PD-Quant, section 3.3): float inputs of a block, moved towards its batch norms.

A batch norm knows the mean and the spread that its inputs had in training; those of few calibration samples differ. Batch norms
are folded here, so the same is said of a convolution's output: its mean should be ``beta`` and its standard deviation
``|gamma|``, both weighed by ``sigma / |gamma|``, which is what the difference is at the batch norm's own input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

__all__ = ["corrected", "has_statistics", "statistics_loss"]


def has_statistics(module: fx.GraphModule) -> bool:
    """Some convolution of an extracted region had a batch norm folded into it."""
    return any(_watched(n) for n in module.graph.nodes)


def _watched(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return "batch_norm" in node.meta and isinstance(value, Tensor) and value.dim() == 4


def statistics_loss(outputs: Sequence[tuple[Tensor, tuple[Tensor, ...]]]) -> Tensor:
    """Squared differences of means and standard deviations over height and width, summed over channels, mean over samples.

    Args:
        outputs: convolution outputs (N, C, H, W) with (beta, gamma, running variance), (C,) each.
    """
    total = torch.zeros(())
    for y, (beta, gamma, variance) in outputs:
        used = gamma.abs() > 1e-6
        weight = torch.where(used, (variance + 1e-6) / gamma.square().clamp(min=1e-12), torch.zeros_like(gamma)).to(y.device)
        mean, spread = y.mean((2, 3)), y.flatten(2).std(2) if y.shape[2] * y.shape[3] > 1 else gamma.abs().to(y.device)
        wrong = (mean - beta.to(y.device)).square() + (spread - gamma.abs().to(y.device)).square()
        total = total.to(y.device) + (wrong * weight).sum() / len(y)
    return total


def corrected(module: fx.GraphModule, x: Tensor, steps: int, anchor: float) -> Tensor:
    """``x`` (N, C, H, W) after ``steps`` of Adam on the statistics, held near where it was: ``mean(sum_c (x - x0)^2) / anchor``.

    The rate is 1e-3 of the values' spread, lowered where the loss stops falling; the best of all steps is returned, so the loss
    never rises.
    """
    start = x.detach()
    moved = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.Adam([moved], 1e-3 * float(start.std().clamp(min=1e-6)))
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=max(10, steps // 5))
    best, best_loss = start, float("inf")
    for _ in range(steps):
        seen: list[tuple[Tensor, tuple[Tensor, ...]]] = []
        _Recorder(module, seen).run(moved)
        loss = statistics_loss(seen) + (moved - start).square().sum(1).mean() / anchor
        value = float(loss.detach())
        if value < best_loss:
            best, best_loss = moved.detach().clone(), value
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        plateau.step(value)
    return best


class _Recorder(fx.Interpreter):
    """Notes the outputs of convolutions that had a batch norm."""

    def __init__(self, module: fx.GraphModule, seen: list[tuple[Tensor, tuple[Tensor, ...]]]) -> None:
        super().__init__(module)
        self.seen = seen

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if _watched(n):
            self.seen.append((value, n.meta["batch_norm"]))
        return value
