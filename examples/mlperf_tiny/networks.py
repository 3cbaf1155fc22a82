"""The four networks of MLPerf Tiny v1 in PyTorch, with the reference models' own weights (mlcommons/tiny, Apache-2.0).

The references are Keras models: padding is "same" as TensorFlow means it (the odd pixel at the end), BatchNorm's eps is 1e-3, and
the softmax at the end is left out.
"""

from itertools import pairwise

import numpy as np
import torch
from samples import folder
from torch import Tensor, nn
from torch.nn import functional as F


class Conv(nn.Module):
    """Convolution with TensorFlow's "same" padding, then BatchNorm."""

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int] = (3, 3), stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, groups=groups)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(same(x, self.conv)))  # type: ignore[no-any-return]


def same(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """``x`` padded so that the output has ceil(size / stride) pixels."""
    around = []
    for size, kernel, stride in zip(x.shape[:1:-1], conv.kernel_size[::-1], conv.stride[::-1], strict=True):
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        around += [total // 2, total - total // 2]
    return F.pad(x, around) if any(around) else x


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.a, self.b = Conv(inputs, outputs, stride=stride), Conv(outputs, outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.skip(x) + self.b(F.relu(self.a(x))))


class Separable(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.dw, self.pw = Conv(inputs, inputs, stride=stride, groups=inputs), Conv(inputs, outputs, (1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.pw(F.relu(self.dw(x))))


class Classifier(nn.Module):
    """Stem, blocks, global average, linear: (N, C, H, W) to (N, classes)."""

    def __init__(self, stem: Conv, blocks: list[nn.Module], features: int, classes: int) -> None:
        super().__init__()
        self.stem, self.blocks, self.fc = stem, nn.Sequential(*blocks), nn.Linear(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(F.relu(self.stem(x))).mean((2, 3)))  # type: ignore[no-any-return]


class Autoencoder(nn.Module):
    """(N, 640) to (N, 640) through 8 numbers."""

    def __init__(self) -> None:
        super().__init__()
        widths = [640, 128, 128, 128, 128, 8, 128, 128, 128, 128]
        self.fcs = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.bns = nn.ModuleList(nn.BatchNorm1d(b, eps=1e-3) for b in widths[1:])
        self.out = nn.Linear(128, 640)

    def forward(self, x: Tensor) -> Tensor:
        for fc, bn in zip(self.fcs, self.bns, strict=True):
            x = F.relu(bn(fc(x)))
        return self.out(x)  # type: ignore[no-any-return]


def resnet8() -> nn.Module:
    """Image classification: (N, 3, 32, 32), pixels 0 to 255; 12.5 M multiply-accumulates."""
    blocks: list[nn.Module] = [Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 64, 2)]
    return _weights(Classifier(Conv(3, 16), blocks, 64, 10), "resnet8")


def dscnn() -> nn.Module:
    """Keyword spotting: (N, 1, 49, 10) MFCC; 2.7 M multiply-accumulates."""
    return _weights(Classifier(Conv(1, 64, (10, 4), 2), [Separable(64, 64) for _ in range(4)], 64, 12), "dscnn")


def mobilenet() -> nn.Module:
    """Visual wake words, MobileNetV1 of width 0.25: (N, 3, 96, 96), pixels 0 to 1; 7.5 M multiply-accumulates."""
    plan = [(8, 16, 1), (16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), *[(128, 128, 1)] * 5]
    plan += [(128, 256, 2), (256, 256, 1)]
    return _weights(Classifier(Conv(3, 8, stride=2), [Separable(*p) for p in plan], 256, 2), "mobilenet")


def autoencoder() -> nn.Module:
    """Anomaly detection: (N, 640), five frames of 128 log-mel bins; 0.26 M multiply-accumulates."""
    return _weights(Autoencoder(), "fc_ae")


def _weights(model: nn.Module, name: str) -> nn.Module:
    """Load the twin's weights; every weight must be there and used."""
    with np.load(folder() / "mlperf_tiny" / "twins" / f"{name}.npz") as file:
        state = {key: torch.from_numpy(file[key]) for key in file.files}
    counters = {key: value for key, value in model.state_dict().items() if key.endswith("num_batches_tracked")}
    model.load_state_dict(counters | state)
    return model.eval()
