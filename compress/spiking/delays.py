"""Learned synaptic delays: a delay for each synapse, found by gradient (DCLS).

Hammouamri, Khalfaoui-Hassani and Masquelier, "Learning Delays in Spiking Neural Networks using Dilated Convolutions with
Learnable Spacings", ICLR 2024. A synapse is the tap of a convolution over time; its position is a real number, spread by a
Gaussian whose width shrinks while training until positions are rounded. Times are steps; sequences are (T, N, features).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["POSITION_RATE", "Delayed", "Synapses", "anneal", "optimizer_groups", "run_synapses"]

_WIDEST = 0.27
"""Added to the width of the Gaussian (the reference's constant)."""
FINAL = 0.23
POSITION_RATE = 0.1
"""Learning rate of positions, in steps (the reference's)."""


@dataclass(frozen=True)
class Synapses:
    """Rounded delays, one row for each synapse that is not zero.

    Attributes:
        pre, post: int64 indices of features and outputs.
        weight: float32.
        delay: int64, in steps, from 0.
    """

    pre: Tensor
    post: Tensor
    weight: Tensor
    delay: Tensor


class Delayed(nn.Module):
    """A linear layer whose synapses delay their input: (T, N, inputs) to (T', N, outputs), or folded with ``steps``.

    T' is T, or T + (K - 1) // 2 with ``tail``, which lets the last spikes arrive; K is the odd number of taps.

    Args:
        largest: longest delay in steps.
        tail: lengthen the sequence.
        steps: T of sequences folded into the batch, (T * N, inputs) to (T * N, outputs), as neurons have them.

    Attributes:
        weight, position: (outputs, inputs); the delay of a synapse is ``(K - 1) / 2 - position``.
        sigma: width of the Gaussian, a plain number, see :func:`anneal`.
        rounded: one tap for each synapse in training too; positions then learn no more.
    """

    def __init__(
        self, inputs: int, outputs: int, largest: int, *, bias: bool = False, tail: bool = False, steps: int | None = None
    ) -> None:
        super().__init__()
        if steps is not None and tail:
            raise ValueError("a folded sequence keeps its length; leave tail out, or steps")
        self.steps = steps
        self.taps, self.tail = largest + 1 + largest % 2, tail
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self.position = nn.Parameter((torch.rand(outputs, inputs) - 0.5) * (self.taps - 1))
        self.bias = nn.Parameter(torch.zeros(outputs)) if bias else None
        self.sigma, self.rounded = float(self.taps // 2), False

    def kernel(self) -> Tensor:
        """Taps (outputs, inputs, K): spread in training, one tap for each synapse in evaluation."""
        k = torch.arange(self.taps, dtype=self.weight.dtype, device=self.weight.device)
        p = self.position.unsqueeze(-1) + self.taps // 2
        if self.training and not self.rounded:
            g = torch.exp(-0.5 * ((k - p) / (abs(self.sigma) + _WIDEST)) ** 2)
            g = g / (g.sum(-1, keepdim=True) + 1e-7)
        else:
            g = (k == torch.round(p)).to(self.weight.dtype)
        return self.weight.unsqueeze(-1) * g

    def forward(self, x: Tensor) -> Tensor:
        if self.steps is not None:
            return self._over(x.reshape(self.steps, -1, x.shape[-1])).flatten(0, 1)
        return self._over(x)

    def _over(self, x: Tensor) -> Tensor:
        sequence = F.pad(x.permute(1, 2, 0), (self.taps - 1, (self.taps - 1) // 2 if self.tail else 0))
        return F.conv1d(sequence, self.kernel(), self.bias).permute(2, 0, 1)

    def clamp(self) -> None:
        """Bring positions back into their range, after an optimizer step."""
        half = self.taps // 2
        self.position.data.clamp_(-half, half)

    def synapses(self) -> Synapses:
        """What a simulator with delays gets."""
        post, pre = self.weight.detach().nonzero(as_tuple=True)
        delay = self.taps // 2 - torch.round(self.position.detach()).long()
        return Synapses(pre, post, self.weight.detach()[post, pre], delay[post, pre])


def anneal(layers: list[Delayed], epoch: int, epochs: int) -> None:
    """The width for an epoch: from its start to 0.23 over the first quarter, then constant; rounded in the last quarter.

    The last part is an addition to the method: weights that were fitted to a position between two steps fail when it is rounded.
    """
    quarter = max(1.0, epochs / 4)
    for layer in layers:
        start = layer.taps / 2
        layer.sigma = max(FINAL, start * (FINAL / start) ** (epoch / quarter))
        layer.rounded = epoch >= 0.75 * epochs


def optimizer_groups(model: nn.Module, rate: float, factor: float = 100.0) -> list[dict[str, object]]:
    """Parameters for an optimizer: positions learn ``factor`` times as fast."""
    positions = {id(m.position) for m in model.modules() if isinstance(m, Delayed)}
    named = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in named if id(p) not in positions], "lr": rate},
        {"params": [p for p in named if id(p) in positions], "lr": rate * factor},
    ]


def run_synapses(synapses: Synapses, x: Tensor, outputs: int, length: int) -> Tensor:
    """What the synapses deliver, event by event: spikes (T, N, inputs) to currents (length, N, outputs).

    A ring of outputs would do (firmware); what arrives after ``length`` is lost.
    """
    current = x.new_zeros(length, x.shape[1], outputs)
    for pre, post, weight, delay in zip(
        synapses.pre.tolist(), synapses.post.tolist(), synapses.weight.tolist(), synapses.delay.tolist(), strict=True
    ):
        end = min(length, len(x) + delay)
        if end > delay:
            current[delay:end, :, post] += weight * x[: end - delay, :, pre]
    return current
