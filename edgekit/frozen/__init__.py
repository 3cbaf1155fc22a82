"""Frozen programs: the one intermediate representation (see docs/concepts.md)."""

from edgekit.frozen.archive import load, read_exported, save
from edgekit.frozen.float_layers import FloatLayer, FloatOp
from edgekit.frozen.program import Exit, FrozenOp, FrozenProgram, Layer, Unquantized, freeze_module

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
