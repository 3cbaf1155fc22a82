"""First and second moments of a layer's inputs or outputs over calibration data, streamed.

Of a layer with more inputs (times kernel taps) than outputs only the outputs' moments are kept: for one split of the weight they
say as much (see :mod:`edgekit.compress.lowrank.split`), and a 3 x 3 convolution of 64 channels needs 64 x 64 numbers then
instead of 576 x 576.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from edgekit.compress.lowrank.layers import Layer

__all__ = ["Moments", "side_of"]


def side_of(layer: Layer, schemes: tuple[str, ...]) -> str:
    """ "output" or "input": whose moments decide; spatial and Tucker splits need those of the inputs."""
    whole_only = layer.is_linear or set(schemes) == {"ced"}
    return "output" if whole_only and layer.rows <= layer.columns else "input"


@dataclass
class Moments:
    """Running sums over positions; ``second`` (groups, d, d) and ``first`` (groups, d) in float64."""

    side: str
    second: Tensor
    first: Tensor
    count: int = 0

    @staticmethod
    def empty(layer: Layer, side: str) -> Moments:
        d = layer.rows if side == "output" else layer.columns
        return Moments(side, torch.zeros(layer.groups, d, d).double(), torch.zeros(layer.groups, d).double())

    def add(self, layer: Layer, x: Tensor, y: Tensor) -> None:
        """Take in one batch: ``x`` the layer's input, ``y`` its output (bias included), as the layer has them."""
        if self.side == "output":
            if layer.bias is not None:
                bias = layer.bias.to(y.device)
                y = y - (bias if layer.is_linear else bias.view(1, -1, 1, 1))
            rows = y.flatten(0, -2) if layer.is_linear else y.transpose(0, 1).flatten(1).T
        elif layer.is_linear:
            rows = x.flatten(0, -2)
        else:
            columns = F.unfold(x, layer.weight.shape[2:], layer.dilation, layer.padding, layer.stride)
            rows = columns.transpose(1, 2).flatten(0, 1)
        grouped = rows.detach().reshape(len(rows), layer.groups, -1).transpose(0, 1)
        self.second += (grouped.transpose(1, 2) @ grouped).double().cpu()
        self.first += grouped.double().sum(1).cpu()
        self.count += len(rows)

    @property
    def mean(self) -> Tensor:
        """(groups, d)."""
        return self.first / max(self.count, 1)

    @property
    def covariance(self) -> Tensor:
        """(groups, d, d), about the mean."""
        mean = self.mean
        return self.second / max(self.count, 1) - mean.unsqueeze(2) * mean.unsqueeze(1)
