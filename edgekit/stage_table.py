"""One row of the stage table: a stage's outputs compared with the frozen program's and the float model's on the same samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import DataError
from edgekit.frozen import FrozenProgram
from edgekit.frozen.dynamic_ops import DYNAMIC_OPS
from edgekit.frozen.spiking_ops import REAL_OPS
from edgekit.metrics import HUGE, difference, score, sqnr_db, top1_agreement
from edgekit.parity import Stage
from edgekit.stages import Evaluation

__all__ = ["Arrays", "output_lsb", "stage_row", "whole_steps"]

Arrays = Sequence[NDArray[Any]]
"""One array (N, ...) for each output of the model."""

_SHAPE_ONLY = frozenset({"view", "reshape", "_unsafe_view", "permute", "transpose", "squeeze", "unsqueeze", "clone", "flatten"})


def stage_row(
    name: str,
    outputs: Arrays,
    references: Mapping[str, Arrays],
    evaluation: Evaluation,
    program: FrozenProgram,
    size: int | None = None,
) -> Stage:
    """One row of the stage table."""
    frozen, original = references["frozen"], references.get("float")
    if [np.shape(y) for y in outputs] != [np.shape(y) for y in frozen]:
        shapes = ", ".join(str(tuple(np.shape(y))) for y in outputs)
        wanted = ", ".join(str(tuple(np.shape(y))) for y in frozen)
        raise DataError(f"stage {name}: outputs of shapes {shapes}, the frozen program has {wanted}; they cannot be compared")
    steps = output_lsb(program)
    lsb = None
    if all(steps):
        lsb = difference(_in_steps(outputs, steps), _in_steps(frozen, steps))
    plain = difference(_flat(outputs), _flat(frozen))
    to_float = None if original is None else difference(_flat(outputs), _flat(original))
    labels = evaluation.labels
    callable_or_known = callable(evaluation.metric) or evaluation.metric == "accuracy"
    return Stage(
        name=name,
        samples=len(evaluation),
        metric=score(evaluation.metric, np.asarray(outputs[0]), labels) if labels is not None and callable_or_known else None,
        agreement_float=None if original is None else top1_agreement(outputs[0], original[0]),
        agreement_frozen=top1_agreement(outputs[0], frozen[0]),
        max_lsb=None if lsb is None else whole_steps(lsb.largest),
        mean_lsb=None if lsb is None else lsb.mean,
        max_difference=plain.largest,
        sqnr_float_db=None if original is None else sqnr_db(_flat(original), _flat(outputs)),
        sqnr_frozen_db=sqnr_db(_flat(frozen), _flat(outputs)),
        exact_float=to_float is not None and to_float.share == 0.0,
        exact_frozen=plain.share == 0.0,
        bytes=size,
        bytes_measured=size is not None,
        macs=program.macs if name not in ("float", "compressed") else None,
    )


def output_lsb(program: FrozenProgram) -> tuple[float | None, ...]:
    """Step of each program output: its scale if it ends in a dequantize (reshapes after it do not matter), 1 if it is an integer,
    None if a float operator comes last, or a membrane or sum of a float spiking network."""
    layers = {layer.node: layer for layer in program.layers}
    output = next(n for n in program.module.graph.nodes if n.op == "output").args[0]
    steps: list[float | None] = []
    for node in output if isinstance(output, tuple | list) else (output,):
        while node.name not in layers and node.op == "call_function" and str(node.target).split(".")[1] in _SHAPE_ONLY:
            node = node.args[0]
        layer = layers.get(node.name)
        if layer is None or layer.op in REAL_OPS | DYNAMIC_OPS:
            steps.append(None)
        else:
            steps.append(float(layer.args["scale"]) if layer.op == "dequantize" else 1.0)
    return tuple(steps)


def whole_steps(lsb: float) -> float:
    """Differences of float32 products are whole steps but for the last bits."""
    return float(round(lsb)) if lsb < HUGE and abs(lsb - round(lsb)) < 1e-3 else lsb


def _in_steps(outputs: Arrays, steps: Sequence[float | None]) -> NDArray[np.float64]:
    return _flat([np.asarray(y, dtype=np.float64) / (step or 1.0) for y, step in zip(outputs, steps, strict=True)])


def _flat(outputs: Arrays) -> NDArray[np.float64]:
    return np.concatenate([np.asarray(y, dtype=np.float64).reshape(-1) for y in outputs])
