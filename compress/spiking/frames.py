"""A model for event frames: the same network on every frame, its outputs averaged."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["Frames"]


class Frames(nn.Module):
    """``net`` on each of T frames: (N, T, ...) to the mean of its outputs, (N, ...).

    As a network with ReLUs it sees each frame by itself. As a spiking network (``spiking: {method: train, frames: true}``) its
    neurons remember from one frame to the next.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x.transpose(0, 1).flatten(0, 1))
        return y.reshape(x.shape[1], -1, *y.shape[1:]).mean(0)
