"""The operators of a frozen program as :class:`edgekit.costs.Work`, which tables of costs take."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import Tensor, fx

from edgekit.costs import FLOAT, Work
from edgekit.frozen.dynamic_ops import DYNAMIC_OPS
from edgekit.frozen.float_layers import FloatLayer
from edgekit.frozen.program import FrozenProgram, Layer

__all__ = ["weighted", "works"]

_FREE = {
    "view", "reshape", "flatten", "unsafe_view", "unsqueeze", "squeeze", "dropout", "detach", "alias", "expand", "transpose",
    "permute", "clone", "contiguous", "to", "t", "lift_fresh_copy", "slice", "select", "split", "chunk", "unbind",
}  # fmt: skip
"""Float operators that move nothing, or are one with their neighbour in the files."""

_CLAMPS = ("relu", "relu6", "hardtanh", "clamp")


def weighted(shape: tuple[int, ...], weight: tuple[int, ...], groups: int, bits: int, inputs: int = 0) -> Work:
    """A convolution (weight of four axes) or a linear layer.

    Args:
        shape: of the output, batch first.
        weight: shape of the weight.
        inputs: activations read.
    """
    depth, taps = math.prod(weight[1:]), math.prod(weight[2:])
    kind = "linear"
    if len(weight) > 2:
        kind = "depthwise" if groups > 1 and weight[1] == 1 else "pointwise" if taps == 1 else "conv"
    return Work(kind, bits, math.prod(shape), inputs, weight[0], depth, taps)


def works(program: FrozenProgram) -> tuple[tuple[str, Work], ...]:
    """(layer, work) of each operator, in execution order; those that cost nothing in a file are left out.

    A float clamp after a float product or sum is part of that operator in every file, and so left out.
    """
    layers: dict[str, Layer | FloatLayer] = {x.node: x for x in program.layers}
    layers |= {x.node: x for x in program.float_layers}
    found = []
    for node in program.module.graph.nodes:
        layer = layers.get(node.name)
        if layer is None or (isinstance(layer, FloatLayer) and (layer.op in _FREE or _fused(node))):
            continue
        read = sum(_size(n) for n in node.all_input_nodes if n.op != "get_attr")
        found.append((layer.name, _float(layer, read) if isinstance(layer, FloatLayer) else _integer(layer, read)))
    return tuple(found)


def _integer(layer: Layer, read: int) -> Work:
    weight = layer.args.get("weight")
    if isinstance(weight, Tensor) and layer.op in ("qconv2d", "qlinear"):
        return weighted(layer.shape, tuple(weight.shape), int(layer.args.get("groups", 1)), layer.weight_bits or 8, read)
    if isinstance(weight, Tensor) and layer.op in DYNAMIC_OPS:
        return replace(weighted(layer.shape, tuple(weight.shape), 1, layer.weight_bits or 8, read), kind=layer.op)
    return Work(layer.op, 8, math.prod(layer.shape), read, depth=layer.macs // max(math.prod(layer.shape), 1))


def _float(layer: FloatLayer, read: int) -> Work:
    outputs = math.prod(layer.shape)
    weights = [t for t in layer.constants.values() if t.dim() in (2, 4)]
    if layer.op in ("conv2d", "convolution", "linear", "addmm") and len(weights) == 1 and outputs:
        weight = tuple(weights[0].shape)
        if layer.op == "addmm":
            weight = weight[::-1]
        groups = 1 if len(weight) == 2 or weight[1] > 1 else weight[0]
        return weighted(layer.shape, weight, groups, FLOAT, read)
    return Work(layer.op, FLOAT, outputs, read, depth=layer.macs // max(outputs, 1))


def _fused(node: fx.Node) -> bool:
    """A clamp of what one float product or sum gives to nobody else."""
    before = node.all_input_nodes[0] if node.all_input_nodes else None
    if before is None or len(before.users) > 1 or _name(node) not in _CLAMPS:
        return False
    return _name(before) in ("conv2d", "convolution", "linear", "addmm", "add")


def _name(node: fx.Node) -> str:
    return str(node.target).removeprefix("aten.").split(".")[0].strip("_")


def _size(node: fx.Node) -> int:
    value: Any = node.meta.get("val")
    return math.prod(value.shape) if isinstance(value, Tensor) else 0
