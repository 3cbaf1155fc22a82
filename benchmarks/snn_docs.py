"""The section of docs/benchmarks.md about spiking networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["section"]

Row = Mapping[str, Any]
NAMES = {
    "mnist": "MNIST (2 conv, 2 linear)",
    "mnist_max": "MNIST, with max pools",
    "cifar10_jpeg": "CIFAR-10 as JPEG (5 conv, 1 linear)",
    "fsdd": "spoken digits (3 conv, 1 linear)",
}


def section(rows: Sequence[Row]) -> str:
    """All tables that there are rows for."""
    parts = {k: [r for r in rows if r["part"] == k] for k in ("qcfs", "calibrated", "confidence", "iir", "sltt", "nmnist")}
    peers = [r for r in rows if r["part"] == "peers"]
    lines = ["## Spiking networks: conversion and training", "", _INTRO]
    if parts["qcfs"]:
        lines += _qcfs(parts["qcfs"])
    if parts["calibrated"]:
        lines += _calibrated(parts["calibrated"], peers)
    if parts["confidence"]:
        lines += _confidence(parts["confidence"])
    if parts["iir"]:
        lines += _iir(parts["iir"])
    if parts["sltt"]:
        lines += _sltt(parts["sltt"])
    if parts["nmnist"]:
        lines += _nmnist(parts["nmnist"])
    return "\n".join(lines)


_INTRO = """
Networks and training are small, so that the script runs in minutes on a CPU: compare within a table. A SynOp is one weight added
because of one spike; MACs are what else is multiplied (an analogue first layer, averaged spikes), for one sample.
"""


def _bound(value: float, bound: float, least: bool) -> str:
    value = round(value, 6)
    met = value >= bound if least else value <= bound
    text = f"(at {'least' if least else 'most'} {bound:g})"
    return f"{value:.2f} {text if met else f'**{text}**'}"


def _qcfs(rows: Sequence[Row]) -> list[str]:
    lines = ["", "### QCFS at as many steps as it has levels", "", _QCFS]
    lines += ["| network | float | T = L | without time | conversion | accuracy | behind it | same class | SynOps | MACs |"]
    lines += ["|---|---|---|---|---|---|---|---|---|---|"]
    for r in rows:
        if r["variant"] == "float":
            real = r["accuracy"]
            continue
        lines.append(
            f"| {NAMES[r['set']]} | {real:.1f} | {r['steps']} | {r['without_time']:.1f} | {r['variant']} | {r['accuracy']:.1f} | "
            f"{_bound(r['without_time'] - r['accuracy'], 1.0, False)} | {_bound(r['agreement'], 98.0, True)} | "
            f"{r['synops']:,.0f} | {r['macs']:,.0f} |"
        )
    return lines


_QCFS = """
Without time: the trained network, whose activations have as many levels. Streaming: all layers in every step, with the correction
named ("none" is the method as published). Layered: a layer waits for all steps of the one before.
"""


def _calibrated(rows: Sequence[Row], peers: Sequence[Row]) -> list[str]:
    lines = ["", "### Unchanged networks converted, 128 unlabelled samples: accuracy by steps"]
    for name in dict.fromkeys(r["set"] for r in rows):
        mine = [r for r in (*rows, *peers) if r["set"] == name]
        real = next(r["accuracy"] for r in mine if r["variant"] == "float")
        lines += [
            "",
            f"{NAMES[name]}: float {real:.1f} %",
            "",
            "| conversion | 8 | 16 | 32 | SynOps at 16 |",
            "|---|---|---|---|---|",
        ]
        for variant in dict.fromkeys(r["variant"] for r in mine if r["variant"] != "float"):
            at = {r.get("steps"): r for r in mine if r["variant"] == variant}
            if any("remark" in r for r in at.values()):
                lines.append(f"| {variant} | {next(r['remark'] for r in at.values())} | | | |")
                continue
            cells = [f"{at[t]['accuracy']:.1f}" if t in at else "" for t in (8, 16, 32)]
            if variant == "mmse, bias" and name == "mnist":
                cells[1] = _bound(at[16]["accuracy"], real - 2, True)
            synops = f"{at[16]['synops']:,.0f}" if "synops" in at[16] else ""
            lines.append(f"| {variant} | {' | '.join(cells)} | {synops} |")
    return lines


def _confidence(rows: Sequence[Row]) -> list[str]:
    lines = [
        "",
        "### Dynamic Confidence on calibrated conversions",
        "",
        "| network | steps | mean steps | fewer % | 95th percentile | oracle | accuracy | of all steps | lost |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {NAMES[r['set']]} | {r['steps']} | {r['mean_steps']:.2f} | {_bound(r['fewer'], 30, True)} | {r['p95']} | "
            f"{r['oracle']:.2f} | {r['accuracy']:.1f} | {r['accuracy_all']:.1f} | "
            f"{_bound(r['accuracy_all'] - r['accuracy'], 0.2, False)} |"
        )
    return lines


def _iir(rows: Sequence[Row]) -> list[str]:
    by_steps = {r["steps"]: r["accuracy"] for r in rows}
    cells = " | ".join(f"{by_steps[t]:.1f}" for t in sorted(by_steps, reverse=True))
    heads = " | ".join(f"T = {t}" for t in sorted(by_steps, reverse=True))
    lost = _bound(by_steps[max(by_steps)] - by_steps[1], 2.0, False)
    return [
        "", "### Fewer steps by stages (IIR-SNN), MNIST, one epoch a stage", "", f"| {heads} | lost from first to last |",
        "|---" * (len(by_steps) + 1) + "|", f"| {cells} | {lost} |",
    ]  # fmt: skip


def _sltt(rows: Sequence[Row]) -> list[str]:
    lines = [
        "",
        "### SLTT beside BPTT, MNIST network of leaky neurons, batch of 8",
        "",
        "| time constant | steps | BPTT saves, bytes | SLTT saves, bytes | cosine of the gradients | largest difference |",
        "|---|---|---|---|---|---|",
    ]
    for r in rows:
        lines.append(
            f"| {r['variant'].removeprefix('tau ')} | {r['steps']} | {r['bptt_bytes']:,} | {r['sltt_bytes']:,} | "
            f"{min(r['cosine'], 1.0):.4f} | {r['difference']:.2g} |"
        )
    return lines


def _nmnist(rows: Sequence[Row]) -> list[str]:
    lines = [
        "", "### N-MNIST events: 1000 recordings to train on, 100 to judge by", "",
        "| trained on | steps | accuracy | SynOps | MACs |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for r in rows:
        cost = f"{r['synops']:,.0f} | {r['macs']:,.0f}"
        lines.append(f"| {r['variant']} | {r['steps']} | {_bound(r['accuracy'], 90, True)} | {cost} |")
    return lines
