"""A run's measured times as a trace for https://ui.perfetto.dev (Chrome's trace event format, JSON).

One track for each device and target: load, first call and a median inference, with its layers inside where they were measured. A
sustained run adds a track of its medians over time. Instructions are no time and are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgekit.files import write_json
from edgekit.profile import Profile, load

__all__ = ["events", "write_trace"]


def write_trace(folder: Path) -> Path | None:
    """Write ``trace.json`` of a run folder's ``profile.json``; None (and no file) where no time was measured."""
    path = Path(folder) / "trace.json"
    found = events(load(Path(folder) / "profile.json"))
    if not found:
        path.unlink(missing_ok=True)
        return None
    write_json(path, {"displayTimeUnit": "ns", "traceEvents": found})
    return path


def events(profiles: Sequence[Profile]) -> list[dict[str, Any]]:
    """Trace events; times in microseconds from each track's start."""
    found: list[dict[str, Any]] = []
    for number, profile in enumerate((p for p in profiles if p.unit == "microseconds"), start=1):
        track = {"pid": number, "tid": 1}
        found.append({"ph": "M", "name": "process_name", "args": {"name": f"{profile.target} on {profile.device}"}, **track})
        start = 0.0
        for name, key in (("load", "load_microseconds"), ("first call", "first_microseconds")):
            if key in profile.figures:
                found.append({"ph": "X", "name": name, "ts": start, "dur": profile.figures[key], **track})
                start += profile.figures[key]
        found.append({"ph": "X", "name": "inference (median)", "ts": start, "dur": profile.total, **track})
        timed = [layer for layer in profile.layers if layer.microseconds is not None]
        whole = sum(layer.microseconds or 0.0 for layer in timed)
        scale = min(1.0, profile.total / whole) if whole else 1.0  # layers timed alone may sum to more: drawn to fit
        for layer in timed:
            args = {"operator": layer.op, "macs": layer.macs, "microseconds alone": layer.microseconds}
            duration = (layer.microseconds or 0.0) * scale
            found.append({"ph": "X", "name": layer.layer, "ts": start, "dur": duration, "args": args, **track})
            start += duration
        for row in profile.series:
            values = {k: v for k, v in row.items() if k != "seconds"}
            for name, value in values.items():
                found.append({"ph": "C", "name": name, "ts": row["seconds"] * 1e6, "args": {name: value}, **track})
    return found
