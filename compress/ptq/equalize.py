"""Cross-layer equalization (Nagel et al. 2019, section 4.1) on a captured graph.

Where layer B alone reads layer A through operators that let a positive factor of a channel pass (ReLU, pools, mean), channel i of
A is divided and the weights of B that read it multiplied by ``s[i] = sqrt(max|A[i]| / max|B[:, i]|)``, so that both have the same
range. The function stays the same. ReLU6 does not let a factor pass; chains through it are left alone.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from edgekit.compress.canonical import ATEN, arguments
from edgekit.compress.capture import Graph, tensor_of

__all__ = ["equalize", "find_pairs", "own_tensor"]

_WEIGHTED = {ATEN.conv2d.default, ATEN.linear.default}
_PASSES = {ATEN.relu.default, ATEN.max_pool2d.default, ATEN.avg_pool2d.default, ATEN.mean.dim}
_SWEEPS, _ENOUGH = 40, 1e-3


def equalize(graph: Graph) -> tuple[Graph, tuple[str, ...]]:
    """The equalized graph and the names of the layers that changed; the given graph stays as it is."""
    module = copy.deepcopy(graph.module)
    result = replace(graph, module=module)
    pairs = find_pairs(module)
    for node in {n for pair in pairs for n in pair}:
        node.meta.pop("batch_norm", None)  # its outputs no longer have that mean and spread
        for argument in node.args[1:3]:
            if isinstance(argument, fx.Node):
                own_tensor(module, argument)
    for _ in range(_SWEEPS):
        change = max((_equalize_pair(module, a, b) for a, b in pairs), default=0.0)
        if change < _ENOUGH:
            break
    names = dict.fromkeys(graph.names[n.name] for pair in pairs for n in pair)
    return result, tuple(names)


def find_pairs(module: fx.GraphModule) -> list[tuple[fx.Node, fx.Node]]:
    """Weighted nodes (A, B) where only B reads A, in execution order."""
    pairs = []
    for node in module.graph.nodes:
        if node.target in _WEIGHTED and _parameters_are_its_own(node):
            user = _single_user(node)
            while user is not None and _lets_factors_pass(user):
                user = _single_user(user)
            if user is not None and user.target in _WEIGHTED and _parameters_are_its_own(user) and _same_channels(node, user):
                pairs.append((node, user))
    return pairs


def _single_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _parameters_are_its_own(node: fx.Node) -> bool:
    used = [n for n in node.args[1:3] if isinstance(n, fx.Node)]
    others = {str(n.target) for n in node.graph.nodes if n.op == "get_attr" and n not in used and n.users}
    return all(n.op == "get_attr" and len(n.users) == 1 and str(n.target) not in others for n in used)


def _same_channels(a: fx.Node, b: fx.Node) -> bool:
    """Outputs of A are inputs of B one to one: channels are axis 1 of a conv and the last axis of a linear."""
    between = b.args[0]
    assert isinstance(between, fx.Node)
    if a.target == ATEN.linear.default:
        return b.target == a.target and (between is a or between.target == ATEN.relu.default)
    return b.target == a.target or between.meta["val"].dim() == 2


def _lets_factors_pass(node: fx.Node) -> bool:
    if node.target == ATEN.reshape.default:
        before, after = node.args[0].meta["val"].shape, node.meta["val"].shape  # type: ignore[union-attr]
        return len(before) == 4 and tuple(before[2:]) == (1, 1) and len(after) == 2
    if node.target == ATEN.mean.dim:
        return node.args[1] == [2, 3]
    return node.target in _PASSES


def own_tensor(module: fx.GraphModule, node: fx.Node) -> None:
    """Give the copied module its own tensor: a deep copy of a graph module shares nothing, an export may alias."""
    owner_name, _, leaf = str(node.target).rpartition(".")
    owner = module.get_submodule(owner_name)
    value = tensor_of(module, node).detach().clone()
    owner._parameters.pop(leaf, None)
    owner._buffers.pop(leaf, None)
    owner.register_parameter(leaf, nn.Parameter(value, requires_grad=False))


def _equalize_pair(module: fx.GraphModule, a: fx.Node, b: fx.Node) -> float:
    """Scale one pair in place; returns the largest relative change of a channel."""
    first, second = tensor_of(module, a.args[1]), tensor_of(module, b.args[1])  # type: ignore[arg-type]
    groups: int = arguments(b)[6] if b.target == ATEN.conv2d.default else 1
    grouped = second.view(groups, second.shape[0] // groups, second.shape[1], -1)
    range_a = first.abs().flatten(1).amax(1)
    range_b = grouped.abs().amax((1, 3)).flatten()
    usable = (range_a > 0) & (range_b > 0)
    factor = torch.where(usable, torch.sqrt(range_a / range_b.clamp(min=1e-30)), torch.ones_like(range_a)).clamp(1e-4, 1e4)
    first.div_(_along_outputs(factor, first))
    if len(a.args) > 2 and isinstance(a.args[2], fx.Node):
        tensor_of(module, a.args[2]).div_(factor)
    grouped.mul_(factor.view(groups, 1, second.shape[1], 1))
    return float((factor - 1).abs().max())


def _along_outputs(factor: Tensor, weight: Tensor) -> Tensor:
    return factor.view(-1, *[1] * (weight.dim() - 1))
