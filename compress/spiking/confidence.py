"""Dynamic Confidence: each sample stops at the first step whose confidence exceeds a threshold.

Li, Jones and Furber, "Unleashing the Potential of Spiking Neural Networks with Dynamic Confidence", ICCV 2023. The confidence of
a step is ``max softmax(A / tau)``, A the sum of the outputs so far: evidence grows with time. Temperature and threshold are
chosen on samples apart from those it is judged on, by exact replay of recorded outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from edgekit.compress.capture import Graph
from edgekit.compress.spiking.judge import Judge, for_choice, split_training
from edgekit.compress.spiking.measure import course
from edgekit.compress.spiking.settings import Spiking
from edgekit.compress.spiking.unroll import SpikingNet
from edgekit.data import Data
from edgekit.errors import InputError
from edgekit.frozen import Exit, FrozenProgram

__all__ = [
    "Exit",
    "Point",
    "choose_exit",
    "choose_threshold",
    "confidences",
    "exit_of",
    "front",
    "points_of",
    "replay",
    "run_early",
    "temperature_of",
]

NEVER = 1.01
"""A threshold that no confidence exceeds."""


@dataclass(frozen=True)
class Point:
    """What a threshold gives: mean steps, score, and the share of samples that answer as after all steps, in percent."""

    threshold: float
    steps: float
    score: float
    same: float = 100.0


def confidences(sums: Tensor, temperature: float) -> Tensor:
    """(T, N) of sums of outputs up to each step (T, N, classes)."""
    return torch.softmax(sums / temperature, -1).amax(-1)


def replay(sums: Tensor, rule: Exit) -> tuple[Tensor, Tensor]:
    """Step at which each sample stops (N,), from 1, and the outputs it answers with (N, classes)."""
    steps = len(sums)
    over = confidences(sums, rule.temperature) > rule.threshold
    at = torch.where(over.any(0), over.to(torch.uint8).argmax(0), steps - 1)
    return at + 1, sums[at, torch.arange(sums.shape[1])]


def temperature_of(sums: Tensor, labels: Tensor) -> float:
    """The temperature with the least negative log-likelihood of the labels, over all steps."""
    grid = torch.logspace(-2, 2.5, 91)
    losses = [
        float(-torch.log_softmax(sums / t, -1).gather(-1, labels.long().expand(len(sums), -1).unsqueeze(-1)).mean()) for t in grid
    ]
    return float(grid[int(torch.tensor(losses).argmin())])


def points_of(sums: Tensor, score: Callable[[Tensor], float], temperature: float) -> list[Point]:
    """What each of many thresholds gives, the last of which never stops early."""
    seen = confidences(sums, temperature)
    grid = [
        *torch.quantile(seen.flatten().double()[:: max(1, seen.numel() // 100_000)], torch.linspace(0, 1, 200).double()).tolist()
    ]
    tried = []
    last = sums[-1].argmax(-1)
    for threshold in [*(i / 100 for i in range(30, 100)), *(1 - 0.01 * 0.7**i for i in range(1, 20)), *grid, NEVER]:
        steps, outputs = replay(sums, Exit(temperature, threshold))
        same = 100 * float((outputs.argmax(-1) == last).float().mean())
        tried.append(Point(threshold, float(steps.double().mean()), score(outputs), same))
    return tried


def front(tried: list[Point]) -> list[Point]:
    """The points that no other beats in both steps and score, by rising steps, and the one that never stops early."""
    kept: list[Point] = []
    for point in sorted(tried, key=lambda p: (p.steps, -p.score)):
        if not kept or point.score > kept[-1].score:
            kept.append(point)
    last = next(p for p in tried if p.threshold == NEVER)
    return kept if last in kept else [*kept, last]


def choose_threshold(points: list[Point], max_drop: float) -> Point:
    """The fewest mean steps whose score is within ``max_drop`` of never stopping early, and whose answers are but for as many.

    The score alone would trust that answers which change change both ways as often on other samples; a model knows the ones it
    was trained on too well for that.
    """
    last = next(p for p in points if p.threshold == NEVER)
    fine = [p for p in points if p.score >= last.score - max_drop - 1e-9 and p.same >= 100 - max_drop - 1e-4]
    return min(fine, key=lambda p: (p.steps, -p.score))


def choose_exit(
    net: SpikingNet, graph: Graph, settings: Spiking, data: Data, judge: Judge
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The front on samples to choose by, as a table, and what the chosen threshold gives on those to report on."""
    how = settings.early_exit
    assert how is not None
    _, held = split_training(data, settings.seed)
    choosing = for_choice(graph, data, held, how.samples, settings.batch_size)
    sums = _sums(net, choosing)
    assert choosing.labels is not None and judge.labels is not None
    temperature = temperature_of(sums, choosing.labels)
    tried = points_of(sums, choosing.score, temperature)
    points, chosen = front(tried), choose_threshold(tried, how.max_drop)
    rule = Exit(temperature, chosen.threshold)
    tested = _sums(net, judge)
    steps, outputs = replay(tested, rule)
    shown = [*points[:: -(-len(points) // 20)], points[-1]] if len(points) > 20 else points
    table = [
        {"threshold": round(p.threshold, 4), "mean steps": round(p.steps, 3), choosing.what: round(p.score, 3)} for p in shown
    ]
    by_size = steps.double().sort().values
    return table, {
        **asdict(rule), "chosen on": choosing.what, "judged by": judge.what,
        "mean steps": round(float(steps.double().mean()), 3), "steps at most": net.steps,
        "steps p50": int(by_size[len(by_size) // 2]), "steps p95": int(by_size[int(0.95 * (len(by_size) - 1))]),
        "fewer steps %": round(100 * (1 - float(steps.double().mean()) / net.steps), 2),
        "score": round(judge.score(outputs), 3), "score of all steps": round(judge.score(tested[-1]), 3),
        "oracle mean steps": round(_oracle(tested, judge.labels), 3),
    }  # fmt: skip


def _oracle(sums: Tensor, labels: Tensor) -> float:
    """Mean of the first step with the right answer, T where there is none: what no rule can beat."""
    right = sums.argmax(-1) == labels
    first = torch.where(right.any(0), right.to(torch.uint8).argmax(0) + 1, len(sums))
    return float(first.double().mean())


def _sums(net: SpikingNet, judge: Judge) -> Tensor:
    means = course(net, judge.batches).outputs
    return means * torch.arange(1, len(means) + 1).view(-1, *[1] * (means.dim() - 1))


def run_early(
    program: FrozenProgram, x: Tensor, rule: Exit | None = None, progress: Callable[[int, int], None] | None = None
) -> tuple[Tensor, Tensor]:
    """A frozen spiking program with early exit: outputs (N, classes), means over the steps taken, and these steps (N,).

    The same samples stop at the same steps as in :func:`replay` of its recorded outputs.

    Args:
        rule: None: the one that was chosen for the program.

    Raises:
        InputError: none was chosen.
        ModelError: as :func:`edgekit.frozen.stepping.steps_of`.
    """
    from edgekit.frozen.stepping import run_until

    rule = rule or program.exit
    if rule is None:
        raise InputError(f"program {program.name} has no early exit; add `early_exit: {{}}` to its spiking block, or give a rule")
    return run_until(program, x, lambda sums, _: confidences(sums, rule.temperature) > rule.threshold, progress)


def exit_of(record: Mapping[str, Any]) -> Exit:
    """The rule that a recipe with ``early_exit`` chose, from its compress.json.

    Raises:
        InputError: there is none.
    """
    for entry in record.get("passes", ()):
        if "early exit" in entry:
            found = entry["early exit"]
            return Exit(float(found["temperature"]), float(found["threshold"]))
    raise InputError("the run has no early exit; add `early_exit: {}` to its spiking block")
