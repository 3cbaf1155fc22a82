"""What an operator costs on a target, modelled: tables measured by ``benchmarks/costs.py``, shipped in ``edgekit/cost_tables``.

A table holds, for each kind of operator and each number of weight bits, how its cost depends on its shape: a sum of a few terms
(:func:`terms`) with coefficients of zero or more, fitted to operators that were run alone. Host tables are microseconds on the
machine that the table names; Cortex-M tables are executed instructions, which no machine changes. A figure from here is a
prediction and must be called so.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from edgekit.errors import FormatError, InputError

__all__ = [
    "FLOAT",
    "STORED",
    "TABLES",
    "WEIGHTED",
    "Table",
    "Work",
    "size_terms",
    "stored_bits",
    "table",
    "targets",
    "terms",
    "weight_bytes",
]

FLOAT = 32
"""Bits of what is computed in float."""

TABLES = Path(__file__).parent / "cost_tables"

WEIGHTED = ("conv", "pointwise", "depthwise", "linear")
"""Kinds with weights: convolutions of several taps, of one tap, of one input channel each, and matrix products."""

_PACKS = {4: WEIGHTED, 2: WEIGHTED}
_DYNAMIC = ("dynamic_qlinear", "weight_only_linear")
STORED: Mapping[str, Mapping[int, Sequence[str]]] = {
    "executorch": {4: ("linear", "dynamic_qlinear")},
    "tflite": {4: (*WEIGHTED, *_DYNAMIC), 2: ("linear", *_DYNAMIC)},
    "onnx": _PACKS,
    **{f"cortex-m{n}": _PACKS for n in (0, 3, 4, 7, 33, 55)},
}
"""Target to the kinds whose weights it stores in so few bits; all others are stored in the next wider form, int8 at last."""

_UNPACKS = ("onnx",)
"""Targets that unpack few-bit weights when they load a file, and then compute as with int8."""


@dataclass(frozen=True)
class Work:
    """One operator on one sample, as far as its cost depends on it.

    Attributes:
        kind: one of :data:`WEIGHTED`, or an operator's name such as "qadd" or "softmax".
        bits: of its weights (8 if it has none); :data:`FLOAT` for a float operator.
        outputs, inputs: numbers written, and activations read.
        channels: of the output (features of a linear layer); 0 without weights.
        depth: products for one output value.
        taps: kernel height times width.
    """

    kind: str
    bits: int
    outputs: int
    inputs: int = 0
    channels: int = 0
    depth: int = 0
    taps: int = 1

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        return self.outputs * self.depth

    @property
    def weights(self) -> int:
        """Stored weights, without biases."""
        return self.channels * self.depth


def terms(work: Work, tile: tuple[int, int] = (1, 1)) -> tuple[float, ...]:
    """What the cost is a weighted sum of: a call, output positions, outputs, operands read, products, weights; without weights a
    call, inputs, outputs, products.

    Args:
        tile: output and input channels that a kernel computes at a time; products are counted for whole tiles.
    """
    if work.kind not in WEIGHTED:
        return (1.0, float(work.inputs), float(work.outputs), float(work.macs))
    positions = work.outputs / max(work.channels, 1)
    columns = _up(work.channels, tile[0])
    depth = work.depth if work.kind == "depthwise" else work.taps * _up(work.depth // work.taps, tile[1])
    return (
        1.0,
        positions,
        positions * columns,
        positions * work.depth,
        positions * columns * depth,
        float(work.weights),
    )


def _up(n: int, step: int) -> int:
    return -(-n // step) * step


def size_terms(works: Sequence[Work], target: str) -> tuple[float, ...]:
    """What a file's bytes beyond its weights are a weighted sum of: a file; a layer with integer weights, one with float weights,
    another operator; an output channel of the first two (bias, scale, zero point).
    """
    weighted = [w for w in works if w.channels]
    integer = [w for w in weighted if w.bits != FLOAT]
    floats = [w for w in weighted if w.bits == FLOAT]
    layers = (len(integer), len(floats), len(works) - len(weighted))
    return (1.0, *map(float, layers), float(sum(w.channels for w in integer)), float(sum(w.channels for w in floats)))


def weight_bytes(work: Work, target: str) -> float:
    """Bytes of the weights as the target stores them."""
    return work.weights * stored_bits(target, work.kind, work.bits) / 8


def stored_bits(target: str, kind: str, bits: int) -> int:
    """Bits in which a target stores such weights: ``stored_bits("executorch", "conv", 4) == 8``."""
    if bits >= 8:
        return bits
    packs = STORED.get(target, {})
    return min((b for b in packs if b >= bits and kind in packs[b]), default=8)


@dataclass(frozen=True)
class Table:
    """The costs of one target on one machine.

    Attributes:
        target: its name.
        unit: "microseconds" or "instructions".
        machine: where it was measured, in words.
        method: how, in words.
        call: cost of a call that computes nothing.
        kinds: "kind/bits" to the tile and the coefficients of :func:`terms`.
        size: coefficients of :func:`size_terms`.
        nets: whole networks that the table was not made from: each with ``predicted`` and ``measured``.
    """

    target: str
    unit: str
    machine: str
    method: str
    call: float
    kinds: Mapping[str, tuple[tuple[int, int], tuple[float, ...]]]
    size: tuple[float, ...] = ()
    nets: tuple[Mapping[str, Any], ...] = field(default=())

    def cost(self, work: Work) -> float | None:
        """In ``unit``; None for a kind that was not measured."""
        found = self.kinds.get(f"{work.kind}/{self._computed(work)}")
        if found is None:
            return None
        tile, coefficients = found
        return float(sum(c * t for c, t in zip(coefficients, terms(work, tile), strict=True)))

    def _computed(self, work: Work) -> int:
        return 8 if self.target in _UNPACKS and work.bits < 8 else stored_bits(self.target, work.kind, work.bits)

    def total(self, works: Sequence[Work]) -> tuple[float, list[Work]]:
        """The cost of a whole program, and the works that no row of the table is for, which it leaves out."""
        costs = [(w, self.cost(w)) for w in works]
        return self.call + sum(c for _, c in costs if c is not None), [w for w, c in costs if c is None]

    def bytes(self, works: Sequence[Work]) -> float:
        """The size of a file with these operators."""
        rest = sum(c * t for c, t in zip(self.size, size_terms(works, self.target), strict=True))
        return rest + sum(weight_bytes(w, self.target) for w in works)

    @property
    def error(self) -> float | None:
        """Median relative error on the networks that it was not made from; None without any."""
        found = sorted(abs(n["predicted"] / n["measured"] - 1) for n in self.nets)
        if not found:
            return None
        middle = len(found) // 2
        return float(found[middle] if len(found) % 2 else (found[middle - 1] + found[middle]) / 2)

    @property
    def largest_error(self) -> float | None:
        """The largest relative error on them."""
        return max((float(abs(n["predicted"] / n["measured"] - 1)) for n in self.nets), default=None)


def targets() -> tuple[str, ...]:
    """Targets with a table."""
    return tuple(sorted(p.stem for p in TABLES.glob("*.json")))


@lru_cache
def table(target: str, folder: Path = TABLES) -> Table:
    """The table of a target.

    Args:
        folder: where tables lie; one of your own machine, made by ``benchmarks/costs.py --out``, is read by giving its folder.

    Raises:
        InputError: there is none.
        FormatError: it is damaged.
    """
    path = Path(folder) / f"{target}.json"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in Path(folder).glob("*.json"))) or "none"
        raise InputError(f"target {target!r} has no table of costs in {folder}; there is one for: {known}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        kinds = {k: ((int(v["tile"][0]), int(v["tile"][1])), tuple(map(float, v["terms"]))) for k, v in value["kinds"].items()}
        found = Table(
            value["target"], value["unit"], value["machine"], value["method"], float(value["call"]), kinds,
            tuple(map(float, value["size"])), tuple(value["nets"]),
        )  # fmt: skip
        if not all(math.isfinite(c) and c >= 0 for _, cs in kinds.values() for c in cs):
            raise ValueError("a coefficient is negative or not finite")
        return found
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise FormatError(f"{path}: damaged ({error}); make it again by benchmarks/costs.py") from error
