"""What each stage of a recipe does, in the folder of a :class:`~edgekit.stage_runner.Stages`; the pipeline has the order."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from edgekit import cache, source
from edgekit.data import Data, fingerprint, sample_inputs
from edgekit.files import sha256, write_json
from edgekit.intake import check_sample, range_warnings
from edgekit.recipe import Recipe, Target
from edgekit.stage_runner import Stages

if TYPE_CHECKING:
    from edgekit.parity import Parity

__all__ = ["Loaded", "compress", "load", "lower", "report", "seed_all", "take_in", "verified", "verify"]


@dataclass(frozen=True)
class Loaded:
    """What the recipe names, in memory, and the hashes that stand for it in keys."""

    model: nn.Module
    data: Data
    sample: tuple[Tensor, ...]
    seed: int
    text: str

    @cached_property
    def keys(self) -> dict[str, Any]:
        return {
            "model": source.model_fingerprint(self.model, self.sample),
            "text": self.text,
            "data": fingerprint(self.data, self.seed),
            "threads": torch.get_num_threads(),
        }


def seed_all(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def take_in(model: nn.Module, data: Data, seed: int, text: str = "") -> Loaded:
    """A model and its data as stages take them, after a try on the first sample; ``text``: hash of the model's source.

    Raises:
        ModelError, DataError: see :mod:`edgekit.intake`.
    """
    sample = sample_inputs(model, data)
    check_sample(model, sample, "the model")
    return Loaded(model, data, sample, seed, text)


def load(settings: Recipe) -> Loaded:
    """The model and the data that a recipe names.

    Raises:
        InputError, ModelError, DataError: a file or factory that is not there, or gives something else.
    """
    seed_all(settings.seed)
    model = source.load_model(settings.model, settings.seed)
    data = source.load_data(settings.data, settings.seed)
    file = Path(settings.model.rpartition(":")[0])
    text = hashlib.sha256(file.read_bytes()).hexdigest() if file.suffix == ".py" else ""
    return take_in(model, data, settings.seed, text)


def compress(stages: Stages, settings: Recipe, loaded: Loaded) -> None:
    """``stage_float.npz``, then ``frozen.pt2``, ``stage_compressed.npz`` and ``compress.json``."""
    from edgekit import stages as outputs

    def evaluate(name: str, model: nn.Module, *, simulated: bool = False) -> str:
        def progress(done: int, total: int) -> None:
            stages.progress(f"{name} model", done, total)

        evaluation = outputs.evaluation_set(loaded.data, len(loaded.sample))
        found = outputs.evaluate_stage(name, model, evaluation, simulated=simulated, progress=progress)
        return outputs.save_stage(stages.folder, found).name

    def quantize() -> list[str]:
        from edgekit.compress import apply
        from edgekit.frozen import save
        from edgekit.layer_costs import measure

        seed_all(settings.seed)
        unfinished = cache.folder() / "unfinished" / cache.key("compress", inputs)
        if not stages.resume:
            shutil.rmtree(unfinished, ignore_errors=True)
        made = apply(
            loaded.model, settings.compress, loaded.data, name=settings.name, progress=stages.progress, folder=unfinished,
            measure=measure,
        )  # fmt: skip
        save(made.program, stages.folder / "frozen.pt2")
        evaluation = outputs.evaluation_set(loaded.data, len(loaded.sample))
        warnings = [*made.record["warnings"], *range_warnings(made.program, evaluation)]
        write_json(stages.folder / "compress.json", {**made.record, "warnings": warnings})
        files = ["frozen.pt2", "compress.json", evaluate("compressed", made.simulation, simulated=True)]
        shutil.rmtree(unfinished, ignore_errors=True)
        return files

    stages.cached("float", loaded.keys, lambda: [evaluate("float", loaded.model)])
    blocks = [[b.kind, asdict(b.settings)] for b in settings.compress]
    inputs = {**loaded.keys, "blocks": blocks, "name": settings.name, "seed": settings.seed}
    stages.cached("compress", inputs, quantize)
    stages.warnings += json.loads((stages.folder / "compress.json").read_text())["warnings"]


def lower(stages: Stages, target: Target) -> None:
    """``model.<suffix>``, or the folder it is in, and ``export_<target>.json``."""
    from edgekit.targets import files, get

    module, frozen = get(target.name), stages.folder / "frozen.pt2"
    path, facts = stages.folder / f"model{module.SUFFIX}", f"export_{target.name}.json"

    def make() -> list[str]:
        from edgekit.frozen import load as opened

        seed_all(0)
        artifact = module.lower(opened(frozen), path, module.Options(**target.options))
        write_json(stages.folder / facts, {"options": target.options, **artifact.to_json()})
        return [*(p.relative_to(stages.folder).as_posix() for p in sorted(files(module, path))), facts]

    inputs = {"frozen": sha256(frozen), "options": asdict(module.Options(**target.options))}
    stages.cached(f"lower {target.name}", inputs, make)


def verified(stages: Stages, settings: Recipe, loaded: Loaded, on: Sequence[tuple[Any, str]]) -> Parity:
    """The verify stage of a whole run, through the cache; what a device computes is not kept there."""
    from edgekit.parity import Parity

    found = ((p.relative_to(stages.folder).as_posix(), p) for p in sorted(stages.folder.rglob("*")) if p.is_file())
    files = {name: sha256(p) for name, p in found if name.startswith(("frozen.", "model.", "stage_"))}

    def make() -> list[str]:
        verify(stages, settings, loaded.data, None if settings.targets else (), on)
        return ["parity.json"]

    if on:
        with stages.timed("verify"):
            make()
        return Parity.load(stages.folder / "parity.json")
    stages.cached("verify", {"files": files, "settings": asdict(settings.verify), "data": loaded.keys["data"]}, make)
    return Parity.load(stages.folder / "parity.json")


def verify(
    stages: Stages, settings: Recipe, data: Data | None, targets: Sequence[str] | None, on: Sequence[tuple[Any, str]]
) -> Parity:
    """``parity.json``: each of ``targets`` (None: all there are) here, and on devices: ``on`` has (device, target)."""
    from edgekit.verify import verify_run

    return verify_run(stages.folder, data, settings.verify, stages.progress, targets, on)


def report(stages: Stages) -> None:
    """``report.html`` of what is in the folder."""
    from edgekit.report import write_report

    with stages.timed("report"):
        write_report(stages.folder)
