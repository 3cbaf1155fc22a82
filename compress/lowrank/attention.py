"""What a transformer layer costs in multiply-accumulates: dense, with low-rank projections, or with Linformer's shorter keys.

For n tokens, width d, hidden width f, rank r (Greenformers' low-rank transformer: Cahyawijaya et al. 2021) and k projected
tokens (Linformer: Wang et al. 2020), for one sample:

    dense       4 n d^2 + 2 n d f + 2 n^2 d
    low rank    8 n d r + 2 n r (d + f) + 2 n^2 d
    Linformer   4 n d^2 + 2 n d f + 2 n k d + 2 n k d

Low rank takes from the projections, whose share falls with n, and is what makes the file smaller; Linformer takes from the
attention products, whose share grows. A recipe's ``lowrank`` block does the former on any model, and the latter where
``linformer`` is set and pays; it changes what the model computes and has to be trained.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgekit.errors import InputError

__all__ = ["AttentionCost", "attention_cost"]


@dataclass(frozen=True)
class AttentionCost:
    """Multiply-accumulates of one layer for one sample, modelled from shapes; ``best`` names the least of them.

    Attributes:
        crossover: the number of tokens from which on Linformer costs less than low rank.
    """

    dense: int
    lowrank: int
    linformer: int
    crossover: int

    @property
    def best(self) -> str:
        costs = {"dense": self.dense, "lowrank": self.lowrank, "linformer": self.linformer}
        return min(costs, key=costs.__getitem__)


def attention_cost(tokens: int, width: int, hidden: int, rank: int, projected: int) -> AttentionCost:
    """Compare the three at one length.

    Args:
        tokens: n; ``width``: d; ``hidden``: f of the feed-forward part; ``rank``: r of all six projections; ``projected``: k.

    Raises:
        InputError: a number below 1.

    Example:
        >>> attention_cost(128, 768, 3072, 256, 128).best, attention_cost(8192, 768, 3072, 256, 128).best
        ('lowrank', 'linformer')
    """
    if min(tokens, width, hidden, rank, projected) < 1:
        raise InputError("attention_cost: every number is at least 1")
    projections = 4 * width**2 + 2 * width * hidden  # of one token
    thin = 8 * width * rank + 2 * rank * (width + hidden)
    shorter = 4 * projected * width
    return AttentionCost(
        dense=tokens * (projections + 2 * tokens * width),
        lowrank=tokens * (thin + 2 * tokens * width),
        linformer=tokens * (projections + shorter),
        crossover=max(1, (projections - thin + shorter) // (2 * width) + 1),  # 2 n d > projections - thin + 4 k d
    )
