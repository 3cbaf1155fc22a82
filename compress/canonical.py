"""One way to write each thing in a captured ATen graph, without changing what it computes.

dropout, detach, alias, clone, contiguous, to(same dtype), slice of all   removed
batch_norm after conv or linear                             folded into weight and bias
other batch_norm on 4-d input                               depthwise 1x1 conv
conv1d, max_pool1d, avg_pool1d                              unsqueeze, the 2-d operator, squeeze
conv2d(padding="same")                                      pad + conv2d
pad(0) on H and W, equal on both sides, before a conv2d     the conv's padding
relu6, hardtanh(0, 6), clamp(0, 6)                          hardtanh(0, 6)
adaptive_avg_pool2d(1), mean over (2, 3)                    mean((2, 3), keepdim), and a reshape
addmm with a parameter as matrix (GPT-2's Conv1D)           linear
flatten, view                                               reshape
transpose, t                                                permute
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["ATEN", "arguments", "assign_tensor", "canonicalize", "drop_unused_tensors", "pair", "traced_value"]

ATEN: Any = torch.ops.aten

_IDENTITY = {
    ATEN.dropout.default, ATEN.detach.default, ATEN.alias.default, ATEN.clone.default, ATEN.contiguous.default,
    ATEN.lift_fresh_copy.default, ATEN.feature_dropout.default,
}  # fmt: skip


_END = 9223372036854775807  # torch's "to the end"


def canonicalize(module: fx.GraphModule) -> None:
    """Rewrite ``module`` in place; see the table above."""
    for rewrite in (
        _remove_identities,
        _transposed_linear,
        _explicit_same_padding,
        _one_dimensional,
        _fold_batch_norm,
        _lower_squeeze,
        _merge_padding,
        _spell,
        _lower_squeeze,
    ):
        for node in list(module.graph.nodes):
            if node.op == "call_function" and node.graph is module.graph and not node._erased:
                rewrite(module, node)
        module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.graph.lint()
    module.recompile()
    drop_unused_tensors(module)


def _replace(node: fx.Node, build: Callable[[fx.Graph], fx.Node]) -> None:
    with node.graph.inserting_before(node):
        new = build(node.graph)
    for made in reversed(_between(new, node)):
        made.meta = {**node.meta, "val": node.meta.get("val") if made is new else traced_value(made)}
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def traced_value(node: fx.Node) -> Any:
    """The fake value of an inserted node, from those of its arguments."""

    def value(n: fx.Node) -> Any:
        if "val" in n.meta:
            return n.meta["val"]
        assert n.op == "get_attr" and n.graph.owning_module is not None
        return mode.from_tensor(_tensor(n.graph.owning_module, str(n.target)))

    fake = next(n.meta["val"] for n in node.all_input_nodes if isinstance(n.meta.get("val"), FakeTensor))
    mode = fake.fake_mode
    arguments, options = fx.map_arg(node.args, value), fx.map_arg(node.kwargs, value)
    target: Any = node.target
    with mode:
        return target(*arguments, **options)


def _between(last: fx.Node, before: fx.Node) -> list[fx.Node]:
    """Nodes without metadata that were just inserted, ending at ``last``."""
    made = []
    node = before.prev
    while node.op != "root" and "nn_module_stack" not in node.meta and node.op == "call_function":
        made.append(node)
        node = node.prev
    return made or [last]


def _remove_identities(module: fx.GraphModule, node: fx.Node) -> None:
    same_dtype = str(node.target).startswith(("aten._to_copy", "aten.to.")) and _same_type(node)
    everything = node.target == ATEN.slice.Tensor and tuple(node.args[2:]) in ((0, _END), (0, _END, 1))
    if node.target in _IDENTITY or same_dtype or everything:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        node.replace_all_uses_with(source)
        module.graph.erase_node(node)
    elif str(node.target).startswith(("aten._assert", "aten.sym_constrain")):
        module.graph.erase_node(node)


def _same_type(node: fx.Node) -> bool:
    before, after = node.args[0].meta.get("val"), node.meta.get("val")  # type: ignore[union-attr]
    return (
        isinstance(before, Tensor) and isinstance(after, Tensor) and before.dtype == after.dtype and before.device == after.device
    )


def _explicit_same_padding(module: fx.GraphModule, node: fx.Node) -> None:
    if node.target not in (ATEN.conv2d.padding, ATEN.conv1d.padding):
        return
    x, weight, bias, stride, padding, dilation, groups = arguments(node)
    rank = 2 if node.target == ATEN.conv2d.padding else 1
    kernel = weight.meta["val"].shape[2:]
    pads: list[int] = []
    for k, d in zip(reversed(list(kernel)), reversed(pair(dilation, rank)), strict=True):
        total = d * (k - 1) if padding == "same" else 0
        pads += [total // 2, total - total // 2]

    def build(graph: fx.Graph) -> fx.Node:
        padded = graph.call_function(ATEN.pad.default, (x, pads)) if any(pads) else x
        conv = ATEN.conv2d.default if rank == 2 else ATEN.conv1d.default
        return graph.call_function(conv, (padded, weight, bias, stride, [0] * rank, dilation, groups))

    _replace(node, build)


def _transposed_linear(module: fx.GraphModule, node: fx.Node) -> None:
    """addmm(bias, x, W) with parameters bias (out,) and W (in, out), each used by nobody else, is linear(x, W^T, bias)."""
    if node.target != ATEN.addmm.default or node.kwargs:
        return
    bias, x, weight = node.args[:3]
    if not all(isinstance(a, fx.Node) and a.op == "get_attr" for a in (bias, weight)):
        return
    value = _tensor(module, str(weight.target))  # type: ignore[union-attr]
    names = {
        p for n in module.graph.nodes if n.op == "get_attr" and _tensor(module, p := str(n.target)).data_ptr() == value.data_ptr()
    }
    if len(names) > 1 or len(weight.users) > 1 or _tensor(module, str(bias.target)).dim() != 1:  # type: ignore[union-attr]
        return
    assign_tensor(module, str(weight.target), value.T)  # type: ignore[union-attr]
    if "val" in weight.meta:  # type: ignore[union-attr]
        weight.meta["val"] = weight.meta["val"].T  # type: ignore[union-attr]
    _replace(node, lambda graph: graph.call_function(ATEN.linear.default, (x, weight, bias)))


def _one_dimensional(module: fx.GraphModule, node: fx.Node) -> None:
    pools = {ATEN.max_pool1d.default: ATEN.max_pool2d.default, ATEN.avg_pool1d.default: ATEN.avg_pool2d.default}
    if node.target != ATEN.conv1d.default and node.target not in pools:
        return
    args = arguments(node)

    def lift(value: Any, fill: int) -> list[int]:
        value = pair(value, 1)
        return [fill, *value] if value else []

    def build(graph: fx.Graph) -> fx.Node:
        x = graph.call_function(ATEN.unsqueeze.default, (args[0], 2))
        if node.target == ATEN.conv1d.default:
            _, weight, bias, stride, padding, dilation, groups = args
            name = str(weight.target)
            value = _tensor(module, name)
            if value.dim() == 3:
                assign_tensor(module, name, value.unsqueeze(2))
                if "val" in weight.meta:
                    weight.meta["val"] = weight.meta["val"].unsqueeze(2)
            y = graph.call_function(
                ATEN.conv2d.default, (x, weight, bias, lift(stride, 1), lift(padding, 0), lift(dilation, 1), groups)
            )
        elif node.target == ATEN.max_pool1d.default:
            _, kernel, stride, padding, dilation, ceil_mode = args
            geometry = (lift(kernel, 1), lift(stride, 1), lift(padding, 0), lift(dilation, 1), ceil_mode)
            y = graph.call_function(pools[node.target], (x, *geometry))
        else:
            _, kernel, stride, padding, ceil_mode, count = args
            y = graph.call_function(pools[node.target], (x, lift(kernel, 1), lift(stride, 1), lift(padding, 0), ceil_mode, count))
        return graph.call_function(ATEN.squeeze.dim, (y, 2))

    _replace(node, build)


def _fold_batch_norm(module: fx.GraphModule, node: fx.Node) -> None:
    if node.target not in (ATEN._native_batch_norm_legit_no_training.default, ATEN.batch_norm.default):
        return
    x, gamma, beta, mean, var = node.args[:5]
    eps = float(node.args[6] if "legit" in str(node.target) else node.args[7])  # type: ignore[arg-type]
    assert isinstance(x, fx.Node) and isinstance(mean, fx.Node) and isinstance(var, fx.Node)
    running_var = _tensor(module, str(var.target)).double()
    factor = torch.rsqrt(running_var + eps)
    if isinstance(gamma, fx.Node):
        factor = factor * _tensor(module, str(gamma.target)).double()
    shift = -_tensor(module, str(mean.target)).double() * factor
    if isinstance(beta, fx.Node):
        shift = shift + _tensor(module, str(beta.target)).double()
    result = next((u for u in node.users if u.args[1] == 0), node) if "legit" in str(node.target) else node

    producer = x.args[0] if x.target == ATEN.squeeze.dim and isinstance(x.args[0], fx.Node) else x
    weighted = producer.target in (ATEN.conv2d.default, ATEN.linear.default) and len(producer.users) == len(x.users) == 1
    if weighted and len(producer.args[1].users) == 1:  # type: ignore[union-attr]
        _scale_producer(module, producer, factor, shift)
        if isinstance(gamma, fx.Node) and isinstance(beta, fx.Node):
            producer.meta["batch_norm"] = tuple(_tensor(module, str(n.target)).float().clone() for n in (beta, gamma, var))
        result.replace_all_uses_with(x)
    elif x.meta["val"].dim() == 4:
        path = str(mean.target).removesuffix("running_mean").strip(".")
        _as_depthwise(module, result, x, factor, shift, path)


def _scale_producer(module: fx.GraphModule, producer: fx.Node, factor: Tensor, shift: Tensor) -> None:
    weight_node, bias_node = producer.args[1], producer.args[2] if len(producer.args) > 2 else None
    assert isinstance(weight_node, fx.Node)
    name = str(weight_node.target)
    weight = _tensor(module, name)
    assign_tensor(module, name, (weight.double() * factor.view(-1, *[1] * (weight.dim() - 1))).to(weight.dtype))
    old = _tensor(module, str(bias_node.target)).double() if isinstance(bias_node, fx.Node) else 0.0
    bias = (old * factor + shift).to(weight.dtype)
    bias_name = name.removesuffix("weight") + "bias" if name.endswith("weight") else f"{name}_bias"
    assign_tensor(module, bias_name, bias)
    with producer.graph.inserting_before(producer):
        producer.update_arg(2, producer.graph.get_attr(bias_name)) if len(producer.args) > 2 else producer.insert_arg(
            2, producer.graph.get_attr(bias_name)
        )


def _as_depthwise(module: fx.GraphModule, node: fx.Node, x: fx.Node, factor: Tensor, shift: Tensor, path: str) -> None:
    dtype = x.meta["val"].dtype
    weight, bias = f"{path}.weight" if path else "bn_weight", f"{path}.bias" if path else "bn_bias"
    assign_tensor(module, weight, factor.view(-1, 1, 1, 1).to(dtype))
    assign_tensor(module, bias, shift.to(dtype))

    def build(graph: fx.Graph) -> fx.Node:
        nodes = graph.get_attr(weight), graph.get_attr(bias)
        return graph.call_function(ATEN.conv2d.default, (x, *nodes, [1, 1], [0, 0], [1, 1], factor.numel()))

    _replace(node, build)


def _merge_padding(module: fx.GraphModule, node: fx.Node) -> None:
    if node.target not in (ATEN.pad.default, ATEN.constant_pad_nd.default):
        return
    x, pads, *rest = arguments(node)
    value = rest[-1] if node.target == ATEN.pad.default else rest[0]
    mode = rest[0] if node.target == ATEN.pad.default else "constant"
    if mode != "constant" or value not in (None, 0, 0.0) or not all(isinstance(p, int) for p in pads):
        return
    if not any(pads):
        node.replace_all_uses_with(x)
        return
    users = list(node.users)
    if len(pads) != 4 or pads[0] != pads[1] or pads[2] != pads[3] or min(pads) < 0:
        return
    if all(u.target == ATEN.conv2d.default and u.args[0] is node for u in users):
        for user in users:
            args = arguments(user)
            old = pair(args[4], 2)
            user.args = (x, *args[1:4], [old[0] + pads[2], old[1] + pads[0]], *args[5:])


def _spell(module: fx.GraphModule, node: fx.Node) -> None:
    """Give operators with several spellings one; shapes come from the traced values."""
    x = node.args[0] if node.args else None
    if not isinstance(x, fx.Node) or not isinstance(x.meta.get("val"), Tensor):
        return
    shape = list(x.meta["val"].shape)
    target = node.target
    low_high = {ATEN.hardtanh.default: (-1.0, 1.0), ATEN.clamp.default: (None, None)}
    if target == ATEN.relu6.default or (
        target in low_high and (tuple(node.args[1:3]) or low_high[target]) in ((0, 6), (0.0, 6.0))
    ):
        _replace(node, lambda g: g.call_function(ATEN.hardtanh.default, (x, 0.0, 6.0)))
    elif target == ATEN.adaptive_avg_pool2d.default and list(node.args[1]) == [1, 1]:  # type: ignore[arg-type]
        _replace(node, lambda g: g.call_function(ATEN.mean.dim, (x, [2, 3], True)))
    elif target == ATEN.mean.dim and len(shape) == 4 and _dims(node) == [2, 3]:
        if not (len(node.args) > 2 and node.args[2]):
            _replace(node, lambda g: _spatial_mean(g, x, shape[1]))
        else:
            node.args = (x, [2, 3], True)
    elif target == ATEN.mean.dim and len(shape) == 3 and [int(d) % 3 for d in node.args[1]] == [2]:  # type: ignore[union-attr, arg-type]
        keep = len(node.args) > 2 and bool(node.args[2])
        _replace(node, lambda g: _mean_over_time(g, x, shape[1], keep))
    elif target == ATEN.adaptive_avg_pool1d.default and list(node.args[1]) == [1]:  # type: ignore[arg-type]
        _replace(node, lambda g: _mean_over_time(g, x, shape[1], True))
    elif target in (ATEN.flatten.using_ints, ATEN.view.default, ATEN._unsafe_view.default):
        _replace(node, lambda g: g.call_function(ATEN.reshape.default, (x, _view_shape(node, shape))))
    elif target in (ATEN.transpose.int, ATEN.t.default):
        dims = list(range(len(shape)))
        i, j = node.args[1:3] if target == ATEN.transpose.int else (0, 1)
        dims[i], dims[j] = dims[j], dims[i]  # type: ignore[index]
        _replace(node, lambda g: g.call_function(ATEN.permute.default, (x, dims)))


def _dims(node: fx.Node) -> list[int]:
    dims: Any = node.args[1]
    return sorted(int(d) % 4 for d in dims)


def _spatial_mean(graph: fx.Graph, x: fx.Node, channels: int) -> fx.Node:
    mean = graph.call_function(ATEN.mean.dim, (x, [2, 3], True))
    return graph.call_function(ATEN.reshape.default, (mean, [-1, channels]))


def _mean_over_time(graph: fx.Graph, x: fx.Node, channels: int, keep: bool) -> fx.Node:
    lifted = graph.call_function(ATEN.unsqueeze.default, (x, 2))
    mean = graph.call_function(ATEN.mean.dim, (lifted, [2, 3], True))
    return graph.call_function(ATEN.reshape.default, (mean, [-1, channels, 1] if keep else [-1, channels]))


def _lower_squeeze(module: fx.GraphModule, node: fx.Node) -> None:
    """Move the squeeze of a 1-d layer behind the activation that follows it, and cancel it against the next layer's unsqueeze."""
    x = node.args[0] if node.args else None
    if not isinstance(x, fx.Node) or x.target != ATEN.squeeze.dim or x.args[1] != 2:
        return
    source = x.args[0]
    if node.target == ATEN.unsqueeze.default and node.args[1] == 2:
        node.replace_all_uses_with(source)  # type: ignore[arg-type]
    elif node.target in (ATEN.relu.default, ATEN.hardtanh.default, ATEN.relu6.default) and len(x.users) == 1:
        target: Any = node.target
        rest = node.args[1:]

        def build(graph: fx.Graph) -> fx.Node:
            return graph.call_function(ATEN.squeeze.dim, (graph.call_function(target, (source, *rest)), 2))

        _replace(node, build)


def _view_shape(node: fx.Node, shape: list[int]) -> Any:
    if node.target != ATEN.flatten.using_ints:
        return node.args[1]
    start = int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type]
    end = int(node.args[2]) if len(node.args) > 2 else -1  # type: ignore[arg-type]
    start, end = start % len(shape), end % len(shape)
    merged = 1
    for d in shape[start : end + 1]:
        merged *= d
    result: list[Any] = [*shape[:start], merged, *shape[end + 1 :]]
    return [d if isinstance(d, int) else -1 for d in result]


def arguments(node: fx.Node) -> list[Any]:
    """All arguments in schema order, defaults filled in."""
    assert isinstance(node.target, torch._ops.OpOverload)
    values: list[Any] = []
    for i, argument in enumerate(node.target._schema.arguments):
        given = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
        values.append(given)
    return values


def pair(value: Any, rank: int) -> list[int]:
    """A stride, padding or kernel as a list; one number stands for ``rank`` equal ones."""
    items = list(value) if isinstance(value, list | tuple) else [value]
    return items * rank if len(items) == 1 and rank > 1 else items


def _tensor(module: fx.GraphModule, name: str) -> Tensor:
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part)
    assert isinstance(value, Tensor)
    return value.detach()


def assign_tensor(module: fx.GraphModule, name: str, value: Tensor) -> None:
    """Set a tensor by dotted name, as a buffer-free plain parameter of the flat module."""
    owner_name, _, leaf = name.rpartition(".")
    if owner_name:
        if not any(n == owner_name for n, _ in module.named_modules()):
            module.add_submodule(owner_name, torch.nn.Module())
        owner = module.get_submodule(owner_name)
    else:
        owner = module
    for table in (owner._parameters, owner._buffers):
        table.pop(leaf, None)
    owner.register_parameter(leaf, torch.nn.Parameter(value.contiguous(), requires_grad=False))


def drop_unused_tensors(module: fx.GraphModule) -> None:
    """Delete the parameters and buffers that no ``get_attr`` node reads."""
    used = {str(n.target) for n in module.graph.nodes if n.op == "get_attr"}
    for prefix, owner in list(module.named_modules()):
        for table in (owner._parameters, owner._buffers):
            for leaf in list(table):
                if (f"{prefix}.{leaf}" if prefix else leaf) not in used:
                    del table[leaf]
