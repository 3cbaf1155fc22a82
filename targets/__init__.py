"""Targets: a frozen program becomes a file of another runtime, and is read back, run and inspected there.

Every module of :data:`TARGETS` has the same members: ``SUFFIX``, ``EXTRA``, ``Options``, ``available()``, ``lower(program, path,
options)``, ``inspect(path, program)``, ``readback(path, program)``, ``run(path, inputs, threads, progress)`` and
``taps(path, program, sample)``. One whose files cannot run on this machine also has ``home(path)``, the name of the device
(:mod:`edgekit.devices`) that ``verify`` runs it on, and one that writes more than one file has ``files(path)``, all of them.
There is no base class; a new target is one module and one line here. Targets that differ in a number only (the Cortex-M cores)
are objects with these members in one module, written ``module:object``.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from edgekit.errors import InputError
from edgekit.files import joint_sha256

__all__ = ["GENERAL", "TARGETS", "digest", "files", "get", "present"]

TARGETS: dict[str, str] = {
    "executorch": "edgekit.targets.executorch",
    "tflite": "edgekit.targets.tflite",
    "onnx": "edgekit.targets.onnx",
    "nir": "edgekit.targets.nir",
    **{f"cortex-m{number}": f"edgekit.targets.cortex_m:M{number}" for number in (0, 3, 4, 7, 33, 55)},
}
"""Target name to module, or to an object in a module; importing one imports no converter and no runtime."""

GENERAL = ("executorch", "tflite", "onnx")
"""Targets that take any model: what a recipe without a wish gets. Not among them: firmware, of which a user wants one core, and
formats of spiking networks."""


def get(name: str) -> Any:
    """The module (or object) of a target.

    Raises:
        InputError: there is no target of that name.
    """
    if name not in TARGETS:
        raise InputError(f"target {name!r} is unknown; choose one of: {', '.join(TARGETS)}")
    module, _, member = TARGETS[name].partition(":")
    found = importlib.import_module(module)
    return getattr(found, member) if member else found


def present(folder: Path) -> list[str]:
    """Names of the targets whose file is in a run folder."""
    return [name for name in TARGETS if (Path(folder) / f"model{get(name).SUFFIX}").exists()]


def files(module: Any, path: Path) -> list[Path]:
    """What an export wrote, ``path`` among it; other files that lie beside them do not count.

    Args:
        module: a target's module, or an object of the same members.
    """
    own = getattr(module, "files", None)
    return [Path(path)] if own is None else [p for p in own(Path(path)) if p.is_file()]


def digest(module: Any, path: Path) -> str:
    """Hex SHA-256 of an export."""
    return joint_sha256(files(module, path))
