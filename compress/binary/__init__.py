"""Binarization: layers whose weights and activations are +1 and -1, trained and frozen as 1-bit operators (docs/binary.md)."""

from edgekit.compress.binary.settings import Binary, Distill, Stage

__all__ = ["Binary", "Distill", "Stage"]
