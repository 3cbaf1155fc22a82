"""Keyword spotting with 1-bit layers: spoken digits from log-mel frames. The float network is trained when first used, then kept.

The Free Spoken Digit Dataset comes as log-mel frames from $EDGEKIT_DATA, or from ../shared/data beside the repository; nothing is
downloaded.
"""

import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from edgekit import Data, cache, load_weights
from edgekit.errors import DataError
from edgekit.files import write_whole


class Keywords(nn.Module):
    """(N, 1, 60, 40) log-mel frames to (N, 10): a stem, three 3x3 convolutions (they become 1-bit), a linear layer; 6 M MACs."""

    def __init__(self) -> None:
        super().__init__()
        shapes = [(1, 32, 2), (32, 32, 2), (32, 64, 1), (64, 64, 2)]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, s, 1, bias=False) for i, o, s in shapes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for _, o, _ in shapes)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def spoken() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_train (2700, 1, 60, 40), y_train, x_test (300, 1, 60, 40), y_test, from -1 to 1."""
    folder = Path(os.environ.get("EDGEKIT_DATA") or Path(__file__).parents[3] / "shared" / "data")
    path = folder / "datasets" / "fsdd_logmel.npz"
    if not path.is_file():
        raise DataError(f"{path}: no such file; set EDGEKIT_DATA to the folder that has datasets/fsdd_logmel.npz")
    with np.load(path) as file:
        x = [torch.from_numpy(file[part][:, None, :60]).float() / 127.5 - 1 for part in ("x_train", "x_test")]
        y = [torch.from_numpy(file[part]).long() for part in ("y_train", "y_test")]
    return x[0], y[0], x[1], y[1]


def load() -> Data:
    """What the recipe's ``data:`` names."""
    x, y, x_test, y_test = spoken()
    return Data(calibration=x[:256], evaluation=(x_test, y_test), training=(x, y))


def build(seed: int = 0) -> nn.Module:
    """What the recipe's ``model:`` names."""
    text = Path(__file__).read_bytes() + torch.__version__.encode()
    weights = cache.folder() / "examples" / f"keywords-{seed}-{hashlib.sha256(text).hexdigest()[:12]}.safetensors"
    if not weights.is_file():
        write_whole(weights, save(train(seed).state_dict()))
    return load_weights(Keywords(), weights).eval()


def train(seed: int, epochs: int = 8) -> nn.Module:
    """One thread, so that the same seed gives the same weights everywhere on one machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model, (x, y, _, _) = Keywords().train(), spoken()
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * 43)
    for _ in range(epochs):
        for part in torch.split(torch.randperm(len(x)), 64):
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(model(x[part]), y[part]))
            optimizer.step()
            schedule.step()
    torch.set_num_threads(threads)
    return model.eval()
