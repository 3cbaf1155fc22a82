"""A float spiking program written out for converters: plain ATen operators, the steps of its neurons one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx

from edgekit.artifact import Coverage, Mismatch
from edgekit.errors import UnsupportedError
from edgekit.frozen import FrozenProgram
from edgekit.frozen.ops import OPS
from edgekit.frozen.spiking_ops import SPIKING_OPS, STATEFUL_OPS
from edgekit.targets.fold import fold_constants
from edgekit.targets.spiking_rules import UNLOWERED, spiking_rules

__all__ = ["Written", "check", "gathered", "is_spiking", "owners", "plain", "renamed", "written_out"]


@dataclass(frozen=True)
class Written:
    """A program without spiking operators.

    Attributes:
        program: the same computation; other layers and float operators have their names.
        neurons: layer of neurons to the fx node that has its output, in order of execution.
    """

    program: FrozenProgram
    neurons: Mapping[str, str]


def is_spiking(program: FrozenProgram) -> bool:
    """Whether a program has operators with time."""
    return any(layer.op in SPIKING_OPS for layer in program.layers)


def check(program: FrozenProgram, target: str) -> None:
    """Refuse what has no form in a converter's operators.

    Raises:
        UnsupportedError: integer neurons, thresholds that are not positive; names the layer.
    """
    for layer in program.layers:
        threshold, reason = layer.args.get("v_threshold"), ""
        if layer.op in UNLOWERED:
            reason = f"{layer.op} is of the integer form, which is for firmware; lower the float one (`weights: float`)"
        elif isinstance(threshold, Tensor) and float(threshold.min()) <= 0:
            reason = "a threshold is not positive; use target nir"
        if reason:
            source = program.sources.get(layer.name, "")
            raise UnsupportedError(f"target {target}, layer {layer.name}{f' ({source})' if source else ''}: {reason}")


def _write_out(program: FrozenProgram, floors: bool) -> Written:
    table: dict[Any, Any] = {getattr(OPS, name).default: rule for name, rule in spiking_rules(floors).items()}
    exported = fold_constants(program.exported.run_decompositions(table))
    made = FrozenProgram(exported, program.name, program.unquantized, program.sources)
    wanted = {layer.name for layer in program.layers if layer.op in STATEFUL_OPS or layer.op == "fire"}
    found: dict[str, str] = {}
    for node in made.module.graph.nodes:
        name = _module(node)
        if node.op == "call_function" and name in wanted:
            found[name] = node.name
    return Written(made, found)


def plain(program: FrozenProgram, floors: bool = False) -> FrozenProgram:
    """The program in plain operators; a program without spiking operators as it is."""
    return written_out(program, floors).program


def owners(program: FrozenProgram, floors: bool = False) -> dict[str, str]:
    """Name of each float operator that a spiking layer was written out to, to that layer's name; the layers of neurons only."""
    written, mine = written_out(program, floors), {layer.name for layer in program.layers}
    modules = {node.name: _module(node) for node in written.program.module.graph.nodes}
    return {x.name: modules[x.node] for x in written.program.float_layers if modules[x.node] in mine}


def renamed(mismatches: Sequence[Mismatch], program: FrozenProgram, floors: bool = False) -> list[Mismatch]:
    """Differences by the names of the program's own layers."""
    known = owners(program, floors) if mismatches and is_spiking(program) else {}
    return [replace(m, layer=known.get(m.layer, m.layer)) for m in mismatches]


def gathered(coverage: Sequence[Coverage], program: FrozenProgram, floors: bool = False) -> tuple[Coverage, ...]:
    """One row of coverage for each layer of neurons, in place of one for each of its operators."""
    if not is_spiking(program):
        return tuple(coverage)
    known, rows = owners(program, floors), dict[str, list[Coverage]]()
    for row in coverage:
        rows.setdefault(known.get(row.layer, row.layer), []).append(row)
    steps = {layer.name: layer.steps for layer in program.layers}
    found = []
    for name, mine in rows.items():
        if len(mine) == 1 and name not in steps:
            found.append(mine[0])
            continue
        counts: dict[str, int] = {}
        for row in mine:
            counts[row.op] = counts.get(row.op, 0) + 1
        note = f"{steps[name]} steps written out" if steps.get(name) else ""
        kinds, storage = "+".join(k for k in counts if k), next((r.storage for r in mine if r.storage), "")
        found.append(Coverage(name, kinds, "float", sum(r.macs for r in mine), storage, note))
    return tuple(found)


def written_out(program: FrozenProgram, floors: bool = False) -> Written:
    """The program in plain operators; a program without spiking operators as it is.

    Args:
        floors: comparisons as floors of quotients, which XNNPACK takes (:mod:`edgekit.targets.spiking_rules`).
    """
    if not is_spiking(program):
        return Written(program, {})
    kept: dict[bool, Written] = program.__dict__.setdefault("_written_out", {})  # asked for again and again by verify
    if floors not in kept:
        kept[floors] = _write_out(program, floors)
    return kept[floors]


def _module(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return next(reversed(stack.values()))[0] if stack else ""
