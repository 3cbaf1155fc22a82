"""Choose method and number of steps by a budget: the cheapest network that is good enough, or the best that is cheap enough."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from edgekit.compress.capture import Graph
from edgekit.compress.spiking.judge import for_choice, split_training
from edgekit.compress.spiking.measure import course, points
from edgekit.compress.spiking.settings import Spiking
from edgekit.compress.spiking.step import Made, make
from edgekit.data import Data
from edgekit.errors import InputError

__all__ = ["Candidate", "choose"]

_STEPS = (2, 4, 8, 16, 32, 64)
_CHOOSING = 1000


@dataclass(frozen=True)
class Candidate:
    """A network that was tried, stopped after ``steps``."""

    method: str
    settings: Spiking
    steps: int
    score: float
    synops: float


def choose(graph: Graph, settings: Spiking, data: Data, progress: Callable[[str, int, int], None]) -> Made:
    """Try the methods at rising numbers of steps; make the one that is chosen on all data.

    With ``target_accuracy``: the fewest SynOps that reach it. Without: the best score within the other limits.

    Raises:
        InputError: none fits; says what came nearest.
    """
    kept, held = split_training(data, settings.seed)
    judge = for_choice(graph, data, held, _CHOOSING, settings.batch_size)
    most = settings.max_timesteps or _STEPS[-1]
    tried: list[Candidate] = []
    for how in _plans(settings, data, most):
        if how.method == "qcfs" and any(_fits(c, settings) for c in tried) and settings.target_accuracy is not None:
            break  # training is the dear way
        made = make(graph, how, kept if how.method == "qcfs" else data, progress)
        found = course(made.net, judge.batches)
        for t in points(how.steps) if how.method == "qcfs" else [how.steps]:
            tried.append(Candidate(how.method, how, t, judge.score(found.outputs[t - 1]), float(found.synops[t - 1])))
    fitting = [c for c in tried if _fits(c, settings)]
    if not fitting:
        raise InputError(_nearest(tried, settings, judge.what))
    if settings.target_accuracy is not None:
        best = min(fitting, key=lambda c: (c.synops, c.steps))
    else:
        best = max(fitting, key=lambda c: (c.score, -c.synops))
    made = make(
        graph, replace(best.settings, steps=best.steps, levels=best.settings.levels or best.settings.steps), data, progress
    )
    made.figures |= {"chosen": f"{best.method} at {best.steps} steps", "chosen on": judge.what}
    made.tables["tried for the budget"] = [_row(c, settings, c is best) for c in tried]
    return made


def _plans(settings: Spiking, data: Data, most: int) -> list[Spiking]:
    """What is tried, the cheapest to make first."""
    free: dict[str, Any] = {"target_accuracy": None, "max_timesteps": None, "max_synops": None, "early_exit": None}
    at: list[int] = sorted({min(t, most) for t in _STEPS})
    plans: list[Any] = [replace(settings, method="calibrate", steps=t, **free) for t in at]
    if data.training is not None:
        plans += [replace(settings, method="qcfs", steps=t, levels=t, **free) for t in at if t in (4, 8) or t == min(most, 4)]
    return plans


def _fits(c: Candidate, settings: Spiking) -> bool:
    return (
        (settings.target_accuracy is None or c.score >= settings.target_accuracy)
        and (settings.max_timesteps is None or c.steps <= settings.max_timesteps)
        and (settings.max_synops is None or c.synops <= settings.max_synops)
    )


def _row(c: Candidate, settings: Spiking, best: bool) -> dict[str, Any]:
    verdict = "chosen" if best else "fits" if _fits(c, settings) else "outside the budget"
    return {
        "method": c.method,
        "steps": c.steps,
        "score": round(c.score, 3),
        "SynOps a sample": round(c.synops, 1),
        "verdict": verdict,
    }


def _nearest(tried: list[Candidate], settings: Spiking, what: str) -> str:
    asked = ", ".join(
        f"{k} {v:g}" for k in ("target_accuracy", "max_timesteps", "max_synops") if (v := getattr(settings, k)) is not None
    )
    within = [c for c in tried if _fits(c, replace(settings, target_accuracy=None, max_synops=settings.max_synops or 1e300))]
    best = max(within, key=lambda c: c.score) if within else min(tried, key=lambda c: c.synops)
    return (
        f"spiking: no method meets {asked}; nearest is {best.method} at {best.steps} steps with {best.score:.2f} ({what}) and "
        f"{best.synops:.0f} SynOps a sample; ask for less, or train longer (epochs)"
    )
