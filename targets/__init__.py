"""Targets: a frozen program becomes a file of another runtime, and is read back, run and inspected there.

Every module of :data:`TARGETS` has the same members: ``SUFFIX``, ``EXTRA``, ``Options``, ``available()``, ``lower(program, path,
options)``, ``inspect(path, program)``, ``readback(path, program)``, ``run(path, inputs, threads, progress)`` and
``taps(path, program, sample)``. There is no base class; a new target is one module and one line here.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from edgekit.errors import InputError

__all__ = ["TARGETS", "get"]

TARGETS: dict[str, str] = {
    "executorch": "edgekit.targets.executorch",
    "tflite": "edgekit.targets.tflite",
    "onnx": "edgekit.targets.onnx",
}
"""Target name to module; importing one imports no converter and no runtime."""


def get(name: str) -> ModuleType:
    """The module of a target.

    Raises:
        InputError: there is no target of that name.
    """
    if name not in TARGETS:
        raise InputError(f"target {name!r} is unknown; choose one of: {', '.join(TARGETS)}")
    return importlib.import_module(TARGETS[name])
