"""What of a run is less than was asked for, in sentences that name the layers: float work, and weights stored wider."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgekit.frozen import FrozenProgram

__all__ = ["in_float", "integer_layers_in_float", "named", "remedy", "shortfalls"]

_SHOWN = 3


def shortfalls(folder: Path) -> list[str]:
    """Sentences on a run folder: operators left in float, integer layers that a file computes in float, weights stored wider."""
    from edgekit.frozen import load

    frozen = folder / "frozen.pt2"
    if not frozen.is_file():
        return []
    program = load(frozen)
    found: list[str] = []
    if not _float_spiking(program) and (left := [f"{u.layer} ({u.op})" for u in program.unquantized]):
        verb = "operator stays" if len(left) == 1 else "operators stay"
        found.append(f"{len(left)} {verb} in float: {named(left)}; `edgekit describe {frozen}` gives the reasons")
    for path in sorted(folder.glob("export_*.json")):
        facts = json.loads(path.read_text())
        found += _of_file(facts["target"], facts["coverage"], facts.get("options", {}), program)
    return found


def _float_spiking(program: FrozenProgram) -> bool:
    """Whether it is a spiking network in float, as its recipe asked: float is nothing less there."""
    from edgekit.frozen.spiking_ops import FLOAT_OPS, MOVING_OPS

    ops = {layer.op for layer in program.layers}
    return bool(ops & FLOAT_OPS) and ops <= FLOAT_OPS | MOVING_OPS


def named(layers: Sequence[str]) -> str:
    """The first three, and how many more: ``named(list("abcde")) == "a, b, c and 2 more"``."""
    more = len(layers) - _SHOWN
    return ", ".join(layers[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def in_float(row: Mapping[str, Any]) -> bool:
    """Whether a row of a file's coverage computes in float, inside of a delegate or not."""
    return bool(row["runs"] == "float")


def integer_layers_in_float(rows: Sequence[Mapping[str, Any]], program: FrozenProgram) -> list[str]:
    """The program's integer layers that a file computes in float, from the file's coverage."""
    from edgekit.frozen.spiking_ops import FLOAT_OPS, MOVING_OPS

    integer = {layer.name for layer in program.layers if layer.op not in {"quantize", "dequantize", *FLOAT_OPS, *MOVING_OPS}}
    return [r["layer"] for r in rows if r["layer"] in integer and in_float(r)]


def _of_file(target: str, rows: Sequence[Mapping[str, Any]], options: Mapping[str, Any], program: FrozenProgram) -> list[str]:
    found, bits = [], {layer.name: layer.weight_bits for layer in program.layers}
    if layers := integer_layers_in_float(rows, program):
        verb = "integer layer runs" if len(layers) == 1 else "integer layers run"
        advice = remedy(target, layers, program, options)
        found.append(f"{target}: {len(layers)} {verb} in float between integers: {named(layers)}{advice and f'; {advice}'}")
    wider: dict[str, list[str]] = {}
    for r in rows:
        if r["storage"].startswith("int") and int(r["storage"][3:]) > (bits.get(r["layer"]) or 8):
            wider.setdefault(r["storage"], []).append(r["layer"])
    for storage, layers in wider.items():
        whose = "1 layer" if len(layers) == 1 else f"{len(layers)} layers"
        found.append(f"{target}: weights below 8 bits of {whose} are stored as {storage}: {named(layers)}")
    real = [] if _float_spiking(program) else [r for r in rows if r["macs"] and in_float(r)]
    if real:
        share = 100 * sum(r["macs"] for r in real) / sum(r["macs"] for r in rows)
        shown = f"{share:.1f}" if share >= 0.05 else "under 0.1"
        found.append(f"{target}: {shown} % of the multiply-accumulates run in float: {named([r['layer'] for r in real])}")
    return found


def remedy(target: str, layers: Sequence[str], program: FrozenProgram, options: Mapping[str, Any] | None = None) -> str:
    """What can be done about integer layers that run in float; "" for nothing. ONNX has an option for functions of one value."""
    functions = [name for name in layers if program.layer(name).op == "qlut"]
    if target != "onnx" or (options or {}).get("tables") or not functions:
        return ""
    whose = "them" if len(functions) == len(layers) else named(functions)
    return f"the target option `onnx: {{tables: true}}` makes exact integer tables of {whose}, which are slower"
