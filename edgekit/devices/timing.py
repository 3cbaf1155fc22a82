"""From the runner's nanoseconds to a :class:`Profile`, with what a reader must know about the machine it was measured on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.profile import LayerCost, Profile, Settings
from edgekit.targets.cuts import Cut

__all__ = ["profile", "with_layers"]


def profile(
    device: str, target: str, macs: int, settings: Settings, result: Mapping[str, Any], nanoseconds: Sequence[NDArray[np.int64]]
) -> Profile:
    """The profile of the one file of a request.

    Args:
        result: what the runner told.
        nanoseconds: one array: every timed run.
    """
    times = np.asarray(nanoseconds[0], np.float64) / 1e3
    facts, series = result["files"][0], result["series"]
    p50, p90, p99 = (float(x) for x in np.percentile(times, [50, 90, 99]))
    figures: dict[str, float | None] = {
        "p50_microseconds": p50,
        "p90_microseconds": p90,
        "p99_microseconds": p99,
        "min_microseconds": float(times.min()),
        "inferences_a_second": 1e6 / float(times.mean()),
        "first_microseconds": facts["first_microseconds"],
        "load_microseconds": facts["load_microseconds"],
        "peak_memory_bytes": result["peak_rss_bytes"],
        "file_memory_bytes": _difference(facts["rss_loaded_bytes"], facts["rss_before_bytes"]),
        "timed_runs": len(times),
        "other_load_percent": None if result.get("other_load") is None else 100 * result["other_load"],
        "drift_percent": _drift(series),
    }
    threads = f"{settings.num_threads} thread{'s' if settings.num_threads > 1 else ''}"
    where = "" if result["pinned"] is None else f" pinned to processor {', '.join(map(str, result['pinned']))}"
    lasting = "" if settings.seconds is None else f" over {settings.seconds:g} seconds"
    method = (
        f"median of {len(times):,} timed calls{lasting} after one first call and {settings.warmup_runs} warm-up runs, "
        f"{facts['runtime']} {facts['version']}, {threads}{where}; the same sample each time"
    )
    identity = {**result["machine"], "num_threads": settings.num_threads, "runtime": f"{facts['runtime']} {facts['version']}"}
    fingerprint = {"machine": identity, "pinned": result["pinned"], "before": result["before"], "after": result["after"]}
    return Profile(
        device=device, target=target, file="", sha256=facts["sha256"], unit="microseconds", total=p50, macs=macs,
        figures={k: float(v) for k, v in figures.items() if v is not None}, fingerprint=fingerprint,
        series=tuple({k: v for k, v in row.items() if v is not None} for row in series),
        method=method, notes=tuple(_notes(result, figures, settings)),
    )  # fmt: skip


def with_layers(
    found: Profile, parts: Sequence[Cut], nanoseconds: Sequence[NDArray[np.int64]], macs: Mapping[str, int]
) -> Profile:
    """The profile with a cost for each part of the file, less what a program costs that computes nothing.

    Args:
        parts: the empty one first.
        nanoseconds: every timed call of each part.
    """
    middle = [float(np.median(t)) / 1e3 for t in nanoseconds]
    costs = [max(0.0, m - middle[0]) for m in middle[1:]]
    whole = sum(costs)
    layers = tuple(
        LayerCost(part.layer, part.op, macs.get(part.layer, 0), microseconds=cost, share=cost / whole if whole else 0.0)
        for part, cost in zip(parts[1:], costs, strict=True)
    )
    alone = max(0.0, found.total - middle[0])
    method = (
        f"{found.method}. Layers: each cut out of the file and timed alone, in turn, less the {middle[0]:.3g} µs of a program "
        f"that computes nothing; together {whole:.4g} µs, the file itself less the same {alone:.4g} µs"
    )
    return replace(found, layers=layers, method=method)


def _difference(a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else a - b


def _drift(series: Sequence[Mapping[str, Any]]) -> float | None:
    """How much slower the last quarter of a sustained run was than its first, in percent of the first."""
    part = len(series) // 4
    if not part:
        return None
    middle = [row["median_microseconds"] for row in series]
    first, last = float(np.median(middle[:part])), float(np.median(middle[-part:]))
    return 100 * (last / first - 1)


def _notes(result: Mapping[str, Any], figures: Mapping[str, float | None], settings: Settings) -> list[str]:
    machine, before, after, notes = result["machine"], result["before"], result["after"], []
    if (other := figures["other_load_percent"]) is not None and other > 10:
        notes.append(f"Other programs used {other:.0f} % of the machine meanwhile: the least time is steadier than the median.")
    for when, state in (("before", before), ("after", after)):
        if state["throttled"]:
            notes.append(f"The firmware said {when} the run: {state['throttled']}; such times are not those of a cool machine.")
    if machine["governor"] not in (None, "performance"):
        notes.append(
            f"The processor's clock is governed ({machine['governor']}); set the governor to performance for steady times."
        )
    if machine["virtual"]:
        notes.append("A virtual machine: its host may take processor time away without a trace here.")
    if result["pinned"] is None and settings.num_threads < machine["usable_cores"]:
        notes.append("Not pinned to a processor: that is not allowed here.")
    if (drift := figures["drift_percent"]) is not None and abs(drift) > 5:
        heat = (before["temperature_celsius"], after["temperature_celsius"])
        told = "" if None in heat else f", {heat[0]:.0f} to {heat[1]:.0f} °C"
        notes.append(f"It drifted by {drift:+.0f} % from the first to the last quarter of the run{told}.")
    return notes
