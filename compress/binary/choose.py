"""Which layers of a captured graph become binary, why the others do not, and the ReLUs that go."""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from edgekit.compress.binary.settings import Binary
from edgekit.compress.canonical import ATEN, arguments, pair
from edgekit.compress.capture import Graph, tensor_of
from edgekit.errors import InputError, ModelError

__all__ = ["Choice", "choose", "geometry_of", "without_relus"]

WEIGHTED = (ATEN.conv2d.default, ATEN.linear.default)
_FEW = 8
"""Products for one output value below which a binary layer cannot be worth it (depthwise 3x3 has 9, but one channel only)."""


@dataclass(frozen=True)
class Choice:
    """Layers by fx node name.

    Attributes:
        kinds: of those that change.
        left: layer name to why it does not.
        shortcuts: nodes that got a shortcut, see :mod:`edgekit.compress.binary.shortcuts`.
    """

    kinds: Mapping[str, str]
    left: Mapping[str, str]
    shortcuts: frozenset[str] = frozenset()


def choose(graph: Graph, settings: Binary) -> Choice:
    """Decide for every layer with weights.

    Raises:
        InputError: a scope fits no layer.
        ModelError: no layer is left to be binary.
    """
    nodes = [n for n in graph.module.graph.nodes if n.target in WEIGHTED]
    _check_scopes(graph, settings, [graph.names[n.name] for n in nodes])
    uses: dict[Any, int] = {}
    for node in nodes:
        uses[node.args[1].target] = uses.get(node.args[1].target, 0) + 1
    kinds: dict[str, str] = {}
    left: dict[str, str] = {}
    for node in nodes:
        name = graph.names[node.name]
        scope = next((k for p, k in settings.scopes.items() if re.fullmatch(p, name)), None)
        reason = _unfit(node, uses)
        if not reason and scope is None:
            ends = settings.keep_first_last and node in (nodes[0], nodes[-1])
            reason = "first or last layer (keep_first_last)" if ends else _unwise(graph, node)
        if not reason and scope == "float":
            reason = "left as it is by `scopes`"
        if reason:
            left[name] = reason
        else:
            kinds[node.name] = scope or settings.kind
    if not kinds:
        said = "; ".join(f"{k}: {v}" for k, v in list(left.items())[:4]) or "it has no convolution or linear layer"
        raise ModelError(f"binary: no layer of the model becomes binary ({said}); name layers with `scopes`")
    return Choice(kinds, left)


def geometry_of(node: fx.Node) -> tuple[Any, ...]:
    """Stride, padding, dilation and groups of a conv2d; nothing for a linear."""
    if node.target == ATEN.linear.default:
        return ()
    _, _, _, stride, padding, dilation, groups = arguments(node)
    return (pair(stride, 2), pair(padding, 2), pair(dilation, 2), groups)


def _unfit(node: fx.Node, uses: Mapping[Any, int]) -> str:
    _, weight, bias, *_ = arguments(node)
    if not (isinstance(weight, fx.Node) and weight.op == "get_attr"):
        return "its weight is computed at run time"
    if bias is not None and not (isinstance(bias, fx.Node) and bias.op == "get_attr"):
        return "its bias is computed at run time"
    if uses[weight.target] > 1:
        return "another layer has the same weight"
    return ""


def _unwise(graph: Graph, node: fx.Node) -> str:
    weight = tensor_of(graph.module, node.args[1])  # type: ignore[arg-type]
    geometry = geometry_of(node)
    if geometry and geometry[3] > 1 and weight.shape[1] == 1:
        return "a depthwise layer: sums of few signs say little (name it in `scopes` to have it binary)"
    if weight[0].numel() < _FEW:
        return f"{weight[0].numel()} products for one output: sums of few signs say little"
    return ""


def _check_scopes(graph: Graph, settings: Binary, names: list[str]) -> None:
    for pattern in settings.scopes:
        if not any(re.fullmatch(pattern, name) for name in names):
            close = difflib.get_close_matches(pattern, names, 3, 0.3) or names[:5]
            raise InputError(f"binary: scopes: {pattern!r} fits no layer with weights; layers are called {', '.join(close)}, ...")


def without_relus(graph: Graph, choice: Choice, everywhere: bool) -> tuple[Graph, list[str]]:
    """A copy without the ReLUs that only signs read; with ``everywhere`` also without those after binary layers and their sums.

    Returns:
        The graph, and the names of the layers whose output lost its ReLU.
    """
    module = copy.deepcopy(graph.module)
    signed = {n.name for n in module.graph.nodes if choice.kinds.get(n.name) in ("binary", "binary_activations")}
    gone = []
    for node in list(module.graph.nodes):
        if node.target != ATEN.relu.default:
            continue
        source = node.args[0]
        only = bool(node.users) and all(u.name in signed and u.args[0] is node for u in node.users)
        if only or (everywhere and _binary_source(source, choice.kinds)):
            gone.append(graph.names.get(node.name, node.name))
            node.replace_all_uses_with(source)
            module.graph.erase_node(node)
    module.recompile()
    return replace(graph, module=module), gone


def _binary_source(node: Any, kinds: Mapping[str, str]) -> bool:
    if node.name in kinds:
        return True
    return node.target == ATEN.add.Tensor and any(isinstance(a, fx.Node) and a.name in kinds for a in node.args[:2])
