"""Settings of ``rewrite:`` as they stand in a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

__all__ = ["Rewrite"]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"), kw_only=True)
class Rewrite:
    """Exact rewrites before anything is compressed; the model computes the same function.

    Attributes:
        norm: ``rms``: LayerNorms of a Pre-LN transformer become RMSNorms (Jiang et al. 2023); ``crms``: become CRMSNorms over one
            feature less, which makes widths odd; ``none``: stay.
        fuse: parallel convolutions that are summed become one (RepVGG, Ding et al. 2021), and so do linear layers or
            1 x 1 convolutions one behind the other, where that costs no more multiply-accumulates.
        attention: fused attention is written out as two matrix products and a softmax.
    """

    norm: Literal["rms", "crms", "none"] = "none"
    fuse: bool = True
    attention: bool = False
