"""scikit-learn's handwritten digits: 1797 images of 8x8 pixels, 1197 to train on and 600 to judge by."""

import torch
from torch import Tensor

from edgekit import Data
from edgekit.errors import missing_extra


def digits() -> tuple[Tensor, Tensor]:
    """Images (1797, 1, 8, 8) from 0 to 1 in a fixed random order, and their labels (1797,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise missing_extra("scikit-learn", "demo") from None
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    x = torch.from_numpy(found.images).float().unsqueeze(1) / 16
    return x[order], torch.from_numpy(found.target)[order].long()


def load() -> Data:
    """What the recipe's ``data:`` names."""
    x, y = digits()
    training = (x[:1197], y[:1197])
    return Data(calibration=x[:256], evaluation=(x[1197:], y[1197:]), training=training)
