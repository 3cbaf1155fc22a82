"""Frozen program to :class:`~edgekit.targets.cortex_m.graph.Firmware`: what each operator becomes is the table in ``rules.py``.

The border is integer: ``quantize`` of a program input and ``dequantize`` of an output are done by whoever feeds the firmware.
What is left in float, and activations of more than 8 bits, are refused with the layer's name, its source line and the remedy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from operator import getitem
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor as TorchTensor
from torch import fx

from edgekit.errors import UnsupportedError
from edgekit.frozen import FrozenProgram, Layer, Unquantized
from edgekit.frozen.spiking_ops import FLOAT_OPS
from edgekit.targets.cortex_m import softmax
from edgekit.targets.cortex_m.graph import Firmware, Port, Step, Tensor

__all__ = ["TAKE_CURRENTS", "Builder", "build", "constants", "refusal", "refuse"]

_REMEDIES = {
    "softmax": "firmware computes it along the last axis of at most 1023 integers; else return the logits and take softmax "
    "(or argmax) where the result is used",
    "log_softmax": "return the logits and take log_softmax (or argmax) where the result is used",
    "layer_norm": "use batch normalization, which is folded into the layer before it",
    "add": "let both operands be computed activations of one shape",
    "sub": "write a - b as an addition of a layer with negated weights",
    "batch_norm": "let it follow a convolution or linear layer directly, so that it is folded",
}
_REMEDY = "replace it by operators with an integer form, take it out of the model, or lower to executorch, tflite or onnx"

_MOVES = {
    "alias", "arange", "cat", "chunk", "clone", "constant_pad_nd", "contiguous", "expand", "flatten", "full", "ones",
    "pad", "permute", "reshape", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind",
    "unsqueeze", "view", "zeros",
}  # fmt: skip
"""ATen operators without arithmetic."""

_FOR_OTHERS = ("an input of it is float", "only float operators use it", "no integer operator", "it feeds a layer normalization")
"""How the reasons begin of layers that could be integers if their neighbours were."""

_SHOWN = 4

TAKE_CURRENTS = ("repeat_steps", "qlif_sequence", "qlif_recurrent", "qsynapse_sequence", "qaccumulate")
"""Operators that read int16 currents."""


def refusal(program: FrozenProgram, layer: str, what: str, remedy: str) -> UnsupportedError:
    """The sentence for something firmware cannot take."""
    place = program.sources.get(layer)
    return UnsupportedError(
        f"layer {layer}{f' ({place})' if place else ''} {what}, which Cortex-M firmware does not take: {remedy}"
    )


def refuse(program: FrozenProgram) -> None:
    """Raise UnsupportedError for layers in float, a softmax between integers excepted, or the first with 16-bit activations."""
    from edgekit.targets.cortex_m.rules import RULES

    neurons = next((x for x in program.layers if x.op in FLOAT_OPS), None)
    if neurons is not None:
        remedy = "set spiking: {weights: int8} in the recipe, which makes integers of it"
        raise refusal(program, neurons.name, f"has membranes in float ({neurons.op})", remedy)
    found = _in_float(program)
    if len(found) == 1:
        (only,) = found
        because = f" ({only.reason})" if only.reason else ""
        raise refusal(program, only.layer, f"stays in float: {only.op}{because}", _REMEDIES.get(only.op, _REMEDY))
    if found:
        raise UnsupportedError(_several(program, found))
    for layer in program.layers:
        bits = max(int(layer.args.get(k, 8)) for k in ("out_bits", "bits"))
        if bits > 8 and not _gives_currents(program, layer):
            remedy = "set activations: int8 in the recipe, or int8 for this layer by a scope"
            raise refusal(program, layer.name, f"has {bits}-bit activations", remedy)
        if layer.op not in RULES:
            raise refusal(program, layer.name, f"is the operator {layer.op}", _REMEDY)


def _gives_currents(program: FrozenProgram, layer: Layer) -> bool:
    """Whether a layer's 16-bit output is the current of neurons or of a readout."""
    users = [x for x in program.layers if layer.name in x.inputs]
    return layer.op in ("qconv2d", "qlinear") and bool(users) and all(u.op in TAKE_CURRENTS for u in users)


def _in_float(program: FrozenProgram) -> list[Unquantized]:
    """Each layer that stays in float, once, those first that are so by themselves and not for a neighbour's sake.

    Operators that only move numbers are left out: they are float because of what is beside them. Only where nothing else is
    in float are they the answer.
    """
    known = {u.layer: u for u in program.unquantized}
    taken, softmaxes = {layer.node for layer in program.layers}, softmax.found(program)
    found: dict[str, Unquantized] = {}
    for node in program.module.graph.nodes:
        if node.op != "call_function" or node.target is getitem or node.name in taken or node.name in softmaxes:
            continue
        if not isinstance(node.meta.get("val"), TorchTensor):
            continue
        op = str(node.target).removeprefix("aten.").split(".")[0].strip("_")
        stack = node.meta.get("nn_module_stack") or {}
        name = (next(reversed(stack.values()))[0] if stack else "") or node.name
        found.setdefault(name, known.get(name, Unquantized(name, op, "")))
    computing = [u for u in found.values() if u.op not in _MOVES] or list(found.values())[:1]
    return sorted(computing, key=lambda u: u.reason.startswith(_FOR_OTHERS))


def _several(program: FrozenProgram, found: Sequence[Unquantized]) -> str:
    """One sentence for more than one layer in float: the first few with their lines, how many more, and the remedies."""
    shown = []
    for u in found[:_SHOWN]:
        place = program.sources.get(u.layer)
        because = "" if not u.reason or u.reason.startswith(u.op) else f", {u.reason}"
        shown.append(f"{u.layer} ({place}: {u.op}{because})" if place else f"{u.layer} ({u.op}{because})")
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    causes = dict.fromkeys(u.op for u in found[:_SHOWN] if not u.reason.startswith(_FOR_OTHERS))
    remedies = [f"for {op}, {_REMEDIES[op]}" for op in causes if op in _REMEDIES]
    remedy = "; ".join([*remedies, "otherwise " + _REMEDY if remedies else _REMEDY])
    return f"layers {', '.join(shown)}{more} stay in float, which Cortex-M firmware does not take: {remedy}"


@dataclass
class Builder:
    """Collects tensors and steps; the rules call its methods."""

    program: FrozenProgram
    tensors: list[Tensor] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    inputs: list[Port] = field(default_factory=list)
    of: dict[str, int] = field(default_factory=dict)
    """Layer (or, for a program input with integers, fx node) to the tensor that holds its output."""
    ends: dict[str, tuple[int, float, int]] = field(default_factory=dict)
    """dequantize layer to (tensor, scale, zero point)."""
    pads: dict[str, tuple[str, tuple[int, int, int, int]]] = field(default_factory=dict)
    """qpad layer that was merged into the convolutions behind it, to (its input, (left, right, top, bottom))."""
    flattened: dict[str, int] = field(default_factory=dict)
    """qreshape layer of a channel-last image that only linear layers read, to that image; their weights are put in its order."""
    repeats: dict[str, str] = field(default_factory=dict)
    """repeat_steps layer to the layer whose output it repeats."""
    _converted: dict[tuple[int, bool], int] = field(default_factory=dict)

    def tensor(
        self,
        layer: Layer | str,
        shape: Sequence[int],
        last: bool,
        q: tuple[float, int],
        base: int | None = None,
        channels: int = 0,
        width: int = 1,
    ) -> int:
        """A new tensor; its index."""
        index = len(self.tensors)
        name = layer if isinstance(layer, str) else layer.name
        own = index if base is None else base
        self.tensors.append(Tensor(index, name, tuple(shape), last, float(q[0]), int(q[1]), own, channels, width))
        return index

    def output(self, layer: Layer, last: bool) -> int:
        """The tensor for a layer's output."""
        assert layer.out_scale is not None and layer.out_zero_point is not None
        index = self.tensor(layer, layer.shape, last, (layer.out_scale, layer.out_zero_point))
        self.of[layer.name] = index
        return index

    def step(self, layer: Layer | str, kind: str, inputs: Sequence[int], output: int, **more: Any) -> None:
        """Append a kernel call; ``more``: values, arrays, macs, bits."""
        self.steps.append(Step(layer if isinstance(layer, str) else layer.name, kind, tuple(inputs), output, **more))

    def read(self, name: str, last: bool | None = None) -> int:
        """The tensor of a producer, stored channel-last (True), in the program's order (False), or as it is (None)."""
        if name not in self.of:
            raise self.refuse(name, "is used as integers but is computed in float", _REMEDY)
        index = self.of[name]
        tensor = self.tensors[index]
        if last is None or tensor.last == last or len(tensor.shape) != 4:
            return index
        if (index, last) not in self._converted:
            self._converted[index, last] = self._convert(tensor, last)
        return self._converted[index, last]

    def _convert(self, tensor: Tensor, last: bool) -> int:
        q = (tensor.scale, tensor.zero_point)
        free = tensor.shape[1] == 1 or prod(tensor.shape[2:]) == 1
        if tensor.width > 1 and not free:
            raise self.refuse(tensor.name, "gives currents of an image that are wanted in another order", "let neurons read them")
        name = f"{tensor.name}.{'last' if last else 'first'}"
        made = self.tensor(name, tensor.shape, last, q, tensor.base if free else None, width=tensor.width)
        if not free:
            self.transpose(tensor.name, tensor.index, made, (0, 2, 3, 1) if last else (0, 3, 1, 2))
        return made

    def transpose(self, layer: Layer | str, source: int, target: int, order: Sequence[int]) -> None:
        """Bytes of ``source``, in its stored shape, with its axes in ``order``."""
        shape = self.tensors[source].stored
        strides = [prod(shape[i + 1 :]) for i in range(len(shape))]
        self.gather(layer, source, target, [shape[i] for i in order], [strides[i] for i in order])

    def gather(
        self, layer: Layer | str, source: int, target: int, shape: Sequence[int], strides: Sequence[int], offset: int = 0
    ) -> None:
        """``target``, dense of ``shape``, from ``source[offset + sum(index * stride)]``.

        Raises:
            UnsupportedError: more than four axes are left when those of size 1 and those that lie together are merged.
        """
        axes: list[tuple[int, int]] = []
        for size, stride in zip(shape, strides, strict=True):
            if size == 1:
                continue
            if axes and axes[-1][1] == size * stride:
                axes[-1] = (axes[-1][0] * size, stride)
            else:
                axes.append((size, stride))
        if len(axes) > 4:
            raise self.refuse(layer, "moves more than four axes", "split the permutation in two")
        axes = [(1, 0)] * (4 - len(axes)) + axes
        values = {"shape": tuple(n for n, _ in axes), "stride": tuple(s for _, s in axes), "offset": offset}
        self.step(layer, "gather", [source], target, values=values)

    def refuse(self, layer: Layer | str, what: str, remedy: str) -> UnsupportedError:
        """The error for a layer that has no firmware form."""
        return refusal(self.program, layer if isinstance(layer, str) else layer.name, what, remedy)

    def is_output(self, layer: Layer) -> bool:
        """The program returns this layer's integers."""
        found = next(n for n in self.program.module.graph.nodes if n.op == "output").args[0]
        return any(getattr(n, "name", "") == layer.node for n in (found if isinstance(found, list | tuple) else (found,)))

    def users(self, layer: Layer) -> list[Layer]:
        """Layers that read this one."""
        return [x for x in self.program.layers if layer.name in x.inputs]


def build(program: FrozenProgram) -> Firmware:
    """Steps and tensors of a program, without offsets.

    Raises:
        UnsupportedError: something is left in float, has 16-bit activations, or no firmware form.
    """
    from edgekit.targets.cortex_m.rules import RULES

    refuse(program)
    builder = Builder(program)
    holders = [n for n in program.module.graph.nodes if n.op == "placeholder"]
    for position, node in enumerate(holders):
        if node.meta["val"].dtype == torch.int8:
            shape = tuple(node.meta["val"].shape)
            builder.of[node.name] = builder.tensor(node.name, shape, False, (1.0, 0))
            builder.inputs.append(Port(position, builder.of[node.name], None, None))
    for layer in program.layers:
        RULES[layer.op](builder, layer)
    outputs = _outputs(builder)
    taps = {x.name: builder.of[x.name] for x in program.layers if x.name in builder.of}
    return Firmware(
        name=program.name,
        tensors=tuple(builder.tensors),
        steps=tuple(builder.steps),
        inputs=tuple(builder.inputs),
        outputs=outputs,
        taps=taps,
    )


def _outputs(builder: Builder) -> tuple[Port, ...]:
    (node,) = (n for n in builder.program.module.graph.nodes if n.op == "output")
    found = node.args[0]
    names = {layer.node: layer.name for layer in builder.program.layers}
    softmaxes = softmax.found(builder.program)
    ports = []
    for position, value in enumerate(found if isinstance(found, list | tuple) else (found,)):
        name = names.get(value.name, value.name) if isinstance(value, fx.Node) else str(value)
        if name in softmaxes:
            shape, (scale, zero_point) = tuple(value.meta["val"].shape), softmax.OUTPUT
            tensor = builder.tensor(name, shape, False, softmax.OUTPUT)
            softmax.add_step(builder, name, softmaxes[name], tensor)
            ports.append(Port(position, tensor, scale, zero_point))
        elif name in builder.ends:
            tensor, scale, zero_point = builder.ends[name]
            ports.append(Port(position, tensor, scale, zero_point))
        elif name in builder.of and builder.tensors[builder.of[name]].channels:
            raise builder.refuse(name, "returns packed signs", "return integers or their float values")
        elif name in builder.of and name in names.values():
            ports.append(Port(position, builder.of[name], None, None))
        else:
            raise builder.refuse(name, "is an output that no integer layer computes", _REMEDY)
    return tuple(ports)


def constants(layer: Layer, *keys: str) -> Mapping[str, NDArray[Any]]:
    """A layer's constant tensors as numpy arrays."""
    return {k: np.ascontiguousarray(layer.args[k].numpy()) for k in keys}
