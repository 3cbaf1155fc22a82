"""The front of a mixed choice of bits as a drawing: positions of points and ticks for the report's inline SVG."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["HEIGHT", "WIDTH", "axes", "drawing"]

WIDTH, HEIGHT = 420, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 14, 38


def drawing(record: Mapping[str, Any]) -> dict[str, Any] | None:
    """Where everything goes for one pass of ``compress.json``; None for a pass that chose no bits.

    Args:
        record: with ``front`` (points of ``cost_share`` and ``predicted_db``) and the chosen ``cost_share`` and ``predicted_db``.
    """
    front = record.get("front")
    if not isinstance(front, Sequence) or not front or not all(isinstance(p, Mapping) and "cost_share" in p for p in front):
        return None
    points = [(float(p["cost_share"]), float(p["predicted_db"])) for p in front]
    chosen = (float(record["cost_share"]), float(record["predicted_db"]))
    xs, ys = [p[0] for p in (*points, chosen)], [p[1] for p in (*points, chosen)]
    across, up, frame = axes(xs, ys)
    limit = (record.get("limits") or {}).get(record.get("cost"))
    inside = limit is not None and min(xs) <= limit <= max(xs)
    return {
        "points": [(round(across(x), 1), round(up(y), 1), f"{x:.3f} of int8, {y:.1f} dB") for x, y in points],
        "chosen": (round(across(chosen[0]), 1), round(up(chosen[1]), 1), f"chosen: {chosen[0]:.3f} of int8, {chosen[1]:.1f} dB"),
        "limit": round(across(limit), 1) if limit is not None and inside else None,
        "x_ticks": [(round(across(v), 1), f"{v:.2f}") for v in _ticks(xs)],
        "y_ticks": [(round(up(v), 1), f"{v:.0f}") for v in _ticks(ys)],
        "x_title": f"{_NAMES.get(str(record.get('cost')), 'cost')}, share of int8",
        **frame,
    }


def axes(xs: Sequence[float], ys: Sequence[float]) -> tuple[Callable[[float], float], Callable[[float], float], dict[str, int]]:
    """Value to position across and up, and the frame that the page draws."""
    across, up = _scale(xs, _LEFT, WIDTH - _RIGHT), _scale(ys, HEIGHT - _BOTTOM, _TOP)
    frame = {"bottom": HEIGHT - _BOTTOM, "left": _LEFT, "right": WIDTH - _RIGHT, "top": _TOP}
    return across, up, {"width": WIDTH, "height": HEIGHT, **frame}


_NAMES = {"size": "bytes of weights", "bops": "bit operations", "instructions": "instructions", "latency": "time"}


def _scale(values: Sequence[float], start: float, end: float) -> Any:
    low, high = min(values), max(values)
    span = high - low
    return lambda v: (start + end) / 2 if span <= 0 else start + (v - low) / span * (end - start)


def _ticks(values: Sequence[float]) -> list[float]:
    low, high = min(values), max(values)
    return [low] if high <= low else [low + (high - low) * i / 4 for i in range(5)]
