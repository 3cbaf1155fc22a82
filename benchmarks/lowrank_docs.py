"""The low-rank part of docs/benchmarks.md, from the rows of results/lowrank*.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["attention", "latencies", "lowrank"]

Row = Mapping[str, Any]
GOALS = {
    ("resnet20", "macs:0.5 svd_data, repaired"): 88.0,
    ("transformer", "params:0.5 svd_data, repaired"): -1.0,
    ("transformer", "params:0.25 svd_data, repaired"): -3.0,
}
"""At least this accuracy; negative: at most so many points below float."""


def lowrank(rows: Sequence[Row]) -> str:
    """Errors, accuracy, the peer, instructions and the tool's own cost."""
    parts = {name: [r for r in rows if r["part"] == name] for name in ("errors", "accuracy", "peer", "instructions", "tool")}
    texts = [_errors(parts["errors"]), _accuracy(parts["accuracy"]), _peer(parts["peer"]), _instructions(parts["instructions"])]
    return "\n".join(["## Low-rank compression", "", *(t for t in (*texts, _tool(parts["tool"])) if t)])


def _table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows), ""])


def _errors(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    lines = []
    for model in dict.fromkeys(r["model"] for r in rows):
        mine = [r for r in rows if r["model"] == model]
        ratios = sorted(r["error_svd_data"] / r["error_svd"] for r in mine)
        worse = sum(r > 1 for r in ratios)
        lines.append([model, len(mine), f"{ratios[len(ratios) // 2]:.2f}", f"{ratios[-1]:.2f}", f"{worse} (none allowed)"])
    text = (
        "Squared output error of a layer on its calibration samples, data-aware over plain SVD at equal rank, a quarter and half "
    )
    heads = ["network", "layers x ranks", "middle ratio", "largest ratio", "data-aware worse"]
    return text + "of break-even:\n\n" + _table(heads, lines)


def _accuracy(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    lines = []
    floats = {r["model"]: r["accuracy"] for r in rows if r["variant"] == "float"}
    seen = set()
    for r in rows:
        if (r["model"], r["variant"]) in seen:
            continue
        seen.add((r["model"], r["variant"]))
        goal = GOALS.get((r["model"], r["variant"]))
        bound = None if goal is None else goal if goal > 0 else floats[r["model"]] + goal
        value = f"{r['accuracy']:.1f}" + ("" if bound is None else f" (at least {bound:.1f})")
        macs = f"{r['macs']:,}" if "macs" in r else "as above"
        value = f"**{value}**" if bound is not None and r["accuracy"] < bound else value
        lines.append([r["model"], r["variant"], value, f"{r['params']:,}", macs])
    return "Accuracy, percent of the evaluation samples:\n\n" + _table(
        ["network", "variant", "accuracy", "weights", "MACs"], lines
    )


def _peer(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    lines = [
        [r["model"], r["share"], r["variant"], f"{r['output_error']:.4f}", f"{r['accuracy']:.1f}", f"{r['seconds']:.1f}"]
        for r in rows
    ]
    text = (
        "greenformer 0.2.2 beside the same module at the ranks it chose (a share of its limit), without training; the error is "
        "that of the network's outputs, relative. It has the split `ced` only, which ResNet-20 does not survive here.\n\n"
    )
    return text + _table(["network", "share", "variant", "output error", "accuracy", "s"], lines)


def _instructions(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    dense = {r["model"]: r for r in rows if r["variant"].startswith("dense")}
    lines = []
    for r in rows:
        base = dense[r["model"]]
        ratios = [r[k] / base[k] for k in ("macs", "instructions", "weight_bytes")]
        lines.append([r["model"], r["variant"], f"{r['instructions']:,}", *(f"{v:.2f}" for v in ratios)])
    text = "Instructions of one int8 layer on an emulated Cortex-M4, counted; ratios to the dense layer:\n\n"
    return text + _table(["layer", "variant", "instructions", "MACs", "instructions ratio", "bytes"], lines)


def _tool(rows: Sequence[Row]) -> str:
    lines = [
        [
            r["model"], r["variant"], r["layers"], f"{r['seconds']} (at most 60)", r["cpu_seconds"],
            f"{r['peak_of_model']} (at most 2)",
        ] for r in rows
    ]  # fmt: skip
    heads = ["model", "threads", "layers", "s", "processor s", "memory beside the model, in models"]
    return "Factorizing every linear layer at half of its break-even rank:\n\n" + _table(heads, lines) if rows else ""


def latencies(rows: Sequence[Row]) -> str:
    """Latency ratios of low-rank layers, of RMSNorm and of other rewrites."""
    lines = []
    for r in rows:
        if r["variant"] != r["latency_ratio_to"]:
            low, high = r["latency_ratio_quartiles"]
            lines.append([r["model"], r["target"], r["variant"], r["latency_us"], f"{r['latency_ratio']} ({low}..{high})"])
    text = (
        "## Latency of low-rank layers and of exact rewrites\n\nRatio to the model as it came, of the same type, and quartiles. "
        "The paper on RMSNorm names 1 to 10 %.\n\n"
    )
    return text + _table(["model", "format", "variant", "us", "ratio"], lines)


def attention(rows: Sequence[Row]) -> str:
    """Linformer and low rank: accuracy after repair, and where each of them pays."""
    lines = [
        [r["variant"], r["repair_epochs"], f"{r['accuracy']:.1f}", f"{r['macs']:,}"] for r in rows if r["part"] == "accuracy"
    ]
    text = (
        "## Linformer beside low rank\n\nAn encoder on the recordings as 60 tokens, int8; keys and values at 16 tokens, "
        "or ranks of 16, or both. Linformer computes something else until it is trained:\n\n"
    )
    text += _table(["variant", "epochs of repair", "accuracy %", "MACs"], lines)
    lines = [
        [
            r["model"],
            r["target"],
            r["variant"],
            r["latency_us"],
            f"{r['latency_ratio']:.2f}",
            f"{r['macs_ratio']:.2f}",
            r["crossover_tokens"],
        ]
        for r in rows
        if r["part"] == "latency" and r["variant"] != "dense int8"
    ]
    text += "\nOne layer, ratios to the dense one; from so many tokens on Linformer has fewer MACs than low rank (modelled):\n\n"
    return text + _table(["model", "format", "variant", "us", "latency ratio", "MACs ratio", "crossover"], lines)
