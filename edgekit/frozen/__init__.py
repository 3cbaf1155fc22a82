"""Frozen programs: the one intermediate representation (see docs/concepts.md)."""

from edgekit.frozen.archive import load, read_exported, save
from edgekit.frozen.program import FrozenOp, FrozenProgram, Layer, Unquantized, freeze_module

__all__ = ["FrozenOp", "FrozenProgram", "Layer", "Unquantized", "freeze_module", "load", "read_exported", "save"]
