"""The four networks of the demos and their data, as the recipes name them; each is trained in under a minute when first used."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import features
import numpy as np
import samples
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from edgekit import Data, cache, load_weights
from edgekit.files import write_whole


def _block(
    make: type[nn.Module], norm: type[nn.Module], a: int, b: int, size: int, stride: int = 1, groups: int = 1
) -> nn.Module:
    layer = make(a, b, size, stride=stride, padding=size // 2, groups=groups, bias=False)
    return nn.Sequential(layer, norm(b), nn.ReLU())


def _2d(a: int, b: int, size: int = 3, stride: int = 1, groups: int = 1) -> nn.Module:
    return _block(nn.Conv2d, nn.BatchNorm2d, a, b, size, stride, groups)


def _1d(a: int, b: int, size: int, stride: int = 1) -> nn.Module:
    return _block(nn.Conv1d, nn.BatchNorm1d, a, b, size, stride)


class Separable(nn.Module):
    """A convolution, three depthwise-separable layers, a mean, a linear layer: (N, 1, H, W) to (N, classes)."""

    def __init__(self, classes: int, width: int = 16) -> None:
        super().__init__()
        layers = [_2d(1, width, 3, 2)]
        for i in range(3):
            layers += [_2d(width << i, width << i, 3, 2 if i == 0 else 1, width << i), _2d(width << i, width << (i + 1), 1)]
        self.layers, self.head = nn.Sequential(*layers), nn.Linear(width << 3, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean((2, 3)))  # type: ignore[no-any-return]


class Motion(nn.Module):
    """(N, 6, 50) to (N, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(_1d(6, 24, 5), _1d(24, 32, 5, 2), _1d(32, 32, 5, 2))
        self.head = nn.Linear(32, len(samples.MOTIONS))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean(2))  # type: ignore[no-any-return]


class AutoEncoder(nn.Module):
    """(N, 320) to itself through 8 numbers; what it has not learned comes out wrong."""

    def __init__(self) -> None:
        super().__init__()
        widths = (320, 64, 64, 8, 64, 64)
        parts = [nn.Sequential(nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU()) for a, b in itertools.pairwise(widths)]
        self.layers, self.out = nn.Sequential(*parts), nn.Linear(64, 320)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.layers(x))  # type: ignore[no-any-return]


def digits() -> nn.Module:
    return _trained("digits", Separable(10), digits_data(), epochs=6)


def words() -> nn.Module:
    return _trained("words", Separable(len(samples.words())), words_data(), epochs=9)


def motions() -> nn.Module:
    return _trained("motions", Motion(), motions_data(), epochs=30)


def machine() -> nn.Module:
    return _trained("machine", AutoEncoder(), machine_data(), epochs=20)


def digits_data() -> Data:
    x, y, x_test, y_test = samples.digit_images()
    return _data(x, y, x_test, y_test)


def words_data() -> Data:
    """Each word twice: at another moment, level and noise."""
    rng = np.random.default_rng(0)
    x, y, x_test, y_test = samples.word_waves()

    def moved(wave: features.Array) -> features.Array:
        shifted = np.roll(wave, int(rng.integers(-1500, 1500)))
        return features.speech((shifted + rng.uniform(0, 0.3) * samples.background(rng)).astype(np.float32))

    train = np.stack([moved(w) for _ in range(2) for w in x])
    return _data(train, np.tile(y, 2), np.stack([features.speech(w) for w in x_test]), y_test)


def motions_data() -> Data:
    """Windows of 5 s, one second apart."""

    def windows(x: features.Array, y: samples.Labels) -> tuple[features.Array, samples.Labels]:
        starts = range(0, x.shape[1] - features.MOTION_SAMPLES + 1, 10)
        cut = [features.motion(s[i : i + features.MOTION_SAMPLES]) for s in x for i in starts]
        return np.stack(cut), np.repeat(y, len(starts))

    x, y, x_test, y_test = samples.motion_readings()
    return _data(*windows(x, y), *windows(x_test, y_test))


def machine_data() -> Data:
    """Learned from a minute of the sound machine; judged on sound and faulty windows it has not heard. A target (N, 321) is 1 for
    a fault, then the input, which the output is compared with."""
    rng = np.random.default_rng(0)

    def windows(wave: features.Array) -> Tensor:
        cut = np.lib.stride_tricks.sliding_window_view(wave, features.SOUND_SAMPLES)[::1024]
        return torch.from_numpy(np.stack([features.machine_sound(w) for w in cut]))

    train = windows(samples.machine(60, rng))
    normal, faulty = windows(samples.machine(10, rng)), windows(samples.machine(10, rng, fault=True))
    x, fault = torch.cat([normal, faulty]), torch.cat([torch.zeros(len(normal), 1), torch.ones(len(faulty), 1)])
    return Data(
        calibration=train[:256], training=(train, train), evaluation=(x, torch.cat([fault, x], 1)), metric=area_under_curve
    )


def area_under_curve(outputs: Tensor, target: Tensor) -> float:
    """Percent of pairs of a sound and a faulty window in which the faulty one has the larger error."""
    y = np.asarray(target)
    errors = ((np.asarray(outputs) - y[:, 1:]) ** 2).mean(1)
    return 100 * float((errors[y[:, 0] == 1][:, None] > errors[y[:, 0] == 0]).mean())


def _data(x: features.Array, y: samples.Labels, x_test: features.Array, y_test: samples.Labels) -> Data:
    one, two, three, four = map(torch.from_numpy, (x, y, x_test, y_test))
    return Data(calibration=one[:: max(1, len(one) // 256)], training=(one, two), evaluation=(three, four))


def _trained(name: str, model: nn.Module, data: Data, epochs: int) -> nn.Module:
    """The first call trains and keeps the weights in edgekit's cache folder, by the hash of this code and its data."""
    total = hashlib.sha256(torch.__version__.encode())
    for file in ("networks.py", "samples.py", "features.py"):
        total.update((Path(__file__).parent / file).read_bytes())
    total.update(b"" if name == "machine" else samples.source(name).encode())
    weights = cache.folder() / "examples" / f"pi-{name}-{total.hexdigest()[:12]}.safetensors"
    if not weights.is_file():
        write_whole(weights, save(_train(model, data, epochs).state_dict()))
    return load_weights(model, weights).eval()


def _train(model: nn.Module, data: Data, epochs: int) -> nn.Module:
    """One thread and one seed, so that the same machine always gives the same weights."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Linear):
            layer.reset_parameters()
    assert data.training is not None
    x, y = data.training
    loss = F.mse_loss if y.is_floating_point() else F.cross_entropy
    steps = epochs * -(-len(x) // 64)
    optimizer = torch.optim.AdamW(model.train().parameters(), 5e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for _ in range(epochs):
        for part in torch.split(torch.randperm(len(x)), 64):
            if len(part) > 1:
                optimizer.zero_grad()
                torch.autograd.backward(loss(model(x[part]), y[part]))
                optimizer.step()
            schedule.step()
    torch.set_num_threads(threads)
    return model.eval()
