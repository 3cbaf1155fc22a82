"""edgekit: compress a PyTorch model and lower it, unchanged to the integer, to small devices.

From Python::

    import edgekit

    outcome = edgekit.run_model(model, data, "runs/first")   # every stage, for an nn.Module and edgekit.Data
    outcome = edgekit.run("recipe.yaml", "runs/second")      # the same for a recipe
    program = edgekit.load("runs/first/frozen.pt2")          # a FrozenProgram
    print(outcome.ok, edgekit.describe(program).bytes)

or stage by stage: ``compress_model``, ``export_program``, ``verify_files`` (:mod:`edgekit.in_memory`).

``edgekit.pipeline`` has every verb of the command line (compress, export, verify, profile, report, run), ``edgekit.compress``,
``edgekit.targets`` and ``edgekit.verify`` the parts. Importing this package imports nothing; a name is loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "Data",
    "EdgekitError",
    "FrozenProgram",
    "Outcome",
    "__version__",
    "compress_model",
    "describe",
    "export_program",
    "load",
    "load_weights",
    "run",
    "run_model",
    "save",
    "verify_files",
]

if TYPE_CHECKING:
    from edgekit.data import Data
    from edgekit.errors import EdgekitError
    from edgekit.frozen import FrozenProgram, load, save
    from edgekit.frozen.describe import describe
    from edgekit.in_memory import compress_model, export_program, run_model, verify_files
    from edgekit.pipeline import Outcome, run
    from edgekit.source import load_weights

_HOME = {
    "Data": "edgekit.data",
    "EdgekitError": "edgekit.errors",
    "FrozenProgram": "edgekit.frozen",
    "load": "edgekit.frozen",
    "save": "edgekit.frozen",
    "describe": "edgekit.frozen.describe",
    "Outcome": "edgekit.pipeline",
    "run": "edgekit.pipeline",
    "load_weights": "edgekit.source",
    **dict.fromkeys(("compress_model", "export_program", "run_model", "verify_files"), "edgekit.in_memory"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'edgekit' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
