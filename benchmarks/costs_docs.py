"""The section of docs/benchmarks.md on tables of costs: what they predict of networks that they were not made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["costs"]


def costs(rows: Sequence[Mapping[str, Any]]) -> str:
    """A row for each target and width, a column for each network."""
    models = list(dict.fromkeys(r["model"] for r in rows))
    lines = [
        "## Predicted cost and size",
        "",
        "`edgekit predict` costs a recipe by tables of single operators, before anything is compressed. Here are whole networks",
        "that no table was made from: the error of the predicted cost, and of the predicted size, in percent of the measured.",
        "",
        f"| target | unit | weights | {' | '.join(models)} |",
        f"|---|---|---|{'---|' * len(models)}",
    ]
    for target, bits in dict.fromkeys((r["target"], r["weight_bits"]) for r in rows):
        mine = {r["model"]: r for r in rows if (r["target"], r["weight_bits"]) == (target, bits)}
        unit = next(iter(mine.values()))["unit"]
        cells = [_cell(mine[m]) if m in mine else "does not fit" for m in models]
        lines.append(f"| {target} | {unit} | {'float' if bits == 32 else f'int{bits}'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(row: Mapping[str, Any]) -> str:
    return f"{100 * row['error']:+.1f}, size {100 * row['size_error']:+.1f}"
