"""A small network with what real ones have: batch normalization, a depthwise layer, a residual sum; trained in seconds."""

import hashlib
from pathlib import Path

import torch
from data import digits
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from edgekit import cache, load_weights
from edgekit.files import write_whole


class Residual(nn.Module):
    """x + pointwise(depthwise(x))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.pointwise = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.depthwise(x)))
        return F.relu(x + self.norm2(self.pointwise(y)))


class DigitNet(nn.Module):
    """Input (N, 1, 8, 8), output (N, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.block1 = Residual(16)
        self.down = nn.Sequential(nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU())
        self.block2 = Residual(32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block2(self.down(self.block1(self.stem(x))))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def build(seed: int = 0) -> nn.Module:
    """What the recipe's ``model:`` names. The first call trains and keeps the weights in edgekit's cache folder."""
    text = Path(__file__).read_bytes() + torch.__version__.encode()
    weights = cache.folder() / "examples" / f"digits-{seed}-{hashlib.sha256(text).hexdigest()[:12]}.safetensors"
    if not weights.is_file():
        write_whole(weights, save(train(DigitNet, seed).state_dict()))
    return load_weights(DigitNet(), weights).eval()


def train(make: type[nn.Module], seed: int = 0, epochs: int = 20) -> nn.Module:
    """Train on the first 1197 digits; one thread, so that the same seed gives the same weights everywhere on one machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    model, (x, y) = make().train(), digits()
    x, y = x[:1197], y[:1197]
    optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=epochs * 19)
    for _ in range(epochs):
        for part in torch.split(torch.randperm(len(x)), 64):
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(model(x[part]), y[part]))
            optimizer.step()
            schedule.step()
    torch.set_num_threads(threads)
    return model.eval()


def accuracy(model: nn.Module) -> float:
    """Percent of the 600 held-back digits."""
    x, y = digits()
    with torch.no_grad():
        return 100 * float((model(x[1197:]).argmax(1) == y[1197:]).float().mean())
