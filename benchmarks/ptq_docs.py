"""The pages' table of few-bit quantization by other tools beside ours."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
FRONT = Path(__file__).resolve().parent / "results" / "ptq_front.json"
RECIPES = FRONT.with_name("ptq.json")
OURS = ("nearest", "gptq", "adaround", "brecq, qdrop")


def peers(rows: Sequence[Row], titles: Mapping[str, str]) -> str:
    """A table for each network and width: ours (of benchmarks/ptq_front.py) and each other tool's, best first."""
    front = json.loads(FRONT.read_text())["rows"] if FRONT.is_file() else []
    lines = ["## Few bits after training, other tools", "", _TEXT]
    for model, w, a in dict.fromkeys((r["model"], r["weight_bits"], r["activation_bits"]) for r in rows):

        def here(r: Row, model: str = model, w: int = w, a: int = a) -> bool:
            return (r["model"], r["weight_bits"], r["activation_bits"], r["seed"]) == (model, w, a, 0)

        mine = [{**r, "variant": f"**edgekit {r['variant']}**"} for r in front if here(r) and r["target"] == "frozen"]
        mine = [r for r in mine if r["variant"].removeprefix("**edgekit ").removesuffix("**") in OURS]
        mine += _recipe(model, w) if a == 8 else []
        theirs = [r for r in rows if here(r)]
        lines += ["", f"{titles[model]}, {w}-bit weights, {a}-bit activations:", ""]
        lines += ["| tool and method | accuracy | judged | processor s | peak MB |", "|---|---|---|---|---|"]
        for r in sorted([*mine, *theirs], key=lambda r: -r.get("accuracy", 0.0)):
            lines.append(f"| {r['variant']} | {_figures(r)} |")
        best = max((r["accuracy"] for r in theirs if "accuracy" in r), default=0.0)
        ours = max((r["accuracy"] for r in mine), default=None)
        if ours is not None:
            lines += ["", f"Best of ours {ours:.1f}, best of the others {best:.1f}: {ours - best:+.1f} points."]
    return "\n".join(lines)


def firmware(rows: Sequence[Row], titles: Mapping[str, str]) -> list[str]:
    """Lines of a table of the rows that are firmware, beside their frozen programs."""
    found = [r for r in rows if "instructions" in r]
    if not found:
        return []
    frozen = {_key(r): r["accuracy"] for r in rows if r["target"] == "frozen"}
    lines = ["", "### Firmware of few bits", "", _FIRMWARE, ""]
    lines += ["| network | bits | method | core | frozen program | firmware | same class % | flash | RAM | instructions |"]
    lines += ["|" + "---|" * 10]
    for r in found:
        bits = f"W{r['weight_bits']}A{r['activation_bits']}"
        cells = [titles[r["model"]], bits, r["variant"], r["target"], f"{frozen[_key(r)]:.1f}", f"{r['accuracy']:.1f}"]
        sizes = [f"{r['bytes']:,}", f"{r['ram']:,}", f"{r['instructions']:,}"]
        lines.append("| " + " | ".join([*cells, f"{r['same_class_as_frozen']:.1f}", *sizes]) + " |")
    return lines


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[k] for k in ("model", "variant", "weight_bits", "activation_bits", "seed"))


_FIRMWARE = """
Built from the same frozen programs, booted on an emulated board; every sample that ran there equals the numpy reference of the
kernels in every bit, and the accuracy is that reference's on all 1000. Flash has code in it.
"""


def _recipe(model: str, bits: int) -> list[dict[str, Any]]:
    """The row of the example's own 4-bit recipe."""
    if not RECIPES.is_file():
        return []
    rows = json.loads(RECIPES.read_text())["rows"]
    found = [r for r in rows if (r["model"], r["weight_bits"], r["seed"], r["target"]) == (model, bits, 0, "frozen")]
    seconds = {
        r["compress_s"] for r in rows if (r["model"], r["weight_bits"], r["seed"]) == (model, bits, 0) and "compress_s" in r
    }
    return [
        {**r, "variant": "**edgekit, the example's recipe**", "processor_s": max(seconds), "peak_memory_mb": ""} for r in found
    ]


def _figures(row: Row) -> str:
    if "accuracy" not in row:
        return f"refused: {row['remarks']} | | |"
    judged = {"frozen": "frozen program, whose files are exact", "fake-quant": "fake quantization, no file"}
    size = f"{row['target']} file, {row['bytes']:,} bytes" if row["target"] not in judged else judged[row["target"]]
    return f"{row['accuracy']:.1f} | {size} | {row['processor_s']:.0f} | {row['peak_memory_mb']}"


_TEXT = """
Seed 0, the same calibration and test samples for all; 1000 test samples, so differences below about a point say little.
Ours are from the section above: the frozen program, which `.pte`, `.onnx` and unpacked `.tflite` files equal in every bit;
at W4A8 also what the example's own recipe makes (first section of this page; its DS-CNN keeps depthwise layers at 8 bits,
as ai-edge-quantizer does). Files of other tools are run in their runtimes.
"""
