"""A whole inference of a NIR graph: what its metadata say of steps, encoding and readout (:mod:`edgekit.nir.from_program`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from edgekit.errors import FormatError, InputError
from edgekit.nir.semantics import flatten, number_of_steps

__all__ = ["encode", "read_out"]


def encode(graph: Any, inputs: Sequence[np.ndarray], where: str = "") -> dict[str, np.ndarray]:
    """Inputs of a program as the sequences (T, N, ...) of its graph.

    Args:
        inputs: for each input (N, ...), or (N, T, ...) where the encoding is "sequence".
        where: begins an error's sentence, such as "model.nir: ".

    Raises:
        FormatError: the graph does not say how to run it.
        InputError: the number of inputs or of steps does not fit.
    """
    names, facts = flatten(graph).inputs, graph.metadata
    if len(inputs) != len(names):
        raise InputError(f"{where}{len(inputs)} inputs given, it takes {len(names)}")
    if not {"steps", "encoding", "readout"} <= set(facts):
        raise FormatError(f"{where}its metadata do not say steps, encoding and readout; make a run of it with `edgekit import`")
    steps = number_of_steps(graph)
    assert steps is not None
    encoded = {}
    for name, given in zip(names, inputs, strict=True):
        x = np.asarray(given, np.float64)
        sequence = x.swapaxes(0, 1) if facts["encoding"] == "sequence" and x.ndim > 1 else np.broadcast_to(x, (steps, *x.shape))
        if len(sequence) != steps:
            raise InputError(f"{where}input {name}: {len(sequence)} time steps given, {steps} expected")
        encoded[name] = sequence
    return encoded


def read_out(graph: Any, y: np.ndarray) -> np.ndarray:
    """An output (T, N, ...) as the program gives it, float32: (N, ...), or (N, T, ...) where the readout is "sequence"."""
    if graph.metadata["readout"] == "sequence":
        return y.swapaxes(0, 1).astype(np.float32)
    total: np.ndarray = y.sum(0) * float(graph.metadata.get("gain", 1.0))
    return total.astype(np.float32)
