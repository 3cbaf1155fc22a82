"""The residual stream of a transformer, found in a captured graph: what LayerNorms read, traced back to what writes it.

Shifting all features of a token by the same number changes no LayerNorm, so the stream's mean over features is free as long as
every reader is a LayerNorm. The trace follows the axis of the features through sums, reshapes and the like to the producers
(linear, conv2d, embedding, parameters); anything else that writes or reads the stream is the reason for a refusal.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any

from torch import Tensor, fx

from edgekit.compress.canonical import ATEN, arguments
from edgekit.compress.capture import Graph, tensor_of

__all__ = ["Stream", "carried", "find_streams", "shape_of"]

_PRODUCERS = (ATEN.linear.default, ATEN.conv2d.default, ATEN.embedding.default)
_MOVES = (
    ATEN.permute.default, ATEN.reshape.default, ATEN.unsqueeze.default, ATEN.squeeze.dim, ATEN.squeeze.dims, ATEN.expand.default,
    ATEN.slice.Tensor, ATEN.select.int, ATEN.mean.dim,
)  # fmt: skip
_SCALES = (ATEN.mul.Tensor, ATEN.mul.Scalar, ATEN.div.Tensor, ATEN.div.Scalar)


@dataclass
class Stream:
    """A residual stream.

    Attributes:
        norms: LayerNorm nodes that read it.
        axes: node of the stream to its feature axis, counted from the end.
        gains: node of a layer scale (a product with a parameter) that stands right behind a producer.
        reason: why it cannot be rewritten, "" if it can.
    """

    norms: list[fx.Node]
    axes: dict[fx.Node, int] = field(default_factory=dict)
    gains: list[fx.Node] = field(default_factory=list)
    reason: str = ""

    @property
    def producers(self) -> list[fx.Node]:
        """Layers, embeddings and parameters that write into the stream."""
        return [n for n in self.axes if n.op == "get_attr" or n.target in _PRODUCERS]


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    """Shape of a node's value; a free batch size stays symbolic."""
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return tuple(value.shape)
    assert node.op == "get_attr" and node.graph.owning_module is not None
    return tuple(tensor_of(node.graph.owning_module, node).shape)


def find_streams(graph: Graph) -> list[Stream]:
    """Every stream that LayerNorms over the last axis read; norms on the same stream are together."""
    streams: list[Stream] = []
    for node in graph.module.graph.nodes:
        if node.target != ATEN.layer_norm.default:
            continue
        found = Stream([node])
        if len(node.args[1]) != 1:
            found.reason = f"{graph.names[node.name]} normalizes over {len(node.args[1])} axes"
        else:
            _trace(graph, node.args[0], -1, found)
        for other in [s for s in streams if s.axes.keys() & found.axes.keys()]:
            streams.remove(other)
            found = Stream(
                [*other.norms, *found.norms], {**other.axes, **found.axes}, list(dict.fromkeys([*other.gains, *found.gains])),
                other.reason or found.reason,
            )  # fmt: skip
        streams.append(found)
    for stream in streams:
        stream.reason = stream.reason or _read_elsewhere(graph, stream)
    return streams


def _trace(graph: Graph, start: fx.Node, axis: int, stream: Stream) -> None:
    """Fill ``stream`` backwards from ``start``."""
    todo = [(start, axis)]
    while todo:
        node, axis = todo.pop()
        if node in stream.axes:
            continue
        stream.axes[node] = axis
        if node.op == "get_attr" or node.target in _PRODUCERS:
            stream.reason = stream.reason or _misplaced(graph, node, axis)
            continue
        sources = _sources(node, axis, stream)
        if isinstance(sources, str):
            stream.reason = stream.reason or f"{_called(graph, node)} {sources}"
            continue
        todo += sources


def _misplaced(graph: Graph, node: fx.Node, axis: int) -> str:
    rank = len(shape_of(node))
    place = {ATEN.linear.default: rank - 1, ATEN.conv2d.default: 1, ATEN.embedding.default: rank - 1}.get(
        node.target, rank + axis
    )
    if place != rank + axis:
        return f"{_called(graph, node)} has its features on another axis"
    if node.op != "get_attr":
        weights = [a for a in (node.args[:1] if node.target == ATEN.embedding.default else node.args[1:3]) if a is not None]
        if not all(isinstance(w, fx.Node) and w.op == "get_attr" for w in weights):
            return f"{_called(graph, node)} computes its weight at run time"
    return ""


def _sources(node: fx.Node, axis: int, stream: Stream) -> list[tuple[fx.Node, int]] | str:
    """Nodes that carry the stream into ``node``, with their axis; or why it cannot be followed."""
    width = shape_of(node)[axis] if isinstance(node.meta.get("val"), Tensor) else None
    if node.target == ATEN.layer_norm.default:
        return "normalizes and feeds the residual stream itself (Post-LN, or a norm behind the embeddings)"
    if node.target == ATEN.add.Tensor:
        parts = [a for a in node.args[:2] if isinstance(a, fx.Node)]
        if len(parts) < 2 or any(len(shape_of(p)) < -axis or shape_of(p)[axis] != width for p in parts):
            return "adds a value that has not the stream's features"
        return [(p, axis) for p in parts]
    if node.target == ATEN.cat.default:
        parts, dim = arguments(node)[:2]
        return (
            "joins along the features" if dim % len(shape_of(node)) == len(shape_of(node)) + axis else [(p, axis) for p in parts]
        )
    if node.target in _SCALES:
        return _scaled(node, axis, stream)
    if node.target in _MOVES:
        found = carried(node, axis, back=True)
        x: Any = node.args[0]
        return "moves the features out of their axis" if found is None else [(x, found)]
    return "writes into the residual stream, and is no linear layer, convolution or embedding"


def _scaled(node: fx.Node, axis: int, stream: Stream) -> list[tuple[fx.Node, int]] | str:
    x, factor = node.args[:2]
    if not isinstance(factor, fx.Node):
        return [(x, axis)] if isinstance(x, fx.Node) else "scales the stream by a value"
    if isinstance(x, fx.Node) and x.op == "get_attr":
        x, factor = factor, x
    if factor.op != "get_attr" or not isinstance(x, fx.Node) or node.target != ATEN.mul.Tensor:
        return "multiplies the stream by a value"
    shape = shape_of(factor)
    if prod(shape) == 1:
        return [(x, axis)]
    along = len(shape) >= -axis and prod(shape) == shape[axis] == shape_of(node)[axis]
    if not along or x.target not in _PRODUCERS[:2] or len(x.users) > 1:
        return "scales the stream feature by feature away from a layer's output"
    stream.gains.append(node)
    return [(x, axis)]


def carried(node: fx.Node, axis: int, back: bool) -> int | None:
    """The feature axis (from the end) before, or after, an operator that moves or reduces other axes; None if it touches it.

    Args:
        axis: of the output if ``back``, else of the input.
    """
    x: Any = node.args[0]
    before, after = shape_of(x), shape_of(node)
    if node.target == ATEN.permute.default:
        dims = [int(d) % len(after) for d in node.args[1]]  # type: ignore[union-attr, arg-type]
        return dims[axis] - len(before) if back else dims.index(len(before) + axis) - len(after)
    if node.target in (ATEN.slice.Tensor, ATEN.select.int):
        dim = int(arguments(node)[1]) % len(before)
    elif node.target == ATEN.mean.dim:
        dims = [int(d) % len(before) for d in node.args[1]]  # type: ignore[union-attr, arg-type]
        keep = bool(arguments(node)[2])
        own = len(after) + axis if back else len(before) + axis
        if back:
            kept = list(range(len(before))) if keep else [d for d in range(len(before)) if d not in dims]
            own = kept[own]
            return None if own in dims else own - len(before)
        return None if own in dims else (own if keep else own - sum(d < own for d in dims)) - len(after)
    else:
        dim = None
    if node.target == ATEN.slice.Tensor:
        return None if dim == len(before) + axis else axis
    if node.target == ATEN.select.int:
        assert dim is not None
        if back:
            own = len(after) + axis
            return (own if own < dim else own + 1) - len(before)
        own = len(before) + axis
        return None if own == dim else (own if own < dim else own - 1) - len(after)
    if node.target == ATEN.expand.default:
        return axis if before[axis] == after[axis] else None
    given, other = (after, before) if back else (before, after)
    place = len(given) + axis
    for i, size in enumerate(other):
        if size == given[place] and prod(other[i + 1 :]) == prod(given[place + 1 :]):
            return i - len(other)
    return None


def _read_elsewhere(graph: Graph, stream: Stream) -> str:
    """Why somebody else than a norm reads the stream."""
    for node in stream.axes:
        for user in node.users:
            if user in stream.axes or (user in stream.norms and user.args[0] is node):
                continue
            where = "the model's output" if user.op == "output" else _called(graph, user)
            return f"{where} reads the residual stream without a norm"
    return ""


def _called(graph: Graph, node: fx.Node) -> str:
    return graph.names.get(node.name, str(node.target) if node.op == "get_attr" else node.name)
