"""Bi-Real shortcuts (Liu et al. 2018, section 3.1): the real input of each binary layer is added to its output."""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from torch import Tensor, fx

from edgekit.compress.binary.choose import Choice
from edgekit.compress.canonical import ATEN
from edgekit.compress.capture import Graph

__all__ = ["with_shortcuts"]


def with_shortcuts(graph: Graph, choice: Choice) -> tuple[Graph, Choice]:
    """A copy in which every chosen layer whose shape allows it has a shortcut, and the choice that names these layers.

    A sum that is there already stays the only one. In a block of two layers, ``x + g(f(x))``, the last layer's shortcut starts
    from its own input, ``h + g(h)`` with ``h = x + f(x)``: with both, every block would double the stream.
    """
    module, names = copy.deepcopy(graph.module), dict(graph.names)
    added: dict[str, fx.Node] = {}
    for node in list(module.graph.nodes):
        if node.name not in choice.kinds or not _same_shape(node):
            continue
        source: Any = node.args[0]
        total = _sum_of(node)
        other = None if total is None else next(a for a in total.args[:2] if a is not node)
        if total is not None and isinstance(other, fx.Node) and _carries(source, other, added.values()):
            total.replace_input_with(other, source)
            continue
        with module.graph.inserting_after(node):
            made = module.graph.call_function(ATEN.add.Tensor, (node, source))
        node.replace_all_uses_with(made, delete_user_cb=lambda user, made=made: user is not made)
        made.meta = {**node.meta}
        names[made.name] = f"{names[node.name]}_shortcut"
        added[node.name] = made
    module.graph.lint()
    module.recompile()
    return replace(graph, module=module, names=names), replace(choice, shortcuts=frozenset(added))


def _sum_of(node: fx.Node) -> fx.Node | None:
    """The plain addition that alone reads a node."""
    users = list(node.users)
    if len(users) != 1 or users[0].target != ATEN.add.Tensor or users[0].kwargs or len(users[0].args) != 2:
        return None
    return users[0] if users[0].args.count(node) == 1 else None


def _carries(node: Any, wanted: fx.Node, added: Collection[fx.Node]) -> bool:
    """Whether ``node`` is ``wanted`` plus outputs of binary layers, through ReLUs."""
    while node is not wanted:
        if node.target == ATEN.relu.default:
            node = node.args[0]
        elif node in added:
            node = node.args[1]
        else:
            return False
    return True


def _same_shape(node: fx.Node) -> bool:
    x = node.args[0]
    value, source = node.meta.get("val"), x.meta.get("val") if isinstance(x, fx.Node) else None
    if not isinstance(value, Tensor) or not isinstance(source, Tensor):
        return False
    return [str(s) for s in value.shape] == [str(s) for s in source.shape]
