"""What a program leaves in float, counted: multiply-accumulates, stored numbers and bytes of every plain ATen operator.

Multiply-accumulates are those of convolutions and matrix products, as for integer layers; elementwise arithmetic, reductions,
normalizations and look-ups count 0. A tensor that several operators read (tied weights) belongs to the first.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["FloatLayer", "FloatOp", "count_macs", "float_layers"]


@dataclass(frozen=True)
class FloatLayer:
    """One plain ATen operator of a frozen program.

    Attributes:
        name: dotted name, that of the source module where there is one.
        op: ATen operator without namespace and overload, such as "layer_norm".
        node: name of the fx node.
        shape: output shape (of the first output), batch first.
        macs: multiply-accumulates for one sample.
        constants: the tensors that belong to it (weights, masks, tables), by their names in the program.
    """

    name: str
    op: str
    node: str
    shape: tuple[int, ...]
    macs: int
    constants: Mapping[str, Tensor]

    @property
    def parameters(self) -> int:
        """How many numbers are stored for it."""
        return sum(t.numel() for t in self.constants.values())

    @property
    def weight_bytes(self) -> int:
        """Their bytes."""
        return sum(t.numel() * t.element_size() for t in self.constants.values())


class FloatOp(nn.Module):
    """One ATen operator as a module, so that its dotted name survives export (``nn_module_stack``)."""

    def __init__(self, target: Callable[..., Any]) -> None:
        super().__init__()
        self.target = target

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.target(*args, **kwargs)


def float_layers(module: fx.GraphModule) -> tuple[FloatLayer, ...]:
    """Every operator of a program's graph that is none of ``edgekit::``, in execution order."""
    found: list[FloatLayer] = []
    used: dict[str, int] = {}
    owned: set[str] = set()
    for node in module.graph.nodes:
        if node.op != "call_function" or node.target is operator.getitem or str(node.target).startswith("edgekit."):
            continue
        stack = node.meta.get("nn_module_stack") or {}
        base = (next(reversed(stack.values()))[0] if stack else "") or node.name
        used[base] = used.get(base, 0) + 1
        constants = {str(n.target): _tensor(module, str(n.target)) for n in node.all_input_nodes if n.op == "get_attr"}
        found.append(
            FloatLayer(
                name=base if used[base] == 1 else f"{base}_{used[base]}",
                op=str(node.target).removeprefix("aten.").split(".")[0].strip("_"),
                node=node.name,
                shape=_shape(node.meta.get("val")),
                macs=_node_macs(module, node),
                constants={k: v for k, v in constants.items() if k not in owned},
            )
        )
        owned |= constants.keys()
    return tuple(found)


def count_macs(function: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Multiply-accumulates of convolutions and matrix products in one call, attention and recurrent layers included."""
    with torch.no_grad(), _visible_products(), FlopCounterMode(display=False) as counter:
        function(*args, **kwargs)
    return int(counter.get_total_flops()) // 2


@contextmanager
def _visible_products() -> Iterator[None]:
    """Fused CPU kernels (attention, LSTM, the encoder layer's fast path) split into products that torch's counter sees."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", "TF32 acceleration on top of oneDNN")  # of flags, whatever the machine
        stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield


def _node_macs(module: fx.GraphModule, node: fx.Node) -> int:
    def value(n: fx.Node) -> Any:
        if n.op == "get_attr":
            return _tensor(module, str(n.target))
        return _zeros(n.meta.get("val"))

    args, kwargs = fx.map_arg((node.args, node.kwargs), value)
    target: Any = node.target
    try:
        return count_macs(target, *args, **kwargs)
    except (RuntimeError, IndexError, ValueError):  # an operator that does not take zeros has no products
        return 0


def _zeros(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_zeros(v) for v in value)
    return torch.zeros(value.shape, dtype=value.dtype) if isinstance(value, Tensor) else value


def _shape(value: Any) -> tuple[int, ...]:
    while isinstance(value, list | tuple) and value:
        value = value[0]
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _tensor(module: nn.Module, name: str) -> Tensor:
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part)
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is not a tensor")
    return value.detach()
