"""Repair after a lossy pass: the compressed model learns from the original one. Names are imported when first used."""

from typing import Any

from edgekit.compress.repair.settings import Repair

__all__ = ["Repair", "repair_module"]


def __getattr__(name: str) -> Any:
    if name == "repair_module":
        from edgekit.compress.repair.module import repair_module

        return repair_module
    raise AttributeError(name)
