"""What TFLite and ONNX make of a frozen program: 1-bit layers as int8 ones, spiking layers written out step by step.

Found facts are told by the names of the program's own layers.
"""

from __future__ import annotations

from collections.abc import Sequence

from edgekit.artifact import Coverage, Mismatch
from edgekit.frozen import FrozenProgram
from edgekit.targets import binary_int8, spiking

__all__ = ["host_form", "renamed", "rows"]


def host_form(program: FrozenProgram) -> FrozenProgram:
    """The program in operators that these formats have; one without 1-bit or spiking layers as it is."""
    return spiking.plain(program) if spiking.is_spiking(program) else binary_int8.int8_form(program)


def renamed(program: FrozenProgram, mismatches: Sequence[Mismatch]) -> list[Mismatch]:
    """Differences by the names of the program's layers."""
    if spiking.is_spiking(program):
        return spiking.renamed(mismatches, program)
    return binary_int8.renamed(program, list(mismatches))


def rows(program: FrozenProgram, coverage: Sequence[Coverage]) -> tuple[Coverage, ...]:
    """Coverage by the program's layers."""
    if spiking.is_spiking(program):
        return spiking.gathered(coverage, program)
    return tuple(binary_int8.rows(program, tuple(coverage)))
