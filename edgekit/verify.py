"""The parity contract: does each file still compute what the frozen program says, and does that still solve the task?

Three checks for each file, from the file itself:

1. *Read back*: every weight integer, scale, zero point and bias stored in the file equals the frozen program's.
2. *Layer by layer*: each frozen layer is fed the TARGET'S OWN inputs and compared with the target's output
   (:meth:`FrozenProgram.forced`). A fault then shows in its layer only; a free-running comparison smears it over all later ones,
   and accuracy may not move at all. Kernel families round differently by one step, so ``max_lsb`` is 1 by default. Taps come
   from the file itself, or from a copy with more outputs; that the file's own outputs follow from them ties the copy to the file.
   Where a device has a bit-exact reference (firmware has), every layer and output must equal it too.
3. *End to end*: the stage table float -> compressed -> frozen -> file on the same samples.

A file is run on this machine, or on a device (:mod:`edgekit.devices`); a file may be checked on several.

Run folder: reads ``frozen.pt2``, ``model.*`` and, where there, ``stage_float.npz`` and ``stage_compressed.npz``
(written by the pipeline through :mod:`edgekit.stages`); writes ``parity.json``. A breach is a sentence in
:attr:`edgekit.parity.Parity.breaches`; callers print it and exit with 1, or call :meth:`edgekit.parity.Parity.require`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgekit import layer_parity
from edgekit.data import Data
from edgekit.devices import connect
from edgekit.devices.target import OnDevice
from edgekit.errors import EdgekitError, FormatError, InputError, MissingTool
from edgekit.frozen import FrozenProgram, load
from edgekit.layer_parity import compare_layers
from edgekit.metrics import metric_name, score
from edgekit.parity import ArtifactParity, Parity, Stage
from edgekit.recipe import Verify
from edgekit.stage_table import Arrays, stage_row
from edgekit.stages import Evaluation, StageOutputs, judged_on, load_stage, spread
from edgekit.targets import TARGETS, digest, get, present

__all__ = ["unchanged", "verify_artifact", "verify_run"]

Progress = Callable[[str, int, int], None]
"""Called with (what runs, samples done, samples in all)."""


def verify_run(
    folder: Path,
    data: Data | None = None,
    settings: Verify | None = None,
    progress: Progress | None = None,
    targets: Sequence[str] | None = None,
    on: Sequence[tuple[Any, str]] = (),
) -> Parity:
    """Check the files of a run folder and write its ``parity.json``.

    What an earlier check found of a file that is not checked now stays, if the file, the tolerances and the samples are the same.

    Args:
        data: the recipe's data; without it the few samples stored with the float stage are used, and without these random inputs.
        targets: which targets to check here; None: every one whose file is there; none at all: the program alone is judged.
        on: what to check on devices: (device, target).

    Raises:
        FormatError: no frozen program in the folder.
        DataError: ``data`` is not the data that the stages were made with.
        MissingTool: nothing that the files need is installed. What keeps a file from being checked is a breach, and so is an
            exported file that is gone.
    """
    folder, settings = Path(folder), settings or Verify()
    program = load(folder / "frozen.pt2")
    stored = {n: load_stage(p) for n in ("float", "compressed") if (p := folder / f"stage_{n}.npz").exists()}
    if data is None and settings.max_accuracy_drop is not None:
        settings = replace(settings, max_accuracy_drop=None)  # one of 32 stored samples would be 3 points
    evaluation, references, notes = judged_on(program, data, stored, settings.samples)
    reference = program.run(*evaluation.inputs, progress=_named(progress, "frozen program"))
    references["frozen"] = tuple(y.float().numpy() for y in reference)
    stages = [stage_row(n, y, references, evaluation, program) for n, y in references.items()]
    stages = [_with_size(s, stored.get(s.name), program) for s in stages]
    found, failures = [], []
    jobs = _jobs(folder, targets, on)
    for name, job in jobs:
        path = folder / f"model{get(name).SUFFIX}"
        try:
            found.append(verify_artifact(program, job, path, evaluation, references, settings, progress))
        except EdgekitError as error:  # a file that cannot be checked must not hide what is wrong with the others
            if not isinstance(job, str) and len(jobs) == 1:
                raise
            where = name if isinstance(job, str) else job.NAME
            failures.append((f"{where}: {path.name} could not be checked: {error}", error))
    if failures and not found and all(isinstance(error, MissingTool) for _, error in failures):
        raise failures[0][1]
    breaches = [text for text, _ in failures]
    if targets is None and not on:
        breaches += [
            f"{name}: {file} is gone; export it again with `edgekit export RUN --target {name}`" for name, file in _gone(folder)
        ]
    breaches += _cost_of_compression(references, evaluation, settings)
    artifacts = _with_earlier(folder, found, settings, stages)
    labelled = evaluation.labels is not None and stages[-1].metric is not None
    parity = Parity(
        program=program.name,
        metric=metric_name(evaluation.metric) if labelled else None,
        samples=len(evaluation),
        layer_samples=min(settings.layer_samples, len(evaluation)),
        settings=_tolerances(settings),
        stages=(*stages, *(a.stage for a in artifacts)),
        artifacts=artifacts,
        unchecked=tuple(name for name in present(folder) if name not in {a.target for a in artifacts}),
        run_breaches=tuple(breaches),
        notes=tuple(notes),
    )
    parity.save(folder / "parity.json")
    return parity


def verify_artifact(
    program: FrozenProgram,
    target: Any,
    path: Path,
    evaluation: Evaluation,
    references: Mapping[str, Arrays] | None = None,
    settings: Verify | None = None,
    progress: Progress | None = None,
) -> ArtifactParity:
    """Check one file against its frozen program.

    Args:
        target: a name of :data:`edgekit.targets.TARGETS`, or an object of the same members, such as
            :class:`edgekit.devices.target.OnDevice`.
        references: outputs of the stages "float", "compressed", "frozen" on ``evaluation``; "frozen" is computed if missing.

    Raises:
        FormatError: the file cannot be read at all.
        MissingTool: the target's runtime is not installed.
    """
    if isinstance(target, str):
        with _at_home(target, path) as module:
            return verify_artifact(program, module, path, evaluation, references, settings, progress)
    module = target
    name = str(getattr(module, "NAME", getattr(module, "__name__", "target").rpartition(".")[2]))
    settings, path = settings or Verify(), Path(path)
    known = dict(references or {})
    if "frozen" not in known:
        known["frozen"] = tuple(y.float().numpy() for y in program.run(*evaluation.inputs))
    mismatches = list(module.readback(path, program))
    artifact = module.inspect(path, program)
    inputs = [x.numpy() for x in evaluation.inputs]
    outputs = module.run(path, inputs, threads=1, progress=_named(progress, name))
    stage = stage_row(name, outputs, known, evaluation, program, size=artifact.bytes)
    chosen = spread(len(evaluation), settings.layer_samples)
    found = compare_layers(program, module, path, evaluation.take(chosen), [y[chosen] for y in outputs], settings, progress)
    tapped = {layer.layer for layer in found.layers}
    bad = {m.layer for m in mismatches} | {layer.layer for layer in found.layers if not layer.within}
    bad |= set(layer_parity.first_inexact(found))
    first = next((x.name for x in program.listed if x.name in bad), None) or next(iter(sorted(bad)), None)
    breaches = [f"{name}: {m}" for m in mismatches]
    breaches += layer_parity.breaches(name, found, first, settings) + layer_parity.exact_breaches(name, found)
    breaches += [f"{name}: {text}" for text in getattr(module, "wrong", ())]
    chip = bool(getattr(module, "quantizes", False))
    breaches += _output_breaches(name, stage, found.systematic, known, evaluation, settings)
    return ArtifactParity(
        target=getattr(module, "target", name),
        device=module.device.name if isinstance(module, OnDevice) else "",
        file=path.name,
        sha256=digest(module, path),
        stage=stage,
        layers=found.layers,
        untapped=() if chip else tuple(x.name for x in program.layers if x.name not in tapped and x.op != "dequantize"),
        mismatches=tuple(map(str, mismatches)),
        first_diverging=first,
        tap_lsb=found.tap_lsb,
        chip=chip,
        exact=not found.inexact if found.exact else None,
        breaches=tuple(breaches),
        notes=(*artifact.notes, *getattr(module, "notes", ())),
        artifact=json.loads(json.dumps(artifact.to_json())),  # as it reads back: lists, not tuples
    )


def _output_breaches(
    target: str,
    stage: Stage,
    systematic: float,
    references: Mapping[str, Arrays],
    evaluation: Evaluation,
    settings: Verify,
) -> list[str]:
    breaches = []
    if systematic > settings.max_lsb + 1:
        breaches.append(
            f"{target}: the file's outputs differ by {systematic:.3g} LSB on average from those that follow from its layers, "
            f"{settings.max_lsb + 1:g} allowed: the file does not compute what its layers compute"
        )
    if settings.max_accuracy_drop is not None and stage.metric is not None and evaluation.labels is not None:
        # what compression itself cost is said once, not of every file
        base = "float" if "float" in references and not _cost_of_compression(references, evaluation, settings) else "frozen"
        drop = score(evaluation.metric, np.asarray(references[base][0]), evaluation.labels) - stage.metric
        if drop > settings.max_accuracy_drop + 1e-9:
            breaches.append(
                f"{target}: {metric_name(evaluation.metric)} fell by {drop:.3g} from {base} to {stage.metric:.4g}, "
                f"{settings.max_accuracy_drop:g} allowed"
            )
    return breaches


def _cost_of_compression(references: Mapping[str, Arrays], evaluation: Evaluation, settings: Verify) -> list[str]:
    """The breach of ``max_accuracy_drop`` that the frozen program is to blame for, not a file; empty if there is none."""
    allowed, labels = settings.max_accuracy_drop, evaluation.labels
    if allowed is None or labels is None or "float" not in references or "frozen" not in references:
        return []
    before, after = (score(evaluation.metric, np.asarray(references[n][0]), labels) for n in ("float", "frozen"))
    if before - after <= allowed + 1e-9:
        return []
    return [
        f"compression: {metric_name(evaluation.metric)} fell by {before - after:.3g} from float ({before:.4g}) to the frozen "
        f"program ({after:.4g}), {allowed:g} allowed; no file is to blame, `edgekit analyze` says which layer is"
    ]


def _gone(folder: Path) -> list[tuple[str, str]]:
    """(target, file) of what was exported into the run and is not there any more."""
    files = {name: f"model{get(name).SUFFIX}" for name in TARGETS if (folder / f"export_{name}.json").exists()}
    return [(name, file) for name, file in files.items() if not (folder / file).exists()]


def _with_size(stage: Stage, stored: StageOutputs | None, program: FrozenProgram) -> Stage:
    if stored is not None:
        return replace(stage, bytes=stored.bytes, macs=stored.macs)
    return replace(stage, bytes=program.weight_bytes)


def _jobs(folder: Path, targets: Sequence[str] | None, on: Sequence[tuple[Any, str]]) -> list[tuple[str, str | OnDevice]]:
    """(target, what :func:`verify_artifact` takes for it), each place once.

    Raises:
        InputError: a file that is not there, or nothing to check.
    """
    here = list(targets) if targets is not None else present(folder)
    jobs: list[tuple[str, str | OnDevice]] = [(name, name) for name in here]
    jobs += [(name, OnDevice(name, device)) for device, name in on]
    home: set[tuple[str, str]] = set()
    for name, _ in jobs:
        path = folder / f"model{get(name).SUFFIX}"
        if not path.exists():
            raise InputError(f"{folder}: no model{get(name).SUFFIX}; make it with `edgekit export {folder} --target {name}`")
        if name in here and hasattr(get(name), "home"):
            home.add((name, get(name).home(path)))
    if not jobs and targets is None:
        raise InputError(f"{folder}: no model file to verify; make one with `edgekit export {folder} --target NAME`")
    return [(name, job) for name, job in jobs if isinstance(job, str) or (name, job.device.name) not in home]


@contextlib.contextmanager
def _at_home(target: str, path: Path) -> Iterator[Any]:
    """A target's module, or what stands for it where its file cannot run on this machine.

    Raises:
        MissingTool: its runtime or emulator is not installed.
    """
    module = get(target)
    if missing := module.available():
        remedy = f"; run: pip install 'edgekit[{module.EXTRA}]'" if module.EXTRA else ""
        raise MissingTool(f"target {target} cannot be verified here: {missing}{remedy}")
    if not hasattr(module, "home"):
        yield module
        return
    with contextlib.closing(connect(module.home(path))) as device:
        yield OnDevice(target, device)


def _with_earlier(
    folder: Path, found: Sequence[ArtifactParity], settings: Verify, stages: Sequence[Stage]
) -> tuple[ArtifactParity, ...]:
    """``found`` and what an earlier ``parity.json`` says of other files, where it still holds."""
    try:
        before = Parity.load(folder / "parity.json")
    except FormatError:
        return tuple(found)
    same = before.settings == _tolerances(settings) and before.stages[: len(stages)] == tuple(stages)
    known = {(a.target, a.device) for a in found}
    kept = [a for a in before.artifacts if same and (a.target, a.device) not in known and unchanged(folder, a)]
    order = {name: i for i, name in enumerate(TARGETS)}
    return tuple(sorted([*kept, *found], key=lambda a: (order.get(a.target, len(order)), a.device)))


def _tolerances(settings: Verify) -> dict[str, Any]:
    """What files are judged by; on which devices is no part of it."""
    return {key: value for key, value in asdict(settings).items() if key != "devices"}


def unchanged(folder: Path, artifact: ArtifactParity) -> bool:
    """Whether the file of a run folder is the one that was checked, to the byte."""
    if artifact.target not in TARGETS:
        return False
    module = get(artifact.target)
    path = folder / f"model{module.SUFFIX}"
    return path.is_file() and digest(module, path) == artifact.sha256


def _named(progress: Progress | None, what: str) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    return lambda done, total: progress(what, done, total)
