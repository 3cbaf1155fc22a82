"""Runs the stages of a pipeline in one folder, through the stage cache, and notes what became of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekit import cache
from edgekit.errors import InputError

__all__ = ["Progress", "StageNote", "Stages"]

Progress = Callable[[str, int, int], None]
"""Called with (what runs, done, in all); in all is 0 where it is not known."""


@dataclass(frozen=True)
class StageNote:
    """What became of a stage: "made" or "cached" (taken from the stage cache), and the seconds it took."""

    name: str
    state: str
    seconds: float


class Stages:
    """Runs stages in a folder, through the cache, and notes what became of each."""

    def __init__(self, folder: Path, resume: bool, progress: Progress | None) -> None:
        self.folder, self.resume = folder, resume
        self.notes: list[StageNote] = []
        self.warnings: list[str] = []
        self._progress = progress

    def progress(self, what: str, done: int, total: int) -> None:
        if self._progress:
            self._progress(what, done, total)

    def timed(self, name: str) -> _Timer:
        return _Timer(self, name)

    def cached(self, name: str, inputs: dict[str, Any], make: Callable[[], Sequence[str]]) -> None:
        """Take the stage's files from the cache, or ``make`` them in the folder (it returns their names) and store them."""
        with self.timed(name) as timer:
            entry = cache.key(name, inputs)
            if self.resume and cache.take(entry, self.folder) is not None:
                timer.state = "cached"
                return
            made = make()
            try:
                cache.put(entry, self.folder, made)
            except InputError as error:
                self.warnings.append(f"{error}; {name} would have to run again after an interruption")


class _Timer:
    """Notes a stage when it ends without an error."""

    def __init__(self, stages: Stages, name: str) -> None:
        self.stages, self.name, self.state = stages, name, "made"

    def __enter__(self) -> _Timer:
        self.start = time.perf_counter()
        self.stages.progress(self.name, 0, 0)
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        if kind is None:
            self.stages.notes.append(StageNote(self.name, self.state, round(time.perf_counter() - self.start, 3)))
            self.stages.progress(self.name, 1, 1)
