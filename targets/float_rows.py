"""Coverage rows of what a program leaves in float, the same for every host target."""

from __future__ import annotations

from edgekit.artifact import Coverage
from edgekit.frozen import FloatLayer, FrozenProgram

__all__ = ["float_rows"]


def float_rows(program: FrozenProgram) -> list[Coverage]:
    """One row for each float operator with products or weights: its multiply-accumulates count as float work."""
    return [
        Coverage(x.name, x.op, "float", x.macs, "float32" if x.parameters else "", "left in float by the program")
        for x in program.counted
        if isinstance(x, FloatLayer)
    ]
