"""The parts of docs/benchmarks.md on 1-bit layers on processors of hosts: results/binary_host.json, binary_aarch64*.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["aarch64_ways", "binary_aarch64", "binary_host"]

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


ARM = """
## 1-bit layers on aarch64

Instructions of one layer under an emulator, packed signs in and out, beside int8 kernels written for this comparison, int8 in and
out. Instructions are no time: what a core gains depends on how many of each kind it starts at once. The 1-bit layer is a whole
call of our library, with the borders of the image; int8 ones are given an image that is padded already. "4 outputs" kernels take
4 outputs at a time; "16 x 4" ones keep 16 outputs of 4 places (of one in linear layers) in registers, as tuned libraries do: a
1-bit layer is still ahead of those, by less.
"""
INT8 = {"simple_v80": "int8, Armv8.0, 4 outputs", "simple_dot": "int8, SDOT, 4 outputs", "blocked_dot": "int8, SDOT, 16 x 4"}


def binary_aarch64(rows: Sequence[Row]) -> str:
    """A line for each layer, a column for each int8 kernel."""
    heads = ["layer", "1-bit", *(f"{text} (times more)" for text in INT8.values())]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for layer in dict.fromkeys(r["layer"] for r in rows):
        mine = {r["int8_kernel"]: r for r in rows if r["layer"] == layer}
        cells = [layer, f"{mine['simple_v80']['instructions']:,}", *(_times(mine[kernel]) for kernel in INT8)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([ARM.strip(), "", *lines])


def _times(row: Row) -> str:
    times, bound = row["times"], row.get("times_bound")
    text = f"{row['int8']:,} ({times:.2f})"
    text = f"**{text}**" if times < (bound or 1.0) else text
    return text + (f" (at least {bound:g})" if bound else "")


WAYS = """
### Ways to count signs on aarch64

What was tried to get further ahead of the int8 kernel with SDOT that keeps 16 outputs of 4 places: bare kernels, without what
gathers or turns inputs and calls them, so the least that each could take. "count" is the library's: CNT of what differs, summed
in bytes. "carry_save" puts three words through full adders (EOR, EOR, BSL) before CNT: an adder costs three instructions and
saves two. "dot" sums by UDOT, which is no instruction fewer than an addition. "sliced" visits the inputs of the rarer sign and
counts 256 outputs (in the convolution: places) in bit planes, as on Cortex-M; it needs transposed weights, which no other
processor's kernels read, and gains in wide linear layers only. So "count" was kept; five times fewer instructions than that int8
kernel is reached by none.
"""
NAMES = ("count", "carry_save", "dot", "sliced")


def aarch64_ways(rows: Sequence[Row]) -> str:
    """A line for each layer, a column for each way."""
    heads = ["layer", "int8, SDOT, 16 x 4", *(f"{name} (times fewer)" for name in NAMES)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for layer in dict.fromkeys(r["layer"] for r in rows):
        mine = {r["way"]: r for r in rows if r["layer"] == layer}
        cells = [f"{mine[name]['instructions']:,} ({mine[name]['times']:.2f})" for name in NAMES]
        lines.append(f"| {layer} | {mine['count']['int8']:,} | " + " | ".join(cells) + " |")
    return "\n".join([WAYS.strip(), "", *lines])
