"""Measured numbers on disk, a line each as soon as it is known, so that an interrupted measurement goes on where it was."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path

__all__ = ["Journal"]


class Journal:
    """Numbers by name.

    Args:
        path: lines of JSON, ``[name, number]``; None: nothing is kept. A last line that was cut off is dropped.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.known: dict[str, float] = {}
        lines = path.read_text().split("\n") if path is not None and path.is_file() else []
        for line in lines:
            with contextlib.suppress(ValueError, TypeError):
                name, number = json.loads(line)
                self.known[str(name)] = float(number)

    def number(self, name: str, make: Callable[[], float]) -> float:
        """The number of that name, measured now if it is not known."""
        if name not in self.known:
            self.known[name] = float(make())
            self._add(name)
        return self.known[name]

    def _add(self, name: str) -> None:
        if self.path is None:
            return
        with contextlib.suppress(OSError):  # a cache that cannot be written only costs the way back
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write("\n" + json.dumps([name, self.known[name]]))  # the line break first: after a line that was cut off
                file.flush()
                os.fsync(file.fileno())
