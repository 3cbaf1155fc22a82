"""A captured graph with binary layers in training, and back: the trained graph in plain ATen operators.

In the graph a binary layer is ``where(x >= threshold, 1, -1)``, then the conv2d or linear with a weight of one size for each
output channel. :mod:`edgekit.compress.ptq.binary_units` knows that form again when the program is frozen.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from edgekit.compress.binary.choose import Choice, geometry_of
from edgekit.compress.binary.layer import Baked, BinaryLayer, Moments
from edgekit.compress.binary.settings import Binary
from edgekit.compress.canonical import ATEN, arguments, assign_tensor, drop_unused_tensors, traced_value
from edgekit.compress.capture import Graph, tensor_of

__all__ = ["baked_graph", "binary_twin", "layers_of", "moments", "settle"]


def moments(graph: Graph, choice: Choice, original: Graph, stream: Iterable[Sequence[Tensor]]) -> dict[str, Moments]:
    """Mean and spread of each chosen layer's input and output in the float model.

    Args:
        graph: the graph that will be trained: it says what each layer reads.
        original: the float model as captured, which has these values too.
        stream: calibration batches.
    """
    wanted: dict[str, int] = {}
    ends: dict[str, tuple[str, str]] = {}
    own = {n.name: n for n in original.module.graph.nodes}
    for node in graph.module.graph.nodes:
        if node.name in choice.kinds:
            x = node.args[0]
            ends[node.name] = (x.name if x.name in own else own[node.name].args[0].name, node.name)
            wanted |= dict.fromkeys(ends[node.name], 1 if geometry_of(node) else -1)
    sums: dict[str, list[Any]] = {name: [0, 0.0, 0.0] for name in wanted}

    class Watcher(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.name in wanted:
                flat = value.double().movedim(wanted[n.name], -1).flatten(0, -2)
                entry = sums[n.name]
                entry[0] += len(flat)
                entry[1] = entry[1] + flat.sum(0)
                entry[2] = entry[2] + flat.square().sum(0)
            return value

    with torch.no_grad():
        for batch in stream:
            Watcher(original.module).run(*batch)

    def summary(name: str) -> tuple[Tensor, Tensor]:
        count, total, squares = sums[name]
        mean = total / count
        return mean.float(), (squares / count - mean.square()).clamp(min=0).sqrt().float()

    return {name: Moments(*summary(i), *summary(o)) for name, (i, o) in ends.items()}


def binary_twin(graph: Graph, choice: Choice, settings: Binary, found: Mapping[str, Moments]) -> fx.GraphModule:
    """The graph with a :class:`BinaryLayer` in place of each chosen layer, called ``binary_<fx node>``; all its weights learn."""
    module = copy.deepcopy(graph.module)
    for node in list(module.graph.nodes):
        if node.name not in choice.kinds:
            continue
        x, weight, bias, *_ = arguments(node)
        own = None if bias is None else tensor_of(module, bias)
        kind, shortcut = choice.kinds[node.name], node.name in choice.shortcuts
        layer = BinaryLayer(tensor_of(module, weight), own, geometry_of(node), kind, settings, found[node.name], shortcut)
        name = f"binary_{node.name}"
        module.add_submodule(name, layer)
        with module.graph.inserting_before(node):
            made = module.graph.call_module(name, (x,))
        node.replace_all_uses_with(made)
        module.graph.erase_node(node)
    for node in list(module.graph.nodes):
        if node.target in (ATEN.conv2d.default, ATEN.linear.default) and node.args[1].op == "get_attr":
            _round_weight(module, node)
    module.graph.eliminate_dead_code()
    module.recompile()
    drop = {n for n, _ in module.named_parameters() if not n.startswith("binary_")}
    used = {str(n.target) for n in module.graph.nodes if n.op == "get_attr"}
    for name, parameter in module.named_parameters():
        if name in drop:
            parameter.requires_grad_(parameter.is_floating_point() and name in used)
    return module


def settle(twin: fx.GraphModule, batch: Sequence[Tensor]) -> None:
    """Start each binary layer, in order, from the statistics of what it really reads: new sums change the float model's."""
    handles = [m.register_forward_pre_hook(lambda layer, args: layer.settle(args[0])) for m in layers_of(twin).values()]
    with torch.no_grad():
        twin.train()(*batch)
    for handle in handles:
        handle.remove()


class _Int8Weight(nn.Module):
    """A weight as `ptq` will round it by default, straight through: signs behind it are learned for what it will be."""

    def forward(self, weight: Tensor) -> Tensor:
        step = weight.detach().flatten(1).abs().amax(1).clamp(min=1e-9).view(-1, *[1] * (weight.dim() - 1)) / 127
        return weight + (torch.round(weight.detach() / step) * step - weight.detach())


def _round_weight(module: fx.GraphModule, node: fx.Node) -> None:
    name = f"int8_{node.name}"
    module.add_submodule(name, _Int8Weight())
    with module.graph.inserting_before(node):
        rounded = module.graph.call_module(name, (node.args[1],))
    node.update_arg(1, rounded)


def layers_of(twin: nn.Module) -> dict[str, BinaryLayer]:
    """fx node name to its layer in training."""
    return {n.removeprefix("binary_"): m for n, m in twin.named_modules() if isinstance(m, BinaryLayer)}


def baked_graph(graph: Graph, choice: Choice, twin: fx.GraphModule) -> Graph:
    """``graph`` with what the twin has learned; see the module for the form of a binary layer."""
    module = copy.deepcopy(graph.module)
    names = dict(graph.names)
    layers = layers_of(twin)
    for name, parameter in twin.named_parameters():
        if not name.startswith("binary_") and parameter.requires_grad:
            assign_tensor(module, name, parameter.detach().clone())
    for node in list(module.graph.nodes):
        if node.name in choice.kinds:
            layer = layers[node.name]
            baked = layer.baked()
            if baked.threshold is not None and _centre(module, node, baked.threshold, layer.spread):  # type: ignore[arg-type]
                baked = replace(baked, threshold=torch.zeros_like(baked.threshold))
            _bake(module, node, baked, names)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    drop_unused_tensors(module)
    module.requires_grad_(False)
    return replace(graph, module=module.eval(), names=names)


def _centre(module: fx.GraphModule, node: fx.Node, threshold: Tensor, spread: Tensor) -> bool:
    """Give the real layer that only this sign reads thresholds of 0 and equal spreads, by its own weights.

    Eight bits for all channels could else tell little on both sides of the threshold of a channel that varies less than others.
    """
    source: Any = node.args[0]
    if source.target not in (ATEN.conv2d.default, ATEN.linear.default) or len(source.users) != 1:
        return False
    _, weight, bias, *_ = arguments(source)
    if (
        weight.op != "get_attr"
        or len(weight.users) != 1
        or not (bias is None or (bias.op == "get_attr" and len(bias.users) == 1))
    ):
        return False
    value = tensor_of(module, weight).detach()
    scale = spread.double()
    if bias is None or len(threshold) != len(value):
        return False
    shape = (-1, *[1] * (value.dim() - 1))
    assign_tensor(module, str(weight.target), (value.double() / scale.view(shape)).float())
    real = tensor_of(module, bias).detach().double()
    assign_tensor(module, str(bias.target), ((real - threshold.double()) / scale).float())
    return True


def _bake(module: fx.GraphModule, node: fx.Node, baked: Baked, names: dict[str, str]) -> None:
    x, weight, _, *rest = arguments(node)
    base = str(weight.target).removesuffix("weight").strip("._")
    base = base if base and base != str(weight.target) else f"{node.name}_binary"
    assign_tensor(module, f"{base}.weight", baked.weight)
    assign_tensor(module, f"{base}.bias", baked.bias)
    layer = names[node.name]
    graph = module.graph
    with graph.inserting_before(node):
        if baked.threshold is not None:
            threshold = baked.threshold.view(-1, 1, 1) if rest else baked.threshold
            assign_tensor(module, f"{base}.threshold", threshold)
            above = graph.call_function(ATEN.ge.Tensor, (x, graph.get_attr(f"{base}.threshold")))
            signs = graph.call_function(ATEN.where.Scalar, (above, 1.0, -1.0))
            for made, suffix in ((above, "sign_ge"), (signs, "sign")):
                made.meta = {**node.meta}
                made.meta.pop("val", None)
                made.meta["val"] = traced_value(made)
                names[made.name] = f"{layer}_{suffix}"
            x = signs
        pointers = graph.get_attr(f"{base}.weight"), graph.get_attr(f"{base}.bias")
    node.args, node.kwargs = (x, *pointers, *rest), {}
