"""The integer form of an imported NIR file: ``edgekit import FILE.nir --weights int8 --inputs SPIKES.npy``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from edgekit.agreement import load_spikes
from edgekit.compress.spiking.integer import coarse_warnings, integer_program
from edgekit.compress.steps import Compressed
from edgekit.errors import InputError
from edgekit.frozen import FrozenProgram

__all__ = ["integer_form"]

_BITS = {"int8": 8, "int4": 4, "int2": 2}


def integer_form(program: FrozenProgram, weights: str, inputs: Path | None) -> Compressed:
    """A float spiking program in integers.

    Args:
        weights: int8, int4 or int2.
        inputs: .npy or .npz with values (T, N, ...), which set the scales of inputs and of first currents; of inputs that are the
            same in each step the first is taken.

    Raises:
        InputError: other weights, no inputs, or inputs that do not fit.
        ModelError: something that the integer operators cannot do; names the layer.
    """
    if weights not in _BITS:
        raise InputError(f"--weights {weights!r}; expected float, int8, int4 or int2")
    if inputs is None:
        raise InputError(f"--weights {weights} sets scales by what the network gets: give some (T, N, ...) by --inputs FILE.npy")
    values = load_spikes(inputs).values.swapaxes(0, 1).astype(np.float32)
    (shape,) = program.input_shapes
    sequence = any(layer.op == "fold_steps" for layer in program.layers)
    values = values if sequence else values[:, 0]
    if values.shape[1:] != shape[1:]:
        found = values.swapaxes(0, 1).shape if sequence else ("T", *values.shape)
        raise InputError(f"{inputs}: values of shape {found}; the network takes samples of shape {tuple(shape[1:])}")
    made, layers = integer_program(program, (torch.from_numpy(np.ascontiguousarray(values)),), _BITS[weights])
    return Compressed(made, made.module, {"passes": [], "unquantized": [], "warnings": coarse_warnings(layers)})
