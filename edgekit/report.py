"""One self-contained HTML page of a run folder: no script, no network, every value escaped, every number labelled.

"measured" means taken from running a file or from the file itself; "modelled" means counted from shapes and integers. The page is
drawn by ``report.html.jinja`` (inline CSS, bars as inline SVG) and is the same for the same run folder. What is absent from the
folder is named on the page.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from edgekit import analyze, profile_table
from edgekit.errors import FormatError
from edgekit.files import sha256, write_whole
from edgekit.frozen import FloatLayer, FrozenProgram, load
from edgekit.metrics import HUGE
from edgekit.parity import ArtifactParity, Parity, Stage
from edgekit.profile import Profile
from edgekit.profile import load as load_profiles
from edgekit.recipe import SETTINGS
from edgekit.shortfalls import in_float, integer_layers_in_float, remedy
from edgekit.targets import TARGETS, digest, get

__all__ = ["render", "write_report"]

_RUNS = ("delegated", "int8", "int16", "float")
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


def write_report(folder: Path) -> Path:
    """Write ``report.html`` into a run folder that holds ``frozen.pt2`` and ``parity.json``; returns its path.

    Raises:
        FormatError: one of the two is missing or damaged.
    """
    path = Path(folder) / "report.html"
    write_whole(path, render(Path(folder)))
    return path


def render(folder: Path) -> str:
    """The page as text."""
    from jinja2 import Environment, StrictUndefined

    program, parity = load(folder / "frozen.pt2"), Parity.load(folder / "parity.json")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(size=_size, count=_count, fixed=_fixed)
    template = environment.from_string(files("edgekit").joinpath("report.html.jinja").read_text(encoding="utf-8"))
    recipe = folder / "recipe.yaml"
    return template.render(
        parity=parity,
        unit=" %" if parity.metric == "accuracy" else "",
        tiles=_tiles(parity, program),
        columns=_columns(parity),
        stages=[_stage(s, parity) for s in parity.stages],
        charts=_charts(parity),
        coverage=[_coverage(a) | _islands(a, program) for a in parity.artifacts],
        runs=_RUNS,
        artifacts=parity.artifacts,
        layers=_layers(program, parity),
        totals=_totals(program),
        analysis=_analysis(folder),
        profiles=_profiles(folder),
        passes=_passes(record := _json(folder / "compress.json")),
        warnings=record.get("warnings", []) if isinstance(record, Mapping) else [],
        recipe=recipe.read_text(encoding="utf-8", errors="replace") if recipe.is_file() else "",
        unquantized=[(u.layer, u.op, u.reason, program.sources.get(u.layer, "")) for u in program.unquantized],
        environment=_flat(_json(folder / "env.json")),
        hashes=_hashes(folder),
    )


def _tiles(parity: Parity, program: FrozenProgram) -> list[dict[str, str]]:
    """The numbers that stand at the top."""
    tiles = []
    by_name = {s.name: s for s in parity.stages}
    files_ = [a.stage for a in parity.artifacts]
    source = by_name.get("float")
    scored = [s.metric for s in files_ if s.metric is not None]
    if scored:
        shown = _range([_fixed(v, 2) for v in (min(scored), max(scored))]) + (" %" if parity.metric == "accuracy" else "")
        note = f"float {_fixed(source.metric, 2)}, {parity.samples} samples" if source and source.metric is not None else ""
        tiles.append({"label": f"{parity.metric} of the files", "value": shown, "note": note, "how": "measured"})
    sizes = [s.bytes for s in files_ if s.bytes is not None]
    if sizes:
        smallest = min((a for a in parity.artifacts if a.stage.bytes is not None), key=lambda a: a.stage.bytes or 0)
        ratio = _ratio(smallest, source.bytes) if source and source.bytes else ""
        tiles.append({"label": "smallest file", "value": _size(min(sizes)), "note": ratio, "how": "measured"})
    checked = [layer for a in parity.artifacts for layer in a.layers]
    within = sum(layer.within for layer in checked)
    note = f"largest difference {_lsb(max((x.max_lsb for x in checked), default=0.0))} LSB, {parity.settings['max_lsb']} allowed"
    tiles.append({"label": "layers within tolerance", "value": f"{within} / {len(checked)}", "note": note, "how": "measured"})
    shares = [1.0 - _coverage(a)["shares"]["float"] for a in parity.artifacts]
    if shares:
        value = _range([_fixed(100 * v, 1) for v in (min(shares), max(shares))]) + " %"
        note = f"of {_count(program.macs)} MACs"
        tiles.append({"label": "MACs in integers", "value": value, "note": note, "how": "modelled"})
    return tiles


def _range(ends: Sequence[str]) -> str:
    return ends[0] if ends[0] == ends[1] else f"{ends[0]}–{ends[1]}"


def _columns(parity: Parity) -> list[dict[str, str]]:
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


def _stage(stage: Stage, parity: Parity) -> dict[str, Any]:
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
        return _fixed(value, 2) + (" %" if parity.metric == "accuracy" else "")
    if field.startswith("agreement"):
        return _fixed(value, 2) + " %"
    if field.startswith("sqnr"):
        return "exact" if value == HUGE else f"{_fixed(value, 1)} dB"
    if field == "bytes":
        return _size(value)
    if field == "macs":
        return _count(value)
    return _lsb(value)


def _charts(parity: Parity) -> list[dict[str, Any]]:
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


def _islands(artifact: ArtifactParity, program: FrozenProgram) -> dict[str, Any]:
    """Integer layers that the file computes in float, and what to do about it."""
    layers = integer_layers_in_float(_rows_of(artifact), program)
    return {"islands": layers, "remedy": remedy(artifact.name, layers, program)}


def _coverage(artifact: ArtifactParity) -> dict[str, Any]:
    """Shares of the MACs by how they run, and the file's operators."""
    rows = [{**r, "runs": "float" if in_float(r) else r["runs"]} for r in _rows_of(artifact)]
    total = sum(r["macs"] for r in rows)
    shares = {run: sum(r["macs"] for r in rows if r["runs"] == run) / total if total else 0.0 for run in _RUNS}
    counts = {run: sum(r["runs"] == run for r in rows) for run in _RUNS}
    return {"target": artifact.name, "rows": rows, "shares": shares, "counts": counts}


def _layers(program: FrozenProgram, parity: Parity) -> list[dict[str, Any]]:
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
                    "lsb": _lsb(found.max_lsb) if found else "" if in_float or layer.op == "dequantize" else "·",
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


def _totals(program: FrozenProgram) -> dict[str, int]:
    return {"parameters": program.parameters, "macs": program.macs, "bytes": program.weight_bytes}


def _analysis(folder: Path) -> dict[str, Any] | None:
    """The heat map of sensitivities: heads, and for each layer its cells as (text, heat 0 to 1 or None)."""
    found = analyze.load(folder)
    if found is None:
        return None
    columns = list(zip(*analyze.rows(found), strict=True))
    warm = {i for i, head in enumerate(analyze.HEADS) if head.endswith("dB")}
    scale = [v for i in warm for v in columns[i] if v is not None and v < 100]
    cells = [
        [
            (
                "–" if v is None else str(v),
                analyze.heat(min(v, max(scale)), scale) if i in warm and v is not None and scale else None,
            )
            for i, v in enumerate(row)
        ]
        for row in analyze.rows(found)
    ]
    return {
        "heads": analyze.HEADS,
        "rows": cells,
        "verdict": analyze.verdict(found),
        "notes": found.notes,
        "samples": found.samples,
    }


def _profiles(folder: Path) -> list[dict[str, Any]]:
    """What was measured; what firmware fits on is open for the first of those that fit on the same."""
    found = load_profiles(folder / "profile.json")
    return [_profile(p, folder) | {"again": any(p.fits == q.fits for q in found[:i])} for i, p in enumerate(found)]


def _profile(found: Profile, folder: Path) -> dict[str, Any]:
    """What was measured of a file, as texts; ``stale`` if the file is no longer the one that was measured."""
    table, known = profile_table.layers(found), found.target in TARGETS and (folder / found.file).is_file()
    fresh = known and digest(get(found.target), folder / found.file) == found.sha256
    return {
        "title": profile_table.title(found),
        "columns": table.columns,
        "rows": [[profile_table.text(v, c) for v, c in zip(row, table.columns, strict=True)] for row in table.rows],
        "shares": [100 * layer.share for layer in found.layers],
        "figures": profile_table.figures(found),
        "machine": _flat(dict(found.fingerprint)),
        "fits": [[profile_table.text(v) for v in profile_table.fit_row(f)] for f in found.fits],
        "heads": profile_table.FITS,
        "notes": [found.method, *found.notes],
        "stale": not fresh,
    }


def _passes(record: Any) -> list[dict[str, Any]]:
    """The compression record as facts and tables, whatever its passes noted: lists of mappings become tables."""
    if isinstance(record, Mapping):
        record = record.get("passes", [record])
    passes = []
    for number, entry in enumerate(record or [], 1):
        entry = dict(entry) if isinstance(entry, Mapping) else {"note": entry}
        title = next((str(entry.pop(k)) for k in ("name", "kind", "pass") if k in entry), f"pass {number}")
        tables, facts, notes = [], [], [str(n) for n in entry.pop("notes", []) or []]
        for key, value in entry.items():
            rows = _rows(key, value)
            if rows:
                heads = list(dict.fromkeys(k for row in rows for k in row))
                tables.append({"title": key, "heads": heads, "rows": [[_plain(row.get(h, "")) for h in heads] for row in rows]})
            else:
                facts += _changed(title, value) if key == "settings" else _flat({key: value})
        passes.append({"title": title, "facts": facts, "tables": tables, "notes": notes})
    return passes


_ALWAYS = ("weights", "activations", "method")


def _changed(kind: str, settings: Any) -> list[tuple[str, str]]:
    """Settings that are not the defaults of their class, and those that everybody asks for."""
    found = _flat(settings)
    if kind not in SETTINGS:
        return found
    usual = dict(_flat(asdict(SETTINGS[kind]())))
    shown = [(k, v) for k, v in found if k in _ALWAYS or usual.get(k) != v]
    return [*shown, ("other settings" if shown else "settings", "the defaults")] if len(shown) < len(found) else shown


def _rows(key: str, value: Any) -> list[Mapping[str, Any]]:
    """What a pass did to each layer, as table rows: a list of mappings, a mapping of mappings, or of texts; else nothing."""
    if isinstance(value, Mapping) and value and key == "layers":
        return [{"layer": k, **(v if isinstance(v, Mapping) else {"change": v})} for k, v in value.items()]
    if isinstance(value, list) and value and all(isinstance(v, Mapping) for v in value):
        return value
    return []


def _flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested mappings as (dotted name, text) pairs."""
    if isinstance(value, Mapping):
        return [pair for k, v in value.items() for pair in _flat(v, f"{prefix}.{k}" if prefix else str(k))]
    return [] if value is None and not prefix else [(prefix, _plain(value))]


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value)) or "–"
    return str(value)


def _json(path: Path) -> Any:
    """A JSON file of the folder, None if it is not there."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FormatError(f"{path}: damaged ({error}); make the run again") from error


def _hashes(folder: Path) -> list[tuple[str, int, str]]:
    """Name, bytes and SHA-256 of the folder's files, but the page itself and the manifest, which come later."""
    skipped = {"report.html", "manifest.json"}
    found = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in skipped and not p.name.startswith("."))
    return [(p.relative_to(folder).as_posix(), p.stat().st_size, sha256(p)) for p in found]


def _fixed(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _lsb(value: float) -> str:
    return "not a number" if value >= HUGE else f"{value:,.0f}" if value == round(value) or value >= 1000 else f"{value:.3g}"


def _ratio(artifact: ArtifactParity, before: int) -> str:
    """A file, or the weights alone of a firmware, which has its code with them, against the float weights."""
    weights = artifact.artifact.get("memory", {}).get("flash_weights")
    if weights is None:
        return _times_smaller(before, artifact.stage.bytes or 0)
    return f"its weights {_times_smaller(before, weights)}" if weights else "no weights of its own"


def _times_smaller(before: int, after: int) -> str:
    """How a file compares with the float weights, in words."""
    if after > before:
        return f"{after / before:.1f}× as large as the float weights"
    return f"{before / after:.1f}× smaller than the float weights"


def _size(value: float) -> str:
    """``_size(95168) == "95.2 kB"`` (1 kB = 1000 bytes)."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= factor:
            return f"{value / factor:.1f} {unit}"
    return f"{value:.0f} B"


def _count(value: float) -> str:
    """``_count(12345678) == "12.35 M"``."""
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{value / factor:.2f} {unit}"
    return f"{value:.0f}"
