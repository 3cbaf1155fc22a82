"""The training loop of QCFS activations and of spiking networks: Adam, cosine decay, cross entropy or squared error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from edgekit.compress.ptq.qat import epoch_of
from edgekit.compress.spiking.neurons import Neuron
from edgekit.compress.spiking.settings import Spiking
from edgekit.data import Source
from edgekit.errors import DataError, InputError

__all__ = ["Backward", "fit", "loss_of", "whole"]

Backward = Callable[[nn.Module, Sequence[Tensor], Tensor, torch.Generator], Tensor]
"""(module, inputs, targets, generator) -> the loss; leaves gradients in the parameters."""


def loss_of(output: Tensor, target: Tensor) -> Tensor:
    """Cross entropy for integer targets (B,), squared error for float ones of the output's shape.

    Raises:
        DataError: targets that do not fit.
    """
    if target.is_floating_point():
        if target.shape != output.shape:
            raise DataError(f"training: targets have shape {tuple(target.shape)}, the model gives {tuple(output.shape)}")
        return nn.functional.mse_loss(output, target)
    if output.dim() != 2 or target.dim() != 1 or int(target.max()) >= output.shape[1] or int(target.min()) < 0:
        raise DataError(
            f"training: class labels of shape {tuple(target.shape)} from {int(target.min())} to {int(target.max())} do not fit "
            f"an output of shape {tuple(output.shape)}; expected shape (batch,) and labels below the number of outputs"
        )
    return nn.functional.cross_entropy(output, target.long())


def whole(module: nn.Module, inputs: Sequence[Tensor], target: Tensor, order: torch.Generator) -> Tensor:
    """Backward through the whole call: training without time, or through time (BPTT)."""
    result: Any = module(*inputs)
    loss = loss_of(result[0] if isinstance(result, tuple | list) else result, target)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def fit(
    module: nn.Module,
    source: Source,
    settings: Spiking,
    progress: Callable[[int, int], None] | None = None,
    *,
    inputs: int = 1,
    backward: Backward = whole,
    after: Callable[[], None] | None = None,
    groups: list[dict[str, Any]] | None = None,
    each_epoch: Callable[[int], None] | None = None,
) -> list[float]:
    """Train in place; returns the mean loss of each epoch.

    Args:
        source: batches of the model's inputs and the targets.
        inputs: how many tensors of a batch the model takes.
        after: called after every optimizer step, to keep parameters in their range.
        groups: parameters with learning rates of their own, in place of all with one.
        each_epoch: called before each epoch, with its number from 0.

    Raises:
        DataError: a batch that does not fit, or a loss that is not finite.
        InputError: device cuda without one.
    """
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise InputError("spiking: device cuda was asked for, but torch sees no CUDA device; use device: cpu")
    torch.manual_seed(settings.seed)
    module.to(settings.device).train()
    order = torch.Generator().manual_seed(settings.seed)
    steps = settings.epochs * sum(1 for _ in epoch_of(source, settings.train_batch_size, torch.Generator()))
    learned = groups or [{"params": [p for p in module.parameters() if p.requires_grad]}]
    optimizer = torch.optim.Adam(learned, settings.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    losses, done = [], 0
    with torch.enable_grad():
        for epoch in range(settings.epochs):
            if each_epoch:
                each_epoch(epoch)
            total = count = 0.0
            for batch in epoch_of(source, settings.train_batch_size, order):
                if len(batch) != inputs + 1:
                    raise DataError(f"training: a batch has {len(batch)} tensors; expected {inputs} inputs and the targets")
                *xs, y = (t.to(settings.device) for t in batch)
                optimizer.zero_grad()
                loss = float(backward(module, xs, y, order))
                if not loss < float("inf"):
                    raise DataError(
                        f"spiking: the loss was {loss} in step {done}; lower learning_rate or check the training data"
                    )
                torch.nn.utils.clip_grad_norm_(module.parameters(), 5.0)
                optimizer.step()
                schedule.step()
                _in_range(module)
                if after:
                    after()
                done, total, count = done + 1, total + loss * len(y), count + len(y)
                if progress:
                    progress(done, steps)
            losses.append(total / max(count, 1))
    module.to("cpu").eval()
    return losses


def _in_range(module: nn.Module) -> None:
    """Thresholds stay above 0, and leaks no stronger than a step can be and no weaker than none (tau above 1)."""
    for part in module.modules():
        if isinstance(part, Neuron):
            part.threshold.data.clamp_(min=1e-3)
            if part.leaky:
                part.tau.data.clamp_(min=1.0)
            if part.tau_syn is not None:
                part.tau_syn.data.clamp_(min=1.0)
