"""Layers as sums of rank-1 components that belong to all classes or to one group of them; smaller models are cut out by group.

After KIND (Xie et al. 2025, "Knowledge Integration and Diversion"), of which only the abstract was at hand: the components
``u_i s_i v_i^T`` of a matrix are split into shared ones and ones that a class gate opens. The formulation here is OUR OWN, and
experimental: ``W(c) = U diag(s g(c)) V^T``, g(c) in {0, 1}, is 1 for the shared components and for those of c's group. The model
is trained with the gates (the class of each sample must be known then); a model for some groups alone is cut out exactly, without
data.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from edgekit.errors import InputError

__all__ = ["GatedLinear", "extract", "gated", "open_groups", "orthogonality"]


class GatedLinear(nn.Module):
    """``y = U (s g V^T x) + b`` over the last axis; U (out, r), V (in, r), s (r,).

    Attributes:
        shared: components that are always open: the first ones.
        owner: (r,), the group of each component, -1 for shared ones.
    """

    owner: Tensor

    def __init__(self, layer: nn.Linear, shared: int, each: int, groups: int) -> None:
        super().__init__()
        rank = shared + groups * each
        most = min(layer.weight.shape)
        if rank > most:
            raise InputError(f"gated: {shared} shared and {groups} x {each} components are more than the rank {most} of {layer}")
        u, s, vt = torch.linalg.svd(layer.weight.detach().double(), full_matrices=False)
        dtype = layer.weight.dtype
        self.u = nn.Parameter(u[:, :rank].to(dtype).contiguous())
        self.s = nn.Parameter(s[:rank].to(dtype))
        self.v = nn.Parameter(vt[:rank].T.to(dtype).contiguous())
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone())
        owner = torch.full((rank,), -1)
        owner[shared:] = torch.arange(rank - shared) % groups if groups else -1  # dealt round by round, largest first
        self.register_buffer("owner", owner)
        self.shared, self.opened = shared, None

    opened: Tensor | None
    """Group of each sample, (N,); None opens every component."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, ..., in)."""
        h = (x @ self.v) * self.s
        if self.opened is not None:
            gate = (self.owner < 0) | (self.owner == self.opened.view(-1, 1))
            h = h * gate.view(len(gate), *[1] * (x.dim() - 2), -1)
        y: Tensor = h @ self.u.T
        return y if self.bias is None else y + self.bias


def gated(model: nn.Module, names: Sequence[str], shared: int, each: int, groups: int) -> nn.Module:
    """A copy of ``model`` with the named linear layers in gated form, started from their SVD.

    Args:
        shared: components open to all; ``each``: those of each of ``groups`` groups of classes.

    Raises:
        InputError: a name that is no ``nn.Linear``, or more components than a layer has.
    """
    made = copy.deepcopy(model)
    for name in names:
        parent, _, leaf = name.rpartition(".")
        layer = made.get_submodule(name)
        if type(layer) is not nn.Linear:
            raise InputError(f"gated: {name!r} is {type(layer).__name__}; only nn.Linear has a gated form")
        setattr(made.get_submodule(parent), leaf, GatedLinear(layer, shared, each, groups))
    return made


@contextmanager
def open_groups(model: nn.Module, groups: Tensor | None) -> Iterator[None]:
    """Meanwhile each sample of a batch passes the shared components and those of its group; ``groups``: (N,) integers."""
    layers = [m for m in model.modules() if isinstance(m, GatedLinear)]
    before = [m.opened for m in layers]
    for m in layers:
        m.opened = groups
    try:
        yield
    finally:
        for m, old in zip(layers, before, strict=True):
            m.opened = old


def orthogonality(model: nn.Module) -> Tensor:
    """``sum |U^T U - I|^2 + |V^T V - I|^2``, a penalty that keeps components comparable while training; 0 at the start."""
    total = torch.zeros(())
    for m in model.modules():
        if isinstance(m, GatedLinear):
            for factor in (m.u, m.v):
                gram = factor.T @ factor
                total = total + (gram - torch.eye(len(gram), dtype=gram.dtype)).square().sum()
    return total


def extract(model: nn.Module, groups: Sequence[int]) -> nn.Module:
    """A copy with plain layers for these groups: two thin ones, or one where that is no larger.

    For a sample of a group it computes what the gated model computes with the gates of all ``groups`` open; for one group exactly
    what training saw.
    """
    made = copy.deepcopy(model)
    for name, m in list(made.named_modules()):
        if isinstance(m, GatedLinear):
            parent, _, leaf = name.rpartition(".")
            setattr(made.get_submodule(parent), leaf, _plain(m, groups))
    return made


def _plain(m: GatedLinear, groups: Sequence[int]) -> nn.Module:
    kept = (m.owner < 0) | torch.isin(m.owner, torch.tensor(list(groups)))
    u, v = (m.u * m.s)[:, kept].detach(), m.v[:, kept].detach()
    (out, rank), inputs = u.shape, len(v)
    weights = [v.T, u] if rank * (inputs + out) < inputs * out else [u @ v.T]
    layers = [nn.Linear(w.shape[1], w.shape[0], bias=w is weights[-1] and m.bias is not None) for w in weights]
    with torch.no_grad():
        for layer, w in zip(layers, weights, strict=True):
            layer.weight.copy_(w)
        if m.bias is not None:
            layers[-1].bias.copy_(m.bias)
    return nn.Sequential(*layers) if len(layers) > 1 else layers[0]
