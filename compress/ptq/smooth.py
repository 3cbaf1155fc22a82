"""SmoothQuant (Xiao et al. 2023, section 4): outlying channels of what linear layers read, moved into their weights.

Where a layer normalization with a scale and a shift of its own is read by linear layers alone, channel j of it is divided and
column j of their weights multiplied by ``s[j] = max|x[j]|^alpha / max|W[:, j]|^(1 - alpha)``. The function stays the same; the
activations lose outliers that would have made 8-bit steps coarse.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from edgekit.compress.canonical import ATEN, arguments
from edgekit.compress.capture import Graph, tensor_of
from edgekit.compress.ptq.equalize import own_tensor
from edgekit.compress.ptq.plan import Batches, fit

__all__ = ["find_norms", "smooth"]

_NORMS = {ATEN.layer_norm.default: 2, ATEN.rms_norm.default: 2}
"""Normalizations and the place of their scale; a shift follows where there is one."""


def smooth(graph: Graph, alpha: float, data: Batches) -> tuple[Graph, tuple[str, ...]]:
    """The smoothed graph and the names of the linear layers that changed; the given graph stays as it is.

    Args:
        alpha: how much of the difficulty moves from activations to weights, 0 to 1; 0.5 is the paper's choice.
        data: streamed once.
    """
    module = copy.deepcopy(graph.module)
    pairs = find_norms(module)
    if not pairs:
        return graph, ()
    largest = _largest(graph, [norm.name for norm, _ in pairs], data)
    for norm, linears in pairs:
        parameters = _affine(norm)
        weights: list[Any] = [layer.args[1] for layer in linears]
        for node in dict.fromkeys((*parameters, *weights)):
            own_tensor(module, node)
        columns = torch.stack([tensor_of(module, w).abs().amax(0) for w in weights]).amax(0)
        x = largest[norm.name]
        usable = (x > 0) & (columns > 0)
        factor = x.clamp(min=1e-30) ** alpha / columns.clamp(min=1e-30) ** (1 - alpha)
        factor = torch.where(usable, factor, torch.ones_like(factor)).clamp(1e-4, 1e4)
        with torch.no_grad():
            for node in parameters:
                tensor_of(module, node).div_(factor)
            for w in dict.fromkeys(weights):
                tensor_of(module, w).mul_(factor)
    names = dict.fromkeys(graph.names[layer.name] for _, linears in pairs for layer in linears)
    return replace(graph, module=module), tuple(names)


def find_norms(module: fx.GraphModule) -> list[tuple[fx.Node, list[fx.Node]]]:
    """Normalizations over the last axis that only linear layers read, with those; all parameters are used nowhere else."""
    found = []
    for node in module.graph.nodes:
        if node.target not in _NORMS or not node.users:
            continue
        affine, users = _affine(node), _readers(node)
        plain = all(u.target == ATEN.linear.default and _is_parameter(u.args[1]) for u in users)
        if not affine or not plain or len(arguments(node)[1]) != 1:
            continue
        mine: set[Any] = {*affine, *(u.args[1] for u in users)}
        targets = {str(n.target) for n in mine}
        others = [n for n in module.graph.nodes if n.op == "get_attr" and n not in mine and n.users and str(n.target) in targets]
        if not others and all(set(n.users) <= {node, *users} for n in mine):
            found.append((node, users))
    return found


def _readers(node: fx.Node) -> list[fx.Node]:
    """What reads a value, through permutations that keep its last axis last."""
    found = []
    for user in node.users:
        order: Any = user.args[1] if user.target == ATEN.permute.default else [0]
        moved = user.target == ATEN.permute.default and order[-1] in (-1, node.meta["val"].dim() - 1)
        found += _readers(user) if moved else [user]
    return found


def _affine(norm: fx.Node) -> list[fx.Node]:
    """Scale and shift of a normalization; empty without a scale."""
    given = list(arguments(norm))[
        _NORMS[norm.target] : _NORMS[norm.target] + (2 if norm.target == ATEN.layer_norm.default else 1)
    ]
    return [n for n in given if isinstance(n, fx.Node)] if given and _is_parameter(given[0]) else []


def _is_parameter(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.op == "get_attr"


def _largest(graph: Graph, names: Sequence[str], data: Batches) -> dict[str, Tensor]:
    """Largest absolute value of each channel (last axis) over the calibration samples."""
    found: dict[str, Tensor] = {}

    class Watcher(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.name in names:
                top = value.detach().abs().flatten(0, -2).amax(0)
                found[n.name] = torch.maximum(found.get(n.name, top), top)
            return value

    with torch.no_grad():
        for batch in fit(graph, data()):
            Watcher(graph.module).run(*batch)
    return found
