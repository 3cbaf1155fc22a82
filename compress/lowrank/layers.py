"""A layer that may be factorized, the thin layers it becomes, and what both cost.

A scheme splits each group of a layer's weight, seen as a matrix of n outputs by m inputs (times the kernel's taps), at rank r:

    linear    (out, in)              ->  (r, in), (out, r)
    ced       k x k convolution      ->  k x k to r channels, then 1 x 1
    spatial   k x k convolution      ->  k x 1 to r channels, then 1 x k
    tucker    k x k convolution      ->  1 x 1 to q channels, k x k to r, 1 x 1; q has r's share of the inputs

Stride, padding and dilation stay with the part that has the kernel; groups stay groups in every part.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Layer", "Part", "Shape", "dense_shape", "effective_weight", "macs_of", "params_of", "part_shapes", "run_parts"]

Pair = tuple[int, int]


@dataclass(frozen=True)
class Layer:
    """A linear or convolutional layer.

    Attributes:
        name: for messages and records.
        weight: float (out, in), or (out, in / groups, kh, kw).
        bias: (out,) or None.
        parameter: dotted name of the weight in its module; "" where nobody asks. ``bias_parameter``: of the bias.
        in_size: height and width of the input; of a linear layer (1, rows for one sample).
        uses: how often the model applies it (more than once with tied weights).
    """

    name: str
    weight: Tensor
    bias: Tensor | None
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    in_size: Pair = (1, 1)
    parameter: str = ""
    uses: int = 1
    bias_parameter: str = ""

    @property
    def is_linear(self) -> bool:
        return self.weight.dim() == 2

    @property
    def rows(self) -> int:
        """Outputs of one group."""
        return self.weight.shape[0] // self.groups

    @property
    def columns(self) -> int:
        """Inputs of one group times the taps of the kernel."""
        return self.weight[0].numel()

    @property
    def break_even(self) -> float:
        """Rank of one group at which two factors have as many weights as the layer: mn / (m + n)."""
        return self.rows * self.columns / (self.rows + self.columns)

    def grouped(self) -> Tensor:
        """The weight as (groups, outputs of a group, inputs of a group x taps), float64."""
        return self.weight.detach().double().reshape(self.groups, self.rows, self.columns)


@dataclass(frozen=True)
class Shape:
    """Geometry of one thin layer; ``weight`` is its weight's shape."""

    weight: tuple[int, ...]
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1


@dataclass(frozen=True)
class Part:
    """One thin layer with its values; only the last of a chain has a bias."""

    shape: Shape
    weight: Tensor
    bias: Tensor | None = None


def part_shapes(layer: Layer, scheme: str, rank: int, multiple: int = 1) -> tuple[Shape, ...]:
    """Shapes of the thin layers of a scheme at ``rank`` (of each group)."""
    out = layer.weight.shape[0]
    if layer.is_linear:
        return Shape((rank, layer.weight.shape[1])), Shape((out, rank))
    inputs, kh, kw = layer.weight.shape[1:]
    g, (sh, sw), (ph, pw), (dh, dw) = layer.groups, layer.stride, layer.padding, layer.dilation
    whole = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation, "groups": g}
    if scheme == "ced":
        return Shape((g * rank, inputs, kh, kw), **whole), Shape((out, rank, 1, 1), groups=g)  # type: ignore[arg-type]
    if scheme == "spatial":
        return (
            Shape((g * rank, inputs, kh, 1), (sh, 1), (ph, 0), (dh, 1), g),
            Shape((out, rank, 1, kw), (1, sw), (0, pw), (1, dw), g),
        )
    entry = min(inputs, ceil(rank * inputs / layer.rows / multiple) * multiple)
    return (
        Shape((g * entry, inputs, 1, 1), groups=g),
        Shape((g * rank, entry, kh, kw), **whole),  # type: ignore[arg-type]
        Shape((out, rank, 1, 1), groups=g),
    )


def params_of(shapes: tuple[Shape, ...]) -> int:
    """Weights, without biases."""
    return sum(prod(s.weight) for s in shapes)


def macs_of(shapes: tuple[Shape, ...], in_size: Pair) -> int:
    """Multiply-accumulates for one sample."""
    total, size = 0, in_size
    for s in shapes:
        if len(s.weight) == 4:
            ends = zip(size, s.weight[2:], s.stride, s.padding, s.dilation, strict=True)
            h, w = ((n + 2 * p - d * (k - 1) - 1) // step + 1 for n, k, step, p, d in ends)
            size = (h, w)
        total += prod(s.weight) * prod(size)
    return total


def dense_shape(layer: Layer) -> Shape:
    """The layer itself as one part."""
    return Shape(tuple(layer.weight.shape), layer.stride, layer.padding, layer.dilation, layer.groups)


def run_parts(parts: tuple[Part, ...], x: Tensor) -> Tensor:
    """The chain applied to (..., features) or (N, C, H, W)."""
    for part in parts:
        s = part.shape
        weight, bias = part.weight.to(x.dtype), None if part.bias is None else part.bias.to(x.dtype)
        if len(s.weight) == 2:
            x = F.linear(x, weight, bias)
        else:
            x = F.conv2d(x, weight, bias, s.stride, s.padding, s.dilation, s.groups)
    return x


def effective_weight(layer: Layer, parts: tuple[Part, ...]) -> Tensor:
    """The one weight that computes what the chain computes, in the shape of the layer's, float64.

    The columns of the identity go through the chain: each unit patch gives what one weight contributes.
    """
    if layer.is_linear:
        eye = torch.eye(layer.weight.shape[1], dtype=torch.float64)
        return run_parts(tuple(Part(p.shape, p.weight.double()) for p in parts), eye).T
    inputs, kh, kw = layer.weight.shape[1:]
    channels = inputs * layer.groups
    taps = torch.eye(channels * kh * kw, dtype=torch.float64).view(-1, channels, kh, kw)
    plain = tuple(Part(Shape(p.shape.weight, groups=p.shape.groups), p.weight.double()) for p in parts)
    full = run_parts(plain, taps).flatten(1).T.reshape(-1, layer.groups, inputs, kh, kw)
    own = torch.arange(layer.weight.shape[0]) // layer.rows
    return full[torch.arange(layer.weight.shape[0]), own]
