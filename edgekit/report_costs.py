"""The report's section on what the files cost where they ran: tables, and charts of what a sustained run did over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from edgekit import profile_table
from edgekit.profile import Profile, load
from edgekit.report_passes import flat
from edgekit.targets import TARGETS, digest, get

__all__ = ["costs"]


def costs(folder: Path) -> list[dict[str, Any]]:
    """What was measured; what firmware fits on is open for the first of those that fit on the same."""
    found = load(folder / "profile.json")
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
        "machine": flat(dict(found.fingerprint)),
        "fits": [[profile_table.text(v) for v in profile_table.fit_row(f)] for f in found.fits],
        "heads": profile_table.FITS,
        "notes": [found.method, *found.notes],
        "stale": not fresh,
        "series": [_line(found.series, key, *words) for key, words in _LINES.items() if any(key in row for row in found.series)],
    }


_LINES = {
    "median_microseconds": ("Median of each second", "µs"),
    "temperature_celsius": ("Temperature", "°C"),
    "megahertz": ("Clock", "MHz"),
}
"""Columns of a sustained run's rows that are drawn, with title and unit."""

_LEFT, _RIGHT, _TOP, _BOTTOM = 64.0, 632.0, 10.0, 130.0
"""The plot inside of a drawing of 640 x 156."""


def _line(rows: Sequence[Mapping[str, float]], key: str, title: str, unit: str) -> dict[str, Any]:
    """A line over time: points, labels at the ends of both axes, and medians of the first and the last quarter.

    The vertical axis reaches at least 5 % to either side of the median, so that noise does not look like drift.
    """
    points = [(row["seconds"], row[key]) for row in rows if key in row]
    values = [v for _, v in points]
    middle, last = median(values), points[-1][0]
    low, high = min(*values, 0.95 * middle), max(*values, 1.05 * middle)

    def x(seconds: float) -> float:
        return round(_LEFT + (_RIGHT - _LEFT) * seconds / last, 1)

    def y(value: float) -> float:
        return round(_BOTTOM - (_BOTTOM - _TOP) * (value - low) / (high - low or 1.0), 1)

    part = len(points) // 4
    ends = [points[:part], points[-part:]] if part else []
    quarters = [(x(p[0][0]), x(p[-1][0]), y(median(v for _, v in p)), median(v for _, v in p)) for p in ends]
    return {
        "key": key, "title": title, "unit": unit, "points": " ".join(f"{x(t)},{y(v)}" for t, v in points),
        "ticks": [(y(v), profile_table.text(float(v))) for v in (low, (low + high) / 2, high)], "seconds": f"{last:.0f}",
        "quarters": [(a, b, c, profile_table.text(float(d))) for a, b, c, d in quarters],
    }  # fmt: skip
