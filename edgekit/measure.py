"""Which file of a run a device measures, with which samples, and what becomes of it in ``profile.json``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit import devices
from edgekit.errors import InputError
from edgekit.frozen import FrozenProgram, load
from edgekit.profile import Profile, Settings, save
from edgekit.stages import judged_on, load_stage
from edgekit.targets import digest, get
from edgekit.trace import write_trace

__all__ = ["SAMPLES", "connected", "pairs", "profile_run", "samples"]

SAMPLES = 4
"""How many samples a device gets: some costs depend on the data."""

Progress = Callable[[str, int, int], None]


@contextlib.contextmanager
def connected(specs: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Name as given to its device, closed at the end; names of the same device give the same one.

    Raises:
        InputError, MissingTool: as :func:`edgekit.devices.connect`.
    """
    with contextlib.ExitStack() as stack:
        found: dict[str, Any] = {}
        for spec in dict.fromkeys(specs):
            device = devices.connect(spec)
            stack.callback(device.close)
            found[spec] = next((known for known in found.values() if known.name == device.name), device)
        yield found


def pairs(
    found: Sequence[Any], targets: Sequence[str] | None, there: Sequence[str], *, exported: bool = False
) -> list[tuple[Any, str]]:
    """What is measured where: (device, target), in order.

    Args:
        found: devices.
        targets: those asked for; None: every one of ``there`` that the device runs, else the one it likes best.
        there: targets that are exported, or will be.
        exported: nothing else than ``there`` will be.

    Raises:
        InputError: a device that runs none of the targets, or a target that none of the devices runs.
    """
    chosen = []
    for device in {device.name: device for device in found}.values():
        names = [t for t in device.targets if t in there] or [device.targets[0]] if targets is None else list(targets)
        runs = [name for name in names if get(name) and name in device.targets]
        if not runs:
            raise InputError(f"device {device.name} runs {', '.join(device.targets)}, not {', '.join(names)}")
        if exported and not set(runs) <= set(there):
            raise InputError(f"device {device.name} runs {', '.join(device.targets)}; add one of them to the recipe's targets")
        chosen += [(device, name) for name in runs]
    if lost := sorted(set(targets or ()) - {name for _, name in chosen}) if chosen else []:
        raise InputError(f"{', '.join(lost)}: runs on none of {', '.join(device.name for device in found)}")
    return chosen


def samples(folder: Path, program: FrozenProgram) -> tuple[list[NDArray[Any]], list[str]]:
    """Up to :data:`SAMPLES` samples (N, ...) for each input, and notes: samples stored in the run, else random ones."""
    path = Path(folder) / "stage_float.npz"
    evaluation, _, notes = judged_on(program, None, {"float": load_stage(path)} if path.exists() else {})
    chosen = evaluation.take(np.arange(min(SAMPLES, len(evaluation))))
    return [np.ascontiguousarray(x.numpy()) for x in chosen.inputs], [] if path.exists() else notes


def profile_run(
    folder: Path,
    chosen: Sequence[tuple[Any, str]],
    settings: Settings | None = None,
    progress: Progress | None = None,
) -> tuple[Profile, ...]:
    """Measure files of a run folder and add what was found to its ``profile.json``.

    Args:
        chosen: as :func:`pairs` gives them; the files are there.

    Raises:
        EdgekitError: from a device; its name is in the message.
    """
    folder, settings = Path(folder), settings or Settings()
    program = load(folder / "frozen.pt2")
    inputs, notes = samples(folder, program)
    found = []
    for device, target in chosen:
        path = folder / f"model{get(target).SUFFIX}"
        what = f"{target} on {device.name}"
        if progress:
            progress(what, 0, 0)
        with devices.naming(device):
            made = device.profile(path, target, program, settings, inputs, _named(progress, what))
        made = replace(made, file=path.relative_to(folder).as_posix(), notes=(*made.notes, *notes))
        found.append(replace(made, sha256=digest(get(target), path)))
        if progress:
            progress(what, 1, 1)
    save(folder / "profile.json", *found)
    write_trace(folder)
    return tuple(found)


def _named(progress: Progress | None, what: str) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    return lambda done, total: progress(what, done, total)
