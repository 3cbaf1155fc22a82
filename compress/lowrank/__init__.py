"""Low-rank compression: a layer's weight becomes a chain of thin layers. Names are imported when first used, torch with them."""

from typing import Any

from edgekit.compress.lowrank.settings import LowRank

__all__ = ["LowRank", "factorize"]


def __getattr__(name: str) -> Any:
    if name == "factorize":
        from edgekit.compress.lowrank.module import factorize

        return factorize
    raise AttributeError(name)
