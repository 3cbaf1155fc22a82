"""1-bit layers for targets without 1-bit kernels: the same numbers by int8 operators. Right, though neither small nor fast.

A packed tensor becomes an int8 tensor of -1 and +1 (scale 1, zero point 0, so that zero padding is the real 0). A layer that ends
in integers becomes ``qconv2d`` or ``qlinear`` with weights -1 and +1, whose rule is the same. One that ends in signs becomes two
operators: with weights -2 and +2 and the bias ``1 - 2 * threshold`` its sum is odd, positive where the sign is +1; a large
multiplier sends it to -128 or 127, in every rounding; and adding that to itself at scale 1/254 gives -1 or +1. The sign of an
int8 tensor is the same with a 1x1 depthwise convolution. Products of signs are computed in float32, which is exact for them.

Weights fit 4 bits and are stored so where the target packs them, else in 8: never in 1 (2 would do for some, but few runtimes
load that). The first operator of a pair is called ``<layer>.sum``; :func:`rows` and :func:`layer_of` lead back to the program's
own layers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import TensorArgument

from edgekit.artifact import Coverage, Mismatch
from edgekit.errors import UnsupportedError
from edgekit.frozen import FrozenProgram, Layer
from edgekit.frozen.binary_ops import BINARY_OPS, unpack_signs
from edgekit.frozen.ops import OPS
from edgekit.targets.fold import copied, lift, prune

__all__ = ["int8_form", "layer_of", "packed", "renamed", "rows"]

_ATEN: Any = torch.ops.aten
_SUM = ".sum"
_SIGN: tuple[float, int] = (1.0, 0)
"""Scale and zero point of a tensor of signs."""
_FULL = 1.0 / 254.0
_GAIN = 200.0


def int8_form(program: FrozenProgram) -> FrozenProgram:
    """An equivalent program without 1-bit operators; the program itself if it has none.

    Raises:
        UnsupportedError: signs go to something else than a 1-bit layer, or come from integers of unknown scale.
    """
    if not any(layer.op in BINARY_OPS for layer in program.layers):
        return program
    kept: FrozenProgram | None = program.__dict__.get("_int8_form")
    if kept is None:
        editor = _Editor(program, copied(program.exported))
        editor.rewrite()
        kept = FrozenProgram(editor.exported, program.name, program.unquantized, program.sources)
        program.__dict__["_int8_form"] = kept  # made again and again otherwise: by lower, inspect, readback and taps
    return kept


def layer_of(program: FrozenProgram, name: str) -> str:
    """The program's layer that a layer of its int8 form belongs to."""
    known = {layer.name for layer in program.layers}
    found = re.fullmatch(r"(.+)\.sum(_\d+)?", name)
    return found[1] if found and name not in known and found[1] in known else name


def renamed(program: FrozenProgram, mismatches: Sequence[Mismatch]) -> list[Mismatch]:
    """Mismatches with the names of the program's layers."""
    return [replace(m, layer=layer_of(program, m.layer)) for m in mismatches]


def packed(program: FrozenProgram, taps: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs of the int8 form's layers as the program's layers have them: signs packed, channels last."""
    form, found = {layer.name: layer.op for layer in int8_form(program).layers}, {}
    for layer in program.layers:
        value = taps.get(layer.name)
        if value is None:
            continue
        if layer.packed:
            # of integers that are no image the signs are made in the shape (1, C, positions, 1), and moved afterwards
            moved = layer.op == "binarize" and form[layer.name] == "qadd"
            last = np.moveaxis(value, 1, -1) if value.ndim == 4 and (moved or _is_image(layer)) else value
            # anything but -1 and +1 is no sign: as a bit it is wrong where it should not be
            value = np.packbits(last > 0, axis=-1, bitorder="little").reshape(layer.shape)
        found[layer.name] = value
    return found


def rows(program: FrozenProgram, coverage: Sequence[Coverage]) -> tuple[Coverage, ...]:
    """A file's coverage with one row for each of the program's layers again, which says what became of a 1-bit one."""
    binary = {layer.name: layer for layer in program.layers if layer.op in BINARY_OPS}
    groups: dict[str, list[Coverage]] = {}
    for row in coverage:
        groups.setdefault(layer_of(program, row.layer), []).append(row)
    found: list[Coverage] = []
    for name, parts in groups.items():
        if name not in binary:
            found += parts
            continue
        main = max(parts, key=lambda row: row.macs)
        storage = main.storage if binary[name].weight_bits == 1 else ""
        why = "no 1-bit kernels here: computed as " + ("float" if main.runs == "float" else "int8")
        why += f", weights stored as {storage}" if storage else ""
        found.append(Coverage(name, main.op, main.runs, binary[name].macs, storage, why))
    return tuple(found)


def _is_image(layer: Layer) -> bool:
    return layer.op == "binary_conv2d" or (layer.op == "binarize" and layer.args["dim"] % 4 == 1)


@dataclass
class _Editor:
    """Replaces the 1-bit nodes of a copy of the program, in order.

    ``signs``: packed node of the program to (node of signs, whether it is an image with its channels in dimension 1).
    """

    program: FrozenProgram
    exported: ExportedProgram
    signs: dict[fx.Node, tuple[fx.Node, bool]] = field(default_factory=dict)
    count: int = 0

    def rewrite(self) -> None:
        layers = {layer.node: layer for layer in self.program.layers}
        graph = self.exported.graph
        for node in list(graph.nodes):
            layer = layers.get(node.name)
            if layer is None or layer.op not in BINARY_OPS:
                continue
            self.node, self.layer = node, layer
            args = dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=True))
            with graph.inserting_before(node):
                new, image = _RULES[layer.op](self, args)
            if layer.packed:
                self.signs[node] = (new, image)
                continue
            node.replace_all_uses_with(new)
            for spec in self.exported.graph_signature.output_specs:
                if spec.arg.name == node.name:
                    spec.arg = TensorArgument(new.name)
        for node in reversed(list(self.signs)):
            binary = {name for name, layer in layers.items() if layer.op in BINARY_OPS}
            if others := [user for user in node.users if user.name not in binary]:
                raise self.refused(layers[node.name], f"its packed signs go to {others[0].name}, which is no 1-bit layer")
        prune(self.exported)
        self.exported.graph_module.recompile()

    def refused(self, layer: Layer, what: str) -> UnsupportedError:
        place = self.program.sources.get(layer.name)
        where = f"layer {layer.name}{f' ({place})' if place else ''}"
        return UnsupportedError(f"{where}: {what}; targets without 1-bit kernels cannot take that, use executorch")

    def call(self, op: Any, *args: Any, last: bool = False) -> fx.Node:
        """A new node; ``last``: it is the layer, else a part of it."""
        node: fx.Node = self.exported.graph.call_function(op, args)
        stack = dict(self.node.meta.get("nn_module_stack") or {})
        if stack and not last:
            key = next(reversed(stack))
            path, kind = stack[key]
            stack[key] = (f"{path}{_SUM}", kind)
        node.meta["nn_module_stack"] = stack
        fakes = fx.node.map_arg(args, lambda n: n.meta["val"])
        with self.mode():
            node.meta["val"] = op(*fakes)
        return node

    def mode(self) -> Any:
        return next(n.meta["val"].fake_mode for n in self.exported.graph.nodes if isinstance(n.meta.get("val"), Tensor))

    def constant(self, value: Tensor) -> fx.Node:
        self.count += 1
        return lift(self.exported, f"_int8_{self.count}", value, self.mode().from_tensor(value, static_shapes=True))

    def own(self, name: str) -> Tensor:
        """A constant of the layer."""
        value: Tensor = self.layer.args[name]
        return value

    def operand(self, node: fx.Node, image: bool) -> fx.Node:
        """Signs in the order that an operator wants: channels in dimension 1 of an image, or last."""
        if node not in self.signs:
            raise self.refused(self.layer, f"its input {node.name} is packed by no 1-bit layer")
        signs, found = self.signs[node]
        if signs.meta["val"].dim() != 4 or found == image:
            return signs
        return self.call(OPS.qpermute.default, signs, [0, 3, 1, 2] if image else [0, 2, 3, 1], *_SIGN)

    def to_signs(self, full: fx.Node, last: bool = True) -> fx.Node:
        """-128 and 127 at scale 1/254 to -1 and +1."""
        return self.call(OPS.qadd.default, full, full, _FULL, 0, _FULL, 0, *_SIGN, "none", 8, last=last)


def _doubled(e: _Editor, threshold: Tensor, largest: int) -> fx.Node:
    """The bias that makes a doubled sum odd, and positive from the threshold on."""
    return e.constant((1 - 2 * threshold.to(torch.int64).clamp(-largest - 1, largest + 1)).to(torch.int32))


def _weight(e: _Editor, count: int, size: int) -> Tensor:
    """Signs, int8, output channels and then the inputs' dimension first."""
    return unpack_signs(e.own("weight"), count).movedim(-1, 1).contiguous() * size


def _conv(e: _Editor, args: Mapping[str, Any]) -> tuple[fx.Node, bool]:
    x, count = e.operand(args["x"], True), args["channels"] // args["groups"]
    weight = _weight(e, count, 2)
    scale, largest = torch.full((len(weight),), _GAIN * _FULL), weight[0].numel()
    bias = _doubled(e, e.own("threshold"), largest)
    geometry = [args[k] for k in ("stride", "padding", "dilation", "groups")]
    constants = (e.constant(weight), e.constant(scale), bias)
    full = e.call(OPS.qconv2d.default, x, *constants, *_SIGN, _FULL, 0, "none", *geometry, 4, 8)
    return e.to_signs(full), True


def _qconv(e: _Editor, args: Mapping[str, Any]) -> tuple[fx.Node, bool]:
    x, count = e.operand(args["x"], True), args["channels"] // args["groups"]
    ends = [args[k] for k in ("out_scale", "out_zp", "activation", "stride", "padding", "dilation", "groups")]
    constants = (e.constant(_weight(e, count, 1)), args["weight_scale"], args["bias"])
    return e.call(OPS.qconv2d.default, x, *constants, *_SIGN, *ends, 4, args["out_bits"], last=True), False


def _linear(e: _Editor, args: Mapping[str, Any]) -> tuple[fx.Node, bool]:
    x, weight = e.operand(args["x"], False), _weight(e, args["features"], 2)
    constants = (e.constant(weight), e.constant(torch.full((len(weight),), _GAIN * _FULL)))
    bias = _doubled(e, e.own("threshold"), args["features"])
    full = e.call(OPS.qlinear.default, x, *constants, bias, *_SIGN, _FULL, 0, "none", 4, 8)
    return e.to_signs(full), False


def _qlinear(e: _Editor, args: Mapping[str, Any]) -> tuple[fx.Node, bool]:
    x = e.operand(args["x"], False)
    constants = (e.constant(_weight(e, args["features"], 1)), args["weight_scale"], args["bias"])
    ends = (args["out_scale"], args["out_zp"], args["activation"])
    return e.call(OPS.qlinear.default, x, *constants, *_SIGN, *ends, 4, args["out_bits"], last=True), False


def _qmatmul(e: _Editor, args: Mapping[str, Any]) -> tuple[fx.Node, bool]:
    a, b = (e.call(OPS.dequantize.default, e.operand(args[k], False), *_SIGN) for k in ("a", "b"))
    if args["a_unsigned"]:
        a = e.call(_ATEN.mul.Tensor, e.call(_ATEN.add.Tensor, a, 1.0), 0.5)
    rank = b.meta["val"].dim()
    b = e.call(_ATEN.permute.default, b, [*range(rank - 2), rank - 1, rank - 2])
    real = e.call(_ATEN.mul.Tensor, e.call(_ATEN.matmul.default, a, b), args["scale"])
    return e.call(OPS.quantize.default, real, args["out_scale"], args["out_zp"], args["out_bits"], last=True), False


def _binarize(e: _Editor, args: Mapping[str, Any]) -> tuple[fx.Node, bool]:
    x, rank = args["x"], args["x"].meta["val"].dim()
    dim = args["dim"] % rank
    image = rank == 4 and dim == 1
    if x.meta["val"].is_floating_point():
        return _binarize_float(e, x, dim, image), image
    shape, threshold = tuple(x.meta["val"].shape), e.own("threshold").to(torch.int32)
    scale, zero_point = _parameters(e, x)
    channels, others = shape[dim], [d for d in range(rank) if d != dim]
    if not image:
        if math.prod(shape[:dim]) > 1:
            x = e.call(OPS.qpermute.default, x, [dim, *others], scale, zero_point)
        x = e.call(OPS.qreshape.default, x, [1, channels, math.prod(shape) // channels, 1], scale, zero_point)
    weight = torch.full((channels, 1, 1, 1), 2, dtype=torch.int8)
    bias = _doubled(e, threshold.expand(channels) - zero_point, 256)
    constants = (e.constant(weight), e.constant(torch.full((channels,), _GAIN * _FULL / scale)), bias)
    geometry = ([1, 1], [0, 0], [1, 1], channels)
    full = e.call(OPS.qconv2d.default, x, *constants, scale, zero_point, _FULL, 0, "none", *geometry, 8, 8)
    signs = e.to_signs(full)
    if image:
        return signs, True
    # only signs are moved back: litert-torch 0.10 takes a reshape out from under the sum, and the sum's scale with it
    sizes = [shape[d] for d in others]
    if math.prod(sizes) > 1:
        signs = e.call(OPS.qreshape.default, signs, [channels, *sizes], *_SIGN)
        return e.call(OPS.qpermute.default, signs, [*range(1, rank), 0], *_SIGN), False
    return e.call(OPS.qreshape.default, signs, [*sizes, channels], *_SIGN), False


def _binarize_float(e: _Editor, x: fx.Node, dim: int, image: bool) -> fx.Node:
    """Compared in float, then -1 and +1 as integers; in the order of the packed tensor unless it is an image."""
    rank, threshold = x.meta["val"].dim(), e.own("threshold")
    if not image and dim != rank - 1:
        x, dim = e.call(_ATEN.permute.default, x, [*(d for d in range(rank) if d != dim), dim]), rank - 1
    threshold = threshold.reshape([-1 if d == dim else 1 for d in range(rank)])
    compared = e.call(_ATEN.ge.Tensor, x, e.constant(threshold))
    real = e.call(_ATEN.where.self, compared, e.constant(torch.tensor(1.0)), e.constant(torch.tensor(-1.0)))
    return e.call(OPS.quantize.default, real, *_SIGN, 8, last=True)


def _parameters(e: _Editor, x: fx.Node) -> tuple[float, int]:
    """Scale and zero point of an int8 tensor: arguments of the operator that made it."""
    bound: dict[str, Any] = {}
    if str(x.target).startswith("edgekit."):
        names = [a.name for a in x.target._schema.arguments]  # type: ignore[union-attr]
        bound = dict(zip(names, x.args, strict=False))
    scale, zero_point = bound.get("out_scale", bound.get("scale")), bound.get("out_zp", bound.get("zero_point"))
    if scale is None or zero_point is None:
        raise e.refused(e.layer, f"the scale of its input {x.name} is not known")
    return float(scale), int(zero_point)


_RULES: Mapping[str, Callable[[_Editor, Mapping[str, Any]], tuple[fx.Node, bool]]] = {
    "binarize": _binarize,
    "binary_conv2d": _conv,
    "binary_qconv2d": _qconv,
    "binary_linear": _linear,
    "binary_qlinear": _qlinear,
    "binary_qmatmul": _qmatmul,
}
