"""The report's section on what was done to the model: the compression record as facts and tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from edgekit import front_chart, steps_chart
from edgekit.recipe import SETTINGS

__all__ = ["flat", "passes_of"]


def passes_of(record: Any) -> list[dict[str, Any]]:
    """The compression record as facts and tables, whatever its passes noted: lists of mappings become tables."""
    if isinstance(record, Mapping):
        record = record.get("passes", [record])
    passes = []
    for number, entry in enumerate(record or [], 1):
        entry = dict(entry) if isinstance(entry, Mapping) else {"note": entry}
        title = next((str(entry.pop(k)) for k in ("name", "kind", "pass") if k in entry), f"pass {number}")
        tables, facts, notes = [], [], [str(n) for n in entry.pop("notes", []) or []]
        front = front_chart.drawing(entry)
        for key, value in entry.items():
            rows = _rows(key, value)
            if rows:
                heads = list(dict.fromkeys(k for row in rows for k in row))
                tables.append({"title": key, "heads": heads, "rows": [[_plain(row.get(h, "")) for h in heads] for row in rows]})
            else:
                facts += _changed(title, value) if key == "settings" else flat({key: value})
        curves = steps_chart.drawings(entry)
        passes.append({"title": title, "facts": facts, "tables": tables, "notes": notes, "front": front, "curves": curves})
    return passes


_ALWAYS = ("weights", "activations", "method")


def _changed(kind: str, settings: Any) -> list[tuple[str, str]]:
    """Settings that are not the defaults of their class, and those that everybody asks for."""
    found = flat(settings)
    if kind not in SETTINGS:
        return found
    usual = dict(flat(asdict(SETTINGS[kind]())))
    shown = [(k, v) for k, v in found if k in _ALWAYS or usual.get(k) != v]
    return [*shown, ("other settings" if shown else "settings", "the defaults")] if len(shown) < len(found) else shown


def _rows(key: str, value: Any) -> list[Mapping[str, Any]]:
    """What a pass did to each layer, as table rows: a list of mappings, a mapping of mappings, or of texts; else nothing."""
    if isinstance(value, Mapping) and value and key == "layers":
        return [{"layer": k, **(v if isinstance(v, Mapping) else {"change": v})} for k, v in value.items()]
    if isinstance(value, list) and value and all(isinstance(v, Mapping) for v in value):
        return value
    return []


def flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested mappings as (dotted name, text) pairs."""
    if isinstance(value, Mapping):
        return [pair for k, v in value.items() for pair in flat(v, f"{prefix}.{k}" if prefix else str(k))]
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
