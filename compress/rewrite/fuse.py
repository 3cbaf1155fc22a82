"""Layers that are one layer: parallel convolutions that are summed, linear maps one behind the other, written-out activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from edgekit.compress.canonical import ATEN, arguments, assign_tensor, pair
from edgekit.compress.capture import Graph, tensor_of
from edgekit.compress.rewrite.editing import Writer

__all__ = ["fuse_layers", "write_out_attention"]

Names = dict[str, str]


def fuse_layers(graph: Graph, names: Names) -> dict[str, str]:
    """Apply every rule until none fits; the graph is changed in place.

    Returns:
        Layer name to what was changed.
    """
    changed: dict[str, str] = {}
    rules: tuple[Callable[[Graph, fx.Node, Names], tuple[str, str] | None], ...] = (_parallel, _consecutive, _activation)
    again = True
    while again:
        again = False
        for node in list(graph.module.graph.nodes):
            if node.op != "call_function" or node._erased:
                continue
            found = next((f for rule in rules if (f := rule(graph, node, names))), None)
            if found:
                changed[found[0]] = found[1]
                graph.module.graph.eliminate_dead_code()
                again = True
    return changed


def _constant(graph: Graph, node: Any) -> Tensor | None:
    return tensor_of(graph.module, node).detach() if isinstance(node, fx.Node) and node.op == "get_attr" else None


def _fixed(graph: Graph, node: Any) -> bool:
    """A conv or linear with parameters as weight and bias."""
    if not isinstance(node, fx.Node) or node.target not in (ATEN.conv2d.default, ATEN.linear.default):
        return False
    _, weight, bias, *_ = arguments(node)
    return _constant(graph, weight) is not None and (bias is None or _constant(graph, bias) is not None)


def _parallel(graph: Graph, node: fx.Node, names: Names) -> tuple[str, str] | None:
    """conv_a(x) + conv_b(x), or x + conv(x), with kernels centred on the same pixel (RepVGG, section 3.3)."""
    if node.target != ATEN.add.Tensor or node.kwargs:
        return None
    a, b = node.args[:2]
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
        return None
    if _is_conv(graph, b) and not _is_conv(graph, a):
        a, b = b, a
    if not _is_conv(graph, a) or len(a.users) > 1:
        return None
    identity = b is a.args[0]
    if not identity and not (_is_conv(graph, b) and b.args[0] is a.args[0] and len(b.users) == 1):
        return None
    first = _Kernel.of(graph, a)
    second = _Kernel.identity(first) if identity else _Kernel.of(graph, b)
    if second is None or first.stride != second.stride or first.dilation != second.dilation:
        return None
    joined = _sum(first, second)
    if joined is None:
        return None
    write = Writer(node, names)
    own = names[a.name]
    made = write(ATEN.conv2d.default, a.args[0], *_store(graph, a, *joined[:2]), *joined[2:])
    write.finish(made)
    names.pop(a.name)
    if not identity:
        names.pop(b.name)
    names[made.name] = own
    return own, "joined with the parallel identity" if identity else "joined with the parallel convolution"


def _is_conv(graph: Graph, node: fx.Node) -> bool:
    return node.target == ATEN.conv2d.default and _fixed(graph, node)


class _Kernel:
    """A convolution's numbers, weight (out, in / groups, kh, kw) and bias in float64."""

    def __init__(self, weight: Tensor, bias: Tensor, stride: list[int], padding: list[int], dilation: list[int], groups: int):
        self.weight, self.bias, self.stride, self.padding = weight, bias, stride, padding
        self.dilation, self.groups = dilation, groups

    @staticmethod
    def of(graph: Graph, node: fx.Node) -> _Kernel:
        _, w, b, stride, padding, dilation, groups = arguments(node)
        weight = tensor_of(graph.module, w).detach().double()
        bias = torch.zeros(len(weight)).double() if b is None else tensor_of(graph.module, b).detach().double()
        dilations = pair(dilation, 2) if tuple(weight.shape[2:]) != (1, 1) else [1, 1]
        return _Kernel(weight, bias, pair(stride, 2), pair(padding, 2), dilations, groups)

    @staticmethod
    def identity(other: _Kernel) -> _Kernel | None:
        channels = other.weight.shape[0]
        if other.weight.shape[1] * other.groups != channels or other.stride != [1, 1]:
            return None
        eye = torch.ones(channels, 1, 1, 1).double()
        return _Kernel(eye, torch.zeros(channels).double(), [1, 1], [0, 0], other.dilation, channels)

    def with_groups(self, groups: int) -> Tensor:
        """The weight for fewer groups: zeros where another group's inputs are."""
        out, per = self.weight.shape[:2]
        inputs = per * self.groups
        full = torch.zeros(out, inputs, *self.weight.shape[2:]).double()
        for o in range(out):
            start = o // (out // self.groups) * per
            full[o, start : start + per] = self.weight[o]
        width = inputs // groups
        return torch.stack([full[o].narrow(0, o // (out // groups) * width, width) for o in range(out)])


def _sum(a: _Kernel, b: _Kernel) -> tuple[Any, ...] | None:
    """One convolution for the sum of two on the same input, or None if their kernels are not centred alike."""
    big, small = (a, b) if a.weight.shape[2] >= b.weight.shape[2] else (b, a)
    margins = []
    for axis in (0, 1):
        more = big.weight.shape[2 + axis] - small.weight.shape[2 + axis]
        shift = big.padding[axis] - small.padding[axis]
        if more < 0 or more % 2 or shift != more // 2 or (more and big.dilation[axis] != 1):
            return None
        margins.append(more // 2)
    groups = min(big.groups, small.groups)
    if max(big.groups, small.groups) % groups or a.weight.shape[0] != b.weight.shape[0]:
        return None
    weight = big.with_groups(groups) + F.pad(small.with_groups(groups), (margins[1], margins[1], margins[0], margins[0]))
    return weight, a.bias + b.bias, big.stride, big.padding, big.dilation, groups


def _consecutive(graph: Graph, node: fx.Node, names: Names) -> tuple[str, str] | None:
    """linear(linear(x)), or conv(conv(x)) with a 1 x 1 kernel in one of them, where the product costs no more."""
    before: Any = node.args[0]
    if not (_fixed(graph, node) and _fixed(graph, before)) or node.target != before.target or len(before.users) > 1:
        return None
    first, second = _constant(graph, before.args[1]), _constant(graph, node.args[1])
    assert first is not None and second is not None
    biases = [_constant(graph, arguments(n)[2]) for n in (before, node)]
    geometry: tuple[Any, ...] = ()
    w1, w2 = first.double(), second.double()
    if node.target == ATEN.linear.default:
        weight = w2 @ w1
        shift = None if biases[0] is None else w2 @ biases[0].double()
    else:
        a, b = arguments(before)[3:], arguments(node)[3:]
        pads = [pair(v[1], 2) for v in (a, b)]
        if a[3] != 1 or b[3] != 1:
            return None
        if tuple(w2.shape[2:]) == (1, 1) and pair(b[0], 2) == [1, 1] and pads[1] == [0, 0]:
            weight, geometry = torch.einsum("oi,ickl->ockl", w2[:, :, 0, 0], w1), tuple(a)
        elif tuple(w1.shape[2:]) == (1, 1) and pair(a[0], 2) == [1, 1] and pads[0] == [0, 0]:
            if biases[0] is not None and pads[1] != [0, 0]:
                return None  # the padding of the second layer would see the bias of the first
            weight, geometry = torch.einsum("oikl,ic->ockl", w2, w1[:, :, 0, 0]), tuple(b)
        else:
            return None
        shift = None if biases[0] is None else w2.sum((2, 3)) @ biases[0].double()
    if weight.numel() > w1.numel() + w2.numel():
        return None
    bias = shift if biases[1] is None else biases[1].double() + (0 if shift is None else shift)
    write = Writer(node, names)
    name, gone = names[node.name], names.pop(before.name)
    write.finish(write(node.target, before.args[0], *_store(graph, node, weight, bias), *geometry))
    return name, f"multiplied with {gone} before it"


def _store(graph: Graph, node: fx.Node, weight: Tensor, bias: Tensor | None) -> tuple[fx.Node, fx.Node | None]:
    """Parameters of a fused layer, beside those of ``node``; get_attr nodes before the latter's reader."""
    old: Any = node.args[1]
    dtype = tensor_of(graph.module, old).dtype
    name = str(old.target).removesuffix("weight") + "fused_weight"
    count = 2
    while any(str(n.target) == name for n in node.graph.nodes if n.op == "get_attr"):
        name, count = f"{str(old.target).removesuffix('weight')}fused{count}_weight", count + 1
    assign_tensor(graph.module, name, weight.to(dtype))
    first = next(iter(node.graph.nodes))
    with node.graph.inserting_before(first):
        made = node.graph.get_attr(name)
        if bias is None:
            return made, None
        other = name.removesuffix("weight") + "bias"
        assign_tensor(graph.module, other, bias.to(dtype))
        return made, node.graph.get_attr(other)


def _activation(graph: Graph, node: fx.Node, names: Names) -> tuple[str, str] | None:
    """x * sigmoid(x) is SiLU; x * relu6(x + 3) / 6 is hardswish: one table instead of a table and a product."""
    if node.target == ATEN.mul.Tensor:
        for x, gate in (node.args[:2], node.args[1::-1]):
            if isinstance(gate, fx.Node) and gate.target == ATEN.sigmoid.default and gate.args[0] is x and len(gate.users) == 1:
                return _as(node, x, ATEN.silu.default, "silu", names)
    if node.target == ATEN.div.Tensor and node.args[1] == 6:
        product: Any = node.args[0]
        if product.target == ATEN.mul.Tensor and len(product.users) == 1:
            for x, gate in (product.args[:2], product.args[1::-1]):
                if _is_relu6_of_3_more(gate, x):
                    return _as(node, x, ATEN.hardswish.default, "hardswish", names)
    return None


def _is_relu6_of_3_more(gate: Any, x: Any) -> bool:
    if not isinstance(gate, fx.Node) or gate.target != ATEN.hardtanh.default or len(gate.users) > 1:
        return False
    inner: Any = gate.args[0]
    return tuple(gate.args[1:3]) == (0.0, 6.0) and inner.target == ATEN.add.Tensor and inner.args[0] is x and inner.args[1] == 3


def _as(node: fx.Node, x: Any, target: Any, what: str, names: Names) -> tuple[str, str]:
    name = names[node.name]
    write = Writer(node, names)
    write.finish(write(target, x))
    return name, f"written as {what}"


def write_out_attention(graph: Graph, names: Names) -> tuple[dict[str, str], dict[str, str]]:
    """Fused attention as ``softmax(q k^T scale + mask) v``; returns what was changed and what was left, with the reason."""
    changed: dict[str, str] = {}
    left: dict[str, str] = {}
    for node in list(graph.module.graph.nodes):
        if node.target != ATEN.scaled_dot_product_attention.default:
            continue
        name = names[node.name]
        q, k, v, mask, dropout, causal, scale, grouped = arguments(node)
        if grouped or dropout:
            left[name] = "attention with grouped heads or dropout is not written out"
            continue
        shape = q.meta["val"].shape
        write = Writer(node, names)
        turned = list(range(len(shape)))
        turned[-1], turned[-2] = turned[-2], turned[-1]
        scores = write(ATEN.matmul.default, q, write(ATEN.permute.default, k, turned))
        scores = write(ATEN.mul.Tensor, scores, float(shape[-1]) ** -0.5 if scale is None else float(scale))
        if causal:
            scores = write(ATEN.add.Tensor, scores, _causal(graph, node, int(shape[-2]), int(k.meta["val"].shape[-2])))
        elif mask is not None:
            if mask.meta["val"].dtype == torch.bool:
                left[name] = "a mask of booleans is not written out"
                graph.module.graph.eliminate_dead_code()
                continue
            scores = write(ATEN.add.Tensor, scores, mask)
        write.finish(write(ATEN.matmul.default, write(ATEN.softmax.int, scores, -1), v))
        changed[name] = "attention written out"
    return changed, left


def _causal(graph: Graph, node: fx.Node, rows: int, columns: int) -> fx.Node:
    name = f"causal_mask_{rows}_{columns}"
    assign_tensor(
        graph.module, name, torch.zeros(rows, columns).masked_fill(torch.ones(rows, columns).tril() == 0, float("-inf"))
    )
    with node.graph.inserting_before(node):
        return node.graph.get_attr(name)
