"""Spikes of a converted network as plain 0 and 1: what each stands for goes into the weights of the layers that read it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from edgekit.compress.canonical import ATEN
from edgekit.compress.spiking.graph import operator_name
from edgekit.compress.spiking.unroll import SpikingNet

__all__ = ["fold_amplitudes"]

_CHANNELWISE = ("avg_pool2d", "adaptive_avg_pool2d", "mean", "pad", "constant_pad_nd")
_MOVES = ("reshape", "permute", "squeeze", "unsqueeze", "slice")


def fold_amplitudes(net: SpikingNet) -> dict[str, str]:
    """Make the spikes of a network 0 and 1, in place; returns for each layer of neurons where its amplitude went.

    A residual sum, or an output, cannot take it: such a path gets a multiplication of its own.
    """
    shapes = _shapes(net)
    notes: dict[str, str] = {}
    for node in list(net.module.graph.nodes):
        if node.op != "call_module" or str(node.target) not in net.sites:
            continue
        neuron = net.neuron(str(node.target))
        if neuron.amplitude is None:
            continue
        amplitude = neuron.amplitude.detach()
        neuron.amplitude = None
        scale = amplitude.expand(1, *shapes[node][1:]) if amplitude.dim() else amplitude
        folded, scaled = [], []
        for user in list(node.users):
            ends = _ends(user, node, scale, shapes)
            if ends is None:
                scaled.append(user)
            else:
                folded += [_into(net.module, end, s) for end, s in ends]
        if scaled:
            _multiply(net, node, amplitude, scaled)
        notes[net.sites[str(node.target)].name] = _note(net, folded, scaled)
    net.module.graph.lint()
    net.module.recompile()
    return notes


def _note(net: SpikingNet, folded: list[fx.Node], scaled: list[fx.Node]) -> str:
    parts = []
    if folded:
        parts.append("amplitude in the weights of " + ", ".join(dict.fromkeys(net.names.get(n.name, n.name) for n in folded)))
    if scaled:
        parts.append("multiplied on the way to " + ", ".join(dict.fromkeys(net.names.get(n.name, n.name) for n in scaled)))
    return "; ".join(parts)


def _ends(node: fx.Node, source: fx.Node, scale: Tensor, shapes: dict[fx.Node, Any]) -> list[tuple[fx.Node, Tensor]] | None:
    """The weighted layers that a path ends in, each with the scale of its input; None where something else ends it."""
    op = operator_name(node) if node.op == "call_function" else ""
    if op in ("conv2d", "linear") and node.args[0] is source:
        weight = node.args[1]
        own = isinstance(weight, fx.Node) and weight.op == "get_attr" and len(weight.users) == 1
        return [(node, scale)] if own and _by_input(scale, op) else None
    if node.op == "call_module" and str(node.target).startswith("pool_"):
        after = _channels(scale, shapes[node])
    elif node.op == "call_module" and str(node.target).startswith(("decode_", "repeat_")):
        after = scale
    elif op in _CHANNELWISE and (op != "mean" or list(node.args[1]) == [2, 3]):  # type: ignore[arg-type]
        if op in ("pad", "constant_pad_nd") and any(a not in (0, 0.0, None, "constant") for a in node.args[2:]):
            return None
        after = _channels(scale, shapes[node])
    elif op in _MOVES and sum(isinstance(a, fx.Node) for a in node.args) == 1:
        target: Any = node.target
        after = target(scale, *node.args[1:], **node.kwargs) if scale.dim() else scale
    else:
        return None
    found: list[tuple[fx.Node, Tensor]] = []
    for user in node.users:
        ends = _ends(user, node, after, shapes)
        if ends is None:
            return None
        found += ends
    return found


def _by_input(scale: Tensor, op: str) -> bool:
    """The scale differs between input channels (conv2d) or features (linear) only, so that a weight can take it."""
    if not scale.dim():
        return True
    rows = scale.flatten(2).movedim(1, 2)[0] if op == "conv2d" else scale.reshape(-1, scale.shape[-1])
    return torch.equal(rows, rows[:1].expand_as(rows))


def _channels(scale: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A scale of whole channels, after an operator that changes their height and width."""
    if not scale.dim():
        return scale
    return scale.flatten(2)[:, :, :1].reshape(1, -1, *[1] * (len(shape) - 2)).expand(1, *shape[1:])


def _into(module: fx.GraphModule, node: fx.Node, scale: Tensor) -> fx.Node:
    weight = module.get_parameter(str(node.args[1].target))  # type: ignore[union-attr]
    if not scale.dim():
        weight.data = weight.data * scale
    elif operator_name(node) == "linear":
        weight.data = weight.data * scale.reshape(-1, scale.shape[-1])[0]
    else:
        columns = scale.flatten(2)[0, :, 0]
        groups = int(node.args[6]) if len(node.args) > 6 else 1  # type: ignore[arg-type]
        each = columns.reshape(groups, 1, -1).expand(groups, weight.shape[0] // groups, -1).reshape(weight.shape[0], -1)
        weight.data = weight.data * each.reshape(*each.shape, *[1] * (weight.dim() - 2))
    return node


def _multiply(net: SpikingNet, node: fx.Node, amplitude: Tensor, users: list[fx.Node]) -> None:
    name = f"{node.target}_amplitude"
    net.module.register_parameter(name, torch.nn.Parameter(amplitude.clone()))
    with net.module.graph.inserting_after(node):
        value = net.module.graph.get_attr(name)
    with net.module.graph.inserting_after(value):
        made = net.module.graph.call_function(ATEN.mul.Tensor, (node, value))
    for user in users:
        user.replace_input_with(node, made)
    net.names[made.name] = f"{net.names[node.name]}_amplitude"


def _shapes(net: SpikingNet) -> dict[fx.Node, tuple[int, ...]]:
    shapes: dict[fx.Node, tuple[int, ...]] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if isinstance(value, Tensor):
                shapes[n] = tuple(value.shape)
            return value

    with torch.no_grad():
        Recorder(net.module).run(*(x[:1] for x in net.sample))
    return shapes
