"""The section of docs/benchmarks.md about 1-bit layers in firmware, from the rows of results/binary_firmware.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["firmware"]

_HEAD = """
## 1-bit layers in firmware

Instructions of one layer on emulated boards, beside our fastest int8 kernel of the same layer on the same core; signs are
random, so that neither of the two is rare, which is the slowest case. Packed outputs feed another 1-bit layer; int8 ones are
requantized as the int8 layer's. "vectors" counts 32 outputs at once (128 with Helium), "planes" 32 positions, "rows" one
output after the other; an exported project takes "rows" where there are fewer than 24 positions. Below 1 the int8 layer is
quicker: so it is on Helium for most convolutions, and for linear layers with int8 outputs.
"""


def firmware(rows: Sequence[Mapping[str, Any]]) -> str:
    """A line for each layer, core and kernel."""
    lines = [_HEAD.strip(), "", "| layer | core | kernel | output | instructions | int8 layer | times fewer |", "|---" * 7 + "|"]
    for r in rows:
        kernel = f"{r['kernel']}, {'portable C' if r['kernel_set'] == 'portable' else r['kernel_set']}"
        bound = r["times_bound"]
        missed = bound is not None and r["times"] < bound
        times = f"{'**' if missed else ''}{r['times']:.2f}{'**' if missed else ''}" + (f" (at least {bound:g})" if bound else "")
        cells = [r["layer"], r["core"], kernel, r["output"], f"{r['instructions']:,}", f"{r['int8']:,}", times]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
