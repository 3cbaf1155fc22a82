"""Samples that a spiking network is scored on, to choose by or to report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from edgekit.compress.capture import Graph
from edgekit.data import Data, batches

__all__ = ["Judge", "for_choice", "for_report", "split_training"]

_HELD_OUT = 0.125


@dataclass(frozen=True)
class Judge:
    """Samples in batches, and a score of outputs (N, ...) on them; ``what`` says in words what it is.

    ``of_float``: the labels are the float model's own answers; ``percent``: the score is a share in percent.
    """

    batches: tuple[tuple[Tensor, ...], ...]
    score: Callable[[Tensor], float]
    what: str
    labels: Tensor | None = None
    of_float: bool = False
    percent: bool = True


def split_training(data: Data, seed: int = 0) -> tuple[Data, tuple[Tensor, ...] | None]:
    """The data with an eighth of its training samples taken out, and these; None where they are no arrays."""
    source = data.training
    if not (isinstance(source, tuple | list) and all(isinstance(t, Tensor | np.ndarray) for t in source)):
        return data, None
    tensors = [torch.as_tensor(t) for t in source]
    order = torch.randperm(len(tensors[0]), generator=torch.Generator().manual_seed(seed + 1))
    held = order[: max(1, int(len(order) * _HELD_OUT))]
    kept = order[len(held) :]
    return replace(data, training=tuple(t[kept] for t in tensors)), tuple(t[held] for t in tensors)


def for_choice(graph: Graph, data: Data, held: tuple[Tensor, ...] | None, most: int, size: int) -> Judge:
    """Held-out labelled training samples; without any, agreement with the float model on calibration samples."""
    if held is not None:
        *xs, y = (t[:most] for t in held)
        return _labelled(data, tuple(xs), y, size, f"{len(y)} training samples held out")
    return _agreement(graph, data, most, size)


def for_report(graph: Graph, data: Data, most: int, size: int) -> Judge:
    """Evaluation samples, evenly spread; without labels, agreement with the float model on calibration samples."""
    if data.evaluation is None or data.evaluation[1] is None:
        return _agreement(graph, data, most, size)
    x, y = data.evaluation
    tensors = x if isinstance(x, tuple) else (x,)
    index = torch.linspace(0, len(y) - 1, min(most, len(y))).round().long()
    return _labelled(data, tuple(t[index] for t in tensors), y[index], size, f"{len(index)} evaluation samples")


def _labelled(data: Data, xs: tuple[Tensor, ...], y: Tensor, size: int, what: str) -> Judge:
    def score(outputs: Tensor) -> float:
        if callable(data.metric):
            return float(data.metric(outputs, y))
        return 100 * float((outputs.flatten(1).argmax(1) == y).float().mean())

    name = data.metric if isinstance(data.metric, str) else getattr(data.metric, "__name__", "metric")
    return Judge(_parts(xs, size), score, f"{name} on {what}", y, percent=not callable(data.metric))


def _agreement(graph: Graph, data: Data, most: int, size: int) -> Judge:
    taken: list[tuple[Tensor, ...]] = []
    for batch in batches(data.calibration, size, inputs=len(graph.sample), what="calibration"):
        taken.append(tuple(t[: most - sum(len(b[0]) for b in taken)] for t in batch))
        if sum(len(b[0]) for b in taken) >= most:
            break
    with torch.no_grad():
        found = [graph.module(*b) for b in taken]
    wanted = torch.cat([f[0] if isinstance(f, tuple | list) else f for f in found]).flatten(1).argmax(1)
    count = len(wanted)

    def score(outputs: Tensor) -> float:
        return 100 * float((outputs.flatten(1).argmax(1) == wanted).float().mean())

    return Judge(tuple(taken), score, f"same class as the float model on {count} calibration samples", wanted, of_float=True)


def _parts(xs: Sequence[Tensor], size: int) -> tuple[tuple[Tensor, ...], ...]:
    return tuple(zip(*(torch.split(t, size) for t in xs), strict=True))
