"""A small network lowered to each target, and requests for the runner."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nets import residual_net

from edgekit.devices import runner
from edgekit.files import sha256
from edgekit.targets import get


def lowered(folder: Path, target: str) -> Path:
    """residual_net as a file of the target."""
    module = get(target)
    path = folder / f"model{module.SUFFIX}"
    module.lower(residual_net(), path)
    return path


def entry(folder: Path, path: Path, target: str, inputs: Sequence[np.ndarray], **more: Any) -> dict[str, Any]:
    """A file of a request, its samples written into the folder in the file's own types."""
    np.savez(folder / f"{path.stem}_in.npz", **{f"input{i}": x for i, x in enumerate(get(target).encode(path, inputs))})
    if path.parent != folder:
        (folder / path.name).write_bytes(path.read_bytes())
    names = {"file": path.name, "inputs": f"{path.stem}_in.npz", "outputs": f"{path.stem}_out.npz"}
    return {**names, "target": target, "sha256": sha256(path), **more}


def ask(folder: Path, action: str, files: Sequence[dict[str, Any]], **more: Any) -> tuple[int, dict[str, Any]]:
    """Exit code and result of the runner in a process of its own."""
    settings = more.pop("settings", {"num_runs": 20, "warmup_runs": 2})
    request = {"protocol": runner.PROTOCOL, "action": action, "files": list(files), "times": "times.npz", "settings": settings}
    (folder / "request.json").write_text(json.dumps(request | more))
    command = [sys.executable, str(runner.__file__), str(folder / "request.json")]
    done = subprocess.run(command, capture_output=True, timeout=120, cwd="/")
    return done.returncode, json.loads((folder / "result.json").read_text())
