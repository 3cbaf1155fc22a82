"""Splitting one layer at every rank that pays.

With inputs x of covariance C the best approximation of W in the layer's output, ``min E|(W - W')x|^2`` at rank r, is
``W' = U U^T W``, U the r leading eigenvectors of ``W C W^T`` (the outputs' covariance; Zhang et al. 2015, section 3.1): the
"whitened" SVD without an inverse. ``C = I`` gives the plain SVD (Eckart and Young 1936). What the mean of x loses goes into the
bias. Both factors get the same norm for each of the r components: sqrt(S) on both sides.

A spatial split is the SVD of the kernel as (in x kh) by (out x kw) (Jaderberg et al. 2014), Tucker-2 the two channel bases and
the core between (Kim et al. 2016); with calibration data the last part is then fitted by least squares to the layer's outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from edgekit.compress.lowrank.layers import (
    Layer,
    Part,
    Shape,
    dense_shape,
    effective_weight,
    macs_of,
    params_of,
    part_shapes,
)
from edgekit.compress.lowrank.moments import Moments

__all__ = ["Option", "Split", "split_layer"]

_RIDGE = 1e-7
"""Weight of the plain objective beside the data's, relative: directions that no sample has are kept as far as rank allows."""


@dataclass(frozen=True)
class Option:
    """A layer at one rank.

    Attributes:
        params: weights; ``biases``: values of a bias that the layer did not have.
        error: squared error relative to the output's variance; without data to the weight's squared norm.
    """

    scheme: str
    rank: int
    params: int
    biases: int
    macs: int
    error: float


@dataclass(frozen=True)
class Split:
    """A layer's options, cheapest first, and ``build(option)``, the thin layers of one."""

    layer: Layer
    params: int
    macs: int
    options: tuple[Option, ...]
    build: Callable[[Option], tuple[Part, ...]]


def split_layer(
    layer: Layer,
    moments: Moments | None,
    *,
    solver: str,
    schemes: tuple[str, ...],
    multiple: int,
    iterations: int,
    seed: int,
    exact: int | None = None,
) -> Split:
    """Every rank at which ``layer`` has fewer weights and fewer multiply-accumulates than before.

    Args:
        moments: of calibration data; None for the plain weight error.
        solver: "svd", "svd_data", "snmf" or "random" (see :class:`LowRank`); the latter two are ranked by the SVD's error.
        schemes: of a convolution; a linear layer, or a 1 x 1 convolution, has one split.
        multiple: of the ranks.
        exact: only this rank.
    """
    one_tap = layer.is_linear or layer.weight[0, 0].numel() == 1
    schemes = ("ced",) if one_tap else schemes
    dense = (dense_shape(layer),)
    params, macs = params_of(dense), macs_of(dense, layer.in_size) * layer.uses
    biases = layer.weight.shape[0] if moments is not None and layer.bias is None else 0
    makers = {s: _MAKERS[s](layer, moments, iterations, multiple) for s in schemes}
    options = []
    for scheme, (errors, _) in makers.items():
        ranks = range(multiple, len(errors) + 1, multiple) if exact is None else [exact] if exact <= len(errors) else []
        for rank in ranks:
            shapes = part_shapes(layer, scheme, rank, multiple)
            p, m = params_of(shapes), macs_of(shapes, layer.in_size) * layer.uses
            if p + biases < params and m < macs:
                options.append(Option(scheme, rank, p, biases, m, errors(rank)))

    def build(option: Option) -> tuple[Part, ...]:
        shapes = part_shapes(layer, option.scheme, option.rank, multiple)
        if solver == "random":
            return _random(layer, shapes, seed)
        if solver == "snmf":
            return _snmf(layer, shapes, option.rank, iterations, seed)
        weights, bias = makers[option.scheme][1](option.rank)
        return _parts(layer, shapes, weights, bias)

    return Split(layer, params, macs, tuple(sorted(options, key=lambda o: (o.params, o.error))), build)


class _Errors:
    """Relative error by rank, computed when asked for."""

    def __init__(self, size: int, of: Callable[[int], float]) -> None:
        self.size, self.of = size, of

    def __len__(self) -> int:
        return self.size

    def __call__(self, rank: int) -> float:
        return max(self.of(rank), 0.0)


_Values = tuple[list[Tensor], Tensor | None]
_Maker = tuple[_Errors, Callable[[int], _Values]]


def _whole(layer: Layer, moments: Moments | None, iterations: int, multiple: int) -> _Maker:
    """Linear and CED: one split of the whole matrix of each group."""
    basis, energy = _basis(layer.grouped(), moments)
    total = float(energy.sum().clamp(min=1e-300))

    def error(rank: int) -> float:
        return float(energy[:, rank:].sum()) / total

    def values(rank: int) -> _Values:
        weight, u = layer.grouped(), basis[:, :, :rank]
        first = u.transpose(1, 2) @ weight
        bias = None
        if moments is not None:
            mean = _output_mean(weight, moments)
            bias = (mean - (u @ (u.transpose(1, 2) @ mean.unsqueeze(2))).squeeze(2)).flatten()
        first, second = _balanced(first, u)
        return [first, second], bias

    return _Errors(min(layer.rows, layer.columns), error), values


def _basis(weight: Tensor, moments: Moments | None) -> tuple[Tensor, Tensor]:
    """Orthonormal columns (groups, n, q) in order of output energy, and the energies (groups, q); weight (groups, n, m)."""
    n, m = weight.shape[1:]
    if moments is None:
        return _left(weight)
    covariance = moments.covariance
    if moments.side == "output":
        plain = weight @ weight.transpose(1, 2)
        ridge = _RIDGE * _traces(covariance) / _traces(plain).clamp(min=1e-300)
        value, vector = torch.linalg.eigh(covariance + ridge * plain)
        q = min(n, m)
        return vector.flip(2)[:, :, :q], value.flip(1)[:, :q].clamp(min=0)
    ridge = _RIDGE * _traces(covariance) / m
    value, vector = torch.linalg.eigh(covariance + ridge * torch.eye(m, dtype=torch.float64))
    return _left(weight @ (vector * value.clamp(min=0).sqrt().unsqueeze(1)))


def _left(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Left singular vectors and squared singular values, from the Gram matrix of the shorter side in float64."""
    n, m = matrix.shape[1:]
    if n <= m:
        value, vector = torch.linalg.eigh(matrix @ matrix.transpose(1, 2))
        return vector.flip(2), value.flip(1).clamp(min=0)
    value, right = torch.linalg.eigh(matrix.transpose(1, 2) @ matrix)
    value, right = value.flip(1).clamp(min=0), right.flip(2)
    columns = matrix @ right
    norms = columns.norm(dim=1, keepdim=True)
    if bool((norms > 1e-7 * norms.amax(2, keepdim=True)).all()):
        return columns / norms, value
    return torch.linalg.qr(columns)[0], value  # columns of singular value 0 have no direction yet


def _traces(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=1, dim2=2).sum(1).view(-1, 1, 1)


def _output_mean(weight: Tensor, moments: Moments) -> Tensor:
    mean = moments.mean
    return mean if moments.side == "output" else (weight @ mean.unsqueeze(2)).squeeze(2)


def _balanced(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of ``first`` (groups, r, m) and columns of ``second`` (groups, n, r) brought to the same norm, pair by pair."""
    a, b = first.norm(dim=2), second.norm(dim=1)
    scale = torch.where((a > 0) & (b > 0), (b / a.clamp(min=1e-150)).sqrt(), torch.ones_like(a))
    return first * scale.unsqueeze(2), second / scale.unsqueeze(1)


def _spatial(layer: Layer, moments: Moments | None, iterations: int, multiple: int) -> _Maker:
    inputs, kh, kw = layer.weight.shape[1:]
    kernel = layer.grouped().view(layer.groups, layer.rows, inputs, kh, kw)
    matrix = kernel.permute(0, 2, 3, 1, 4).reshape(layer.groups, inputs * kh, layer.rows * kw)
    u, energy = _left(matrix)
    total = float(energy.sum().clamp(min=1e-300))

    def values(rank: int) -> _Values:
        first = u[:, :, :rank].transpose(1, 2)  # (g, r, in * kh)
        second = (first @ matrix).view(layer.groups, rank, layer.rows, kw)
        bias = None
        if moments is not None:
            each = first.view(layer.groups, rank, inputs, kh)
            taps = torch.zeros(layer.groups, rank, kw, inputs, kh, kw, dtype=torch.float64)
            for tap in range(kw):
                taps[:, :, tap, :, :, tap] = each
            fitted, bias = _fit_last(layer, taps.view(layer.groups, rank * kw, -1), moments)
            second = fitted.view(layer.groups, layer.rows, rank, kw).transpose(1, 2)
        first, flat = _balanced(first, second.permute(0, 2, 3, 1).reshape(layer.groups, -1, rank))
        second = flat.view(layer.groups, layer.rows, kw, rank).transpose(2, 3)
        return [first, second], bias

    def error(rank: int) -> float:
        return _error_of(layer, values(rank), moments, "spatial", rank, multiple) if moments else (
            float(energy[:, rank:].sum()) / total
        )  # fmt: skip

    return _Errors(min(matrix.shape[1:]), error), values


def _tucker(layer: Layer, moments: Moments | None, iterations: int, multiple: int) -> _Maker:
    inputs, kh, kw = layer.weight.shape[1:]
    g = layer.groups
    kernel = layer.grouped().view(g, layer.rows, inputs, kh * kw)
    start, _ = _left(kernel.transpose(1, 2).reshape(g, inputs, -1))

    def values(rank: int) -> _Values:
        entry = part_shapes(layer, "tucker", rank, multiple)[0].weight[0] // g
        v = start[:, :, :entry]
        for _ in range(max(1, min(iterations, 5))):  # higher-order orthogonal iteration
            seen = torch.einsum("gnit,gie->gnet", kernel, v).reshape(g, layer.rows, -1)
            u = _left(seen)[0][:, :, :rank]
            v = _left(torch.einsum("gnit,gnr->girt", kernel, u).reshape(g, inputs, -1))[0][:, :, :entry]
        core = torch.einsum("gnit,gie,gnr->gret", kernel, v, u)
        last, bias = u, None
        if moments is not None:
            taps = torch.einsum("gret,gie->grit", core, v).reshape(g, rank, -1)
            last, bias = _fit_last(layer, taps, moments)
        middle, last = _balanced(core.reshape(g, rank, -1), last)
        middle = middle.view(g, rank, entry, -1)
        first, moved = _balanced(v.transpose(1, 2), middle.permute(0, 1, 3, 2).reshape(g, -1, entry))
        middle = moved.view(g, rank, kh * kw, entry).transpose(2, 3)
        return [first, middle, last], bias

    def error(rank: int) -> float:
        return _error_of(layer, values(rank), moments, "tucker", rank, multiple)

    return _Errors(min(layer.rows, layer.columns), error), values


def _fit_last(layer: Layer, before: Tensor, moments: Moments) -> tuple[Tensor, Tensor]:
    """Least squares on the data: Z with ``W x ~ Z (before x)``, and what the mean needs in the bias; before (groups, k, m)."""
    weight, covariance = layer.grouped(), moments.covariance
    ridge = _RIDGE * _traces(covariance) / weight.shape[2]
    covariance = covariance + ridge * torch.eye(weight.shape[2], dtype=torch.float64)
    inner = before @ covariance @ before.transpose(1, 2)
    size = inner.diagonal(dim1=1, dim2=2).mean(1).view(-1, 1, 1).clamp(min=1e-300)
    inner = inner + 1e-12 * size * torch.eye(inner.shape[1], dtype=torch.float64)
    z = torch.linalg.solve(inner, before @ covariance @ weight.transpose(1, 2)).transpose(1, 2)
    rest = weight - z @ before
    return z, (rest @ moments.mean.unsqueeze(2)).flatten()


def _error_of(layer: Layer, values: _Values, moments: Moments | None, scheme: str, rank: int, multiple: int) -> float:
    parts = _parts(layer, part_shapes(layer, scheme, rank, multiple), *values)
    weight = layer.grouped()
    rest = weight - effective_weight(layer, parts).reshape(weight.shape)
    if moments is None:
        return float(rest.square().sum() / weight.square().sum().clamp(min=1e-300))
    covariance = moments.covariance

    def energy(w: Tensor) -> float:
        return float(((w @ covariance) * w).sum())

    return energy(rest) / max(energy(weight), 1e-300)


def _parts(layer: Layer, shapes: tuple[Shape, ...], weights: list[Tensor], bias: Tensor | None) -> tuple[Part, ...]:
    """The thin layers in the layer's dtype; ``bias`` is what the split adds to the layer's own."""
    dtype = layer.weight.dtype
    own = None if layer.bias is None else layer.bias.detach().double()
    if bias is not None:
        own = bias if own is None else own + bias
    last = None if own is None else own.to(dtype)
    parts = [Part(s, w.reshape(s.weight).to(dtype).contiguous()) for s, w in zip(shapes, weights, strict=True)]
    return (*parts[:-1], Part(parts[-1].shape, parts[-1].weight, last))


def _random(layer: Layer, shapes: tuple[Shape, ...], seed: int) -> tuple[Part, ...]:
    """Normal values, scaled so that the outputs' variance is that of the layer's own weight. The layer's bias stays."""
    generator = torch.Generator().manual_seed(seed)
    gain = float(layer.grouped().square().sum(2).mean().sqrt())
    weights = []
    for i, s in enumerate(shapes):
        scale = (gain if i == 0 else 1.0) / torch.Size(s.weight[1:]).numel() ** 0.5
        weights.append(torch.randn(s.weight, generator=generator).double() * scale)
    return _parts(layer, shapes, weights, None)


def _snmf(layer: Layer, shapes: tuple[Shape, ...], rank: int, iterations: int, seed: int) -> tuple[Part, ...]:
    """Semi-NMF (Ding, Li and Jordan 2010, section 3.1): ``W ~ G F^T`` with G >= 0, by alternating updates."""
    weight = layer.grouped()  # X^T of the paper, (g, n, m)
    generator = torch.Generator().manual_seed(seed)
    g = torch.rand(weight.shape[0], weight.shape[1], rank, generator=generator).double() + 0.2
    for _ in range(iterations):
        f = _least_squares(g, weight)
        xf, ff = weight @ f.transpose(1, 2), f @ f.transpose(1, 2)
        up, down = xf.clamp(min=0) + g @ (-ff).clamp(min=0), (-xf).clamp(min=0) + g @ ff.clamp(min=0)
        g = g * (up / down.clamp(min=1e-12)).sqrt()
    first, second = _balanced(_least_squares(g, weight), g)
    return _parts(layer, shapes, [first, second], None)


def _least_squares(g: Tensor, weight: Tensor) -> Tensor:
    """F^T (groups, r, m) with the least ``|weight - g F^T|``."""
    eye = torch.eye(g.shape[2], dtype=torch.float64)
    inner = g.transpose(1, 2) @ g
    ridge = 1e-10 * inner.diagonal(dim1=1, dim2=2).mean()
    found: Tensor = torch.linalg.solve(inner + ridge * eye, g.transpose(1, 2) @ weight)
    return found


_MAKERS: dict[str, Callable[[Layer, Moments | None, int, int], _Maker]] = {
    "ced": _whole,
    "spatial": _spatial,
    "tucker": _tucker,
}
