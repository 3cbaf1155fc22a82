"""Compression: a PyTorch model in, a frozen program out. Names are imported when first used, torch with them."""

from typing import Any

__all__ = ["Compressed", "apply"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from edgekit.compress import steps

        return getattr(steps, name)
    raise AttributeError(name)
