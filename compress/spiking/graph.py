"""What of a captured graph becomes neurons, what stays linear on currents and spikes, and what has no spiking form.

A rectifier (functional or module, ``relu`` and ``relu6``) becomes a layer of neurons. Whatever is linear in its activations works
on the currents and spikes of each step as it is: the mean over time of what it computes is what it computes of the mean. Anything
else has no spiking form; it is named, and only where the recipe allows it is it computed on the mean over time.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx

from edgekit.compress.canonical import ATEN
from edgekit.compress.capture import Graph, shapes_of
from edgekit.errors import ModelError

__all__ = ["Left", "Site", "Survey", "average_pools", "free_batches", "operator_name", "rectifiers_first", "survey"]

ACTIVATIONS = frozenset({
    "celu", "elu", "gelu", "glu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "log_sigmoid_forward", "mish", "prelu",
    "relu", "relu6", "selu", "sigmoid", "silu", "softplus", "softmax", "_softmax", "log_softmax", "tanh", "threshold", "clamp",
    "hardshrink", "softshrink", "rrelu", "abs", "exp", "sqrt", "pow",
})  # fmt: skip

_LINEAR = frozenset({
    "conv1d", "conv2d", "conv3d", "conv_transpose2d", "convolution", "linear", "avg_pool2d", "adaptive_avg_pool2d", "mean",
    "sum", "reshape", "permute", "cat", "pad", "constant_pad_nd", "unsqueeze", "squeeze", "slice", "select", "neg", "expand",
    "upsample_nearest2d", "upsample_bilinear2d", "native_batch_norm_legit_no_training", "add", "sub", "mul", "div",
    "split_with_sizes", "split", "pixel_shuffle", "flip",
})  # fmt: skip
"""Linear (or affine) in the activations; mul and div only with one of them."""

_WEIGHTED = frozenset({"conv1d", "conv2d", "conv3d", "conv_transpose2d", "convolution", "linear"})


@dataclass(frozen=True)
class Site:
    """An activation that becomes neurons.

    Attributes:
        name: layer name.
        node: name of its fx node in the captured graph.
        op: ATen operator.
        shape: of its output for one sample, without batch.
        cap: the activation's own upper bound, infinite for a ReLU.
    """

    name: str
    node: str
    op: str
    shape: tuple[int, ...]
    cap: float = math.inf


@dataclass(frozen=True)
class Left:
    """An operator without a spiking form; ``after``: behind the last neurons and the last weights, after the mean over time."""

    name: str
    node: str
    op: str
    source: str
    after: bool

    @property
    def is_activation(self) -> bool:
        return self.op.strip("_") in {a.strip("_") for a in ACTIVATIONS}


@dataclass(frozen=True)
class Survey:
    """What was found on a graph: rectifiers, operators without a spiking form, and names of the nodes of max pools."""

    sites: tuple[Site, ...]
    left: tuple[Left, ...]
    pools: tuple[str, ...]


def survey(graph: Graph, frames: bool = False) -> Survey:
    """Look at every operator of a captured graph; ``frames``: its input holds the steps.

    Raises:
        ModelError: no rectifier at all, a fixed batch, or an operator that mixes the samples of a batch.
    """
    if not graph.dynamic_batch:
        raise ModelError(
            "spiking: the model exports only for a batch of one, and time is run as a batch; keep the batch free in its forward "
            "(no x.view(1, ...), no loop over samples)"
        )
    shapes = shapes_of(graph, 2)
    lines = {node: graph.sources.get(name, "") for node, name in graph.names.items()}
    sites: list[Site] = []
    left: list[Left] = []
    pools: list[str] = []
    nodes = [n for n in graph.module.graph.nodes if n.op == "call_function"]
    moving = _depends_on_input(graph.module)
    later = _before_the_end(graph.module)
    for node in nodes:
        name, op = graph.names.get(node.name, node.name), operator_name(node)
        if not frames and node.name in shapes and node in moving and (not shapes[node.name] or shapes[node.name][0] != 2):
            raise ModelError(f"spiking: layer {name} ({op}) moves or mixes the samples of a batch; time is run as a batch")
        if node not in moving or node.target is operator.getitem:
            continue
        if (cap := _cap(node)) is not None:
            sites.append(Site(name, node.name, op, shapes[node.name][1:], cap))
        elif op == "max_pool2d":
            pools.append(node.name)
        elif not _is_linear(node, op, moving):
            left.append(Left(name, node.name, op, lines.get(node.name, ""), after=node not in later))
    if not sites:
        activations = [x for x in left if x.is_activation]
        found = ", ".join(f"{x.name} ({x.op})" for x in activations or left)
        what = "its activations are" if activations else "its operators without a spiking form are"
        raise ModelError(
            "spiking: nothing to convert, the graph has no ReLU"
            + (f"; {what} {found}: train the model with ReLU instead" if found else "")
        )
    return Survey(tuple(sites), tuple(left), tuple(pools))


def operator_name(node: fx.Node) -> str:
    """ATen operator without namespace and overload: ``aten.conv2d.default`` is "conv2d"."""
    return str(node.target).removeprefix("aten.").split(".")[0].strip("_")


def _is_linear(node: fx.Node, op: str, moving: set[fx.Node]) -> bool:
    if op not in _LINEAR:
        return False
    inputs = [a for a in node.args if isinstance(a, fx.Node) and a in moving]
    if op == "div":
        return len(inputs) == 1 and node.args[0] is inputs[0]
    if op == "mul":
        return len(inputs) == 1
    if op in ("linear", "conv2d", "conv1d", "conv_transpose2d"):
        return len(inputs) == 1 and node.args[0] is inputs[0]
    return True


def _depends_on_input(module: fx.GraphModule) -> set[fx.Node]:
    found: set[fx.Node] = set()
    for node in module.graph.nodes:
        if node.op == "placeholder" or any(i in found for i in node.all_input_nodes):
            found.add(node)
    return found


def _before_the_end(module: fx.GraphModule) -> set[fx.Node]:
    """Nodes that some rectifier or layer with weights depends on."""
    found: set[fx.Node] = set()
    for node in reversed(list(module.graph.nodes)):
        if any(u in found or _cap(u) is not None or operator_name(u) in _WEIGHTED for u in node.users):
            found.add(node)
    return found


def _cap(node: fx.Node) -> float | None:
    """Upper bound of a rectifier max(0, min(x, cap)); None for any other operator."""
    op = operator_name(node) if node.op == "call_function" else ""
    if op == "relu":
        return math.inf
    if op not in ("hardtanh", "clamp", "clamp_min", "relu6"):
        return None
    names = {"hardtanh": ("min_val", "max_val"), "clamp": ("min", "max"), "clamp_min": ("min", ""), "relu6": ("", "")}[op]
    given = [node.args[i] if i < len(node.args) else node.kwargs.get(k) for i, k in enumerate(names, 1)]
    low, high = (0.0, 6.0) if op == "relu6" else given
    if low != 0 or isinstance(high, fx.Node):
        return None
    return math.inf if high is None else float(high)  # type: ignore[arg-type]


def free_batches(graph: Graph) -> Graph:
    """The graph with -1 in the place of a batch size that a reshape takes from its input: time makes the batch longer.

    Raises:
        ModelError: the size of a batch is used for anything else.
    """
    module = copy.deepcopy(graph.module)
    for node in list(module.graph.nodes):
        if node.op == "call_function" and operator_name(node) == "reshape":
            shape = list(node.args[1])
            sizes = [i for i, d in enumerate(shape) if isinstance(d, fx.Node)]
            if len(sizes) == 1 and -1 not in shape:
                node.args = (node.args[0], [-1 if i in sizes else d for i, d in enumerate(shape)])
    module.graph.eliminate_dead_code()
    for node in module.graph.nodes:
        if node.op == "call_function" and operator_name(node) == "sym_size":
            users = ", ".join(graph.names.get(u.name, u.name) for u in node.users)
            raise ModelError(f"spiking: {users} depends on the number of samples in a batch, and time is run as a batch")
    module.recompile()
    return Graph(module, graph.sample, graph.names, graph.sources, graph.dynamic_batch, graph.unused)


def rectifiers_first(graph: Graph, sites: tuple[Site, ...]) -> Graph:
    """``relu(max_pool(x))`` as ``max_pool(relu(x))``, which is the same: spikes can be pooled, currents of a step cannot."""
    names = {s.node for s in sites}
    module = copy.deepcopy(graph.module)
    for node in list(module.graph.nodes):
        pool = node.args[0] if node.args else None
        if node.name not in names or not isinstance(pool, fx.Node) or operator_name(pool) != "max_pool2d" or len(pool.users) > 1:
            continue
        x = pool.args[0]
        assert isinstance(x, fx.Node)
        node.replace_all_uses_with(pool)
        node.args = (x, *node.args[1:])
        pool.args = (node, *pool.args[1:])
        pool.prepend(node)
        node.meta["val"] = x.meta.get("val")
    module.graph.lint()
    module.recompile()
    return Graph(module, graph.sample, graph.names, graph.sources, graph.dynamic_batch, graph.unused)


def average_pools(graph: Graph, pools: tuple[str, ...]) -> Graph:
    """Every max pool as the average pool of the same window (QCFS, section 2.2), to be trained."""
    module = copy.deepcopy(graph.module)
    for node in module.graph.nodes:
        if node.name in pools:
            arguments: Mapping[str, Any] = dict(
                zip((a.name for a in node.target._schema.arguments), node.args, strict=False)
            ) | dict(node.kwargs)
            if list(arguments.get("dilation", [1, 1])) not in ([1, 1], [1]):
                raise ModelError(
                    f"spiking: max pool {graph.names.get(node.name, node.name)} is dilated; an average pool cannot be"
                )
            stride = arguments.get("stride") or arguments["kernel_size"]
            padding = arguments.get("padding", [0, 0])
            node.target = ATEN.avg_pool2d.default
            node.args = (
                arguments["self"], arguments["kernel_size"], stride, padding, arguments.get("ceil_mode", False), False,
            )  # fmt: skip
            node.kwargs = {}
    module.graph.lint()
    module.recompile()
    return Graph(module, graph.sample, graph.names, graph.sources, graph.dynamic_batch, graph.unused)
