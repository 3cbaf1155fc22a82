"""Digits for a small chip: 16 inputs (the image in 4 x 4), one hidden layer."""

from data import digits
from torch import Tensor, nn
from torch.nn import functional as F

from edgekit import Data


def build(seed: int = 0) -> nn.Module:
    """What a recipe's ``model:`` names: an untrained network, ``spiking: {method: train}`` teaches it. Input (N, 16)."""
    import torch

    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 60, bias=False), nn.ReLU(), nn.Linear(60, 10, bias=False))


def load() -> Data:
    """What a recipe's ``data:`` names."""
    images, y = digits()
    x: Tensor = F.avg_pool2d(images, 2).flatten(1)
    return Data(calibration=x[:256], evaluation=(x[1197:], y[1197:]), training=(x[:1197], y[:1197]))
