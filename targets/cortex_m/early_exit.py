"""Runs streaming firmware with early exit on the emulated board: see :mod:`~edgekit.targets.cortex_m.confidence`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import InputError
from edgekit.targets.cortex_m import host
from edgekit.targets.cortex_m.preparation import from_stored, to_stored
from edgekit.targets.cortex_m.project import load

__all__ = ["run_early"]


def run_early(path: Path, inputs: Sequence[NDArray[Any]], on: str = "") -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Streaming firmware with early exit on the emulated board.

    Args:
        path: an exported ``model.c`` that was made with ``exit_threshold``.
        inputs: a batch of samples in the program's layout.

    Returns:
        Outputs, means over the steps that each sample took (N, classes), and these numbers of steps (N,).

    Raises:
        InputError: the firmware has no early exit.
    """
    folder = Path(path).parent
    samples = len(inputs[0])
    facts = load(folder)
    if not facts.build.exit_threshold:
        raise InputError(f"{path}: the firmware has no early exit; export it with stream: true and exit_threshold")
    data = b"".join(x.tobytes() for i in range(samples) for x in to_stored(facts.inputs, [v[i : i + 1] for v in inputs]))
    _, result = host.boot(folder, data, samples, "-DMODEL_EXIT=1", on=on)
    (spec,) = facts.outputs
    rows = np.frombuffer(result.output, np.int8).reshape(samples, spec.size + 4)
    steps = np.ascontiguousarray(rows[:, spec.size :]).view("<i4").reshape(-1).astype(np.int64)
    means = np.concatenate([from_stored(spec, np.ascontiguousarray(row[: spec.size])) for row in rows])
    return (means * (facts.count / steps)[:, None]).astype(np.float32), steps
