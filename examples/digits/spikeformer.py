"""Meta-SpikeFormer, a spike-driven transformer, for digits: every product of it has spikes as one operand."""

import torch
from data import digits
from torch import nn

from edgekit import Data
from edgekit.compress.spiking.metaformer import MetaSpikeFormer

STEPS = 4


def load() -> Data:
    """Digits of 16x16 pixels, each pixel twice in both directions."""
    x, y = digits()
    x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    return Data(calibration=x[:256], evaluation=(x[1197:], y[1197:]), training=(x[:1197], y[:1197]))


def build() -> nn.Module:
    """What the recipe's ``model:`` names; the recipe trains it."""
    torch.manual_seed(0)
    return MetaSpikeFormer(
        10, dims=(8, 16, 24, 32), depths=(1, 0, 1, 1, 0), steps=STEPS, inputs=1, form="sdsa1", surrogate="arctangent"
    ).eval()
