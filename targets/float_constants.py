"""Float numbers of a file against the frozen program's: weights of layers left in float, tables, masks, parameters.

Converters keep float numbers bit for bit but lay them out in their own way. A constant counts as kept when the file holds exactly
its float32 numbers

* in any order of its axes and any shape (OIHW as OHWI, a bias as a row), once or several times (an unrolled LSTM);
* after operators of the program that read nothing but constants (a slice of a table of positions), computed here;
* in blocks of a recurrent layer's gates (ONNX orders them otherwise), its two biases also as their sum;
* times a number that the program, or an attention's scale, multiplies or divides by;
* with the lowest float32 for -inf, which a softmax does not tell apart (attention masks);
* as one number where all are equal, not at all where all are 1 or all 0 (nothing is multiplied or added then).

Where a neighbouring operator has constants too, converters may merge the two (a normalization's scale into a weight); such
numbers cannot be compared one by one and are named in a note. Everything else that is not found is a mismatch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from edgekit.artifact import Mismatch
from edgekit.frozen import FrozenProgram

__all__ = ["Stored", "compare_floats"]

Array = NDArray[np.float32]

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
_ARITHMETIC = {"add", "sub", "rsub", "mul", "div", "batch_norm", "native_batch_norm_legit_no_training", "addmm", "addcmul"}
_LAYOUT = {"reshape", "view", "permute", "transpose", "unsqueeze", "squeeze", "expand", "contiguous", "clone", "flatten", "t"}
_LOWEST = np.finfo(np.float32).min
_ROUNDED = 0.01
"""Numbers all within this ratio of the expected ones are taken for a rounded copy, not for other numbers."""


@dataclass(frozen=True)
class Stored:
    """A float constant of a file: its numbers, and what the file says about whose it is (fx node, constant; "" if nothing)."""

    hint: str
    values: Array


@dataclass(frozen=True)
class _Wanted:
    """A constant as some operator reads it: ``name`` of the layer, ``field``, ``hints`` for :attr:`Stored.hint`, its numbers, the
    raw constants it comes from (equally good), and how many gate blocks it may be taken apart into (0: none)."""

    name: str
    field: str
    hints: frozenset[str]
    values: Array
    raw: tuple[Array, ...]
    blocks: int
    mergeable: bool
    required: bool = True


def compare_floats(program: FrozenProgram, stored: Sequence[Stored]) -> tuple[list[Mismatch], list[str]]:
    """Mismatches in the program's order, and notes on numbers that a converter merged with others.

    Args:
        stored: every float constant of the file that is no scale of an integer layer.
    """
    wanted, factors = _wanted(program), _factors(program)
    stored = [Stored(s.hint, np.maximum(s.values, _LOWEST)) for s in stored]
    explained: set[int] = set()
    missing: list[_Wanted] = []
    for w in wanted:
        hits = [i for i, s in enumerate(stored) if _holds(s.values, w, factors)]
        explained.update(hits)
        if not hits and w.required and not _raw_found(w, stored):
            missing.append(w)
    found: list[Mismatch] = []
    notes: list[str] = []
    left = [s for i, s in enumerate(stored) if i not in explained]
    for w in missing:
        near = next((m for s in _by_hint(left, w) if (m := _near(s.values, w)) is not None), None)
        if near is not None:
            found.append(near)
        elif w.mergeable:
            notes.append(f"{w.name}: its {w.field} was merged with a neighbour's constants; checked by running only")
        else:
            found.append(Mismatch(w.name, w.field, "missing", f"{w.values.size} float32 numbers"))
    named = {m.layer for m in found}
    for s in left:  # a second copy that differs
        near = next((m for w in _by_name(wanted, s) if (m := _near(s.values, w)) is not None), None)
        if near is not None and near.layer not in named:
            found.append(near)
            named.add(near.layer)
    return found, notes


def _wanted(program: FrozenProgram) -> list[_Wanted]:
    """Constants at the border between what depends on constants alone and the rest, by the layer that reads them."""
    module, names = program.module, {x.node: x for x in program.float_layers}
    known: dict[fx.Node, Any] = {}
    raw: dict[fx.Node, frozenset[str]] = {}
    found: list[_Wanted] = []
    for node in module.graph.nodes:
        if node.op == "get_attr":
            known[node], raw[node] = _attribute(module, str(node.target)), frozenset([str(node.target)])
        if node.op != "call_function" or str(node.target).startswith("edgekit."):
            continue
        if node.all_input_nodes and all(n in known for n in node.all_input_nodes):
            args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
            with torch.no_grad():
                known[node] = node.target(*args, **kwargs)
            raw[node] = frozenset().union(*(raw[n] for n in node.all_input_nodes))
            continue
        if node.name in names:
            found += _read_by(node, names[node.name], known, raw, module)
    return found


def _read_by(
    node: fx.Node, layer: Any, known: dict[fx.Node, Any], raw: dict[fx.Node, frozenset[str]], module: Any
) -> Iterator[_Wanted]:
    gates, mergeable = _GATES.get(layer.op, 0), _mergeable(node)
    read = [n for n in node.all_input_nodes if isinstance(known.get(n), Tensor) and known[n].is_floating_point()]
    for n in read:
        field = sorted(raw[n])[0].removeprefix("constant_") if raw[n] else n.name
        flat = layer.name.replace(".", "_")
        field = field.removeprefix(f"{layer.name}.").removeprefix(f"{flat}_") or field
        sources = tuple(_array(_attribute(module, name)) for name in sorted(raw[n]))
        hints = frozenset({node.name, n.name, *raw[n]})
        values = _array(known[n])
        idle = values.size > 0 and values.flat[0] in (0.0, 1.0) and bool((values == values.flat[0]).all())
        yield _Wanted(layer.name, field, hints, values, sources, gates, mergeable, required=not idle)
    biases = [known[n] for n in read if known[n].dim() == 1] if gates else []
    for first, second in zip(biases[::2], biases[1::2], strict=False):
        hints = frozenset({node.name})
        yield _Wanted(layer.name, "sum of biases", hints, _array(first + second), (), 0, True, required=False)


def _mergeable(node: fx.Node) -> bool:
    """Whether the operator before or after (layout changes skipped) has constants too, which a converter may merge with these."""

    def op(n: fx.Node) -> str:
        return str(n.target).removeprefix("aten.").split(".")[0].strip("_")

    def constant(n: fx.Node) -> bool:
        scalars = op(n) in _ARITHMETIC and any(isinstance(a, int | float) for a in n.args[:2])
        ours = n.op == "call_function" and not str(n.target).startswith("edgekit.")
        return ours and (scalars or any(m.op == "get_attr" for m in n.all_input_nodes))

    def beyond(n: fx.Node, step: Any) -> list[fx.Node]:
        return [x for m in step(n) for x in (beyond(m, step) if m.op == "call_function" and op(m) in _LAYOUT else [m])]

    around = [*beyond(node, lambda n: list(n.users)), *beyond(node, lambda n: n.all_input_nodes)]
    return op(node) in ("batch_norm", "native_batch_norm_legit_no_training") or any(constant(n) for n in around)


def _factors(program: FrozenProgram) -> list[np.float32]:
    """Numbers that the program multiplies or divides by, and their reciprocals."""
    found: dict[float, None] = {}
    for node in program.module.graph.nodes:
        if str(node.target).startswith(("aten.mul.", "aten.div.")):
            found |= {float(a): None for a in node.args if isinstance(a, int | float) and not isinstance(a, bool) and a}
        if str(node.target).startswith("aten.scaled_dot_product_attention."):  # on the product, or its root on both factors
            scale = node.kwargs.get("scale") or node.args[0].meta["val"].shape[-1] ** -0.5
            found |= {float(scale): None, float(scale) ** 0.5: None}
    return [np.float32(f) for x in found for f in (x, 1.0 / x)]


def _holds(stored: Array, w: _Wanted, factors: Sequence[np.float32]) -> bool:
    """The stored constant is this one in one of the forms that count as kept."""
    if stored.size == 1 and w.values.size and bool((w.values == stored.reshape(())).all()):
        return True  # all numbers are equal and stand as one
    if stored.size == w.values.size and (
        _permuted(stored, w.values) or any(_permuted(stored, w.values * factor) for factor in factors)
    ):
        return True
    if not w.blocks or not w.values.size:
        return False
    blocks = w.values.reshape(w.blocks, -1)
    rows = stored.reshape(-1, blocks.shape[1]) if stored.size % blocks.shape[1] == 0 else np.zeros((0, 1), np.float32)
    return len(rows) >= w.blocks and all((rows == block).all(1).any() for block in blocks)


def _permuted(stored: Array, wanted: Array) -> bool:
    """Equal numbers in some order of the wanted one's axes, whatever the stored shape."""
    if stored.size != wanted.size:
        return False
    flat = stored.reshape(-1)
    return any(np.array_equal(wanted.transpose(order).reshape(-1), flat) for order in _orders(wanted))


def _orders(array: Array) -> Iterator[tuple[int, ...]]:
    return itertools.permutations(range(array.ndim))


def _raw_found(w: _Wanted, stored: Sequence[Stored]) -> bool:
    """The constants that it is computed from are all in the file (whose operators then compute it)."""
    return bool(w.raw) and all(any(_permuted(s.values, r) for s in stored) for r in w.raw)


def _near(stored: Array, w: _Wanted) -> Mismatch | None:
    """The difference, where the stored numbers are this constant with some altered: half of them equal, or all almost."""
    best: tuple[int, Array] | None = None
    for wanted in (w.values, *w.raw):
        if stored.size != wanted.size or stored.size < 2:
            continue
        for order in _orders(wanted):
            given = _back(stored, wanted, order)
            equal = int((given == wanted).sum())
            close = bool(np.isclose(given, wanted, rtol=_ROUNDED, atol=0).all())
            if (2 * equal >= stored.size or close) and equal < stored.size and (best is None or equal > best[0]):
                best = equal, given
                kept = wanted
    if best is None:
        return _near_block(stored, w)
    wrong = np.argwhere(best[1] != kept)
    at = tuple(int(i) for i in wrong[0])
    place = f"{w.field}[{', '.join(map(str, at))}]"
    return Mismatch(w.name, place, f"{best[1][at]:.9g} ({len(wrong)} of {kept.size} differ)", f"{kept[at]:.9g}")


def _back(stored: Array, wanted: Array, order: tuple[int, ...]) -> Array:
    """The stored numbers in the wanted layout, if they were laid out in that order of axes."""
    shape = tuple(wanted.shape[i] for i in order)
    result: Array = stored.reshape(shape).transpose(np.argsort(order)) if order else stored.reshape(wanted.shape)
    return result


def _near_block(stored: Array, w: _Wanted) -> Mismatch | None:
    """A recurrent layer's gate blocks in a larger constant, one of them altered."""
    if not w.blocks or not w.values.size or stored.size % (w.values.size // w.blocks):
        return None
    blocks = w.values.reshape(w.blocks, -1)
    rows = stored.reshape(-1, blocks.shape[1])
    for number, block in enumerate(blocks):
        equal = (rows == block).sum(1)
        best = int(equal.argmax())
        if 2 * equal[best] >= block.size and equal[best] < block.size:
            at = int(np.argwhere(rows[best] != block)[0][0])
            return Mismatch(w.name, f"{w.field}, gate {number}, number {at}", f"{rows[best][at]:.9g}", f"{block[at]:.9g}")
    return None


def _by_hint(stored: Sequence[Stored], w: _Wanted) -> list[Stored]:
    return sorted(stored, key=lambda s: s.hint not in w.hints)


def _by_name(wanted: Sequence[_Wanted], s: Stored) -> list[_Wanted]:
    return sorted(wanted, key=lambda w: s.hint not in w.hints)


def _array(value: Any) -> Array:
    return np.ascontiguousarray(np.maximum(value.detach().float().numpy(), _LOWEST))


def _attribute(module: Any, name: str) -> Any:
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part)
    return value
