"""Linformer (Wang et al. 2020): attention over k projected keys and values instead of n, found in a captured graph.

``softmax(q K^T) V`` becomes ``softmax(q (E K)^T) (F V)``, with E and F (k, n) for all heads of a layer. They start as means of
neighbouring tokens, which is exact where neighbours are equal, and have to be trained (the ``repair`` block). An attention is
left alone where that costs more: 2 n^2 d multiply-accumulates become 4 n k d (:mod:`edgekit.compress.lowrank.attention`).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from edgekit.compress.canonical import ATEN, arguments, assign_tensor, traced_value
from edgekit.compress.capture import Graph
from edgekit.compress.rewrite.editing import free_name, revalue

__all__ = ["neighbours", "shorten"]

_SCALING = (ATEN.mul.Tensor, ATEN.div.Tensor, ATEN.mul.Scalar, ATEN.div.Scalar)


@dataclass(frozen=True)
class _Attention:
    """``key`` and ``value``: (node, argument, axis of the tokens) where the two are read. ``refused``: why it cannot be done."""

    name: str
    key: tuple[fx.Node, int, int]
    value: tuple[fx.Node, int, int]
    refused: str = ""


def shorten(graph: Graph, tokens: int) -> tuple[Graph, dict[str, str], dict[str, str]]:
    """A copy of ``graph`` in which keys and values are projected to ``tokens``, wherever that saves work.

    Returns:
        The graph, layer name to what was done, and to why nothing was.
    """
    module, names = copy.deepcopy(graph.module), dict(graph.names)
    changed: dict[str, str] = {}
    left: dict[str, str] = {}
    for found in list(_attentions(module, names)):
        node, argument, _ = found.value
        n = int(_operand(node, argument).meta["val"].shape[-2])
        if found.refused:
            left[found.name] = found.refused
        elif 2 * tokens >= n:
            left[found.name] = f"projecting to {tokens} costs less from {2 * tokens + 1} tokens on; it has {n}"
        else:
            for what, place in (("keys", found.key), ("values", found.value)):
                _project(module, names, *place, f"{found.name}.{what}", neighbours(tokens, n))
            changed[found.name] = f"keys and values of {n} tokens projected to {tokens}, as means of neighbours until trained"
    revalue(module)
    module.graph.lint()
    module.recompile()
    return replace(graph, module=module, names=names), changed, left


def neighbours(tokens: int, n: int) -> Tensor:
    """(tokens, n): each row the mean of its share of neighbours; the shares differ by one at most."""
    owner = torch.arange(n) * tokens // n
    member = (owner == torch.arange(tokens).unsqueeze(1)).float()
    return member / member.sum(1, keepdim=True)


def _attentions(module: fx.GraphModule, names: dict[str, str]) -> Iterator[_Attention]:
    """Fused ones, and products with a softmax over the last axis between them."""
    for node in module.graph.nodes:
        if node.target == ATEN.scaled_dot_product_attention.default:
            mask, dropout, causal = arguments(node)[3:6]
            refused = _MASKED if mask is not None or causal else "it has dropout" if dropout else ""
            yield _Attention(names[node.name], (node, 1, -2), (node, 2, -2), refused)
        elif node.target == ATEN.matmul.default and _target(weights := node.args[0]) == ATEN.softmax.int:
            scores, refused = weights.args[0], ""
            while _target(scores) in _SCALING and not isinstance(scores.args[1], fx.Node):
                scores = scores.args[0]
            if _target(scores) in (ATEN.add.Tensor, ATEN.where.self, ATEN.masked_fill.Scalar):
                refused, scores = _MASKED, weights
            elif _target(scores) != ATEN.matmul.default or weights.args[1] not in (-1, len(weights.meta["val"].shape) - 1):
                continue
            elif any(len(n.users) > 1 for n in (weights, scores)):
                refused = "its scores are read by something else too"
            yield _Attention(_layer_of(names[weights.name]), (scores, 1, -1), (node, 1, -2), refused)


_MASKED = "its scores have a mask, which does not fit projected keys"


def _layer_of(name: str) -> str:
    """ "layers.0.attention.softmax" is of "layers.0.attention"."""
    return name.rpartition(".")[0] or name


def _target(node: Any) -> Any:
    return node.target if isinstance(node, fx.Node) else None


def _operand(node: fx.Node, argument: int) -> fx.Node:
    found = node.args[argument]
    assert isinstance(found, fx.Node)
    return found


def _project(
    module: fx.GraphModule, names: dict[str, str], node: fx.Node, argument: int, axis: int, name: str, weight: Tensor
) -> None:
    """Put a linear layer over the tokens, which are on ``axis`` (-1 or -2), before an argument of a node."""
    x, name = _operand(node, argument), free_name(name, names)
    parameter = f"{name.replace('.', '_')}.weight"
    assign_tensor(module, parameter, weight.to(x.meta["val"].dtype))
    turn = [*range(len(x.meta["val"].shape))]
    turn[-1], turn[-2] = turn[-2], turn[-1]
    with module.graph.inserting_before(node):
        steps: list[tuple[Any, tuple[Any, ...]]] = [(ATEN.linear.default, (module.graph.get_attr(parameter), None))]
        if axis == -2:
            steps = [(ATEN.permute.default, (turn,)), *steps, (ATEN.permute.default, (turn,))]
        for target, more in steps:
            made = module.graph.call_function(target, (x, *more))
            made.meta = {**node.meta, "val": traced_value(made)}
            names[made.name] = free_name(name if target == ATEN.linear.default else f"{name}_turned", names)
            x = made
    node.update_arg(argument, x)
