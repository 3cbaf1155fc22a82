"""The section of docs/benchmarks.md about firmware, from the rows of results/firmware.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
MAIN = ("mps2-an386", "mps3-an547")

_HEAD = """
## Firmware

Instructions of one inference on boards emulated by QEMU: exact, the same on every run, and not time. Every firmware is first
compared with its numpy reference, bit by bit, and every float program with PyTorch. Flash and RAM are of the linked file; RAM
holds the arena (activations and scratch), 4,096 bytes of reserved stack and the static data.
"""


def firmware(rows: Sequence[Row], titles: Mapping[str, str]) -> str:
    """All of it."""
    networks = [r for r in rows if r["kind"] == "network"]
    parts = [_HEAD.strip()]
    for board in MAIN:
        chosen = [r for r in networks if r["board"] == board]
        if chosen:
            parts += [f"### Networks on {chosen[0]['core']} ({board})", _networks(chosen, titles)]
    parts += ["### RAM", _arenas([r for r in networks if r["board"] == MAIN[0]], titles)]
    parts += ["### Single layers", _layers([r for r in rows if r["kind"] == "kernel"])]
    others = [r for r in networks if r["board"] not in MAIN]
    if others:
        parts += ["### Every other board", _boards(others, titles)]
    parts += [_walls(networks)]
    sets = [r for r in rows if r["kind"] == "set"]
    if sets:
        parts += ["### Whole evaluation sets", _sets(sets, titles)]
    parts += [
        f"### Bit flips\n\n{r['flips']:,} images of {titles[r['model']]} for {r['board']}, each with one random bit of its "
        f"constants turned over in flash: {r['caught']:,} were caught by the CRC before the first inference, and the damaged "
        f"constant was named; {r['hung']} hung, {r['computed']} went on to compute, {r['other']} ended otherwise."
        for r in rows
        if r["kind"] == "flips"
    ]
    return "\n\n".join(p for p in parts if p)


def _networks(rows: Iterable[Row], titles: Mapping[str, str]) -> str:
    body = [
        [
            titles[r["model"]], _maker(r), f"{r['instructions']:,}", _limited(r, "instructions_per_mac", "{:.3f}"),
            *(f"{r[k]:,}" for k in ("flash_code", "flash_weights", "arena", "ram", "stack_used")),
        ]
        for r in rows
        if "instructions" in r
    ]  # fmt: skip
    return _table(["network", "made by", "instructions", "per MAC", "code", "weights", "arena", "RAM", "stack used"], body)


def _maker(row: Row) -> str:
    if row["variant"] != "edgekit":
        return str(row["variant"])
    return "edgekit, portable C" if row["kernel_set"] == "portable" else f"edgekit, {row['kernel_set']} kernels"


def _limited(row: Row, key: str, form: str) -> str:
    bound = row.get(f"{key}_bound")
    if bound is None:
        return form.format(row[key])
    text = form.format(row[key])
    return f"{f'**{text}**' if row[key] > bound else text} (at most {bound:,})"


def _arenas(rows: Iterable[Row], titles: Mapping[str, str]) -> str:
    body = [
        [titles[r["model"]], f"{r['arena']:,}", f"{r['arena_bound']:,}", f"{r['tflm_arena']:,}"]
        for r in rows
        if r["variant"] == "edgekit" and r["kernel_set"] != "portable" and r.get("tflm_arena")
    ]
    text = (
        "Bytes of arena on the Cortex-M4, what the tensors' lifetimes allow at best if no output lies over its own input, and "
        "what TFLite for Microcontrollers takes for MLPerf's int8 file of the network."
    )
    return f"{text}\n\n" + _table(["network", "edgekit", "least by lifetimes", "TFLM"], body)


def _layers(rows: Iterable[Row]) -> str:
    body = [
        [r["kernel"], r["core"], r["kernel_set"], _limited(r, "instructions", "{:,}"), f"{r['instructions_per_mac']:.3f}"]
        for r in rows
    ]
    return _table(["layer", "core", "kernels", "instructions", "per MAC"], body)


def _boards(rows: Sequence[Row], titles: Mapping[str, str]) -> str:
    """One line for each network and board: instructions per MAC and RAM of the board's own kernels, of portable C and float C."""
    body = []
    for model, board in dict.fromkeys((r["model"], r["board"]) for r in rows):
        mine = [r for r in rows if (r["model"], r["board"]) == (model, board)]
        own = next(r for r in mine if r["variant"] == "edgekit")
        cells = [titles[model], f"{board} ({own['core']})", _maker(own).removeprefix("edgekit, ")]
        if "instructions" not in own:
            body.append([*cells, "does not fit", "", "", ""])
            continue
        plain = next((r for r in mine if r["variant"].startswith("float C")), {})
        beside = f"{plain['instructions_per_mac']:.2f}" if "instructions" in plain else "does not fit"
        body.append([*cells, f"{own['instructions']:,}", f"{own['instructions_per_mac']:.3f}", beside, f"{own['ram']:,}"])
    head = ["network", "board", "kernels", "instructions", "per MAC", "float C, per MAC", "RAM"]
    return _table(head, body)


def _walls(rows: Sequence[Row]) -> str:
    found = [r for r in rows if "processor_seconds" in r]
    if not found:
        return ""
    busy, wall = (sorted(r[k] for r in found) for k in ("processor_seconds", "wall_seconds"))
    return (
        f"Compiling everything, booting and one inference took {busy[0]:.1f} to {busy[-1]:.1f} s of processor time on this host "
        f"(median {busy[len(busy) // 2]:.1f} s over {len(found)} networks and boards; {wall[0]:.1f} to {wall[-1]:.1f} s by the "
        "clock while other work was running beside it)."
    )


def _sets(rows: Iterable[Row], titles: Mapping[str, str]) -> str:
    body = []
    for r in rows:
        judged = [f"{r[k]:.2f}" for k in ("on_board", "frozen", "float")]
        steps = [f"{r['max_lsb']:g}", f"{r['mean_lsb']:.2f}", f"{r['equal_outputs']:.1f}"]
        body.append([titles[r["model"]], f"{r['samples']:,}", r["metric"].replace("_", " "), *judged, *steps])
    text = "Every sample ran on the emulated Cortex-M4; differences are from the frozen program, in steps of the output."
    head = ["network", "samples", "metric", "on the board", "frozen program", "float", "max LSB", "mean LSB", "equal outputs %"]
    return f"{text}\n\n" + _table(head, body)


def _table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *body))
