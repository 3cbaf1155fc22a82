"""What a result was made with: versions, Python, operating system, processor, threads. No host name, user name or path."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["PACKAGES", "describe", "processor", "versions"]

PACKAGES: Mapping[str, str] = {
    "torch": "",
    "numpy": "",
    "brevitas": "",
    "executorch": "executorch",
    "torchao": "executorch",
    "litert-torch": "tflite",
    "ai-edge-litert": "tflite",
    "onnx": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
}
"""Packages whose version can change a result, and the extra that brings them ("" for those always there)."""


@lru_cache(maxsize=1)
def versions() -> dict[str, str | None]:
    """Installed version of each of :data:`PACKAGES`, None where it is not installed; imports none of them."""
    return {name: _version(name) for name in PACKAGES}


def describe() -> dict[str, Any]:
    """The content of ``env.json``."""
    import torch

    from edgekit import __version__

    return {
        "edgekit": __version__,
        "packages": versions(),
        "python": platform.python_version(),
        "system": platform.system(),
        "release": platform.release(),
        "machine": platform.machine(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }


def processor() -> str:
    """The processor's model name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
