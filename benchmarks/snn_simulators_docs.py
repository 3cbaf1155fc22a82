"""The tables of ``snn_simulators.json`` in docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
_SIMULATORS = ("spikingjelly", "snntorch", "norse", "sinabs", "nest")
_TEXT = """
The same NIR graph on edgekit's float64 interpreter and on other tools, each rewritten for its importer where that changes
nothing. A cell is the number of values of all rasters (steps x samples x neurons of every layer) that differ; "refused" stands
where the tool cannot express the network, which edgekit says, naming node and reason, instead of letting it run as another one.
"""

_CHIPS = """
Quantized to a chip by calibration on 128 training samples, accuracy in percent on the chip's integer arithmetic; the last column
is the vendor's own simulator on the same integers against edgekit's reference. A network trained for one spike a step loses on
Xylo, whose hidden neurons may spike up to 31 times in it; edgekit says so when it quantizes.
"""


def simulators(rows: Sequence[Row]) -> str:
    """Agreement, chips, NeuroBench and speed."""
    parts = {name: [r for r in rows if r["part"] == name] for name in ("agreement", "chips", "neurobench", "speed")}
    lines = ["## Spiking networks on other simulators and on chips' arithmetic", "", _TEXT.strip(), ""]
    return "\n".join([*lines, *_agreement(parts["agreement"]), "", *_chips(parts["chips"]), "", *_rest(parts)])


def _agreement(rows: Sequence[Row]) -> list[str]:
    found = {(r["network"], r["simulator"]): r for r in rows}
    version = {r["simulator"]: r["version"] for r in rows if "version" in r}
    lines = ["| network | " + " | ".join(f"{s} {version.get(s, '')}".strip() for s in _SIMULATORS) + " |"]
    lines += ["|---" * (len(_SIMULATORS) + 1) + "|"]
    for network in dict.fromkeys(r["network"] for r in rows):
        cells = [_cell(found.get((network, s))) for s in _SIMULATORS]
        lines.append(f"| {network} | " + " | ".join(cells) + " |")
    return lines


def _cell(row: Row | None) -> str:
    if row is None:
        return ""
    return "refused" if "refused" in row else f"{row['differing']:,} of {row['values']:,}"


def _chips(rows: Sequence[Row]) -> list[str]:
    lines = [
        _CHIPS.strip(),
        "",
        "| network | chip | float | on the chip | samples | vendor's simulator: values that differ |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        ends = f"{r['samples']} | {r['vendor']}: {r['differing']:,} of {r['values']:,}"
        lines.append(f"| {r['network']} | {r['simulator']} | {r['accuracy_float']:.1f} | {r['accuracy_chip']:.1f} | {ends} |")
    return lines


def _rest(parts: Mapping[str, Sequence[Row]]) -> list[str]:
    lines = []
    for r in parts["neurobench"]:
        lines += [
            f"Synaptic operations of {r['network']}, a sample of {r['steps']} steps: {r['acs']:,.1f}, NeuroBench's "
            f"{r['acs_theirs']:,.1f}; dense {r['dense']:,}, NeuroBench's {r['dense_theirs']:,.0f}.",
            "",
        ]
    lines += [
        "Simulation, processor time of one thread, same network and input; times edgekit is the median of the rounds' ratios.",
        "",
        "| network | tool | ms | times edgekit (at least 1) |",
        "|---|---|---|---|",
    ]
    for r in parts["speed"]:
        ratio = f"{r['ratio']:.2f}" if r["simulator"] == "edgekit" or r["ratio"] >= 1 else f"**{r['ratio']:.2f}**"
        lines.append(f"| {r['network']} | {r['simulator']} | {r['milliseconds']:.1f} | {ratio} |")
    return lines
