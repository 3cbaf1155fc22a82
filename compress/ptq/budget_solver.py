"""The choice of least noise within budgets, exactly: a multiple-choice knapsack as an integer program, solved by HiGHS."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from edgekit.compress.ptq.budgets import Budget

__all__ = ["least"]

_TIGHTER = 1e-5
"""HiGHS keeps a limit up to 1e-6; where that is not enough, it solves again below the limit."""


def least(values: Sequence[Sequence[float]], limits: Sequence[Budget]) -> tuple[int, ...] | None:
    """One choice for each layer, of the least total value, that keeps every limit; None if there is none.

    Args:
        values: for each layer the value (noise, cost) of each of its choices, none below 0.
    """
    for slack in (0.0, _TIGHTER):
        found = _solved(values, limits, slack)
        if found is None or all(x.within(found) for x in limits):
            return found
    return None


def _solved(values: Sequence[Sequence[float]], limits: Sequence[Budget], slack: float) -> tuple[int, ...] | None:
    from scipy.optimize import Bounds, LinearConstraint, milp

    flat = np.array([v for row in values for v in row])
    starts = np.cumsum([0, *map(len, values)])
    once = np.zeros((len(values), len(flat)))
    for i, (a, b) in enumerate(pairwise(starts)):
        once[i, a:b] = 1
    constraints = [LinearConstraint(once, 1, 1)]
    for limit in limits:
        if limit.share is not None:
            row = np.array([c for costs in limit.costs for c in costs]) / (limit.whole * limit.share)
            constraints.append(LinearConstraint(row[None], -np.inf, 1 - slack))
    found = milp(
        flat / max(flat.max(), 1e-300), integrality=np.ones(len(flat)), bounds=Bounds(0, 1), constraints=constraints,
        options={"mip_rel_gap": 0.0},
    )  # fmt: skip
    if found.x is None:
        return None
    return tuple(int(np.argmax(found.x[a:b])) for a, b in pairwise(starts))
