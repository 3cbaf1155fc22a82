"""Two microphones hear a click one after the other: from where did it come? The class is the lag between two spikes.

Neurons whose leak is shorter than the lag cannot tell. Delays that are learned let the two spikes of one lag arrive together.
"""

import torch
from torch import Tensor, nn

from edgekit import Data
from edgekit.compress.spiking import Neuron
from edgekit.compress.spiking.delays import Delayed
from edgekit.compress.spiking.neurons import Decode, Fold

STEPS, LONGEST = 24, 8
LAGS = (-6, -2, 2, 6)


def clicks(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Spikes (count, STEPS, 2) of two microphones, a few of them noise, and the class of each lag (count,)."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, len(LAGS), (count,), generator=generator)
    x = (torch.rand(count, STEPS, 2, generator=generator) < 0.01).float()
    first = torch.randint(6, STEPS - 14, (count,), generator=generator)
    for i in range(count):
        x[i, int(first[i]), 0] = 1
        x[i, int(first[i]) + LAGS[int(y[i])], 1] = 1
    return x, y


def load() -> Data:
    """What the recipe's ``data:`` names."""
    (x, y), test = clicks(800, 0), clicks(400, 1)
    return Data(calibration=x[:100], evaluation=test, training=(x, y))


def build() -> nn.Module:
    """What the recipe's ``model:`` names: a spiking network with a delay for each synapse; the recipe trains it."""
    torch.manual_seed(0)
    delayed = Delayed(2, 24, LONGEST, steps=STEPS)
    delayed.weight.data = delayed.weight.data.abs() + 0.2  # a spike of each together make a neuron fire
    head = nn.Linear(24, len(LAGS))
    head.weight.data *= STEPS  # the mean over the steps of a spike or two is small
    return nn.Sequential(
        Fold(), delayed, Neuron(0.8, steps=STEPS, tau=1.5, surrogate="arctangent"),
        head, Decode(STEPS),
    ).eval()  # fmt: skip
