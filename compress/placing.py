"""A captured graph on another device: its parameters, and the tensors that it makes itself (``arange``, ``zeros``, ``to``)."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import fx, nn
from torch.fx.node import map_aggregate

__all__ = ["on_device"]

Module = TypeVar("Module", bound=nn.Module)


def on_device(module: Module, device: str) -> Module:
    """``module``, moved in place; a graph names the device of what it makes, which ``Module.to`` leaves as it was captured."""
    wanted = torch.device(device)

    def moved(value: Any) -> Any:
        return wanted if isinstance(value, torch.device) else value

    module.to(wanted)
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            for node in part.graph.nodes:
                node.args, node.kwargs = map_aggregate(node.args, moved), map_aggregate(node.kwargs, moved)
            part.recompile()
    return module
