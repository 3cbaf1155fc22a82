"""Run the compression blocks of a recipe, in order, on one model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from torch import fx, nn

from edgekit.compress.capture import Graph, capture
from edgekit.compress.ptq.freeze import freeze
from edgekit.compress.ptq.plan import Plan
from edgekit.compress.ptq.quantize import Progress, quantize, train
from edgekit.data import Data, sample_inputs
from edgekit.errors import InputError
from edgekit.frozen import FrozenProgram

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
    simulation: fx.GraphModule
    record: dict[str, Any]


def apply(
    model: nn.Module, blocks: Sequence[_Block], data: Data, *, name: str = "model", progress: Progress | None = None
) -> Compressed:
    """Compress ``model`` by ``blocks``, each with a ``kind`` ("ptq", "qat") and its ``settings``.

    Raises:
        InputError: no blocks.
        ModelError, DataError: see :func:`edgekit.compress.capture.capture` and :func:`edgekit.compress.ptq.plan.make_plan`.
    """
    if not blocks:
        raise InputError("compress: no steps given; name at least one, such as `- ptq: {weights: int8}`")
    from edgekit.compress.ptq.simulate import simulate

    graph = capture(model, sample_inputs(model, data))
    plan: Plan | None = None
    passes: list[dict[str, Any]] = []
    for block in blocks:
        step: Callable[..., tuple[Graph, Plan]] = quantize if block.kind == "ptq" else train
        graph, plan = step(graph, block.settings, data, plan, progress)
        passes.append({"kind": block.kind, "settings": asdict(block.settings), "layers": dict(plan.changes)})
    assert plan is not None
    program = freeze(graph, plan, name)
    record = {
        "passes": passes,
        "unquantized": [[u.layer, u.op, u.reason] for u in plan.unquantized],
        "warnings": list(plan.warnings),
    }
    return Compressed(program, simulate(graph, plan), record)
