"""The parts of docs/benchmarks.md on networks with 1-bit layers, from results/binary.json and binary_encoder.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

__all__ = ["encoder", "networks"]

Row = Mapping[str, Any]


def networks(rows: Sequence[Row]) -> str:
    """Accuracy, bytes and instructions of binary networks beside int8 ones."""
    parts = [_HEAD]
    for model in dict.fromkeys(r["model"] for r in rows):
        mine = [r for r in rows if r["model"] == model]
        budget = next((r for r in mine if r["variant"] not in ("float", "int8")), mine[0])
        lines = [
            f"### {model}: {budget['images']:,} images, {budget['epochs']} epochs, judged on {budget['evaluated']:,}",
            "",
            "| variant | accuracy, mean (least - most) | seeds | bytes | width | instructions, Cortex-M4 | 1-bit MACs |",
            "|---|---|---|---|---|---|---|",
        ]
        for variant in dict.fromkeys(r["variant"] for r in mine):
            lines.append(_line(variant, [r for r in mine if r["variant"] == variant]))
        parts.append("\n".join([*lines, *_verdict(mine)]))
    return "\n\n".join(parts)


def _verdict(rows: Sequence[Row]) -> list[str]:
    """A sentence on each int8 network of equal cost, beside the best estimator."""
    means = {v: mean(r["accuracy"] for r in rows if r["variant"] == v) for v in dict.fromkeys(r["variant"] for r in rows)}
    narrow = [v for v in means if v.startswith("int8, ")]
    trained = [v for v in means if v not in ("float", "int8", *narrow)]
    if not narrow or not trained:
        return []
    best = max(trained, key=lambda v: means[v])
    said = []
    for v in narrow:
        gap = means[best] - means[v]
        better = "1-bit is better" if gap > 0 else "the narrow int8 network is better"
        said.append(f"at equal {v.removeprefix('int8, as many ')} {better} by {abs(gap):.1f} points")
    return ["", f"With the best estimator ({best}, {means[best]:.1f} %): " + "; ".join(said) + "."]


_HEAD = """## Networks with 1-bit layers beside int8

Trained here with short budgets, so that accuracies say little about the estimators; the question is what a user gets beside int8
of the same network, and beside an int8 network so narrow that it costs as much: no more bytes, or no more instructions. All learn
from the same float network and images, with as many epochs."""


def _line(variant: str, rows: Sequence[Row]) -> str:
    found = [r["accuracy"] for r in rows]
    spread = f" ({min(found):.1f} - {max(found):.1f})" if len(found) > 1 else ""
    counted = [r["instructions"] for r in rows if r.get("instructions")]
    instructions = f"{round(mean(counted)):,}" if counted else ""
    share = f"{100 * rows[0]['binary_macs'] / rows[0]['macs']:.0f} %" if rows[0].get("binary_macs") else ""
    width = f"{rows[0]['width']:.3g}"
    return f"| {variant} | {mean(found):.1f}{spread} | {len(rows)} | {rows[0]['bytes']:,} | {width} | {instructions} | {share} |"


def encoder(rows: Sequence[Row]) -> str:
    """A binary transformer's accuracy with and without estimators, and the accounting."""
    lines = [
        "## A binary transformer encoder",
        "",
        "| model | variant | rank of the estimators | accuracy, mean (least - most) | seeds | bytes | 1-bit MACs |",
        "|---|---|---|---|---|---|---|",
    ]
    judged = [r for r in rows if "accuracy" in r]
    for key in dict.fromkeys((r["model"], r["variant"], r["rank"]) for r in judged):
        mine = [r for r in judged if (r["model"], r["variant"], r["rank"]) == key]
        found = [r["accuracy"] for r in mine]
        spread = f" ({min(found):.1f} - {max(found):.1f})" if len(found) > 1 else ""
        share = f"{100 * mine[0]['binary_macs'] / mine[0]['macs']:.0f} %" if mine[0].get("binary_macs") else ""
        rank = key[2] if key[1] == "binary" else ""
        lines.append(
            f"| {key[0]} | {key[1]} | {rank} | {mean(found):.1f}{spread} | {len(mine)} | {mine[0]['bytes']:,} | {share} |"
        )
    lines += ["", _COST, "", "| model | form | operations, M | of products, M | memory, bytes | 1-bit weights | float numbers |"]
    lines.append("|---|---|---|---|---|---|---|")
    for r in (r for r in rows if "operations" in r):
        rank = f", rank {r['rank']}" if r["rank"] else ""
        lines.append(
            f"| {r['model']} | {r['variant'].removeprefix('cost, ')}{rank} "
            f"| {r['operations'] / 1e6:,.1f} | {r['products'] / 1e6:,.1f} | {r['memory']:,} | {r['binary_weights']:,} "
            f"| {r['float_values']:,} |"
        )
    return "\n".join(lines)


_COST = (
    "Counted, not measured, by the conventions of `edgekit.compress.binary.cost`: operations = FLOPs + BOPs / 64, bytes of all "
    "tensors. For BERT-base at 128 tokens papers quote 56 times fewer operations (22.5 G / 0.4 G, as their tables round) and 28 "
    "times less memory."
)
