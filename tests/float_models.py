"""Small float models in the styles users write, for tests of compression (seeded; batch norm statistics away from 0 and 1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Modules(nn.Module):
    """Everything as modules: conv, BatchNorm, ReLU6, depthwise, MaxPool, adaptive pool, Dropout, Flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
            nn.Conv2d(8, 8, 3, 2, 1, groups=8, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
            nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class Functional(nn.Module):
    """The same kind of net in functional style, with a residual add, concat, average pool, a gate and an asymmetric pad."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 8, 3, padding="same")
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.a(F.pad(x, (0, 1, 0, 1)))))
        x = F.relu(x + self.b(x))
        x = torch.cat([F.max_pool2d(x, 2), F.avg_pool2d(x, 2)], 1)
        x = x * torch.sigmoid(x)
        return self.fc(x.mean((2, 3)))


class Waves(nn.Module):
    """1-d: conv1d 'same', BatchNorm1d, max_pool1d, BatchNorm after a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv1d(3, 8, 3, padding="same", bias=False), nn.BatchNorm1d(8)
        self.pool, self.fc, self.out = nn.MaxPool1d(2), nn.Linear(64, 5), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.fc(self.pool(F.relu6(self.bn(self.conv(x)))).flatten(1)))


class PreActivation(nn.Module):
    """Batch norm before the conv (cannot be folded into a weight before it), option-A shortcut (slice and channel pad)."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.conv, self.fc = nn.BatchNorm2d(3), nn.Conv2d(3, 6, 3, 2, 1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(torch.relu(self.bn(x)))
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 2))
        return self.fc(torch.relu(y + short).mean((2, 3)))


class Encoder(nn.Module):
    """A pre-norm transformer layer: linears become integer, the rest stays float."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1, activation="gelu", batch_first=True, norm_first=True)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.layer(self.embed(x))).mean(1))


SHAPES = {Modules: (3, 16, 16), Functional: (3, 16, 16), Waves: (3, 16), PreActivation: (3, 16, 16), Encoder: (6, 8)}


def build(kind: type[nn.Module], n: int = 64, seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A model in eval mode and n standard-normal inputs."""
    torch.manual_seed(seed)
    model = kind()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.3)
            m.running_var.uniform_(0.5, 1.5)
            m.weight.data.uniform_(0.5, 1.5)
            m.bias.data.normal_(0, 0.3)
    return model.eval(), torch.randn(n, *SHAPES[kind])


def related(shape: tuple[int, ...], n: int = 128) -> Tensor:
    """Inputs whose values depend on each other, as those of real layers do: few factors, smooth over the image."""
    factors = torch.randn(n, 3, *shape[1:])
    if len(shape) == 3:
        factors = F.avg_pool2d(F.pad(factors, (2, 2, 2, 2), "circular"), 5, 1) * 5
    mixed = torch.einsum("cf,nf...->nc...", torch.randn(shape[0], 3), factors)
    return mixed + 0.1 * torch.randn_like(mixed)
