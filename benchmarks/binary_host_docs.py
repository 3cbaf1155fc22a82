"""The part of docs/benchmarks.md on 1-bit layers on a host's processor, from the rows of results/binary_host.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["binary_host"]

Row = Mapping[str, Any]
TEXT = """
Time of one layer in a `.pte` of nothing else, one thread, and how many times faster that is than XNNPACK's int8 layer of the same
shape in the same run. "chain": packed signs in, packed signs out. "int8 ends": the sign of an int8 tensor, the 1-bit layer, int8
again. Under 1: **slower than int8**.
"""


def binary_host(rows: Sequence[Row]) -> str:
    """One table: a line for each shape and kind, a column for each variant of the kernels."""
    variants = list(dict.fromkeys(r["variant"] for r in rows if r["kind"] != "int8"))
    heads = [
        "layer",
        "",
        "XNNPACK int8, us",
        "LiteRT int8, us",
        *(f"{v}, us (times faster)" for v in variants),
        "bytes of weights",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for model in dict.fromkeys(r["model"] for r in rows):
        mine = {(r["kind"], r["variant"]): r for r in rows if r["model"] == model}
        for kind in dict.fromkeys(k for k, _ in mine if k != "int8"):
            int8 = [f"{mine['int8', v]['latency_us']:.1f}" for v in ("xnnpack", "litert")]
            ours = [_cell(mine[kind, v]) for v in variants]
            sizes = f"{mine[kind, variants[0]]['weight_bytes']:,} of {mine['int8', 'xnnpack']['weight_bytes']:,}"
            lines.append("| " + " | ".join([model, kind, *int8, *ours, sizes]) + " |")
    slower = sum(r["times_faster_than_xnnpack"] < 1 for r in rows if r["kind"] != "int8")
    count = sum(r["kind"] != "int8" for r in rows)
    closing = f"{slower} of the {count} 1-bit figures are slower than int8."
    return "\n".join(["## 1-bit layers on a host", TEXT, *lines, "", closing])


def _cell(row: Row) -> str:
    times, bound = row["times_faster_than_xnnpack"], row.get("at_least")
    text = f"{row['latency_us']:.1f} ({times:.2f})"
    text = f"**{text}**" if times < (bound or 1.0) else text
    return text + (f" (at least {bound:g})" if bound else "")
