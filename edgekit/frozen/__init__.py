"""Frozen programs: the one intermediate representation (see docs/concepts.md)."""

import warnings

from edgekit.frozen.archive import load, read_exported, save
from edgekit.frozen.float_layers import FloatLayer, FloatOp
from edgekit.frozen.program import Exit, FrozenOp, FrozenProgram, Layer, Unquantized, freeze_module

# said by torch's copies of its own graphs, which nobody can avoid; no other message is meant
warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)

__all__ = [
    "Exit",
    "FloatLayer",
    "FloatOp",
    "FrozenOp",
    "FrozenProgram",
    "Layer",
    "Unquantized",
    "freeze_module",
    "load",
    "read_exported",
    "save",
]
