"""1-bit layers of a captured graph: found, put into chains that never unpack, and given integer thresholds.

A binary layer is ``where(x >= threshold, 1, -1)`` followed by a conv2d or linear whose weights have one size for each output
channel; a binary product is a matmul of two such signs, the left one perhaps ``where(x >= threshold, 1, 0)``. That is
what :mod:`edgekit.compress.binary` leaves, and what a model of the user's own may be written as.

A layer whose result goes to one sign only becomes ``binary_conv2d`` or ``binary_linear``: its bit is a function of an integer
sum, found for every value of the sum, and so one threshold, for it is monotonic whatever scale, bias, activation and threshold
are (a negative scale has become the signs of the channel's weights).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from edgekit.compress.canonical import ATEN, arguments, pair
from edgekit.compress.capture import Graph, tensor_of
from edgekit.compress.ptq.observers import ActQ
from edgekit.errors import ModelError

__all__ = [
    "SIGNS",
    "Signs",
    "binary_weight",
    "input_threshold",
    "is_sign",
    "match_binary",
    "match_product",
    "match_sign",
    "packed_layer",
]

SIGNS = ActQ(1.0, 0, 1)
"""How a plan marks an activation that is packed signs."""

_WEIGHTED = {ATEN.conv2d.default: "conv2d", ATEN.linear.default: "linear"}
_LEAST = 8
_NO_SCALE = 1 << 20


@dataclass(frozen=True)
class Signs:
    """The numbers of a 1-bit layer.

    Attributes:
        signs: int8 of -1 and +1, (O, C / groups, kh, kw) or (O, F); None for a sign.
        scale: float32 (O,), positive; the layer is ``scale * sum + bias``.
        bias: float64 (O,).
        threshold: of a packed layer int32 (O,), ``bit = sum >= threshold``; of a sign float32 (C,) or (1,).
        unsigned: a sign gives 1 and 0 instead of 1 and -1.
    """

    signs: Tensor | None = None
    scale: Tensor | None = None
    bias: Tensor | None = None
    threshold: Tensor | None = None
    unsigned: bool = False


def is_sign(node: Any) -> bool:
    """Whether the node is a sign that nothing but binary layers and products read, all of them packed along one dimension."""
    return _is_comparison(node) and node in _signs(node.graph)


def _signs(graph: fx.Graph) -> dict[fx.Node, int]:
    """Every such sign with the dimension it is packed along; a product needs both of its operands among them."""
    found = {n: 0 for n in graph.nodes if _is_comparison(n) and n.users}
    changed = True
    while changed:
        changed = False
        for node in list(found):
            dims = {_read_along(user, node, found) for user in node.users}
            limit = node.args[0].args[1]
            each = isinstance(limit, fx.Node) and _channel_shape(limit, node.args[0].args[0]) != 0
            if len(dims) != 1 or None in dims or (each and dims == {-2}):  # thresholds belong to the packed dimension
                del found[node]
                changed = True
            else:
                found[node] = int(dims.pop() or 0)
    return found


def _is_comparison(node: Any) -> bool:
    if not isinstance(node, fx.Node) or node.target != ATEN.where.Scalar or tuple(node.args[1:3]) not in ((1, -1), (1, 0)):
        return False
    above = node.args[0]
    if not isinstance(above, fx.Node) or above.target not in (ATEN.ge.Tensor, ATEN.ge.Scalar) or len(above.users) != 1:
        return False
    x, limit = above.args[:2]
    if not isinstance(x, fx.Node) or not isinstance(x.meta.get("val"), Tensor) or x.meta["val"].dtype != torch.float32:
        return False
    if not isinstance(limit, fx.Node):
        return True
    return limit.op == "get_attr" and _channel_shape(limit, x) is not None


def _channel_shape(limit: fx.Node, x: fx.Node) -> int | None:
    """The dimension whose channels have a threshold each (-1 or 1), 0 for one threshold; None: another shape."""
    module = limit.graph.owning_module
    assert module is not None
    shape = tuple(tensor_of(module, limit).shape)
    rank = x.meta["val"].dim()
    if all(s == 1 for s in shape):
        return 0
    if rank == 4 and len(shape) in (3, 4) and shape[-2:] == (1, 1) and shape[:-3] in ((), (1,)):
        return 1
    return -1 if rank != 4 and all(s == 1 for s in shape[:-1]) else None


def _read_along(user: fx.Node, node: fx.Node, signs: dict[fx.Node, int]) -> int | None:
    """The dimension along which a reader sums: 1, -1 or -2; None for a reader that is not binary."""
    if _transposes(user):
        readers = list(user.users)
        product = len(readers) == 1 and readers[0].target == ATEN.matmul.default and readers[0].args[1] is user
        return -1 if product and _is_product(readers[0], signs) else None
    if user.target == ATEN.matmul.default:
        if user.args[0] is user.args[1] or not _is_product(user, signs):
            return None
        return -1 if user.args[0] is node else -2
    if user.target not in _WEIGHTED or user.args[0] is not node or node.args[2] != -1:
        return None
    module = node.graph.owning_module
    assert module is not None
    _, weight, bias, *_ = arguments(user)
    fixed = all(w is None or (isinstance(w, fx.Node) and w.op == "get_attr") for w in (weight, bias))
    if not fixed or weight is None or binary_weight(tensor_of(module, weight)) is None:
        return None
    return 1 if user.target == ATEN.conv2d.default else -1


def _transposes(node: fx.Node) -> bool:
    """A permute that swaps the last two dimensions."""
    if node.target != ATEN.permute.default:
        return False
    dims: Any = node.args[1]
    rank = len(dims)
    return [d % rank for d in dims] == [*range(rank - 2), rank - 1, rank - 2]


def _is_product(node: fx.Node, signs: dict[fx.Node, int]) -> bool:
    """A matmul of two signs with equal leading dimensions, the right one signed."""
    a, b = node.args[:2]
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
        return False
    b = b.args[0] if _transposes(b) else b
    if a not in signs or b not in signs or b.args[2] != -1:  # type: ignore[union-attr]
        return False
    shapes = [[str(s) for s in n.meta["val"].shape[:-2]] for n in (a, b)]  # type: ignore[union-attr]
    return shapes[0] == shapes[1]


def binary_weight(weight: Tensor) -> tuple[Tensor, Tensor] | None:
    """(signs int8, scale float32 (O,)) of a weight that has one size for each output channel; None for another.

    A channel of zeros gets +1 at scale 0.
    """
    flat = weight.detach().flatten(1)
    size = flat.abs().amax(1)
    if not torch.equal(flat.abs(), size.view(-1, 1).expand_as(flat)):
        return None
    return torch.where(weight.detach() >= 0, 1, -1).to(torch.int8), size.float()


def match_sign(graph: Graph, node: fx.Node) -> tuple[tuple[fx.Node, ...], fx.Node, dict[str, Any], Signs]:
    """Nodes, input, attributes and threshold of a sign (see :func:`is_sign`)."""
    above: Any = node.args[0]
    x, limit = above.args[:2]
    if isinstance(limit, fx.Node):
        threshold = tensor_of(graph.module, limit).detach().float().flatten()
    else:
        threshold = torch.tensor([float(limit)])
    return (above, node), x, {"dim": _signs(node.graph)[node]}, Signs(threshold=threshold, unsigned=bool(node.args[2] == 0))


def match_product(graph: Graph, node: fx.Node) -> tuple[tuple[fx.Node, ...], tuple[fx.Node, fx.Node], dict[str, Any]] | None:
    """Nodes, operands and attributes of a matmul of two signs, with the factor behind it; None for any other."""
    if node.target != ATEN.matmul.default or not is_sign(node.args[0]):
        return None
    a, right = node.args[:2]
    assert isinstance(a, fx.Node) and isinstance(right, fx.Node)
    nodes: tuple[fx.Node, ...] = (right, node) if _transposes(right) else (node,)
    b: Any = right.args[0] if _transposes(right) else right
    scale = 1.0
    after = next(iter(node.users)) if len(node.users) == 1 else node
    if after.target == ATEN.mul.Tensor and after.args[0] is node and (factor := _constant(graph, after.args[1])):
        nodes, scale = (*nodes, after), factor
    attributes = {"features": int(a.meta["val"].shape[-1]), "a_unsigned": a.args[2] == 0, "scale": scale}
    return nodes, (a, b), attributes


def _constant(graph: Graph, value: Any) -> float:
    """A positive number, as a float32 value; 0.0 for anything else."""
    if isinstance(value, fx.Node):
        if value.op != "get_attr" or tensor_of(graph.module, value).numel() != 1:
            return 0.0
        value = float(tensor_of(graph.module, value))
    return max(float(torch.tensor(value, dtype=torch.float32)), 0.0) if isinstance(value, int | float) else 0.0


def match_binary(graph: Graph, node: fx.Node) -> tuple[str, dict[str, Any], Signs] | None:
    """Kind, attributes and numbers of a layer that reads a sign; None for any other."""
    if node.target not in _WEIGHTED or not is_sign(node.args[0]):
        return None
    _, weight, bias, *rest = arguments(node)
    found = binary_weight(tensor_of(graph.module, weight))
    assert found is not None
    signs, scale = found
    real = torch.zeros(len(signs)) if bias is None else tensor_of(graph.module, bias).detach()
    attributes: dict[str, Any] = {"features": signs.shape[1]}
    if rest:
        stride, padding, dilation, groups = rest
        attributes = {
            "channels": signs.shape[1] * groups, "stride": pair(stride, 2), "padding": pair(padding, 2),
            "dilation": pair(dilation, 2), "groups": groups,
        }  # fmt: skip
    least = (real.abs().double() / _NO_SCALE).clamp(min=1e-9).float()  # the bias must fit int32 where the scale is (nearly) 0
    return f"binary_q{_WEIGHTED[node.target]}", attributes, Signs(signs, torch.maximum(scale, least), real.double())


def packed_layer(layer: Signs, activation: str, sign: Signs, name: str) -> Signs:
    """The layer with the sign behind it: its threshold for each channel, found by trying every sum.

    Raises:
        ModelError: the bit is no monotonic function of the sum.
    """
    assert layer.signs is not None and layer.scale is not None and layer.bias is not None and sign.threshold is not None
    reach = layer.signs[0].numel()
    sums = torch.arange(-reach, reach + 1, dtype=torch.float64)
    real = sums * layer.scale.double().view(-1, 1) + layer.bias.view(-1, 1)
    if activation != "none":
        real = real.clamp(0, 6) if activation == "relu6" else real.clamp(min=0)
    bits = real >= sign.threshold.double().view(-1, 1)
    threshold = torch.where(bits.any(1), -reach + bits.to(torch.int8).argmax(1), reach + 1).to(torch.int32)
    if not torch.equal(bits, sums >= threshold.double().view(-1, 1)):
        raise ModelError(f"layer {name}: the sign of its output does not rise with its sum")
    return Signs(layer.signs, layer.scale, layer.bias, threshold)


def input_threshold(sign: Signs, x: ActQ, name: str) -> Tensor:
    """int16 thresholds of the integers of an activation: ``scale * (q - zero_point) >= threshold``; 128 is never, -128 always.

    Raises:
        ModelError: the activation has 16 bits.
    """
    if x.bits != 8:
        raise ModelError(f"layer {name}: signs are taken of 8-bit activations only; set activations: int8")
    assert sign.threshold is not None
    integers = torch.ceil(sign.threshold.double() / x.scale - 1e-9) + x.zero_point
    return integers.clamp(-128, 128).to(torch.int16)
