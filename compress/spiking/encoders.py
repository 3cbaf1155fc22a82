"""Values as spikes, and moving images as the events of a camera.

All encoders take values from 0 to 1, (N, ...), and give (N, T, ...), what a network with ``frames: true`` takes. ``direct`` is
what conversion uses: the value itself as a constant current.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["camera", "direct", "event_frames", "latency", "poisson", "rate", "saccade"]


def direct(x: Tensor, steps: int) -> Tensor:
    """The value at every step."""
    return x.unsqueeze(1).expand(len(x), steps, *x.shape[1:]).clone()


def rate(x: Tensor, steps: int) -> Tensor:
    """``round(x * steps)`` spikes (ties up), as evenly spread as can be."""
    t = torch.arange(steps + 1, dtype=torch.float64).view(1, -1, *[1] * (x.dim() - 1))
    counts = torch.floor(x.unsqueeze(1).double() * t + 0.5)
    return (counts[:, 1:] - counts[:, :-1]).to(x.dtype)


def poisson(x: Tensor, steps: int, generator: torch.Generator | None = None) -> Tensor:
    """A spike at each step with probability x, independently."""
    return (torch.rand(len(x), steps, *x.shape[1:], generator=generator) < x.unsqueeze(1)).to(x.dtype)


def latency(x: Tensor, steps: int) -> Tensor:
    """One spike, the earlier the larger: at step ``round((1 - x) * (steps - 1))``; none for 0."""
    at = torch.round((1 - x) * (steps - 1)).long().unsqueeze(1)
    t = torch.arange(steps).view(1, -1, *[1] * (x.dim() - 1))
    return ((t == at) & (x.unsqueeze(1) > 0)).to(x.dtype)


def event_frames(
    t: Tensor, x: Tensor, y: Tensor, polarity: Tensor, size: tuple[int, int], bins: int, duration: float, *, binary: bool = True
) -> Tensor:
    """Events of one recording as (bins, 2, H, W): 1 where any fell in, or their number.

    Args:
        t: times from 0 to ``duration``, in its unit; what is later falls in the last bin.
        x, y, polarity: columns, rows, 0 or 1; integers, as long as ``t``.
    """
    height, width = size
    step = (t.double() * bins / duration).long().clamp(0, bins - 1)
    flat = ((step * 2 + polarity.long()) * height + y.long()) * width + x.long()
    counts = torch.bincount(flat, minlength=bins * 2 * height * width).reshape(bins, 2, height, width).float()
    return counts.clamp(max=1) if binary else counts


def saccade(images: Tensor, frames: int, reach: float = 2.0) -> Tensor:
    """A video (N, frames, H, W) of images (N, H, W) moved along a triangle, as N-MNIST's camera was (Orchard et al. 2015).

    ``reach``: largest shift in pixels; positions between pixels are interpolated, what comes in is 0.
    """
    corners = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 2.0], [0.0, 0.0]]) * reach / 2
    at = torch.linspace(0, 3, frames)
    low = at.floor().clamp(max=2).long()
    shift = corners[low] + (corners[low + 1] - corners[low]) * (at - low).unsqueeze(1)
    count, height, width = images.shape
    video = []
    for dy, dx in shift.tolist():
        theta = torch.tensor([[1.0, 0.0, 2 * dx / width], [0.0, 1.0, 2 * dy / height]]).expand(count, 2, 3)
        grid = torch.nn.functional.affine_grid(theta, [count, 1, height, width], align_corners=False)
        moved = torch.nn.functional.grid_sample(images.unsqueeze(1), grid, align_corners=False)
        video.append(moved[:, 0])
    return torch.stack(video, 1)


def camera(video: Tensor, threshold: float = 0.15, floor: float = 0.1, most: int = 1) -> Tensor:
    """ON and OFF events of an event camera, (N, F - 1, 2, H, W), of a video (N, F, H, W) with values from 0 to 1.

    A pixel remembers a log intensity. Where the present one is ``threshold`` or more above it, it emits ON events, one for each
    threshold but at most ``most`` a frame, and remembers that much more; below it, OFF events (Lichtsteiner et al. 2008).

    Args:
        floor: added to intensities before the logarithm.
    """
    light = torch.log(video + floor)
    memory, found = light[:, 0], []
    for t in range(1, light.shape[1]):
        change = (light[:, t] - memory) / threshold
        on, off = (torch.floor(c + 1e-6).clamp(0, most) for c in (change, -change))
        memory = memory + (on - off) * threshold
        found.append(torch.stack([on, off], 1))
    return torch.stack(found, 1)
