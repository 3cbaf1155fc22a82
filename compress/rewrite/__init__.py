"""Exact rewrites of a captured graph: the same function, cheaper. Names are imported when first used, torch with them."""

from typing import Any

from edgekit.compress.rewrite.settings import Rewrite

__all__ = ["Rewrite", "rewrite"]


def __getattr__(name: str) -> Any:
    if name == "rewrite":
        from edgekit.compress.rewrite.step import rewrite

        return rewrite
    raise AttributeError(name)
