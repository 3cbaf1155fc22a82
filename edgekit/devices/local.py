"""``local``: this machine, in a process of its own; ``local:python=PATH`` with another Python (one with tflite-runtime, say)."""

from __future__ import annotations

import sys

from edgekit.devices.linux import Here, Linux, connected, options

__all__ = ["connect"]


def connect(spec: str) -> Linux:
    """This machine.

    Raises:
        InputError: an unknown option; MissingTool: no runtime is installed.
    """
    given = options(spec.partition(":")[2], spec)
    return connected(spec, Here([given.python or sys.executable]), given)
