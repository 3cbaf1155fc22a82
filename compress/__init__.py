"""Compression: a PyTorch model in, a frozen program out. Names are imported when first used, torch with them."""

import warnings
from typing import Any

# as in edgekit.frozen: what torch's copies of its own graphs say
warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)

__all__ = ["Compressed", "apply"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from edgekit.compress import steps

        return getattr(steps, name)
    raise AttributeError(name)
