"""Small spiking networks trained on scikit-learn's digits by surrogate gradients, as NIR graphs, with their data.

``xylo``: 16 inputs (4 x 4 pixels), 60 hidden CubaLIF neurons, 8 outputs (digits 0 to 7), 32 steps; ``loihi``: 64 inputs, 48
hidden LIF neurons, 10 outputs, 16 steps. Pixels become spikes by an IF neuron that starts at half its threshold.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from neuromorphic_nets import DT, chain, cuba, ends, lif, nir
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Trained:
    """A graph, spikes (T, N, I) to calibrate with, and spikes and labels to judge by."""

    graph: Any
    calibration: np.ndarray
    spikes: np.ndarray
    labels: np.ndarray


class _Spike(torch.autograd.Function):
    """Whole thresholds in a membrane, at most ``limit``; the gradient is that of an arc tangent."""

    @staticmethod
    def forward(ctx: Any, over: Tensor, limit: int) -> Tensor:
        ctx.save_for_backward(over)
        return torch.clamp(torch.floor(over) + 1, 0, limit)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Any:
        (over,) = ctx.saved_tensors
        return grad[0] / (1 + (math.pi * over) ** 2), None


def encode(pixels: Tensor, steps: int) -> Tensor:
    """Spikes (T, N, I) at the rate of each pixel."""
    v, out = torch.full_like(pixels, 0.5), []
    for _ in range(steps):
        v = v + pixels
        s = (v >= 1).float()
        v = v - s
        out.append(s)
    return torch.stack(out)


def _cuba(spikes: Tensor, weight: Tensor, limit: int) -> Tensor:
    rate, out = 1 / 8, []
    i = v = torch.zeros(())
    for s in spikes:
        i = (1 - rate) * i + rate * 1.5 * (s @ weight)
        v = (1 - rate) * v + rate * 2.0 * i
        z = _Spike.apply(v / 0.7 - 1, limit)
        v = v - z.detach() * 0.7
        out.append(z)
    return torch.stack(out)


def _lif(spikes: Tensor, weight: Tensor, limit: int) -> Tensor:
    v, out = torch.zeros(()), []
    for s in spikes:
        v = 0.9 * v + s @ weight
        z = _Spike.apply(v - 1, 1)
        v = v * (1 - z.detach())
        out.append(z)
    return torch.stack(out)


def _train(
    layer: Callable[[Tensor, Tensor, int], Tensor], sizes: Sequence[tuple[int, int, float]], limit: int, spikes: Tensor,
    labels: Tensor, epochs: int,
) -> list[np.ndarray]:  # fmt: skip
    torch.manual_seed(0)
    weights = [(torch.randn(i, o) * scale).requires_grad_() for i, o, scale in sizes]
    optimizer = torch.optim.Adam(weights, lr=4e-3)
    for _ in range(epochs):
        order = torch.randperm(len(labels))
        for at in range(0, len(order), 64):
            chosen = order[at : at + 64]
            counts = layer(layer(spikes[:, chosen], weights[0], limit), weights[1], 1).sum(0)
            optimizer.zero_grad()
            F.cross_entropy(0.5 * counts, labels[chosen]).backward()
            optimizer.step()
    return [w.detach().double().numpy().T.copy() for w in weights]


def _digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    return torch.tensor(found.images[order] / 16, dtype=torch.float32), torch.tensor(found.target[order])


def xylo(limit: int = 31, epochs: int = 6) -> Trained:
    """CubaLIF with reset by subtraction, hidden neurons trained for up to ``limit`` spikes a step."""
    images, labels = _digits()
    kept = labels < 8
    spikes, labels = encode(F.avg_pool2d(images[kept][:, None], 2).flatten(1), 32), labels[kept]
    split = len(labels) * 3 // 4
    w = _train(_cuba, [(16, 60, 1.0), (60, 8, 0.5)], limit, spikes[:, :split], labels[:split], epochs)
    source, sink = ends((16,), (8,))
    facts = {"reset": "subtract", "tie": "ge", "tau_syn": 8 * DT, "tau_mem": 8 * DT}
    nodes = {"input": source, "fc1": nir.Linear(w[0]), "hidden": cuba(60, spikes=limit, **facts), "fc2": nir.Linear(w[1])}
    graph = chain(nodes | {"last": cuba(8, **facts), "out": sink})
    return _trained(graph, spikes, labels, split)


def loihi(epochs: int = 8) -> Trained:
    """LIF with reset to zero."""
    images, labels = _digits()
    spikes = encode(images.flatten(1), 16)
    split = len(labels) * 3 // 4
    w = _train(_lif, [(64, 48, 0.15), (48, 10, 0.3)], 1, spikes[:, :split], labels[:split], epochs)
    source, sink = ends((64,), (10,))
    first, second = nir.Linear(10 * w[0]), nir.Linear(10 * w[1])
    nodes = {"input": source, "fc1": first, "hidden": lif(48, tie="gt"), "fc2": second, "last": lif(10, tie="gt"), "out": sink}
    return _trained(chain(nodes), spikes, labels, split)


def _trained(graph: Any, spikes: Tensor, labels: Tensor, split: int) -> Trained:
    values = spikes.numpy().astype(np.int64)
    return Trained(graph, values[:, :128], values[:, split:], labels[split:].numpy())
