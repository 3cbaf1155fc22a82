"""The data of the four networks, read from $EDGEKIT_DATA (or ../shared/data beside the repository): nothing is downloaded."""

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from edgekit import Data
from edgekit.errors import DataError


def folder() -> Path:
    """Where the files are."""
    found = Path(os.environ.get("EDGEKIT_DATA") or Path(__file__).parents[3] / "shared" / "data")
    if not (found / "mlperf_tiny").is_dir():
        raise DataError(f"{found}: no folder mlperf_tiny; set EDGEKIT_DATA to the folder that has datasets/ and mlperf_tiny/")
    return found


def pixels(part: str) -> Tensor:
    """CIFAR-10 images "x_train" (4000) or "x_test" (1000) as (N, 3, 32, 32), 0 to 255."""
    with np.load(folder() / "datasets" / "cifar10_exact_5k.npz") as file:
        return torch.from_numpy(file[part]).permute(0, 3, 1, 2).float().contiguous()


def cifar10(calibration: int = 1024) -> Data:
    """For ResNet-8: calibrated on the first training images, judged on the first 1000 test images."""
    with np.load(folder() / "datasets" / "cifar10_exact_5k.npz") as file:
        labels = {part: torch.from_numpy(file[part]).long().flatten() for part in ("y_train", "y_test")}
    training = pixels("x_train")
    return Data(
        calibration=training[:calibration],
        evaluation=(pixels("x_test"), labels["y_test"]),
        training=(training, labels["y_train"]),
    )


def keywords(calibration: int = 200) -> Data:
    """For DS-CNN: 1000 spoken words as 49 x 10 MFCC. Calibrated on the first 200, judged on all 1000, as MLPerf Tiny has it."""
    with np.load(folder() / "datasets" / "kws01.npz") as file:
        integers = torch.from_numpy(file["x"]).float().reshape(-1, 1, 49, 10)
        x = (integers - float(file["zero_point"])) * float(file["scale"])
        y = torch.from_numpy(file["y"]).long()
    return Data(calibration=x[:calibration], evaluation=(x, y), training=(x, y))


def images96(calibration: int = 256, judged: int = 500) -> Data:
    """For MobileNet: CIFAR-10 enlarged to 96 x 96, 0 to 1. There are no labelled photographs here, so the float model's own
    answers are the labels: the metric is how often a file agrees with it."""
    from networks import mobilenet

    def enlarge(x: Tensor) -> Tensor:
        return F.interpolate(x, size=(96, 96), mode="bilinear", align_corners=False) / 255

    x = enlarge(pixels("x_test")[:judged])
    with torch.no_grad():
        y = torch.cat([mobilenet()(part).argmax(1) for part in torch.split(x, 50)])
    return Data(calibration=enlarge(pixels("x_train")[:calibration]), evaluation=(x, y), metric=agreement_with_float)


def machine_sound() -> Data:
    """For the auto-encoder: one normal clip, 196 windows of 5 frames x 128 log-mel bins; even ones calibrate, odd ones judge."""
    frames = np.fromfile(folder() / "mlperf_tiny" / "ad" / "normal_id_01_00000000_hist_librosa.bin", np.float32).reshape(-1, 128)
    x = torch.from_numpy(np.stack([frames[i : i + 5].ravel() for i in range(len(frames) - 4)]))
    return Data(calibration=x[::2], evaluation=(x[1::2], x[1::2]), metric=reconstruction_db)


def agreement_with_float(outputs: Tensor, y: Tensor) -> float:
    """Percent of samples on which the largest output is the float model's."""
    return 100 * float((np.asarray(outputs).argmax(1) == np.asarray(y)).mean())


def reconstruction_db(outputs: Tensor, y: Tensor) -> float:
    """How far the input's power lies above the reconstruction error's."""
    signal, found = np.asarray(y, np.float64), np.asarray(outputs, np.float64)
    return float(10 * np.log10((signal**2).sum() / ((signal - found) ** 2).sum()))
