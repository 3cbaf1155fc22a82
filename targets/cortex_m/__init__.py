"""Frozen program to a bare-metal C project for Arm Cortex-M: no allocation, no interpreter, the same integers.

``M0`` to ``M55`` have the members of a target module. Read :mod:`~edgekit.targets.cortex_m.lowering` first, then
:mod:`~edgekit.targets.cortex_m.rules` (operator to steps), :mod:`~edgekit.targets.cortex_m.kernels` (step to C call) and
:mod:`~edgekit.targets.cortex_m.reference` (step in numpy).
"""

from __future__ import annotations

from edgekit.targets.cortex_m.target import TARGETS, CortexM, Options

__all__ = ["M0", "M3", "M4", "M7", "M33", "M55", "TARGETS", "CortexM", "Options"]

M0, M3, M4, M7, M33, M55 = (TARGETS[f"cortex-m{number}"] for number in (0, 3, 4, 7, 33, 55))
