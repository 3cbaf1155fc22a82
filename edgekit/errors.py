"""Every error edgekit raises on purpose, and the exit code the command line gives it.

    EdgekitError                    exit code
    ├── InputError                  2   a file, value or argument that the user gave
    │   ├── RecipeError             2   recipe.yaml: line, what was found, what is allowed
    │   ├── ModelError              2   the model: NaN weights, a graph that cannot be exported, a wrong shape
    │   ├── DataError               2   calibration or evaluation data: empty, wrong shape or dtype, NaN
    │   └── FormatError             2   a damaged, altered, foreign or newer file
    ├── UnsupportedError            2   a target cannot take this operator; says which layer, where, and the remedy
    ├── ParityError                 1   an artefact does not compute what the frozen program says
    ├── FirmwareFault               1   a firmware ended by a fault on its board
    ├── DeviceError                 3   a device cannot be reached, is full or busy, or lost the process that ran there
    └── MissingTool                 3   an optional package or a program is not installed

A message says where, what was found and what to do, in one sentence. Nothing is printed as a traceback unless it is a bug.
"""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path
from typing import ClassVar

__all__ = [
    "DataError",
    "DeviceError",
    "EdgekitError",
    "FirmwareFault",
    "FormatError",
    "InputError",
    "MissingTool",
    "ModelError",
    "ParityError",
    "RecipeError",
    "UnsupportedError",
    "cause",
    "missing_extra",
]


class EdgekitError(Exception):
    """Base of all errors that edgekit raises on purpose."""

    exit_code: ClassVar[int] = 2


class InputError(EdgekitError):
    """Something the user gave cannot be used."""


class RecipeError(InputError):
    """A recipe is not valid YAML, has an unknown key, or a value outside what is allowed."""


class ModelError(InputError):
    """The model cannot be captured, or its weights or outputs are not finite."""


class DataError(InputError):
    """Calibration, training or evaluation data cannot be used."""


class FormatError(InputError):
    """A file is truncated, altered, from another tool, or from a newer edgekit."""


class UnsupportedError(EdgekitError):
    """A target cannot take an operator of this program."""


class ParityError(EdgekitError):
    """A lowered artefact differs from the frozen program; the message names the layer."""

    exit_code: ClassVar[int] = 1


class FirmwareFault(EdgekitError):
    """A firmware on a board ended by a fault; the message says which and where."""

    exit_code: ClassVar[int] = 1


class DeviceError(EdgekitError):
    """A device failed: not reachable, unknown host key, no room, in use by another, or the process there was lost."""

    exit_code: ClassVar[int] = 3


class MissingTool(EdgekitError):
    """An optional Python package or an external program is not installed."""

    exit_code: ClassVar[int] = 3


def cause(error: BaseException) -> str:
    """An exception of the user's code in one line, with the last line of theirs that led to it: "KeyError: 'x' (data.py:12)"."""
    theirs = [
        (frame.f_code.co_filename, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if not _is_library(frame.f_code.co_filename, str(frame.f_globals.get("__name__", "")))
    ]
    text = [line.strip() for line in str(error).splitlines() if line.strip()]
    where = f" ({Path(theirs[-1][0]).name}:{theirs[-1][1]})" if theirs else ""
    return f"{type(error).__name__}{': ' + text[0][:200] if text else ''}{where}"


def _is_library(file: str, module: str) -> bool:
    if module.partition(".")[0] in ("edgekit", "importlib") or not file.endswith(".py") or file.startswith("<"):
        return True
    return "site-packages" in file or file.startswith((sysconfig.get_path("stdlib"), str(Path(__file__).parent)))


def missing_extra(package: str, extra: str) -> MissingTool:
    """The error for an optional dependency that is not installed."""
    return MissingTool(f"{package} is not installed; run: pip install 'edgekit[{extra}]'")
