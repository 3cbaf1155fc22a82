"""Writing operators into a captured graph with their traced values and layer names."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from edgekit.compress.canonical import traced_value
from edgekit.compress.capture import tensor_of

__all__ = ["Writer", "free_name", "revalue"]


def free_name(name: str, names: dict[str, str]) -> str:
    """``name``, or with a number behind it if a layer is called so."""
    base, count, taken = name, 2, set(names.values())
    while name in taken:
        name, count = f"{base}_{count}", count + 1
    return name


class Writer:
    """Writes operators before ``node`` that replace it; call :meth:`finish` with the last one."""

    def __init__(self, node: fx.Node, names: dict[str, str]) -> None:
        self.node, self.names = node, names
        self.made: list[fx.Node] = []

    def __call__(self, target: Any, *args: Any) -> fx.Node:
        with self.node.graph.inserting_before(self.node):
            made = self.node.graph.call_function(target, args)
        made.meta = {k: v for k, v in self.node.meta.items() if k != "val"}
        made.meta["val"] = traced_value(made)
        self.made.append(made)
        return made

    def finish(self, last: fx.Node) -> None:
        """Let ``last`` stand for the node: its users, its name."""
        name = self.names.pop(self.node.name)
        for made in self.made:
            if made is not last:
                self.names[made.name] = free_name(f"{name}_{str(made.target).split('.')[1].strip('_')}", self.names)
        self.names[last.name] = name
        self.node.replace_all_uses_with(last)
        self.node.graph.erase_node(self.node)


def revalue(module: fx.GraphModule) -> None:
    """Trace every operator's value again, after parameters have changed their shapes."""
    fakes = (n.meta["val"] for n in module.graph.nodes if isinstance(n.meta.get("val"), FakeTensor))
    mode = next(fakes).fake_mode
    for node in module.graph.nodes:
        if node.op == "get_attr":
            node.meta["val"] = mode.from_tensor(tensor_of(module, node))
        elif node.op == "call_function" and any(isinstance(n.meta.get("val"), FakeTensor) for n in node.all_input_nodes):
            node.meta["val"] = traced_value(node)
