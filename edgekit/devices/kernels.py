"""The library of 1-bit kernels that goes to a device together with a ``.pte`` that calls them: compiled here, for its runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgekit.devices import arm64_root
from edgekit.errors import MissingTool
from edgekit.targets import executorch_binary

__all__ = ["library"]


def library(device: str, machine: Mapping[str, Any], files: Sequence[Path]) -> Path | None:
    """The library for the ExecuTorch of a machine, None if no file needs it.

    Its headers must be of the same version: there are those of the ExecuTorch installed here and of the arm64 Linux.

    Args:
        device: its name, for messages.
        machine: what the runner's ``describe`` told of it.

    Raises:
        MissingTool: no compiler for that machine, or no headers of that version.
    """
    if not any(path.suffix == ".pte" and executorch_binary.needs_kernels(path.read_bytes()) for path in files):
        return None
    there = machine.get("packages", {}).get("executorch", "")
    candidates = {executorch_binary.package_version(p): p for p in (arm64_root.site("executorch") / "executorch", _here())}
    if there not in candidates or not there:
        known = " and ".join(filter(None, candidates)) or "no version"
        raise MissingTool(
            f"{device}: the file has 1-bit layers, whose kernels are compiled against the headers of the ExecuTorch there "
            f"({there or 'none is installed'}), and those of {known} are here; install the same version on both"
        )
    major, minor = machine["python"].split(".")[:2]
    return executorch_binary.kernel_library(machine["machine"], candidates[there], (int(major), int(minor)))


def _here() -> Path:
    """The installed executorch, or a folder that is not there."""
    try:
        return executorch_binary.installed_package()
    except MissingTool:
        return Path("executorch")
