"""Pre-LN to Pre-RMSNorm and Pre-CRMSNorm, exactly (Jiang et al. 2023, "Pre-RMSNorm and Pre-CRMSNorm Transformers").

1. The gain and bias of each LayerNorm go into the linear layers that read it (kept beside the norm where something else does).
2. Every producer of the residual stream gets zero mean over the features: ``W - mean of its rows``, ``b - mean``. The stream then
   is what it was minus its mean, which no LayerNorm sees.
3. LayerNorm of zero-mean values is RMSNorm, with the same eps.
4. CRMSNorm: the last feature of a zero-mean stream is minus the sum of the others, so it is dropped: producers lose a row, and
   consumers take ``W[:, :-1] - W[:, -1:]``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx

from edgekit.compress.canonical import ATEN, arguments, assign_tensor
from edgekit.compress.capture import Graph, tensor_of
from edgekit.compress.rewrite.editing import Writer, free_name, revalue
from edgekit.compress.rewrite.stream import Stream, carried, find_streams, shape_of

__all__ = ["rewrite_norms"]

Names = dict[str, str]


def rewrite_norms(graph: Graph, kind: str, names: Names) -> tuple[dict[str, str], dict[str, str]]:
    """Rewrite the norms of ``graph`` in place; new nodes are entered in ``names``.

    Args:
        kind: "rms" or "crms".

    Returns:
        Layer name to what was changed, and norm to why it was left alone.
    """
    changed: dict[str, str] = {}
    left: dict[str, str] = {}
    for stream in find_streams(graph):
        reason = stream.reason
        readers = {norm: _linear_readers(norm) for norm in stream.norms}
        if not reason and kind == "crms":
            blocked = [n for n, r in readers.items() if r is None or not _foldable(graph, r)]
            reason = f"{names[blocked[0].name]} is read by something else than linear layers of its own" if blocked else ""
        if reason:
            left |= {names[n.name]: reason for n in stream.norms}
            continue
        for norm, found in readers.items():
            changed[names[norm.name]] = f"LayerNorm to {'RMSNorm' if kind == 'rms' else 'CRMSNorm'}"
            _fold_affine(graph, norm, found if found and _foldable(graph, found) else None, names)
        for node in stream.producers:
            text = _recentre(graph, node, stream, drop=kind == "crms")
            changed[names.get(node.name, str(node.target))] = text
        for node in stream.gains:
            _skip(node)
        if kind == "crms":
            _narrow(graph, stream, readers)
        for norm in stream.norms:
            _swap(norm, kind, names)
        revalue(graph.module)
    return changed, left


def _linear_readers(norm: fx.Node) -> list[fx.Node] | None:
    """The linear layers that read a norm, through operators that leave the features alone; None if something else does."""
    found: list[fx.Node] = []
    todo = [(u, norm, -1) for u in norm.users]
    while todo:
        node, source, axis = todo.pop()
        if node.target == ATEN.linear.default and node.args[0] is source and axis == -1:
            found.append(node)
            continue
        moves = node.target in (ATEN.mean.dim, ATEN.permute.default, ATEN.reshape.default, ATEN.select.int, ATEN.slice.Tensor)
        after = carried(node, axis, back=False) if moves else None
        if after is None:
            return None
        todo += [(u, node, after) for u in node.users]
    return list(dict.fromkeys(found))


def _foldable(graph: Graph, readers: list[fx.Node]) -> bool:
    """Their weights are parameters that nobody else uses."""
    return all(
        isinstance(a, fx.Node) and a.op == "get_attr" and _is_own(graph, a, node)
        for node in readers
        for a in node.args[1:3]
        if a is not None
    )


def _is_own(graph: Graph, attribute: fx.Node, user: fx.Node) -> bool:
    pointer = tensor_of(graph.module, attribute).data_ptr()
    same = [n for n in graph.module.graph.nodes if n.op == "get_attr" and tensor_of(graph.module, n).data_ptr() == pointer]
    return all(u is user for n in same for u in n.users)


def _fold_affine(graph: Graph, norm: fx.Node, readers: list[fx.Node] | None, names: Names) -> None:
    _, shape, gain, bias, eps, *_ = arguments(norm)
    values = [None if a is None else tensor_of(graph.module, a).detach() for a in (gain, bias)]
    if readers is not None:
        for node in readers:
            _fold_into(graph, node, *values)
        norm.args = (norm.args[0], shape, None, None, eps)
        return
    norm.args = (norm.args[0], shape, gain, None, eps)
    if bias is not None:
        with norm.graph.inserting_after(norm):
            shifted = norm.graph.call_function(ATEN.add.Tensor, (norm, bias))
        shifted.meta = dict(norm.meta)
        norm.replace_all_uses_with(shifted, delete_user_cb=lambda u: u is not shifted)
        names[shifted.name] = free_name(f"{names[norm.name]}_bias", names)


def _fold_into(graph: Graph, node: fx.Node, gain: Tensor | None, bias: Tensor | None) -> None:
    """W (g n + b) + c = (W diag g) n + (c + W b)."""
    attribute: Any = node.args[1]
    weight = tensor_of(graph.module, attribute).detach()
    if bias is not None:
        shift = weight.double() @ bias.double()
        old: Any = node.args[2] if len(node.args) > 2 else None
        shift = shift if old is None else shift + tensor_of(graph.module, old).detach().double()
        _set_bias(graph, node, shift.to(weight.dtype))
    if gain is not None:
        _set(graph, attribute, (weight.double() * gain.double()).to(weight.dtype))


def _set(graph: Graph, attribute: fx.Node, value: Tensor) -> None:
    assign_tensor(graph.module, str(attribute.target), value)
    attribute.meta.pop("val", None)


def _set_bias(graph: Graph, node: fx.Node, value: Tensor) -> None:
    old: Any = node.args[2] if len(node.args) > 2 else None
    if old is not None:
        _set(graph, old, value)
        return
    name = str(node.args[1].target).removesuffix("weight") + "bias"  # type: ignore[union-attr]
    assign_tensor(graph.module, name, value)
    with node.graph.inserting_before(node):
        made = node.graph.get_attr(name)
    node.args = (*node.args[:2], made, *node.args[3:])


def _recentre(graph: Graph, node: fx.Node, stream: Stream, drop: bool) -> str:
    """Zero mean over the features of what this producer writes; with a layer scale behind it multiplied in first."""
    if node.op == "get_attr":
        axis = stream.axes[node]
        return _change(graph, node, None, lambda v: _zero_mean(v, axis, drop))
    if node.target == ATEN.embedding.default:
        return _change(graph, node.args[0], _together(stream, node, 0), lambda v: _zero_mean(v, 1, drop))
    scale = next((u for u in node.users if u in stream.gains), None)
    gain = None if scale is None else _gain(graph, scale, node)

    def rows(value: Tensor) -> Tensor:
        if gain is not None:
            value = value * gain.view(-1, *[1] * (value.dim() - 1))
        return _zero_mean(value, 0, drop)

    text = _change(graph, node.args[1], _together(stream, node, 1), rows)
    if len(node.args) > 2 and node.args[2] is not None:
        _change(graph, node.args[2], _together(stream, node, 2), rows)
    return text + (", layer scale multiplied in" if gain is not None else "")


def _together(stream: Stream, node: fx.Node, place: int) -> list[fx.Node]:
    """The producers that share this parameter and are treated alike: one without a layer scale stands for all of them."""
    scaled = [n for n in stream.producers if any(u in stream.gains for u in n.users)]
    if node in scaled:
        return [node]
    return [n for n in stream.producers if n.target == node.target and n not in scaled and n.args[place] is node.args[place]]


def _zero_mean(value: Tensor, axis: int, drop: bool) -> Tensor:
    value = value - value.mean(axis, keepdim=True)
    return value.narrow(axis, 0, value.shape[axis] - 1) if drop else value


def _gain(graph: Graph, scale: fx.Node, producer: fx.Node) -> Tensor:
    factor: Any = next(a for a in scale.args[:2] if a is not producer)
    return tensor_of(graph.module, factor).detach().double().flatten()


def _change(graph: Graph, attribute: Any, users: list[fx.Node] | None, function: Callable[[Tensor], Tensor]) -> str:
    """Replace a parameter for ``users`` (None: all of its node); others of the same tensor keep it (a tied head is untied)."""
    if str(attribute.target).endswith(_DONE):
        return "recentred"  # with the first of those that share it
    old = tensor_of(graph.module, attribute).detach()
    value = function(old.double()).to(old.dtype)
    mine = list(attribute.users) if users is None else users
    same = [n for n in graph.module.graph.nodes if n.op == "get_attr" and _shares(graph, n, old)]
    untied = any(u not in mine for n in same for u in n.users)
    name = f"{attribute.target}{_DONE}"
    while _has(graph.module, name):
        name = name.removesuffix(_DONE) + f"_{_DONE}"
    assign_tensor(graph.module, name, value)
    with attribute.graph.inserting_before(attribute):
        made = attribute.graph.get_attr(name)
    for user in mine:
        user.replace_input_with(attribute, made)
    return f"recentred; untied from other uses of its weight, {value.numel():,} values more" if untied else "recentred"


_DONE = "_recentred"


def _has(module: fx.GraphModule, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    return hasattr(module.get_submodule(owner), leaf)


def _shares(graph: Graph, node: fx.Node, value: Tensor) -> bool:
    return tensor_of(graph.module, node).data_ptr() == value.data_ptr()


def _skip(scale: fx.Node) -> None:
    producer = next(a for a in scale.args[:2] if isinstance(a, fx.Node) and a.op != "get_attr")
    scale.replace_all_uses_with(producer)
    scale.graph.erase_node(scale)


def _narrow(graph: Graph, stream: Stream, readers: Mapping[fx.Node, list[fx.Node] | None]) -> None:
    """One feature less: literal sizes inside the stream, and the readers' weights."""
    for node, axis in stream.axes.items():
        if node.target in (ATEN.reshape.default, ATEN.expand.default):
            sizes: Any = list(node.args[1])  # type: ignore[arg-type]
            place = len(shape_of(node)) + axis
            if isinstance(sizes[place], int) and sizes[place] != -1:
                sizes[place] -= 1
                node.args = (node.args[0], sizes)
    for found in readers.values():
        for node in found or ():
            attribute: Any = node.args[1]
            weight = tensor_of(graph.module, attribute).detach()
            _set(graph, attribute, (weight[:, :-1].double() - weight[:, -1:].double()).to(weight.dtype))


def _swap(norm: fx.Node, kind: str, names: Names) -> None:
    """The norm itself: ``rms_norm``, or CRMSNorm written out with means over n = d - 1 features."""
    x, shape, gain, _, eps = norm.args[:5]
    write = Writer(norm, names)
    if kind == "rms":
        write.finish(write(ATEN.rms_norm.default, x, shape, gain, eps))
        return
    d = int(shape[0])  # type: ignore[index, arg-type]
    n = d - 1
    power, mean = write(ATEN.mean.dim, write(ATEN.mul.Tensor, x, x), [-1], True), write(ATEN.mean.dim, x, [-1], True)
    power = write(ATEN.mul.Tensor, power, n / d)
    square = write(ATEN.mul.Tensor, write(ATEN.mul.Tensor, mean, mean), n * n / d)
    total = write(ATEN.add.Tensor, write(ATEN.add.Tensor, power, square), eps)
    write.finish(write(ATEN.mul.Tensor, x, write(ATEN.rsqrt.default, total)))
