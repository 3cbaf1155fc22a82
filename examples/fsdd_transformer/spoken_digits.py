"""A small transformer encoder that tells spoken digits apart; trained in under a minute when first used, then kept.

Attention is written out (two matrix products and a softmax), so that a target can see its parts. The Free Spoken Digit Dataset
comes as log-mel frames from $EDGEKIT_DATA, or from ../shared/data beside the repository; nothing is downloaded.
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

WIDTH, HEADS, TOKENS, FEATURES = 64, 4, 20, 120


def spoken() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_train (2700, 20, 120), y_train, x_test (300, 20, 120), y_test: a token is three frames of 40 bins, from -1 to 1."""
    folder = Path(os.environ.get("EDGEKIT_DATA") or Path(__file__).parents[3] / "shared" / "data")
    path = folder / "datasets" / "fsdd_logmel.npz"
    if not path.is_file():
        raise DataError(f"{path}: no such file; set EDGEKIT_DATA to the folder that has datasets/fsdd_logmel.npz")
    with np.load(path) as file:
        x = [
            torch.from_numpy(file[part][:, :60]).float().reshape(-1, TOKENS, FEATURES) / 127.5 - 1
            for part in ("x_train", "x_test")
        ]
        y = [torch.from_numpy(file[part]).long() for part in ("y_train", "y_test")]
    return x[0], y[0], x[1], y[1]


def load() -> Data:
    """What the recipe's ``data:`` names."""
    x_train, y_train, x_test, y_test = spoken()
    return Data(calibration=x_train[::5], evaluation=(x_test, y_test), training=(x_train, y_train))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self._heads(part(x)) for part in (self.q, self.k, self.v))
        weights = torch.softmax(q @ k.transpose(-2, -1) * (WIDTH // HEADS) ** -0.5, -1)
        return self.out((weights @ v).transpose(1, 2).reshape(x.shape))  # type: ignore[no-any-return]

    def _heads(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], x.shape[1], HEADS, WIDTH // HEADS).transpose(1, 2)


class Layer(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(WIDTH), Attention(), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))  # type: ignore[no-any-return]


class SpokenDigits(nn.Module):
    """(N, 20, 120) to (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Linear(FEATURES, WIDTH), nn.Parameter(0.02 * torch.randn(1, TOKENS, WIDTH))
        self.layers = nn.Sequential(Layer(), Layer())
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layers(self.embed(x) + self.position)).mean(1))  # type: ignore[no-any-return]


def build(seed: int = 0) -> nn.Module:
    """What the recipe's ``model:`` names. The first call trains and keeps the weights in edgekit's cache folder."""
    text = Path(__file__).read_bytes() + torch.__version__.encode()
    weights = cache.folder() / "examples" / f"fsdd-{seed}-{hashlib.sha256(text).hexdigest()[:12]}.safetensors"
    if not weights.is_file():
        write_whole(weights, save(train(seed).state_dict()))
    return load_weights(SpokenDigits(), weights).eval()


def train(seed: int = 0, epochs: int = 30) -> nn.Module:
    """One thread, so that the same seed gives the same weights; each batch is shifted in time by a random step."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model, (x, y, _, _) = SpokenDigits().train(), spoken()
    steps = epochs * -(-len(x) // 64)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(epochs):
        for part in torch.split(torch.randperm(len(x)), 64):
            shifted = torch.roll(x[part], int(torch.randint(-2, 3, ())), 1)
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(model(shifted), y[part], label_smoothing=0.1))
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    torch.set_num_threads(threads)
    return model.eval()


if __name__ == "__main__":
    model, (_, _, images, labels) = build(), spoken()
    with torch.no_grad():
        right = model(images).argmax(1) == labels
    print(f"float accuracy on the 300 held-back recordings: {100 * float(right.float().mean()):.2f} %")
