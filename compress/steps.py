"""Run the compression blocks of a recipe, in order, on one model.

Float passes (``rewrite``, ``lowrank``, ``binary``, ``repair``) turn the captured graph into another one; ``ptq`` and ``qat`` then
decide the integers. A recipe without them gives a frozen program in float, said so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from edgekit.compress.capture import Graph, capture
from edgekit.compress.order import misplaced
from edgekit.compress.passes import FloatPass
from edgekit.compress.ptq.freeze import ZERO_POINTS, freeze
from edgekit.compress.ptq.plan import Plan
from edgekit.compress.ptq.quantize import Progress, quantize, train
from edgekit.compress.ptq.units import find_units
from edgekit.data import Data, batches, sample_inputs
from edgekit.errors import InputError
from edgekit.frozen import FrozenProgram

if TYPE_CHECKING:
    from edgekit.compress.lowrank.metered import Measure
    from edgekit.compress.spiking.unroll import SpikingNet

__all__ = ["Compressed", "apply"]


class _Block(Protocol):
    @property
    def kind(self) -> str: ...
    @property
    def settings(self) -> Any: ...


@dataclass(frozen=True)
class Compressed:
    """A compressed model.

    Attributes:
        program: the frozen program.
        simulation: the compressed model in float arithmetic (fake quantization), any batch size.
        record: what was done, plain values for JSON: ``passes`` (kind, settings, layers changed), ``unquantized``, ``warnings``.
    """

    program: FrozenProgram
    simulation: nn.Module
    record: dict[str, Any]


@dataclass(frozen=True)
class _State:
    """The model between two blocks; ``plan`` is None until it is quantized, ``original`` the last graph that lost nothing.

    ``spiking``: the network over time that ends a recipe with a ``spiking`` block.
    """

    original: Graph
    graph: Graph
    plan: Plan | None = None
    spiking: SpikingNet | None = None
    passes: tuple[dict[str, Any], ...] = ()
    warnings: tuple[str, ...] = ()
    folder: Path | None = None
    measure: Measure | None = None


def apply(
    model: nn.Module,
    blocks: Sequence[_Block],
    data: Data,
    *,
    name: str = "model",
    progress: Progress | None = None,
    folder: Path | None = None,
    measure: Measure | None = None,
) -> Compressed:
    """Compress ``model`` by ``blocks``, each with a ``kind`` ("lowrank", "ptq", "qat", ...) and its ``settings``.

    Args:
        folder: finished parts of long methods are kept here and taken from here, so that an interrupted call goes on where it
            was; for one model, data and blocks only.
        measure: what a program costs on a target, for budgets in that (:func:`edgekit.layer_costs.measure`).

    Raises:
        InputError: no blocks, or one that cannot stand where it does.
        ModelError, DataError: see :func:`edgekit.compress.capture.capture` and :func:`edgekit.compress.ptq.plan.make_plan`.
    """
    if not blocks:
        raise InputError("compress: no steps given; name at least one, such as `- ptq: {weights: int8}`")
    if (wrong := misplaced([block.kind for block in blocks])) is not None:
        raise InputError(f"compress: {wrong[1]}")
    if any(getattr(block.settings, "asymmetric_weights", False) for block in blocks):  # before hours of learning
        raise InputError(f"compress: {ZERO_POINTS}")
    from edgekit.compress.ptq.simulate import simulate

    if blocks[-1].kind == "spiking":
        from edgekit.compress.spiking.own import is_network

        if is_network(model):
            return _own_network(model, blocks, data, name, progress)
    graph = capture(model, sample_inputs(model, data))
    state = _State(graph, graph, folder=folder, measure=measure)
    for block in blocks:
        state = _STEPS[block.kind](state, block, data, progress)
    if state.spiking is not None:
        return _spiking_program(state, graph, name, blocks[-1].settings, data)
    plan = state.plan or _float_plan(state.graph)
    program = freeze(state.graph, plan, name)
    record = {
        "passes": list(state.passes),
        "unquantized": [[u.layer, u.op, u.reason] for u in plan.unquantized],
        "warnings": [*_never_run(graph), *state.warnings, *plan.warnings],
    }
    simulation = simulate(state.graph, plan)
    return Compressed(program, simulation if state.graph.dynamic_batch else _OneByOne(simulation), record)


class _OneByOne(nn.Module):
    """A simulation whose graph takes one sample, for any batch size."""

    def __init__(self, one: nn.Module) -> None:
        super().__init__()
        self.one = one

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        answers = [self.one(*(x[i : i + 1] for x in inputs)) for i in range(len(inputs[0]))]
        if isinstance(answers[0], Tensor):
            return torch.cat(answers)
        return tuple(torch.cat(parts) for parts in zip(*answers, strict=True))


def _quantizing(
    step: Callable[..., tuple[Graph, Plan]], state: _State, block: _Block, data: Data, progress: Progress | None
) -> _State:
    graph, plan = step(state.graph, block.settings, data, state.plan, progress)
    entry = {"kind": block.kind, "settings": asdict(block.settings), **plan.facts, "layers": dict(plan.changes)}
    return replace(state, graph=graph, plan=plan, passes=(*state.passes, entry))


def _ptq(state: _State, block: _Block, data: Data, progress: Progress | None) -> _State:
    folder = None if state.folder is None else state.folder / str(len(state.passes))
    return _quantizing(partial(quantize, folder=folder), state, block, data, progress)


def _in_float(
    load: Callable[[], FloatPass], state: _State, block: _Block, data: Data, progress: Progress | None, *, exact: bool = False
) -> _State:
    graph, record = load()(state.graph, block.settings, data, state.original, progress)
    entry = {"kind": block.kind, "settings": asdict(block.settings), **record.to_json()}
    original = graph if exact and state.original is state.graph else state.original
    made = replace(state, original=original, graph=graph, passes=(*state.passes, entry))
    return replace(made, warnings=(*state.warnings, *record.warnings))


def _rewrite() -> FloatPass:
    from edgekit.compress.rewrite.step import rewrite

    return rewrite


def _lowrank(state: _State, block: _Block, data: Data, progress: Progress | None) -> _State:
    from edgekit.compress.lowrank.step import lowrank

    return _in_float(lambda: partial(lowrank, measure=state.measure), state, block, data, progress)


def _binary(state: _State, block: _Block, data: Data, progress: Progress | None) -> _State:
    from edgekit.compress.binary.step import binarize

    folder = None if state.folder is None else state.folder / str(len(state.passes))
    return _in_float(lambda: partial(binarize, folder=folder), state, block, data, progress)


def _repair(state: _State, block: _Block, data: Data, progress: Progress | None) -> _State:
    """In float, or with the quantizers in place once there is a plan."""
    from edgekit.compress.repair.step import repair, repair_plan

    if state.plan is None:
        return _in_float(lambda: repair, state, block, data, progress)
    if any(u.signs is not None for u in state.plan.units):
        raise InputError("repair: 1-bit layers cannot be repaired; let ptq follow `binary` at once (which has `distill`)")
    plan, record = repair_plan(state.graph, state.plan, block.settings, data, state.original, progress)
    entry = {"kind": block.kind, "settings": asdict(block.settings), **record.to_json()}
    return replace(state, plan=plan, passes=(*state.passes, entry), warnings=(*state.warnings, *record.warnings))


def _spiking(state: _State, block: _Block, data: Data, progress: Progress | None) -> _State:
    from edgekit.compress.spiking.step import spiking

    net, record, warnings = spiking(state.graph, block.settings, data, progress)
    entry = {"kind": block.kind, "settings": asdict(block.settings), **record}
    return replace(state, spiking=net, passes=(*state.passes, entry), warnings=(*state.warnings, *warnings))


def _own_network(model: nn.Module, blocks: Sequence[_Block], data: Data, name: str, progress: Progress | None) -> Compressed:
    """A model that is a spiking network already."""
    from edgekit.compress.spiking.own import own

    if len(blocks) > 1:
        raise InputError(f"compress: `{blocks[0].kind}` takes ordinary networks, and the model is a spiking one; leave it out")
    settings = blocks[0].settings
    network, program, facts = own(model, settings, data, name, progress)
    entry, warnings = {"kind": "spiking", "settings": asdict(settings), **facts}, list[str]()
    if settings.weights != "float":
        program = _integers(program, settings, data, entry, warnings)
    record = {
        "passes": [entry], "unquantized": [[u.layer, u.op, u.reason] for u in program.unquantized], "warnings": warnings,
    }  # fmt: skip
    return Compressed(program, network, record)


def _integers(program: FrozenProgram, settings: Any, data: Data, entry: dict[str, Any], warnings: list[str]) -> FrozenProgram:
    from edgekit.compress.spiking.integer import coarse_warnings, integer_program

    inputs = len(program.input_shapes)
    samples = next(iter(batches(data.calibration, settings.samples, inputs=inputs, what="calibration")))
    made, layers = integer_program(program, samples, int(settings.weights.removeprefix("int")))
    entry["integers"] = [asdict(layer) for layer in layers]
    warnings += coarse_warnings(layers)
    return made


def _spiking_program(state: _State, captured: Graph, name: str, settings: Any, data: Data) -> Compressed:
    from edgekit.compress.spiking.freeze import freeze_spiking

    assert state.spiking is not None
    program = freeze_spiking(state.spiking, name)
    warnings = [*_never_run(captured), *state.warnings]
    if settings.weights != "float":
        program = _integers(program, settings, data, state.passes[-1], warnings)
    record = {
        "passes": list(state.passes),
        "unquantized": [[u.layer, u.op, u.reason] for u in program.unquantized],
        "warnings": warnings,
    }
    if "early exit" in state.passes[-1]:
        from edgekit.compress.spiking.confidence import exit_of

        program = replace(program, exit=exit_of(record))
    return Compressed(program, state.spiking.module, record)


_STEPS: dict[str, Callable[[_State, _Block, Data, Progress | None], _State]] = {
    "rewrite": partial(_in_float, _rewrite, exact=True),
    "lowrank": _lowrank,
    "binary": _binary,
    "repair": _repair,
    "ptq": _ptq,
    "qat": partial(_quantizing, train),
    "spiking": _spiking,
}
"""Block to what it does to the state; float passes are imported when they are used."""


def _float_plan(graph: Graph) -> Plan:
    """A plan without integers, for a recipe that quantizes nothing."""
    _, found = find_units(graph, skip=(".*",))
    reason = "the recipe has no ptq or qat step"
    unquantized = tuple(replace(u, reason=reason) if "`skip`" in u.reason else u for u in found)
    return Plan((), {}, {}, unquantized, ("nothing is quantized: the recipe has no ptq or qat step, every file is float32",))


def _never_run(graph: Graph) -> list[str]:
    """A warning about layers that the model's forward does not reach."""
    if not graph.unused:
        return []
    shown = ", ".join(graph.unused[:4]) + (", ..." if len(graph.unused) > 4 else "")
    return [f"layers that have weights and never run are not in the program: {shown}"]
