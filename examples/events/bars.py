"""A camera that sees changes looks at moving bars: which way do they move? One frame does not tell, the order of frames does.

Nothing is downloaded: bars of random width move over noise, and :func:`edgekit.compress.spiking.encoders.camera` turns the video
into events, ON and OFF ones taken together.
"""

import torch
from torch import Tensor, nn

from edgekit import Data
from edgekit.compress.spiking import Frames
from edgekit.compress.spiking.encoders import camera

STEPS, SIZE = 8, 12
DIRECTIONS = ((0, 1), (0, -1), (1, 0), (-1, 0))  # right, left, down, up


def videos(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Videos (count, STEPS + 1, SIZE, SIZE) from 0 to 1 and the direction of each (count,)."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 4, (count,), generator=generator)
    start, width = (torch.randint(a, b, (count,), generator=generator) for a, b in ((0, SIZE), (1, 4)))
    video = 0.02 * torch.rand(count, STEPS + 1, SIZE, SIZE, generator=generator)
    for i in range(count):
        dy, dx = DIRECTIONS[int(y[i])]
        for t in range(STEPS + 1):
            lines = [(int(start[i]) + (dy + dx) * t + k) % SIZE for k in range(int(width[i]))]
            if dx:
                video[i, t, :, lines] += 0.9
            else:
                video[i, t, lines, :] += 0.9
    return video.clamp(max=1), y


def load() -> Data:
    """What the recipe's ``data:`` names: event frames (N, STEPS, 1, SIZE, SIZE)."""
    (x, y), (xt, yt) = ((camera(v, 0.5).amax(2, keepdim=True), label) for v, label in (videos(600, 0), videos(200, 1)))
    return Data(calibration=x[:100], evaluation=(xt, yt), training=(x, y))


def build() -> nn.Module:
    """What the recipe's ``model:`` names; the recipe trains it."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Flatten(),
        nn.Linear(16 * 36, 4),
    )  # fmt: skip
    model: nn.Module = Frames(net)
    return model.eval()
