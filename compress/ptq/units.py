"""Which nodes of a captured graph become integer layers, and why the others stay in float.

A :class:`Unit` is one frozen operator to be: a weighted layer with its activation fused, a residual add with its ReLU, a pool, a
shape change. Convolutions and linears are always integer; everything else is where its neighbours are, so that a CNN is integer
from end to end and a transformer keeps its normalizations, attention products and residual stream in float.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from edgekit.compress.canonical import ATEN, arguments, pair
from edgekit.compress.capture import Graph, tensor_of
from edgekit.compress.ptq.binary_units import Signs, is_sign, match_binary, match_product, match_sign, packed_layer
from edgekit.errors import InputError
from edgekit.frozen import Unquantized
from edgekit.frozen.binary_ops import PACKED_OPS

__all__ = ["SHAPE_KINDS", "Unit", "find_units", "weight_of"]

SHAPE_KINDS = {"qreshape", "qpermute", "qslice", "qpad"}
_ONLY_8BIT = {"qlut", "qavg_pool2d", "qconcat"}
_FUSING = ("qconv2d", "qlinear", "qadd", "qmul", "binary_qconv2d", "binary_qlinear")
_INHERIT = {*SHAPE_KINDS, "qmax_pool2d", "qavg_pool2d"}
_LUT = {
    ATEN.sigmoid.default: "sigmoid", ATEN.tanh.default: "tanh", ATEN.silu.default: "silu", ATEN.hardswish.default: "hardswish",
    ATEN.hardsigmoid.default: "hardsigmoid", ATEN.gelu.default: "gelu", ATEN.leaky_relu.default: "leaky_relu",
    ATEN.elu.default: "elu", ATEN.relu.default: "relu",
}  # fmt: skip
_NO_ARITHMETIC = {
    ATEN.reshape.default, ATEN.permute.default, ATEN.slice.Tensor, ATEN.unsqueeze.default, ATEN.squeeze.dim, ATEN.squeeze.dims,
    ATEN.select.int, ATEN.pad.default, ATEN.constant_pad_nd.default, ATEN.expand.default, ATEN.cat.default, ATEN.split.Tensor,
    ATEN.split_with_sizes.default, ATEN.chunk.default, ATEN.unbind.int, ATEN.sym_size.int, ATEN.arange.default, ATEN.full.default,
    ATEN.zeros.default, ATEN.ones.default,
}  # fmt: skip


@dataclass(frozen=True)
class Unit:
    """A frozen operator to be.

    Attributes:
        kind: operator name, such as "qconv2d".
        name: layer name.
        nodes: the fx nodes it replaces; the last one is its output.
        inputs: producers of its activation inputs.
        activation: "none", "relu" or "relu6".
        attributes: the operator's scalar arguments other than scales and zero points.
        weight, bias: ``get_attr`` nodes of a weighted layer.
        signs: the numbers of a 1-bit layer, which has no ``weight``: nothing rounds or scales it.
        real: the input is read as float (a sign of what a float operator computes).
    """

    kind: str
    name: str
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    activation: str = "none"
    attributes: dict[str, Any] = field(default_factory=dict)
    weight: fx.Node | None = None
    bias: fx.Node | None = None
    signs: Signs | None = None
    real: bool = False

    @property
    def packed(self) -> bool:
        """The output is packed signs."""
        return self.kind in PACKED_OPS

    @property
    def output(self) -> fx.Node:
        """The node whose value this unit computes."""
        return self.nodes[-1]

    @property
    def inherits(self) -> bool:
        """The output has the input's scale and zero point."""
        return self.kind in _INHERIT


def find_units(graph: Graph, skip: Sequence[str] = (), bits: int = 8) -> tuple[tuple[Unit, ...], tuple[Unquantized, ...]]:
    """Units in execution order, and every operator with arithmetic that stays in float with the reason.

    Args:
        skip: regular expressions (full match) of layer names to leave in float.
        bits: bits of activations; the operators of ``_ONLY_8BIT`` stay in float with 16.
    """
    units: dict[fx.Node, Unit] = {}
    reasons: dict[fx.Node, str] = {}
    fused: set[fx.Node] = set()
    for node in graph.module.graph.nodes:
        if node.op != "call_function" or node in fused:
            continue
        found = _match(graph, node)
        if isinstance(found, str):
            reasons[node] = found
            continue
        if bits > 8 and found.kind in _ONLY_8BIT:
            reasons[node] = f"{found.kind} has no {bits}-bit form"
            continue
        if any(re.fullmatch(pattern, found.name) for pattern in skip):
            if found.signs is not None and skip != _EVERYTHING:
                raise InputError(f"skip: {found.name} is a 1-bit layer and cannot stay in float; take it out of `skip`")
            reasons[node] = "left in float by the setting `skip`"
            continue
        found = _fuse(found)
        fused.update(found.nodes)
        units[found.output] = found
    kept = _from_float(_chained(_settle(units, reasons)))
    for part in (n for unit in kept for n in unit.nodes):
        reasons.pop(part, None)
    unquantized = [
        Unquantized(graph.names[n.name], _short(n), reason)
        for n, reason in reasons.items()
        if n.target not in _NO_ARITHMETIC and n.target is not operator.getitem and _has_tensor(n.meta.get("val"))
    ]
    return tuple(kept), tuple(unquantized)


_EVERYTHING = (".*",)


def _chained(units: list[Unit]) -> list[Unit]:
    """Binary layers whose result goes to one sign only become one unit with it, so that nothing is unpacked between them."""
    signs = {u.inputs[0]: u for u in units if u.kind == "binarize"}
    found, taken = [], set()
    for unit in units:
        sign = signs.get(unit.output)
        if unit.kind in ("binary_qconv2d", "binary_qlinear") and sign is not None and list(unit.output.users) == [sign.nodes[0]]:
            assert unit.signs is not None and sign.signs is not None
            packed = packed_layer(unit.signs, unit.activation, sign.signs, unit.name)
            taken.add(sign.output)
            kind = unit.kind.replace("_q", "_")
            unit = replace(unit, kind=kind, nodes=(*unit.nodes, *sign.nodes), activation="none", signs=packed)
        found.append(unit)
    return [u for u in found if not (u.kind == "binarize" and u.output in taken)]


def _from_float(units: list[Unit]) -> list[Unit]:
    """Signs of what a float operator computes are taken of the float itself."""
    made = {u.output for u in units}
    real = [u for u in units if u.kind == "binarize" and u.inputs[0] not in made and u.inputs[0].op != "placeholder"]
    return [replace(u, real=True) if u in real else u for u in units]


def _has_tensor(value: Any) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, tuple | list) and any(isinstance(v, Tensor) for v in value))


def _short(node: fx.Node) -> str:
    return str(node.target).removeprefix("aten.").split(".")[0].strip("_")


def _settle(units: dict[fx.Node, Unit], reasons: dict[fx.Node, str]) -> list[Unit]:
    """Drop the units whose neighbours are float; fills ``reasons``."""
    chosen = dict(units)
    changed = True
    while changed:
        changed = False
        for node, unit in reversed(list(chosen.items())):
            reason = _misfit(unit, chosen)
            if reason:
                del chosen[node]
                for part in unit.nodes:
                    reasons[part] = reason
                changed = True
    return list(chosen.values())


def _misfit(unit: Unit, chosen: dict[fx.Node, Unit]) -> str:
    """Why this unit should not be integer, "" if it should."""
    if unit.weight is not None or unit.signs is not None:
        return ""
    if any(i not in chosen and i.op != "placeholder" for i in unit.inputs):
        return "an input of it is float"
    users = list(unit.output.users)
    wanted = any(u in chosen or any(u in c.nodes for c in chosen.values()) for u in users)
    if unit.kind in SHAPE_KINDS:
        at_end = any(u.op == "output" for u in users) and any(i in chosen for i in unit.inputs)
        return "" if wanted or at_end else "only float operators use it"
    if any(u.target == ATEN.layer_norm.default for u in users):
        return "it feeds a layer normalization, which stays float (a residual stream in 8 bits loses accuracy)"
    from_integer = any(i in chosen for i in unit.inputs)
    return "" if from_integer or wanted else "no integer operator is beside it"


def _fuse(unit: Unit) -> Unit:
    """Take the activation that follows into the unit, if it is the only use."""
    if unit.kind not in _FUSING or len(unit.output.users) != 1:
        return unit
    user = next(iter(unit.output.users))
    if user.target == ATEN.relu.default:
        activation = "relu"
    elif user.target == ATEN.hardtanh.default and tuple(user.args[1:3]) == (0.0, 6.0):
        activation = "relu6"
    else:
        return unit
    return replace(unit, nodes=(*unit.nodes, user), activation=activation)


def _match(graph: Graph, node: fx.Node) -> Unit | str:
    """The unit that starts at ``node``, or the reason why there is none."""
    rule = _RULES.get(node.target)
    if rule is None:
        return f"{_short(node)} has no integer form"
    value = node.meta.get("val")
    if isinstance(value, Tensor) and value.dtype != torch.float32:
        return f"its values are {str(value.dtype).removeprefix('torch.')}, only float32 is quantized"
    return rule(graph, node)


def _weighted(kind: str) -> Callable[[Graph, fx.Node], Unit | str]:
    def rule(graph: Graph, node: fx.Node) -> Unit | str:
        x, weight, bias, *rest = arguments(node)
        if not (isinstance(weight, fx.Node) and weight.op == "get_attr"):
            return "its weight is computed at run time"
        if bias is not None and not (isinstance(bias, fx.Node) and bias.op == "get_attr"):
            return "its bias is computed at run time"
        if (found := match_binary(graph, node)) is not None:
            return Unit(found[0], graph.names[node.name], (node,), (x,), "none", found[1], signs=found[2])
        attributes: dict[str, Any] = {}
        if kind == "qconv2d":
            stride, padding, dilation, groups = rest
            attributes = {"stride": pair(stride, 2), "padding": pair(padding, 2), "dilation": pair(dilation, 2), "groups": groups}
        return Unit(kind, graph.names[node.name], (node,), (x,), "none", attributes, weight, bias)

    return rule


def _sign(graph: Graph, node: fx.Node) -> Unit | str:
    if not is_sign(node):
        return "only signs that nothing but 1-bit layers read are packed"
    nodes, x, attributes, signs = match_sign(graph, node)
    return Unit("binarize", graph.names[node.name], nodes, (x,), "none", attributes, signs=signs)


def _binary(kind: str) -> Callable[[Graph, fx.Node], Unit | str]:
    def rule(graph: Graph, node: fx.Node) -> Unit | str:
        a, b = node.args[:2]
        if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)) or node.kwargs.get("alpha", 1) != 1:
            return "one operand is a constant"
        if "get_attr" in (a.op, b.op):
            return "one operand is a parameter"
        shapes = [tuple(n.meta["val"].shape) for n in (a, b)]
        if shapes[0] != shapes[1] and kind == "qadd":
            one, other = ("(" + ", ".join(str(d) if isinstance(d, int) else "N" for d in shape) + ")" for shape in shapes)
            return f"its operands have shapes {one} and {other}: broadcasting adds are not quantized"
        return Unit(kind, graph.names[node.name], (node,), (a, b))

    return rule


def _mean(graph: Graph, node: fx.Node) -> Unit | str:
    x, dims, keep = [*arguments(node)[:2], len(node.args) > 2 and bool(node.args[2])]
    if x.meta["val"].dim() != 4 or list(dims) != [2, 3] or not keep:
        return "only a mean over height and width has an integer form"
    return Unit("qmean", graph.names[node.name], (node,), (x,))


def _avg_pool(graph: Graph, node: fx.Node) -> Unit | str:
    x, kernel, stride, padding, ceil_mode, count, divisor = arguments(node)
    if divisor is not None:
        return "divisor_override has no integer form"
    kernel = pair(kernel, 2)
    geometry: dict[str, Any] = {"kernel": kernel, "stride": pair(stride, 2) if stride else kernel, "padding": pair(padding, 2)}
    geometry |= {"ceil_mode": bool(ceil_mode), "count_include_pad": bool(count)}
    return Unit("qavg_pool2d", graph.names[node.name], (node,), (x,), "none", geometry)


def _max_pool(graph: Graph, node: fx.Node) -> Unit | str:
    x, kernel, stride, padding, dilation, ceil_mode = arguments(node)
    kernel = pair(kernel, 2)
    geometry: dict[str, Any] = {"kernel": kernel, "stride": pair(stride, 2) if stride else kernel, "padding": pair(padding, 2)}
    geometry |= {"dilation": pair(dilation, 2), "ceil_mode": bool(ceil_mode)}
    return Unit("qmax_pool2d", graph.names[node.name], (node,), (x,), "none", geometry)


def _concat(graph: Graph, node: fx.Node) -> Unit | str:
    xs, dim = arguments(node)[:2]
    if any(x.op == "get_attr" for x in xs):
        return "one part is a parameter"
    return Unit("qconcat", graph.names[node.name], (node,), tuple(xs), "none", {"dim": dim % node.meta["val"].dim()})


def _pad(graph: Graph, node: fx.Node) -> Unit | str:
    x, pads, *rest = arguments(node)
    mode, value = rest if node.target == ATEN.pad.default else ("constant", rest[0])
    if mode != "constant" or value not in (None, 0, 0.0):
        return f"padding of mode {mode} with value {value} has no integer form"
    return Unit("qpad", graph.names[node.name], (node,), (x,), "none", {"pad": list(pads)})


def _product(graph: Graph, node: fx.Node) -> Unit | str:
    found = match_product(graph, node)
    if found is None:
        return "only a product of two signs has an integer form"
    nodes, operands, attributes = found
    return Unit("binary_qmatmul", graph.names[node.name], nodes, operands, "none", attributes, signs=Signs())


def _reshape(graph: Graph, node: fx.Node) -> Unit | str:
    return Unit("qreshape", graph.names[node.name], (node,), (node.args[0],))  # type: ignore[arg-type]


def _permute(graph: Graph, node: fx.Node) -> Unit | str:
    if is_sign(node.args[0]):
        return "a part of a product of signs"
    return Unit("qpermute", graph.names[node.name], (node,), (node.args[0],), "none", {"dims": node.args[1]})  # type: ignore[arg-type]


def _slice(graph: Graph, node: fx.Node) -> Unit | str:
    x, dim, start, end, step = arguments(node)
    if not all(v is None or isinstance(v, int) for v in (start, end, step)):
        return "its bounds are computed at run time"
    size = x.meta["val"].shape[dim]
    if not isinstance(size, int):
        return "it slices the batch"
    first, last, _ = slice(start, end, step).indices(size)
    return Unit(
        "qslice", graph.names[node.name], (node,), (x,), "none", {"dim": dim, "start": first, "end": last, "step": step or 1}
    )


def _lut(graph: Graph, node: fx.Node) -> Unit | str:
    if node.target == ATEN.hardtanh.default:
        if tuple(node.args[1:3]) != (0.0, 6.0):
            return "hardtanh with these bounds has no integer form"
        function = "relu6"
    else:
        function = _LUT[node.target]
        if len(node.args) > 1 or node.kwargs.get("approximate", "none") != "none":
            return f"{function} with these arguments has no integer form"
    return Unit("qlut", graph.names[node.name], (node,), (node.args[0],), "none", {"function": function})  # type: ignore[arg-type]


_RULES: dict[Any, Callable[[Graph, fx.Node], Unit | str]] = {
    ATEN.conv2d.default: _weighted("qconv2d"),
    ATEN.linear.default: _weighted("qlinear"),
    ATEN.where.Scalar: _sign,
    ATEN.matmul.default: _product,
    ATEN.add.Tensor: _binary("qadd"),
    ATEN.mul.Tensor: _binary("qmul"),
    ATEN.mean.dim: _mean,
    ATEN.avg_pool2d.default: _avg_pool,
    ATEN.max_pool2d.default: _max_pool,
    ATEN.cat.default: _concat,
    ATEN.pad.default: _pad,
    ATEN.constant_pad_nd.default: _pad,
    ATEN.reshape.default: _reshape,
    ATEN.unsqueeze.default: _reshape,
    ATEN.squeeze.dim: _reshape,
    ATEN.squeeze.dims: _reshape,
    ATEN.permute.default: _permute,
    ATEN.slice.Tensor: _slice,
    ATEN.hardtanh.default: _lut,
    **dict.fromkeys(_LUT, _lut),
}


def weight_of(graph: Graph, unit: Unit) -> tuple[Tensor, Tensor]:
    """Float32 weight and bias (zeros if the layer has none) of a weighted unit."""
    assert unit.weight is not None
    weight = tensor_of(graph.module, unit.weight).detach()
    bias = torch.zeros(weight.shape[0]) if unit.bias is None else tensor_of(graph.module, unit.bias).detach()
    return weight, bias
