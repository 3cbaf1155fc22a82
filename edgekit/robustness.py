"""``edgekit attack``: how a run's spiking program stands attacks on its evaluation samples; kept as ``robustness.json``.

The attacks are those of :mod:`edgekit.compress.spiking.attack`, on the frozen program itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from edgekit import recipe, runfolder, source
from edgekit.data import Data
from edgekit.errors import DataError, InputError
from edgekit.files import write_json
from edgekit.frozen import load
from edgekit.stage_runner import Progress
from edgekit.stages import spread

__all__ = ["FILE", "KINDS", "attack_run"]

FILE = "robustness.json"
KINDS = ("fgsm", "pgd", "sda")


def attack_run(
    folder: Path,
    kinds: Sequence[str] = ("fgsm", "pgd"),
    *,
    eps: Sequence[float] = (2.0, 8.0),
    steps: int = 10,
    samples: int = 100,
    seed: int | None = None,
    data: Data | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Attack the program of a run folder and write ``robustness.json``.

    Args:
        kinds: of :data:`KINDS`.
        eps: sizes of fgsm and pgd, in 255ths of the range of the evaluation samples.
        steps: of pgd.
        samples: evaluation samples, evenly spread.
        data: instead of what the recipe names.

    Raises:
        InputError: an unknown attack.
        DataError: no labelled evaluation samples.
        ModelError: no spiking program of float neurons, or sda on inputs that are not all 0 or 1.
    """
    from edgekit.compress.spiking.attack import attack

    if wrong := [k for k in kinds if k not in KINDS]:
        raise InputError(f"attack {wrong[0]!r} is unknown; there are {', '.join(KINDS)}")
    folder = Path(folder)
    runfolder.open_run(folder, "frozen.pt2", "recipe.yaml")
    settings = recipe.load(folder / "recipe.yaml", files=False)
    if data is None and settings.data == recipe.IN_MEMORY:
        raise DataError(
            f"attack needs labelled evaluation samples, and {folder.name} was made without a recipe that names any; "
            "call edgekit.robustness.attack_run(folder, data=Data(..., evaluation=(x, y)))"
        )
    chosen = settings.seed if seed is None else seed
    given = source.load_data(settings.data, chosen) if data is None else data
    if given.evaluation is None or given.evaluation[1] is None:
        raise DataError("attack needs labelled evaluation samples; return Data(..., evaluation=(x, y)) from the data factory")
    x, y = given.evaluation
    index = torch.from_numpy(spread(len(y), samples))
    x, y = (x[0] if isinstance(x, tuple) else x)[index], y[index]
    low, high = float(x.min()), float(x.max())
    found = attack(
        load(folder / "frozen.pt2"), x, y, kinds=tuple(kinds), eps=tuple(e / 255 * (high - low) for e in eps), steps=steps,
        low=low, high=high, seed=chosen, progress=progress,
    )  # fmt: skip
    made = {
        "surrogate": "pdsg",
        "range": [low, high],
        "steps": steps,
        "seed": chosen,
        "rows": [f.row(math.prod(x.shape[1:])) for f in found],
    }
    with runfolder.staged(folder, keep=True) as work:
        write_json(work / FILE, made)
    return made
