"""Networks and samples of the spiking benchmarks; needs torch and numpy alone, so that a peer's environment can import it."""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(os.environ.get("EDGEKIT_DATA") or ROOT.parent / "shared" / "data") / "datasets"

EPOCHS = {"mnist": 2, "mnist_max": 2, "cifar10_jpeg": 8, "fsdd": 60}
"""Of the float networks."""


def network(name: str) -> nn.Sequential:
    """The float network of a set, with modules for every rectifier and pool."""

    def block(c: int, o: int, stride: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(c, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]

    pool = nn.MaxPool2d if name == "mnist_max" else nn.AvgPool2d
    if name.startswith("mnist"):
        parts = [
            *block(1, 12),
            pool(2),
            *block(12, 24),
            pool(2),
            nn.Flatten(),
            nn.Linear(24 * 49, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        ]
    elif name == "cifar10_jpeg":
        parts = [*block(3, 24), *block(24, 24), pool(2), *block(24, 48), *block(48, 48), pool(2), *block(48, 96), pool(2)]
        parts += [nn.Flatten(), nn.Linear(96 * 16, 10)]
    else:  # fsdd: 61 x 40 log-mel frames
        parts = [*block(1, 16, 2), *block(16, 24, 2), *block(24, 32, 2), nn.AvgPool2d((8, 5)), nn.Flatten(), nn.Linear(32, 10)]
    return nn.Sequential(*parts)


def samples(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x_train, y_train, x_test, y_test: float32 from 0 to 1, (N, C, H, W), and int64."""
    if name == "cifar10_jpeg":
        return _cifar(1500, 100)
    with np.load(DATA / ("fsdd_logmel.npz" if name == "fsdd" else "mnist.npz")) as z:
        x, y, xt, yt = (torch.from_numpy(z[k]) for k in ("x_train", "y_train", "x_test", "y_test"))
    if name.startswith("mnist"):
        x, y, xt, yt = x[:20000], y[:20000], xt[:1000], yt[:1000]
    return x.float().unsqueeze(1) / 255, y.long(), xt.float().unsqueeze(1) / 255, yt.long()


def _cifar(train: int, test: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from PIL import Image

    z = np.load(DATA / "cifar10_jpeg_60k.npz")
    head, body, at, labels, is_test = z["header"].tobytes(), z["body"].tobytes(), z["offsets"], z["label"], z["is_test"]
    found: list[Tensor] = []
    for part, count in ((False, train), (True, test)):
        ids = np.concatenate([np.flatnonzero((labels == c) & (is_test == part))[:count] for c in range(10)])
        ids = np.random.default_rng(0).permutation(ids)
        images = [np.asarray(Image.open(io.BytesIO(head + body[at[i] : at[i + 1]]))) for i in ids]
        found += [torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255, torch.from_numpy(labels[ids]).long()]
    return found[0], found[1], found[2], found[3]


def events(bins: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """N-MNIST, 1000 and 100 samples, as frames of 0 and 1 (N, bins, 2, 34, 34)."""
    z, found = np.load(DATA / "nmnist_small.npz"), []
    for s in ("train", "test"):
        at = z[f"offsets_{s}"]
        count = len(at) - 1
        item = np.repeat(np.arange(count), np.diff(at))
        step = np.minimum(z[f"t_{s}"].astype(np.int64) * bins // 300_000, bins - 1)
        flat = (((item * bins + step) * 2 + z[f"p_{s}"]) * 34 + z[f"y_{s}"]) * 34 + z[f"x_{s}"]
        counts = np.bincount(flat, minlength=count * bins * 2 * 34 * 34).reshape(count, bins, 2, 34, 34)
        found += [torch.from_numpy((counts > 0).astype(np.float32)), torch.from_numpy(z[f"label_{s}"]).long()]
    return found[0], found[1], found[2], found[3]


def trained(name: str, folder: Path, seed: int = 0) -> nn.Sequential:
    """The float network, trained the first time and then read from ``folder``."""
    torch.manual_seed(seed)
    net, path = network(name), folder / f"snn_{name}_{seed}.pt"
    if path.is_file():
        net.load_state_dict(torch.load(path, weights_only=True))
        return net.eval()
    x, y, *_ = samples(name)
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=EPOCHS[name] * -(-len(x) // 100))
    net.train()
    for _ in range(EPOCHS[name]):
        for rows in torch.randperm(len(x)).split(100):
            optimizer.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(net.state_dict(), path)
    return net.eval()
