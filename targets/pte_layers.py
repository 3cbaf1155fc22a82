"""Which operators and tensors of a ``.pte`` file are which layer of a frozen program, and whether they hold the same integers.

Nothing in the file names a layer, so layers are found by dataflow: from the program's inputs on, a layer is the operator of its
kind whose activations are the tensors of the layers before it; among several (query, key and value projections) the one whose
constants fit best. Layout changes, copies and dequantized twins of a tensor count as the same tensor. After a float operator of
the program, whose file form is not known, the search goes on by kind, shape and constants.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgekit.frozen import FrozenProgram, Layer
from edgekit.frozen.dynamic_ops import DYNAMIC_OPS
from edgekit.targets.executorch_binary import KERNELS, NAMESPACE, unpack
from edgekit.targets.pte_file import FileOp, FileTensor, PteFile

__all__ = ["FloatWeight", "Placed", "Placement", "constant_of", "kernel_arguments", "place", "stored_weight"]

_SAME = {
    "Link", "XNNCopy", "aten::clone", "aten::alias_copy", "dim_order_ops::_to_dim_order_copy", "dim_order_ops::_clone_dim_order",
}  # fmt: skip
_PERMUTE = {"XNNStaticTranspose", "aten::permute_copy", "aten::t_copy", "aten::transpose_copy"}
_RESHAPE = {"XNNStaticReshape", "aten::view_copy", "aten::view"}
_PAD = {"XNNStaticConstantPad", "aten::constant_pad_nd"}
_CLAMP = {"XNNClamp", "aten::relu", "aten::hardtanh", "aten::clamp"}
_PRODUCT = {"XNNMultiply", "aten::mul"}
_SIGMOID = {"XNNSigmoid", "aten::sigmoid"}
_HARDSWISH = {"XNNHardswish", "aten::hardswish"}
_CONV = {"XNNConv2d", "XNNDepthwiseConv2d", "aten::convolution"}
_CAT = {"aten::cat", *(f"XNNConcatenate{n}" for n in (2, 3, 4, 5))}
_MAIN: Mapping[str, set[str]] = {
    "qconv2d": _CONV,
    "qlinear": {"XNNFullyConnected", "aten::linear", "aten::addmm", "aten::mm"},
    "dynamic_qlinear": {"XNNFullyConnected"},
    "qadd": {"XNNAdd", "aten::add"},
    "qmul": _PRODUCT,
    "qmean": {"XNNGlobalAvgPooling2d", "aten::mean"},
    "qavg_pool2d": {"XNNAvgPooling2d", "aten::avg_pool2d"},
    "qmax_pool2d": {"XNNMaxPooling2d", "aten::max_pool2d_with_indices", "aten::max_pool2d"},
    "qconcat": _CAT,
    "qpad": _PAD,
    **{name: {f"{NAMESPACE}::{name}"} for name in KERNELS},
}
"""The operator that does the layer's work, by what file formats call it."""

_ABSORBED: Mapping[str, set[str]] = {
    "qslice": {"XNNStaticSlice", "XNNDepthwiseConv2d", "aten::slice_copy", *_PAD, *_RESHAPE},
    "qreshape": _RESHAPE,
    "qpermute": _PERMUTE,
    "relu": _CLAMP,
    "relu6": _CLAMP,
    "sigmoid": _SIGMOID,
    "tanh": {"XNNTanh", "aten::tanh"},
    "hardswish": {*_HARDSWISH, "XNNAdd", "XNNClamp", "XNNMultiply", "XNNDiv", "aten::add", "aten::mul", "aten::div", *_CLAMP},
    "hardsigmoid": {"XNNAdd", "XNNMultiply", "aten::add", "aten::mul", "aten::div", *_CLAMP},
    "gelu": {"XNNGelu", "aten::gelu"},
    "leaky_relu": {"XNNLeakyReLU", "aten::leaky_relu"},
    "elu": {"XNNMultiply", "XNNExp", "XNNAdd", "XNNSubtract", "aten::elu", *_CLAMP},
}  # fmt: skip
"""Operators that a layer without one main operator may consist of, by layer or table function."""


@dataclass(frozen=True)
class Placed:
    """A layer in the file: its operators, and every int8 (or packed) tensor that is its output, in the layouts the file keeps.

    ``source`` are the tensors it reads where they are known. ``found`` is False where the file has no operator for it.
    """

    layer: Layer
    ops: tuple[FileOp, ...]
    values: tuple[int, ...]
    source: frozenset[int] | None
    found: bool = True


Placement = Mapping[str, Placed]


@dataclass(frozen=True)
class FloatWeight:
    """Marks a layer's weight that the file holds in float, which no scale describes."""

    dtype: str


def place(file: PteFile, program: FrozenProgram) -> Placement:
    """Every layer of the program in the file, by name."""
    placer = _Placer(file, program)
    return {layer.name: placer.place(layer) for layer in program.layers}


def constant_of(file: PteFile, number: int, producers: Mapping[int, FileOp]) -> FileTensor | None:
    """The constant behind a tensor: itself, or what a kernel dequantizes or transposes; None for an activation."""
    tensor = file.tensors.get(number)
    if tensor is None or tensor.data is not None:
        return tensor
    op = producers.get(number)
    if op is not None and op.kind == "Link":
        return constant_of(file, op.inputs[0], producers)
    if op is None or op.delegate >= 0:
        return None
    if op.kind.endswith("dequantize_per_channel"):
        weight, scales = (constant_of(file, n, producers) for n in op.inputs[:2])
        if weight is None or scales is None or scales.data is None:
            return None
        at = {"data": weight.at["data"], "scales": scales.at["data"]}
        return FileTensor(weight.dtype, weight.shape, scales=scales.data.reshape(-1), data=weight.data, at=at)
    return constant_of(file, op.inputs[0], producers) if op.kind in _SAME | _PERMUTE and op.inputs else None


def kernel_arguments(op: FileOp) -> dict[str, Any]:
    """Arguments of one of edgekit's own kernels that are no tensors, by name."""
    names = [word.split()[1] for word in KERNELS[op.kind.partition("::")[2]].split(", ")]
    return {n: op.arguments[str(i)] for i, n in enumerate(names) if op.arguments.get(str(i)) is not None}


def stored_weight(op: FileOp, tensor: FileTensor) -> np.ndarray | FloatWeight:
    """A weight's integers in PyTorch's layout (OIHW or (out, in)), from the file's channel-last one; packed signs as they are."""
    if op.kind.startswith(NAMESPACE) and tensor.dtype == "uint8" and tensor.data is not None:
        return unpack(tensor.data, kernel_arguments(op).get("groups", 1))
    if tensor.dtype not in ("int8", "int4") or tensor.data is None:
        return FloatWeight(tensor.dtype)
    if op.kind == "XNNConv2d":
        return tensor.data.transpose(0, 3, 1, 2)
    return tensor.data.transpose(3, 0, 1, 2) if op.kind == "XNNDepthwiseConv2d" else tensor.data


class _Placer:
    """Keeps which file tensors each frozen tensor is (None: unknown) and which operators are taken."""

    def __init__(self, file: PteFile, program: FrozenProgram) -> None:
        self.file, self.program = file, program
        self.users: dict[int, list[int]] = {}
        self.producers: dict[int, FileOp] = {}
        for i, op in enumerate(file.ops):
            for n in op.inputs:
                self.users.setdefault(n, []).append(i)
            self.producers.update(dict.fromkeys(op.outputs, op))
        self.taken: set[int] = set()
        self.roots: set[int] = set()
        names = [n.name for n in program.module.graph.nodes if n.op == "placeholder"]
        self.known: dict[str, list[int]] = {k: self.spread([n]) for k, n in zip(names, file.inputs, strict=False)}
        self.params = {(np.float32(la.out_scale), la.out_zero_point) for la in program.layers if la.out_scale is not None}

    def place(self, layer: Layer) -> Placed:
        sources = [self.known.get(name) for name in layer.inputs]
        pool = None if any(s is None for s in sources) else {n for s in sources for n in s or ()}
        if layer.op == "quantize":
            ops, outs = self.quantize_ops(layer, pool), None
        elif layer.op == "dequantize":
            ops, outs = [], [n for n in pool or () if self.dtype(n) == "float32"]
        elif layer.op in _MAIN:
            ops, outs = self.main(layer, pool), None
        elif layer.op == "qlut" and layer.args["function"] == "silu":
            ops, outs = self.gated(layer, pool), None
        else:
            ops, outs = self.absorb(layer, pool, _ABSORBED[layer.args["function"] if layer.op == "qlut" else layer.op])
        if outs is None:
            outs = self.outputs_of(layer, [n for i in ops for n in self.file.ops[i].outputs] if layer.op == "quantize" else
                                   list(self.file.ops[ops[-1]].outputs) if ops else [])  # fmt: skip
        found = bool(outs)
        self.taken.update(ops)
        if found:
            self.known[layer.name] = outs
        kind = "float32" if layer.op in DYNAMIC_OPS else "uint8" if layer.packed else "int8"
        values = tuple(n for n in outs if self.dtype(n) == kind)
        source = None if pool is None else frozenset(pool)
        return Placed(layer, tuple(self.file.ops[i] for i in ops), values, source, found)

    def dtype(self, number: int) -> str:
        return self.file.tensors[number].dtype

    def is_quantize(self, op: FileOp) -> bool:
        if op.kind == "XNNConvert":
            return self.dtype(op.outputs[0]) == "int8" and self.dtype(op.inputs[0]) == "float32"
        return op.kind.endswith("::quantize_per_tensor")

    def is_same(self, op: FileOp) -> bool:
        """An operator whose output is its input in another layout or, dequantized, in another type."""
        if op.kind == "XNNConvert":
            return self.dtype(op.outputs[0]) == "float32" and self.dtype(op.inputs[0]) == "int8"
        if op.kind == "XNNStaticTranspose":
            return not op.arguments["in_program"]
        return op.kind in _SAME or op.kind.endswith("::dequantize_per_tensor")

    def spread(self, numbers: Iterable[int]) -> list[int]:
        """These tensors and all their layouts and dequantized twins, in order of execution."""
        found = list(dict.fromkeys(numbers))
        for n in found:
            for i in self.users.get(n, ()):
                if self.is_same(self.file.ops[i]):
                    found += [o for o in self.file.ops[i].outputs if o not in found]
        return found

    def activations(self, op: FileOp) -> list[int]:
        return [n for n in op.inputs if constant_of(self.file, n, self.producers) is None]

    def candidates(self, kinds: set[str], pool: set[int] | None) -> list[int]:
        """Free operators of these kinds that read only tensors of the pool (any tensors where it is unknown)."""
        found = []
        for i, op in enumerate(self.file.ops):
            if op.kind in kinds and i not in self.taken:
                reads = self.activations(op)
                if pool is None or (reads and all(n in pool or self.behind_reshape(n) in pool for n in reads)):
                    found.append(i)
        return found

    def behind_reshape(self, number: int) -> int:
        """The portable linear flattens its input first: look through that."""
        op = self.producers.get(number)
        return self.behind_reshape(op.inputs[0]) if op and op.delegate < 0 and op.kind in _RESHAPE else number

    def outputs_of(self, layer: Layer, outputs: Sequence[int]) -> list[int]:
        """From an operator's outputs to all int8 forms of the layer's output: through its clamp and its quantize."""
        found = self.spread(outputs)
        if not outputs or layer.out_scale is None:
            return found
        while all(self.dtype(n) != "int8" for n in found):
            following = [i for n in found for i in self.users.get(n, ())]
            quantize = [i for i in following if self.is_quantize(self.file.ops[i])]
            clamp = [i for i in following if self.file.ops[i].kind in _CLAMP | _RESHAPE]
            step = quantize or clamp[:1]
            if not step:
                return found
            self.taken.update(step)
            found = self.spread(n for i in step for n in self.file.ops[i].outputs)
        return found

    def fits(self, layer: Layer, numbers: Sequence[int]) -> tuple[bool, bool]:
        """(shape is wrong, scale or zero point is wrong) of a layer's supposed outputs; sorts the best first."""
        values = [self.file.tensors[n] for n in numbers]
        shape = any(sorted(v.shape) == sorted(layer.shape) for v in values)
        return not shape, not any(_params(v) == _wanted(layer) for v in values)

    def quantize_ops(self, layer: Layer, pool: set[int] | None) -> list[int]:
        """All quantize operators of that source and scale; else the free one whose scale is no other layer's.

        Where the source is a float operator of the program, it is the one of the file, not yet found, whose quantized values feed
        the weights that this layer feeds; it is remembered by its name, so that other layers that read it find it.
        """
        found = [i for i, op in enumerate(self.file.ops) if self.is_quantize(op) and (pool is None or op.inputs[0] in pool)]
        found = [i for i in found if not self.fits(layer, self.file.ops[i].outputs)[0]]
        exact = [i for i in found if not self.fits(layer, self.file.ops[i].outputs)[1]]
        if pool is None and exact:
            groups: dict[int, list[int]] = {}
            for i in exact:
                groups.setdefault(self.root(self.file.ops[i].inputs[0]), []).append(i)
            free = [r for r in groups if r not in self.roots] or list(groups)
            best = min(free, key=lambda r: (self.misfit_of_users(layer, groups[r]), groups[r][0]))
            self.roots.add(best)
            self.known[layer.inputs[0]] = self.spread([best])
            return groups[best]
        if exact:
            return exact
        odd = [i for i in found if i not in self.taken]
        odd.sort(key=lambda i: (_params(self.file.tensors[self.file.ops[i].outputs[0]]) in self.params, i))
        return odd[:1]

    def root(self, number: int) -> int:
        """The tensor that an operator computed, before any copies and changes of layout."""
        op = self.producers.get(number)
        return self.root(op.inputs[0]) if op is not None and self.is_same(op) else number

    def misfit_of_users(self, layer: Layer, quantize: Sequence[int]) -> int:
        """Differing weights of the best operators behind these quantize operators, over the layers that read this layer."""
        values = set(self.spread(n for i in quantize for n in self.file.ops[i].outputs))
        users = [la for la in self.program.layers if "weight" in la.args and layer.name in la.inputs]
        return sum(
            min((self.misfit(la, self.file.ops[i])[1] for i in self.candidates(_MAIN[la.op], values)), default=1 << 30)
            for la in users
        )

    def main(self, layer: Layer, pool: set[int] | None) -> list[int]:
        ops: list[int] = []
        if layer.op in DYNAMIC_OPS and pool is not None:  # behind what quantizes the rows
            pool = pool | {o for op in self.file.ops if op.kind == "XNNConvert" and op.inputs[0] in pool for o in op.outputs}
        if layer.op == "qavg_pool2d" and any(layer.args["padding"]):
            ops, pool = self.extend(layer, pool, _PAD, ops)
        if layer.op == "qconcat" and pool is not None:
            requantized = [
                i for i, op in enumerate(self.file.ops) if self.is_quantize(op) and op.inputs[0] in pool and self.joined(op)
            ]
            ops, pool = requantized, pool | set(self.spread(n for i in requantized for n in self.file.ops[i].outputs))
        while True:
            found = self.candidates(_MAIN[layer.op], pool)
            if not found:
                return ops if layer.op == "qconcat" and ops and self.file.ops[ops[-1]].kind in _CAT else []
            best = min(found, key=lambda i: (*self.misfit(layer, self.file.ops[i]), i))
            ops.append(best)
            outs = self.outputs_of(layer, self.file.ops[best].outputs)
            shape_wrong = self.fits(layer, outs)[0]
            if layer.op == "qconcat" and shape_wrong and pool is not None and best not in self.taken:
                self.taken.add(best)
                pool = pool | set(outs)
                continue
            break
        if layer.args.get("activation", "none") != "none" and "output_min" not in self.file.ops[best].arguments:
            ops, _ = self.extend(layer, set(outs), _CLAMP, ops)
        return ops

    def joined(self, op: FileOp) -> bool:
        return any(self.file.ops[i].kind in _CAT for n in self.spread(op.outputs) for i in self.users.get(n, ()))

    def extend(self, layer: Layer, pool: set[int] | None, kinds: set[str], ops: list[int]) -> tuple[list[int], set[int] | None]:
        found = self.candidates(kinds, pool) if pool is not None else []
        if not found:
            return ops, pool
        return [*ops, found[0]], set(self.outputs_of(layer, self.file.ops[found[0]].outputs))

    def misfit(self, layer: Layer, op: FileOp) -> tuple[bool, int, bool]:
        """How badly an operator fits a layer: shape, number of differing weights, scale of the output."""
        shape, params = self.fits(layer, self.outputs_peek(layer, op))
        wanted = layer.args.get("weight")
        if wanted is None:
            return shape, 0, params
        for n in op.inputs:
            tensor = constant_of(self.file, n, self.producers)
            if tensor is not None and len(tensor.shape) > 1:
                weight = stored_weight(op, tensor)
                if isinstance(weight, FloatWeight):
                    return shape, int(wanted.numel() + (sorted(tensor.shape) != sorted(wanted.shape))), params
                if weight.shape == tuple(wanted.shape):
                    return shape, int((weight != wanted.numpy()).sum()), params
        return True, wanted.numel() + 2, params

    def outputs_peek(self, layer: Layer, op: FileOp) -> list[int]:
        before = set(self.taken)
        outs = self.outputs_of(layer, op.outputs)
        self.taken = before
        return outs

    def absorb(self, layer: Layer, pool: set[int] | None, kinds: set[str]) -> tuple[list[int], list[int]]:
        """Follow operators of the given kinds from the layer's input until its output's type and shape are there.

        A layer that only moves integers may have no operator at all (a reshape that moves no bytes, a permute and its inverse).
        """
        if pool is None:
            return [], []
        ops: list[int] = []
        outs, reached, moves = sorted(pool), set(pool), layer.op != "qlut"
        while not (self.done(layer, outs) and (ops or layer.op == "qslice")):
            found = [i for i in self.candidates(kinds, reached) if i not in ops]
            if layer.op in ("qreshape", "qpermute"):
                found = [i for i in found if not self.fits(layer, self.spread(self.file.ops[i].outputs))[0]]
            elif not moves:
                found.sort(key=lambda i: self.unlike(layer, i))
            if not found:
                break
            ops.append(found[0])
            outs = self.spread(self.file.ops[found[0]].outputs)
            quantize = [i for n in outs for i in self.users.get(n, ()) if self.is_quantize(self.file.ops[i])]
            if all(self.dtype(n) == "float32" for n in outs) and quantize:
                outs = self.spread(n for i in quantize for n in self.file.ops[i].outputs)
            reached |= set(outs)
        return ops, outs if ops or moves else []

    def gated(self, layer: Layer, pool: set[int] | None) -> list[int]:
        """A sigmoid of the layer's input and the product of the two, both in float or both in int8."""
        found: list[list[int]] = []
        for i in self.candidates(_SIGMOID, pool) if pool is not None else ():
            gate = set(self.spread(self.file.ops[i].outputs))
            found += [[i, j] for j in self.candidates(_PRODUCT, (pool or set()) | gate) if gate & {*self.file.ops[j].inputs}]
        return min(found, key=lambda pair: (self.fits(layer, self.outputs_peek(layer, self.file.ops[pair[1]])), pair), default=[])

    def unlike(self, layer: Layer, number: int) -> tuple[bool, bool, tuple[bool, bool], int]:
        """Sorts first what a table function's next operator looks like: in float where the function takes several."""
        outputs, other = self.file.ops[number].outputs, self.file.ops[number].kind not in _HARDSWISH
        is_int8 = any(self.dtype(n) == "int8" for n in outputs)
        several = layer.args["function"] in ("hardswish", "hardsigmoid", "elu")
        return other, several and is_int8, self.fits(layer, self.outputs_peek(layer, self.file.ops[number])), number

    def done(self, layer: Layer, outs: Sequence[int]) -> bool:
        values = [self.file.tensors[n] for n in outs if self.dtype(n) == "int8"]
        return any(sorted(v.shape) == sorted(layer.shape) for v in values)


def _params(tensor: FileTensor) -> tuple[np.float32, int | None]:
    return np.float32(tensor.scale or 0.0), tensor.zero_point


def _wanted(layer: Layer) -> tuple[np.float32, int | None]:
    return np.float32(layer.out_scale or 0.0), layer.out_zero_point
