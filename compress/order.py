"""In which order the blocks of a recipe may stand, so that a wrong order is refused before anything is trained."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["misplaced"]

_FLOAT = ("rewrite", "lowrank", "binary")
_INTEGERS = ("ptq", "qat")


def misplaced(kinds: Sequence[str]) -> tuple[int, str] | None:
    """The first block that cannot stand where it does, counted from 0, and why; None if all can."""
    for i, kind in enumerate(kinds):
        before = kinds[:i]
        if "spiking" in before:
            return i, f"`{kind}` stands after `spiking`, which ends the network; put it before"
        quantized = any(b in _INTEGERS for b in before)
        if kind == "spiking" and quantized:
            return i, "`spiking` works on the float model; leave ptq and qat out"
        if kind == "spiking" and "binary" in before:
            return i, "`spiking` cannot take 1-bit layers; leave `binary` out"
        if kind in _FLOAT and quantized:
            return i, f"`{kind}` works on the float model; put it before ptq and qat"
        if kind in (*_FLOAT, "repair") and "binary" in before:
            return i, f"`{kind}` would undo `binary`; put it before, only ptq comes after"
        if kind == "qat" and "binary" in before:
            return i, "`qat` cannot train 1-bit layers; let `ptq` follow `binary`, which trains itself"
    if "binary" in kinds and "ptq" not in kinds:
        return kinds.index("binary"), "`binary` needs `ptq` after it, which makes the 1-bit operators and int8 of the rest"
    return None
