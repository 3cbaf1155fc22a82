"""ResNet-20 for CIFAR-10 (He et al. 2016) with option-A shortcuts: every second pixel, and zeros for the new channels.

Weights: akamaster/pytorch_resnet_cifar10 (BSD-2-Clause), read without executing anything in the file. Images and weights come
from $EDGEKIT_DATA, or from ../shared/data beside the repository; nothing is downloaded.
"""

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekit import Data
from edgekit.errors import DataError

MEAN, STD = (torch.tensor(v).view(1, 3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stride = outputs // inputs
        self.new = (outputs - inputs) // 2
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, self.stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.new:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.new, self.new))
        return F.relu(x + y)


class ResNet20(nn.Module):
    """(N, 3, 32, 32) to (N, 10); 40.6 M multiply-accumulates."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(Block(16, 16), Block(16, 16), Block(16, 16))
        self.layer2 = nn.Sequential(Block(16, 32), Block(32, 32), Block(32, 32))
        self.layer3 = nn.Sequential(Block(32, 64), Block(64, 64), Block(64, 64))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))  # type: ignore[no-any-return]


def build() -> nn.Module:
    """What the recipe's ``model:`` names."""
    file = torch.load(folder() / "models" / "cifar_resnet" / "resnet20-12fca82f.th", map_location="cpu", weights_only=True)
    model = ResNet20()
    model.load_state_dict({key.removeprefix("module."): value for key, value in file["state_dict"].items()})
    return model.eval()


def folder() -> Path:
    """Where the files are."""
    found = Path(os.environ.get("EDGEKIT_DATA") or Path(__file__).parents[3] / "shared" / "data")
    if not (found / "models" / "cifar_resnet").is_dir():
        raise DataError(f"{found}: no folder models/cifar_resnet; set EDGEKIT_DATA to the folder that has datasets/ and models/")
    return found


def normalized(images: np.ndarray) -> Tensor:
    """uint8 (N, 32, 32, 3) to what the checkpoint was trained on: (N, 3, 32, 32)."""
    return ((torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - MEAN) / STD).contiguous()


def load(calibration: int = 1024) -> Data:
    """Calibrated on the first training images, judged on the first 1000 test images."""
    with np.load(folder() / "datasets" / "cifar10_exact_5k.npz") as file:
        x = {part: normalized(file[part]) for part in ("x_train", "x_test")}
        y = {part: torch.from_numpy(file[part]).long().flatten() for part in ("y_train", "y_test")}
    return Data(
        calibration=x["x_train"][:calibration],
        evaluation=(x["x_test"], y["y_test"]),
        training=(x["x_train"], y["y_train"]),
    )
