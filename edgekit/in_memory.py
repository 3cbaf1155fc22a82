"""The verbs of the command line for an ``nn.Module`` and tensors that are in memory, without a recipe or files of one's own.

    >>> data = Data(calibration=images, evaluation=(test_images, labels))
    >>> compressed = compress_model(model, data, "static_wi4_ai8")
    >>> export_program(compressed, "runs/mine", ["executorch", {"tflite": {"io": "float"}}])
    >>> verify_files("runs/mine", data).ok
    True

or all of it, with the float model's row in the stage table and a report page: ``run_model(model, data, "runs/mine")``. What these
make is an ordinary run folder: ``edgekit describe``, ``export``, ``verify``, ``profile`` and ``report`` work on it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from edgekit import pipeline, recipe
from edgekit.compress.steps import Compressed, apply
from edgekit.data import Data
from edgekit.errors import ModelError, cause
from edgekit.frozen import FrozenProgram
from edgekit.intake import check_model
from edgekit.layer_costs import measure
from edgekit.pipeline import Outcome, Progress
from edgekit.recipe import Recipe, Verify
from edgekit.stage_work import Loaded, take_in

__all__ = ["compress_model", "export_program", "run_model", "verify_files"]

Steps = str | Mapping[str, Any] | Sequence[Any]
"""``compress`` of a recipe: a name, a block such as ``{"ptq": {"weights": "int4"}}`` or ``PTQ(weights="int4")``, or a list."""

Targets = str | Mapping[str, Any] | Sequence[Any]
"""``targets`` of a recipe: a name, ``{"tflite": {"io": "float"}}``, or a list of them."""


def compress_model(
    model: nn.Module,
    data: Any,
    compress: Steps = "static_wi8_ai8",
    *,
    seed: int = 0,
    name: str = "model",
    device: str | None = None,
    progress: Progress | None = None,
) -> Compressed:
    """Compress a model; its ``program`` is the frozen program, ``record["warnings"]`` what was doubtful.

    Args:
        model: in float32, on any device, in any mode; a copy is worked on.
        data: a :class:`edgekit.Data`, or only its calibration part: a Tensor (N, ...), DataLoader and the like.
        compress: what is done, as in a recipe.
        device: "cpu" or "cuda", where blocks that learn do so.
        progress: called with (what runs, done, in all).

    Raises:
        RecipeError: ``compress`` is not valid. ModelError, DataError: the model or the data cannot be used; says why.
    """
    settings = recipe.replace(recipe.in_memory(compress=compress, seed=seed, name=name), device=device)
    notes = pipeline.device_notes(settings, device)
    found = _taken(model, data, seed)
    made = apply(found.model, settings.compress, found.data, name=name, progress=progress, measure=measure)
    made.record["warnings"] = [*notes, *made.record["warnings"]]
    return made


def export_program(
    compressed: Compressed | FrozenProgram,
    folder: str | Path,
    targets: Targets | None = None,
    *,
    resume: bool = True,
    progress: Progress | None = None,
) -> Outcome:
    """Write a run folder with the frozen program and its files.

    Args:
        targets: as in a recipe; None: every format that is installed.

    Raises:
        RecipeError, UnsupportedError, MissingTool, ParityError: nothing is written then.
    """
    settings = recipe.in_memory(compress=[], targets=_installed() if targets is None else targets)
    record: dict[str, Any] = {"passes": [], "unquantized": [], "warnings": []}
    program = compressed if isinstance(compressed, FrozenProgram) else compressed.program
    if isinstance(compressed, Compressed):
        record = compressed.record
        blocks = [{step["kind"]: step["settings"]} for step in record["passes"]]
        settings = recipe.in_memory(compress=blocks, targets=[_written(t) for t in settings.targets], name=program.name)
    return pipeline.export_program(program, Path(folder), settings, record, resume=resume, progress=progress)


def verify_files(
    folder: str | Path, data: Data | None = None, targets: Sequence[str] | None = None, *, progress: Progress | None = None
) -> Outcome:
    """Check every file of a run folder against its frozen program; a breach is no error, see ``ok`` and ``parity.breaches``.

    Args:
        data: what the files are judged on; without it the samples stored in the folder, or random inputs where there are none.
    """
    return pipeline.verify(Path(folder), targets, data=data, progress=progress)


def run_model(
    model: nn.Module,
    data: Any,
    folder: str | Path,
    *,
    compress: Steps = "static_wi8_ai8",
    targets: Targets | None = None,
    verify: Verify | Mapping[str, Any] | None = None,
    seed: int = 0,
    name: str = "model",
    device: str | None = None,
    resume: bool = True,
    progress: Progress | None = None,
) -> Outcome:
    """Every stage of ``edgekit run`` for a model in memory: compress, export, verify and report into ``folder``.

    Args: as :func:`compress_model` and :func:`export_program`; ``verify``: what counts as equal, as in a recipe; ``resume``: take
        finished stages from the cache.

    Raises:
        EdgekitError: any of them; ``folder`` is then as it was before.
    """
    chosen = _installed() if targets is None else targets
    asked = dict(verify) if isinstance(verify, Mapping) else verify
    settings = recipe.in_memory(compress=compress, targets=chosen, verify=asked, seed=seed, name=name)
    settings = recipe.replace(settings, device=device)
    load = _loader(model, data, settings)
    return pipeline.make(settings, load, Path(folder), device=device, resume=resume, progress=progress)


def _loader(model: nn.Module, data: Any, settings: Recipe) -> Any:
    return lambda: _taken(model, data, settings.seed)


def _taken(model: nn.Module, data: Any, seed: int) -> Loaded:
    """A copy of the model, on the CPU in evaluation mode, and the data, checked."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"the model is {type(model).__name__}; expected a torch.nn.Module")
    try:
        own = copy.deepcopy(model)
    except Exception as error:
        raise ModelError(f"the model cannot be copied: {cause(error)}") from error
    found = data if isinstance(data, Data) else Data(calibration=data)
    return take_in(check_model(own, "the model"), found, seed)


def _installed() -> list[str]:
    from edgekit.targets import GENERAL, get

    return [name for name in GENERAL if get(name).available() is None]


def _written(target: Any) -> Any:
    return {target.name: dict(target.options)} if target.options else target.name
