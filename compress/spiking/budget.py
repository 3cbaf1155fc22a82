"""Choose method and number of steps by a budget: the cheapest network that is good enough, or the best that is cheap enough."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from edgekit.compress.capture import Graph
from edgekit.compress.spiking.judge import Judge, for_choice, for_report, split_training
from edgekit.compress.spiking.measure import course, points
from edgekit.compress.spiking.settings import Spiking
from edgekit.compress.spiking.step import Made, make
from edgekit.data import Data
from edgekit.errors import InputError

__all__ = ["Candidate", "choose"]

_STEPS = (2, 4, 8, 16, 32, 64)
_CHOOSING = 1000


@dataclass(frozen=True)
class _Limits:
    """The budget; ``score`` is what a network needs on the samples to choose by."""

    score: float | None
    steps: int | None
    synops: float | None


@dataclass(frozen=True)
class Candidate:
    """A network that was tried, stopped after ``steps``; ``synops`` with the MACs of what is not zeros and ones."""

    method: str
    settings: Spiking
    steps: int
    score: float
    synops: float
    error: float = 0.0


def choose(graph: Graph, settings: Spiking, data: Data, progress: Callable[[str, int, int], None]) -> Made:
    """Try the methods at rising numbers of steps; make the one that is chosen on all data.

    With ``target_accuracy``: the fewest operations that reach it. Without: the best score within the other limits. A model knows
    its training samples better than others: where there are labelled evaluation samples, a network may lose on the former what
    the float model has to spare on the latter, and one standard error less.

    Raises:
        InputError: none fits; says what came nearest.
    """
    kept, held = split_training(data, settings.seed)
    judge = for_choice(graph, data, held, _CHOOSING, settings.batch_size)
    limits = _limits(graph, settings, data, judge)
    most = settings.max_timesteps or _STEPS[-1]
    tried: list[Candidate] = []
    for how in _plans(settings, data, most):
        if how.method == "qcfs" and any(_fits(c, limits) for c in tried) and settings.target_accuracy is not None:
            break  # training is the dear way
        made = make(graph, how, kept if how.method == "qcfs" else data, progress)
        found = course(made.net, judge.batches)
        for t in points(how.steps) if how.method == "qcfs" else [how.steps]:
            score = judge.score(found.outputs[t - 1])
            tried.append(
                Candidate(how.method, how, t, score, float(found.synops[t - 1] + found.macs[t - 1]), _error(score, judge))
            )
    fitting = [c for c in tried if _fits(c, limits)]
    if not fitting:
        raise InputError(_nearest(tried, settings, limits, judge.what))
    if settings.target_accuracy is not None:
        best = min(fitting, key=lambda c: (c.synops, c.steps))
    else:
        best = max(fitting, key=lambda c: (c.score, -c.synops))
    made = make(
        graph, replace(best.settings, steps=best.steps, levels=best.settings.levels or best.settings.steps), data, progress
    )
    made.figures |= {"chosen": f"{best.method} at {best.steps} steps", "chosen on": judge.what}
    if settings.target_accuracy is not None and judge.of_float:
        made.warnings.append(f"spiking: no labelled training samples: target_accuracy was asked of {judge.what}")
    if limits.score is not None:
        made.figures["score needed there"] = round(limits.score, 3)
    made.tables["tried for the budget"] = [_row(c, limits, c is best) for c in tried]
    return made


def _plans(settings: Spiking, data: Data, most: int) -> list[Spiking]:
    """What is tried, the cheapest to make first."""
    free: dict[str, Any] = {"target_accuracy": None, "max_timesteps": None, "max_synops": None, "early_exit": None}
    at: list[int] = sorted({min(t, most) for t in _STEPS})
    plans: list[Any] = [replace(settings, method="calibrate", steps=t, **free) for t in at]
    if data.training is not None:
        plans += [replace(settings, method="qcfs", steps=t, levels=t, **free) for t in at if t in (4, 8) or t == min(most, 4)]
    return plans


def _limits(graph: Graph, settings: Spiking, data: Data, judge: Judge) -> _Limits:
    needed = settings.target_accuracy
    if needed is not None and data.evaluation is not None and data.evaluation[1] is not None and not judge.of_float:
        report = for_report(graph, data, _CHOOSING, settings.batch_size)
        known, other = (j.score(_float_outputs(graph, j)) for j in (judge, report))
        needed += max(0.0, known - other)
    return _Limits(needed, settings.max_timesteps, settings.max_synops)


def _float_outputs(graph: Graph, judge: Judge) -> Tensor:
    with torch.no_grad():
        found = [graph.module(*b) for b in judge.batches]
    return torch.cat([f[0] if isinstance(f, tuple | list) else f for f in found])


def _error(score: float, judge: Judge) -> float:
    """Standard error of a share in percent; 0 for another metric."""
    if not judge.percent or judge.labels is None:
        return 0.0
    share = min(max(score / 100, 0.0), 1.0)
    return 100 * float((share * (1 - share) / len(judge.labels)) ** 0.5)


def _fits(c: Candidate, limits: _Limits) -> bool:
    return (
        (limits.score is None or c.score - c.error >= limits.score)
        and (limits.steps is None or c.steps <= limits.steps)
        and (limits.synops is None or c.synops <= limits.synops)
    )


def _row(c: Candidate, limits: _Limits, best: bool) -> dict[str, Any]:
    verdict = "chosen" if best else "fits" if _fits(c, limits) else "outside the budget"
    return {
        "method": c.method,
        "steps": c.steps,
        "score": round(c.score, 3),
        "SynOps and MACs a sample": round(c.synops, 1),
        "verdict": verdict,
    }


def _nearest(tried: list[Candidate], settings: Spiking, limits: _Limits, what: str) -> str:
    asked = ", ".join(
        f"{k} {v:g}" for k in ("target_accuracy", "max_timesteps", "max_synops") if (v := getattr(settings, k)) is not None
    )
    within = [c for c in tried if _fits(c, replace(limits, score=None))]
    wanted = "" if limits.score is None else f", where {limits.score:.2f} and a standard error were needed"
    best = max(within, key=lambda c: c.score) if within else min(tried, key=lambda c: c.synops)
    return (
        f"spiking: no method meets {asked}; nearest is {best.method} at {best.steps} steps with {best.score:.2f} ({what}) and "
        f"{best.synops:.0f} SynOps and MACs a sample{wanted}; ask for less, or train longer (epochs)"
    )
