"""The instruction clock: a plugin for QEMU's user mode, built from ``clock.c`` when it is needed."""

from __future__ import annotations

import subprocess
from pathlib import Path

from edgekit.errors import MissingTool
from edgekit.firmware_sim.toolchain import find

__all__ = ["build"]

SOURCE = Path(__file__).resolve().parent / "clock.c"


def build(folder: Path) -> Path:
    """The plugin, made in ``folder``.

    Raises:
        MissingTool: no gcc, or it fails.
    """
    library = folder / "libclock.so"
    command = [find("gcc"), "-O2", "-shared", "-fPIC", "-fvisibility=hidden", str(SOURCE), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise MissingTool(f"gcc failed: {done.stderr.strip().splitlines()[0] if done.stderr else 'no message'}")
    return library
