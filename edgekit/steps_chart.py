"""Score of a spiking network against its steps and against its SynOps, as drawings for the report's inline SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from edgekit.front_chart import axes

__all__ = ["drawings"]

_AXES = (("steps", "time steps"), ("SynOps a sample", "SynOps for one sample"))


def drawings(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One drawing for each axis; none for a pass without ``by steps``, or with a single step. Costs are on a log scale."""
    rows = record.get("by steps")
    if not isinstance(rows, Sequence) or len(rows) < 2 or not all(isinstance(r, Mapping) and "score" in r for r in rows):
        return []
    found = []
    for key, title in _AXES:
        kept = [r for r in rows if float(r[key]) > 0]
        if len(kept) < 2:
            continue
        xs, ys = [math.log2(float(r[key])) for r in kept], [float(r["score"]) for r in kept]
        across, up, frame = axes(xs, ys)
        texts = [f"{r['steps']} steps, {float(r['SynOps a sample']):,.0f} SynOps: {float(r['score']):.2f}" for r in kept]
        found.append(
            {
                "points": [(round(across(x), 1), round(up(y), 1), t) for x, y, t in zip(xs, ys, texts, strict=True)],
                "x_ticks": [(round(across(x), 1), _short(float(r[key]))) for x, r in zip(xs, kept, strict=True)],
                "y_ticks": [(round(up(v), 1), f"{v:.1f}") for v in (min(ys), (min(ys) + max(ys)) / 2, max(ys))],
                "x_title": title,
                "judged": str(record.get("judged by", "score")),
                **frame,
            }
        )
    return found


def _short(value: float) -> str:
    """``_short(12345) == "12k"``."""
    for unit, factor in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.3g}"
