"""``edgekit predict``: will a recipe's files be smaller and faster? Said before compressing, from tables of measured operators.

The recipe's blocks are applied in their cheapest form (rounding to nearest, few samples, no training), which gives the
same layers, shapes and bits; :mod:`edgekit.costs` says what those cost on each target. Nothing is converted or run:
every figure is modelled.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit import costs, recipe, source
from edgekit.errors import InputError
from edgekit.recipe import Block, Recipe

if TYPE_CHECKING:
    from torch import nn

    from edgekit.costs import Table, Work
    from edgekit.data import Data

__all__ = ["HEADS", "Prediction", "Predictions", "Row", "predict", "remarks", "rows"]

HEADS = ("target", "files of", "bytes", "of float %", "cost", "unit", "times as fast as float", "as int8", "error of model %")
"""Columns of the table."""

_SAMPLES = 16
_MOST = 0.05
"""Share of the multiply-accumulates that a table may have no row for."""
_SAME = 0.97
"""A share of the cost above this is no gain."""


@dataclass(frozen=True)
class Row:
    """One form of the model on one target: ``form`` is "float", "int8" or "recipe"; all figures are modelled.

    ``left_out``: kinds of operators that the table has no row for, which the cost leaves out, and ``left_out_macs``, their share
    of the multiply-accumulates; where that is more than a twentieth there is no cost.
    """

    form: str
    bytes: int
    cost: float | None
    left_out: tuple[str, ...] = ()
    left_out_macs: float = 0.0


@dataclass(frozen=True)
class Prediction:
    """What is expected of one target.

    Attributes:
        unit: of costs, "microseconds" or "instructions".
        machine: where the table was measured.
        error, largest_error: of the table on whole networks that it was not made from; None: unknown.
        rows: the recipe's form last; before it int8 and float where they are other forms and the target has them.
        warnings: where fewer bits buy nothing.
    """

    target: str
    unit: str
    machine: str
    error: float | None
    largest_error: float | None
    rows: tuple[Row, ...]
    warnings: tuple[str, ...] = ()

    def row(self, form: str) -> Row | None:
        """The row of a form."""
        return next((r for r in self.rows if r.form == form), None)

    def ratio(self, form: str, to: str, what: str = "cost") -> float | None:
        """Cost (or "bytes") of a form over that of another; None without it, or if it is nothing."""
        mine, other = self.row(form), self.row(to)
        if mine is None or other is None or getattr(mine, what) is None or not getattr(other, what):
            return None
        return float(getattr(mine, what) / getattr(other, what))


@dataclass(frozen=True)
class Predictions:
    """One entry for each target, and what was not taken into account."""

    targets: tuple[Prediction, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def predict(
    path: Path, *, targets: Sequence[str] | None = None, seed: int | None = None, tables: Path | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Predictions:  # fmt: skip
    """The predicted size and cost of a recipe's files.

    Args:
        path: a recipe, or a run folder (its recipe is taken).
        targets: those to predict; the recipe's, or all with a table if it names none.
        tables: folder of tables of another machine, made by ``benchmarks/costs.py --device ... --out FOLDER``.

    Raises:
        InputError: no target with a table.
        EdgekitError: as the stages load and compress.
    """
    path, folder = Path(path), Path(tables) if tables else costs.TABLES
    settings = recipe.load(path / "recipe.yaml", files=False) if path.is_dir() else recipe.load(path)
    if seed is not None:
        settings = recipe.replace(settings, seed=seed)
    known = tuple(sorted(p.stem for p in folder.glob("*.json")))
    wanted = list(targets or [t.name for t in settings.targets] or known)
    if not (found := [t for t in wanted if t in known]):
        raise InputError(f"predict: no table of costs for {', '.join(wanted)}; there is one for: {', '.join(known) or 'none'}")
    model, data = source.load_model(settings.model, settings.seed), source.load_data(settings.data, settings.seed)
    forms = _forms(settings, model, data, progress)
    notes = [f"No table of costs for {t}." for t in wanted if t not in known]
    notes += [f"{kind} is left out: it changes no shape." for kind in {b.kind for b in settings.compress} & {"repair"}]
    return Predictions(tuple(_predicted(costs.table(t, folder), forms) for t in found), tuple(notes))


def _forms(
    settings: Recipe, model: nn.Module, data: Data, progress: Callable[[str, int, int], None] | None
) -> dict[str, list[Work]]:
    """The operators of each form; "int8" only where the recipe has another."""
    from edgekit.compress.ptq.settings import PTQ, Quantization
    from edgekit.compress.rewrite import Rewrite
    from edgekit.compress.steps import apply
    from edgekit.frozen.work import works

    quick = [_quick(b) for b in settings.compress if b.kind != "repair"]
    blocks = {"float": [Block("rewrite", Rewrite(fuse=False))]}
    if any(isinstance(b.settings, Quantization) for b in quick):
        blocks["int8"] = [Block("ptq", PTQ(samples=_SAMPLES, observer="minmax"))]
    blocks["recipe"] = quick
    found: dict[str, list[Work]] = {}
    for i, (form, how) in enumerate(blocks.items()):
        found[form] = [w for _, w in works(apply(model, how, data, name=settings.name).program)]
        if progress:
            progress("predict", i + 1, len(blocks))
    if found.get("int8") == found["recipe"]:
        del found["int8"]
    return found


def _quick(block: Block) -> Block:
    """A block that makes the same shapes and bits, cheaply."""
    from edgekit.compress.ptq.settings import PTQ, Quantization

    how = block.settings
    if not isinstance(how, Quantization):
        return block
    shared = {f.name: getattr(how, f.name) for f in dataclasses.fields(Quantization)}
    shared |= {"samples": min(how.samples, _SAMPLES), "observer": "minmax", "weight_scale": "max"}
    return Block("ptq", PTQ(**shared, mixed=how.mixed if isinstance(how, PTQ) else None))


def _predicted(table: Table, forms: dict[str, list[Work]]) -> Prediction:
    found = []
    for form, works in forms.items():
        if form == "float" and table.target.startswith("cortex-m"):
            continue  # there is no float firmware
        cost, left = table.total(works)
        macs = sum(w.macs for w in works)
        kinds = tuple(sorted({w.kind for w in left}))
        share = sum(w.macs for w in left) / macs if macs else 0.0
        found.append(Row(form, round(table.bytes(works)), None if share > _MOST else round(cost, 1), kinds, round(share, 4)))
    made = Prediction(table.target, table.unit, table.machine, table.error, table.largest_error, tuple(found))
    return dataclasses.replace(made, warnings=tuple(_warnings(table, made, forms)))


def _warnings(table: Table, made: Prediction, forms: dict[str, list[Work]]) -> list[str]:
    """Sentences about what the recipe's bits do not buy on this target."""
    said = []
    few = [w for w in forms["recipe"] if w.kind in costs.WEIGHTED and w.bits < 8]
    wider = [w for w in few if costs.stored_bits(table.target, w.kind, w.bits) > w.bits]
    speed, size = made.ratio("recipe", "int8"), made.ratio("recipe", "int8", "bytes")
    if wider:
        said.append(f"{table.target} stores the weights of {len(wider)} of {len(few)} few-bit layers wider than asked for")
    if few and speed is not None and size is not None and speed > _SAME:
        how = f"{speed:.2f} times the cost of int8" if speed > 2 - _SAME else "as fast as int8"
        bytes_ = f"at {size:.2f} times the bytes" if size < _SAME else "and no smaller"
        said.append(f"{table.target}: weights below 8 bits buy no speed: {how} (modelled), {bytes_}")
    quantized = made.ratio("recipe", "float")
    if quantized is not None and quantized > _SAME:
        said.append(
            f"{table.target}: the recipe's file is not faster than the float file: {quantized:.2f} times its cost (modelled)"
        )
    return said


def rows(found: Predictions) -> list[list[Any]]:
    """Rows in the order of :data:`HEADS`."""
    table = []
    for target in found.targets:
        for row in target.rows:
            size, base = target.ratio(row.form, "float", "bytes"), "int8" if target.row("int8") else "recipe"
            table.append([
                target.target, row.form, row.bytes, None if size is None else round(100 * size, 1), row.cost, target.unit,
                _inverse(target.ratio(row.form, "float")), _inverse(target.ratio(row.form, base)),
                None if target.error is None else round(100 * target.error, 1),
            ])  # fmt: skip
    return table


def _inverse(ratio: float | None) -> float | None:
    return None if not ratio else round(1 / ratio, 2)


def remarks(found: Predictions) -> list[str]:
    """What has to be said with the table."""
    said = [w for t in found.targets for w in t.warnings]
    for t in found.targets:
        if kinds := sorted({k for r in t.rows for k in r.left_out}):
            code = ", their code also of the bytes" if t.unit == "instructions" else ""  # a firmware holds its kernels
            said.append(f"{t.target}: not in the table and left out of the cost{code}: {', '.join(kinds)}")
    machines: dict[str, list[str]] = {}
    for t in found.targets:
        error = "" if t.largest_error is None else f", at most {100 * t.largest_error:.0f} % off on networks it was not made from"
        machines.setdefault(f"{t.unit} on {t.machine}{error}", []).append(t.target)
    said += [f"modelled, not measured: {', '.join(names)}: {what}" for what, names in machines.items()]
    return [*said, *found.notes]
