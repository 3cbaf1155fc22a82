"""Latency of our files as a ratio to other tools' files in the same runtime: one thread, interleaved, medians.

    python benchmarks/latency.py [--models resnet8] [--rounds 200]

Uses the files that benchmarks/ptq.py left (seed 0). In each round every file runs for some milliseconds in turn: a change
of the machine's speed meets all of them; the ratio is the median over rounds of (ours / theirs) of that round. Below 1: ours is
faster. What is timed is the runtime's call alone; inputs are already in the layout and type that the file takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import peers
import subjects
from ptq import file_of
from subjects import Subject, log

GOAL = 1.0
RUNTIMES = ("executorch", "tflite", "onnx")


def callables(net: Subject, target: str, bits: int) -> dict[str, tuple[Callable[[], Any], str]]:
    """Variant to (run once, how it takes input) for every file of this runtime that is there."""
    found: dict[str, tuple[Callable[[], Any], str]] = {}
    names = ["edgekit", *(name for name, (runtime, wide, *_) in peers.PEERS.items() if (runtime, wide) == (target, bits))]
    for name in names:
        path = file_of(net, name, target, bits, 0)
        if path.is_file():
            give, run, takes = peers.caller(path, net)
            give(net.x[:1].numpy())
            found[name] = (run, takes)
    return found


def interleaved(runs: dict[str, Callable[[], Any]], rounds: int, budget_s: float = 0.008) -> dict[str, list[float]]:
    """Seconds of one call, for each round; the order turns by one each round."""
    repeats = {}
    for name, run in runs.items():
        for _ in range(3):
            run()
        start = time.perf_counter()
        run()
        repeats[name] = max(1, int(budget_s / max(time.perf_counter() - start, 1e-6)))
    names, times = list(runs), {name: [] for name in runs}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            run = runs[name]
            start = time.perf_counter()
            for _ in range(repeats[name]):
                run()
            times[name].append((time.perf_counter() - start) / repeats[name])
    return times


def rows_of(net: Subject, target: str, bits: int, rounds: int) -> list[dict[str, Any]]:
    found = callables(net, target, bits)
    if "edgekit" not in found:
        log(f"  {net.name} {target} w{bits}: no file; run benchmarks/ptq.py first")
        return []
    times = interleaved({name: run for name, (run, _) in found.items()}, rounds)
    middle = {name: median(values) for name, values in times.items()}
    others = [name for name in found if name != "edgekit"]
    ratios = {name: float(np.median(np.array(times["edgekit"]) / np.array(times[name]))) for name in others}
    best = max(others, key=ratios.__getitem__, default=None)  # the one we look worst against
    rows = []
    for name in found:
        rows.append({
            "model": net.name, "variant": name, "target": target, "device": "host", "weight_bits": bits, "input": found[name][1],
            "latency_us": round(1e6 * middle[name], 1),
            **({} if name == "edgekit" else {"edgekit_over_this": round(ratios[name], 3)}),
            **({"best_peer": True} if name == best else {}),
        })  # fmt: skip
        log("  " + ", ".join(f"{k} {v}" for k, v in rows[-1].items() if k != "device"))
    if best is not None:
        low, high = np.percentile(np.array(times["edgekit"]) / np.array(times[best]), [25, 75])
        rows[0] |= {"latency_ratio": round(ratios[best], 3), "latency_ratio_quartiles": [round(low, 3), round(high, 3)]}
        rows[0] |= {"latency_ratio_to": best, "latency_ratio_bound": GOAL}
    return rows


def main() -> None:
    given = subjects.arguments(__doc__ or "", rounds=200, bits=[8, 4])
    rows: list[dict[str, Any]] = []
    for name in given.models:
        net = subjects.subject(name)
        for bits in given.bits:
            for target in RUNTIMES:
                rows += rows_of(net, target, bits, given.rounds)
    subjects.write("latency", rows)


if __name__ == "__main__":
    main()
