"""The report's tables and charts of stages, of what each file stores and of layers, as plain values for the template."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgekit.frozen import FloatLayer, FrozenProgram
from edgekit.metrics import HUGE
from edgekit.parity import ArtifactParity, Parity, Stage
from edgekit.shortfalls import in_float, integer_layers_in_float, remedy

__all__ = ["RUNS", "charts", "columns", "count", "coverage", "fixed", "islands", "layers", "lsb", "size", "stage"]

RUNS = ("delegated", "binary", "int8", "int16", "float")
_STAGE_COLUMNS = (
    # field, heading, how, what it is
    ("metric", "", "measured", "task metric on the evaluation samples"),
    ("agreement_float", "top-1 = float", "measured", "samples on which the float model chooses the same class"),
    ("agreement_frozen", "top-1 = frozen", "measured", "samples on which the frozen program chooses the same class"),
    ("max_lsb", "max LSB", "measured", "largest difference from the frozen program, in steps of the output's scale"),
    ("mean_lsb", "mean LSB", "measured", "mean difference from the frozen program, in steps of the output's scale"),
    ("sqnr_float_db", "SQNR to float", "measured", "the float output's power over that of the difference from it"),
    ("sqnr_frozen_db", "SQNR to frozen", "measured", "the frozen output's power over that of the difference from it"),
    ("bytes", "size", "", "a file's size on disk (measured); weights, biases and scales counted (modelled)"),
    ("macs", "MACs", "modelled", "multiply-accumulates for one sample, counted from shapes"),
)


def columns(parity: Parity) -> list[dict[str, str]]:
    """Columns of the stage table that any stage has a value for."""
    found = []
    for field, heading, how, meaning in _STAGE_COLUMNS:
        if any(_value(s, field) is not None for s in parity.stages):
            found.append({"field": field, "heading": heading or parity.metric or field, "how": how, "meaning": meaning})
    return found


def _value(stage: Stage, field: str) -> float | None:
    value = getattr(stage, field)
    if value is None and field == "sqnr_float_db" and stage.exact_float and stage.name != "float":
        return HUGE
    if value is None and field == "sqnr_frozen_db" and stage.exact_frozen and stage.name != "frozen":
        return HUGE
    return None if value is None else float(value)


def stage(stage: Stage, parity: Parity) -> dict[str, Any]:
    """A row: text of each field, and whether its bytes are measured."""
    own = {  # a stage compared with itself says nothing
        "float": {"agreement_float", "sqnr_float_db"},
        "frozen": {"agreement_frozen", "max_lsb", "mean_lsb", "sqnr_frozen_db"},
    }.get(stage.name, set())
    text = {field: "" if field in own else _text(field, _value(stage, field), parity) for field, *_ in _STAGE_COLUMNS}
    return {"name": stage.name, "text": text, "bytes_how": "measured" if stage.bytes_measured else "modelled"}


def _text(field: str, value: float | None, parity: Parity) -> str:
    if value is None:
        return "–"
    if field == "metric":
        return fixed(value, 2) + (" %" if parity.metric == "accuracy" else "")
    if field.startswith("agreement"):
        return fixed(value, 2) + " %"
    if field.startswith("sqnr"):
        return "exact" if value == HUGE else f"{fixed(value, 1)} dB"
    if field == "bytes":
        return size(value)
    if field == "macs":
        return count(value)
    return lsb(value)


def charts(parity: Parity) -> list[dict[str, Any]]:
    """One bar a stage: task metric, bytes, MACs; each from zero."""
    wanted = [("bytes", "Size"), ("macs", "Multiply-accumulates for one sample")]
    if parity.metric == "accuracy":
        wanted.insert(0, ("metric", "Accuracy"))
    charts = []
    for field, title in wanted:
        rows = [(s, _value(s, field)) for s in parity.stages]
        largest = 100.0 if field == "metric" else max((v for _, v in rows if v is not None), default=0.0)
        if largest <= 0:
            continue
        bars = [
            {
                "label": s.name,
                "target": s.name.partition(" on ")[0],
                "where": s.name.partition(" on ")[2],
                "share": max(0.0, v / largest),
                "text": _text(field, v, parity),
                "modelled": field == "macs" or (field == "bytes" and not s.bytes_measured),
            }
            for s, v in rows
            if v is not None
        ]
        charts.append({"title": title, "field": field, "bars": bars})
    return charts


def _rows_of(artifact: ArtifactParity) -> list[Mapping[str, Any]]:
    return list(artifact.artifact.get("coverage", []))


def islands(artifact: ArtifactParity, program: FrozenProgram) -> dict[str, Any]:
    """Integer layers that the file computes in float, and what to do about it."""
    layers = integer_layers_in_float(_rows_of(artifact), program)
    return {"islands": layers, "remedy": remedy(artifact.name, layers, program)}


def coverage(artifact: ArtifactParity) -> dict[str, Any]:
    """Shares of the MACs by how they run, and the file's operators."""
    rows = [{**r, "runs": "float" if in_float(r) else r["runs"]} for r in _rows_of(artifact)]
    total = sum(r["macs"] for r in rows)
    shares = {run: sum(r["macs"] for r in rows if r["runs"] == run) / total if total else 0.0 for run in RUNS}
    counts = {run: sum(r["runs"] == run for r in rows) for run in RUNS}
    return {"target": artifact.name, "rows": rows, "shares": shares, "counts": counts}


def layers(program: FrozenProgram, parity: Parity) -> list[dict[str, Any]]:
    """One row a layer, float ones included: what it is, and what became of it in each file."""
    parities = [{x.layer: x for x in a.layers} for a in parity.artifacts]
    stored = [{r["layer"]: r for r in a.artifact.get("coverage", [])} for a in parity.artifacts]
    broken = [{m.split(":", 1)[0].removeprefix("layer ") for m in a.mismatches} for a in parity.artifacts]
    largest = max((x.share for p in parities for x in p.values()), default=0.0) or 1.0
    rows = []
    for layer in program.listed:
        in_float = isinstance(layer, FloatLayer)
        cells = []
        for a, checked, files_, wrong in zip(parity.artifacts, parities, stored, broken, strict=True):
            found, kept = checked.get(layer.name), files_.get(layer.name, {})
            cells.append(
                {
                    "target": a.name,
                    "lsb": lsb(found.max_lsb) if found else "" if in_float or layer.op == "dequantize" else "·",
                    "share": 0.0 if found is None else found.share,
                    "bar": 0.0 if found is None else found.share / largest,
                    "ok": (found is None or found.within) and layer.name not in wrong,
                    "first": a.first_diverging == layer.name,
                    "wrong": layer.name in wrong,
                    "storage": kept.get("storage", ""),
                    "runs": kept.get("runs", ""),
                }
            )
        rows.append(
            {
                "name": layer.name,
                "op": f"{layer.op} (float)" if in_float else layer.op,
                "shape": "×".join(map(str, layer.shape)),
                "bits": None if isinstance(layer, FloatLayer) else layer.weight_bits,
                "parameters": layer.parameters,
                "macs": layer.macs,
                "bytes": layer.weight_bytes,
                "cells": cells,
            }
        )
    return rows


def fixed(value: float | None, digits: int = 2) -> str:
    """``fixed(97.5) == "97.50"``; a dash for None."""
    return "–" if value is None else f"{value:.{digits}f}"


def lsb(value: float) -> str:
    """A difference in steps: ``lsb(0.5) == "0.5"``."""
    return "not a number" if value >= HUGE else f"{value:,.0f}" if value == round(value) or value >= 1000 else f"{value:.3g}"


def size(value: float) -> str:
    """``size(95168) == "95.2 kB"`` (1 kB = 1000 bytes)."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{value / factor:.1f} {unit}"
    return f"{value:.0f} B"


def count(value: float) -> str:
    """``count(12345678) == "12.35 M"``."""
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{value / factor:.2f} {unit}"
    return f"{value:.0f}"
