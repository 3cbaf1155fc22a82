"""The parity contract: does each file still compute what the frozen program says, and does that still solve the task?

Three checks for each file, from the file itself:

1. *Read back*: every weight integer, scale, zero point and bias stored in the file equals the frozen program's.
2. *Layer by layer*: each frozen layer is fed the TARGET'S OWN inputs and compared with the target's output
   (:meth:`FrozenProgram.forced`). A fault then shows in its layer only; a free-running comparison smears it over all later ones,
   and accuracy may not move at all. Kernel families round differently by one step, so ``max_lsb`` is 1 by default. Taps come
   from the file itself, or from a copy with more outputs; that the file's own outputs follow from them ties the copy to the file.
3. *End to end*: the stage table float -> compressed -> frozen -> file on the same samples.

Run folder: reads ``frozen.pt2``, ``model.{pte,tflite,onnx}`` and, where there, ``stage_float.npz`` and ``stage_compressed.npz``
(written by the pipeline through :mod:`edgekit.stages`); writes ``parity.json``. A breach is a sentence in
:attr:`edgekit.parity.Parity.breaches`; callers print it and exit with 1, or call :meth:`edgekit.parity.Parity.require`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgekit.data import Data
from edgekit.errors import InputError, MissingTool
from edgekit.files import sha256
from edgekit.frozen import FrozenProgram, load
from edgekit.metrics import HUGE, difference, metric_name, score, sqnr_db
from edgekit.parity import ArtifactParity, LayerParity, Parity, Stage
from edgekit.recipe import Verify
from edgekit.stage_table import Arrays, output_lsb, stage_row, whole_steps
from edgekit.stages import Evaluation, StageOutputs, judged_on, load_stage, spread
from edgekit.targets import get, present

__all__ = ["compare_layers", "verify_artifact", "verify_run"]

Progress = Callable[[str, int, int], None]
"""Called with (what runs, samples done, samples in all)."""


def verify_run(
    folder: Path,
    data: Data | None = None,
    settings: Verify | None = None,
    progress: Progress | None = None,
    targets: Sequence[str] | None = None,
) -> Parity:
    """Check every file of a run folder and write its ``parity.json``.

    Args:
        data: the recipe's data; without it the few samples stored with the float stage are used, and without these random inputs.
        targets: which targets to check; None: every one whose file is there.

    Raises:
        FormatError: no frozen program in the folder, or a damaged file.
        DataError: ``data`` is not the data that the stages were made with.
        MissingTool: the runtime of a file is not installed.
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
    artifacts = tuple(
        verify_artifact(program, name, folder / f"model{get(name).SUFFIX}", evaluation, references, settings, progress)
        for name in _present(folder, targets)
    )
    if not artifacts:
        raise InputError(f"{folder}: no model file to verify; make one with `edgekit export`")
    labelled = evaluation.labels is not None and stages[-1].metric is not None
    parity = Parity(
        program=program.name,
        metric=metric_name(evaluation.metric) if labelled else None,
        samples=len(evaluation),
        layer_samples=min(settings.layer_samples, len(evaluation)),
        settings=asdict(settings),
        stages=(*stages, *(a.stage for a in artifacts)),
        artifacts=artifacts,
        notes=tuple(notes),
    )
    parity.save(folder / "parity.json")
    return parity


def verify_artifact(
    program: FrozenProgram,
    target: str | ModuleType,
    path: Path,
    evaluation: Evaluation,
    references: Mapping[str, Arrays] | None = None,
    settings: Verify | None = None,
    progress: Progress | None = None,
) -> ArtifactParity:
    """Check one file against its frozen program.

    Args:
        target: a name of :data:`edgekit.targets.TARGETS`, or a module (or object) of the same members.
        references: outputs of the stages "float", "compressed", "frozen" on ``evaluation``; "frozen" is computed if missing.

    Raises:
        FormatError: the file cannot be read at all.
        MissingTool: the target's runtime is not installed.
    """
    name, module = _target(target)
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
    layers, tap_lsb, systematic = compare_layers(
        program, module, path, evaluation.take(chosen), [y[chosen] for y in outputs], settings, progress
    )
    tapped = {layer.layer for layer in layers}
    bad = {m.layer for m in mismatches} | {layer.layer for layer in layers if not layer.within}
    first = next((x.name for x in program.layers if x.name in bad), None) or next(iter(sorted(bad)), None)
    breaches = [f"{name}: {m}" for m in mismatches]
    breaches += _layer_breaches(name, layers, first, settings)
    breaches += _output_breaches(name, stage, systematic, known, evaluation, settings)
    return ArtifactParity(
        target=name,
        file=path.name,
        sha256=sha256(path),
        stage=stage,
        layers=layers,
        untapped=tuple(x.name for x in program.layers if x.name not in tapped and x.op != "dequantize"),
        mismatches=tuple(map(str, mismatches)),
        first_diverging=first,
        tap_lsb=tap_lsb,
        breaches=tuple(breaches),
        notes=tuple(artifact.notes),
        artifact=json.loads(json.dumps(artifact.to_json())),  # as it reads back: lists, not tuples
    )


def compare_layers(
    program: FrozenProgram,
    module: Any,
    path: Path,
    samples: Evaluation,
    outputs: Arrays,
    settings: Verify,
    progress: Progress | None = None,
) -> tuple[tuple[LayerParity, ...], float | None, float]:
    """Every layer fed the target's own inputs, and the file's outputs against those that follow from the taps.

    A runtime may fuse less once an inner tensor is an output, and then round differently here and there; so outputs are judged by
    what does not average out over the samples.

    Args:
        outputs: what the file itself answered for ``samples``.

    Returns:
        The layers in execution order; the largest output difference in LSBs (output units where there is no LSB), None without
        taps; the largest difference of one output element after averaging over the samples, same unit.
    """
    found: dict[str, list[NDArray[Any]]] = {}
    expected: dict[str, list[NDArray[Any]]] = {}
    gaps: list[NDArray[Any]] = []
    steps = output_lsb(program)
    for i in range(len(samples)):
        one = tuple(x[i : i + 1] for x in samples.inputs)
        taps = module.taps(path, program, [x.numpy() for x in one])
        tensors = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in taps.items()}
        forced, following = program.forced_outputs(tensors, *one)
        for key, tap in taps.items():
            found.setdefault(key, []).append(np.asarray(tap).reshape(-1))
            expected.setdefault(key, []).append(forced[key].numpy().reshape(-1))
        gaps.append(_signed([y[i] for y in outputs], following, steps))
        if progress:
            progress(f"{getattr(module, 'SUFFIX', '')[1:] or 'file'} layers", i + 1, len(samples))
    layers = tuple(
        _layer(layer, np.concatenate(found[layer.name]), np.concatenate(expected[layer.name]), settings)
        for layer in program.layers
        if layer.name in found
    )
    stacked = np.stack(gaps)
    largest, systematic = float(np.abs(stacked).max(initial=0.0)), float(np.abs(stacked.mean(axis=0)).max(initial=0.0))
    return layers, whole_steps(largest) if found else None, systematic if found else 0.0


def _signed(outputs: Arrays, expected: Sequence[Any], steps: Sequence[float | None]) -> NDArray[np.float64]:
    """Differences of one sample's outputs in LSBs; what is no number is HUGE."""
    parts = [
        (np.asarray(y, dtype=np.float64).reshape(-1) - wanted.double().numpy().reshape(-1)) / (step or 1.0)
        for y, wanted, step in zip(outputs, expected, steps, strict=True)
    ]
    gaps: NDArray[np.float64] = np.nan_to_num(np.concatenate(parts), nan=HUGE, posinf=HUGE, neginf=-HUGE)
    return gaps


def _layer(layer: Any, found: NDArray[Any], expected: NDArray[Any], settings: Verify) -> LayerParity:
    gap = difference(found, expected)
    zero_point = layer.out_zero_point or 0
    return LayerParity(
        layer=layer.name,
        op=layer.op,
        weight_bits=layer.weight_bits,
        macs=layer.macs,
        max_lsb=gap.largest,
        share=gap.share,
        sqnr_db=sqnr_db(expected.astype(np.float64) - zero_point, found.astype(np.float64) - zero_point),
        elements=gap.elements,
        within=gap.largest <= settings.max_lsb,
    )


def _layer_breaches(target: str, layers: Sequence[LayerParity], first: str | None, settings: Verify) -> list[str]:
    return [
        f"{target}: layer {x.layer} ({x.op}) differs from the frozen program by {x.max_lsb:g} LSB (share {x.share:.3g}) when fed "
        f"the same inputs, {settings.max_lsb:g} allowed{'; it is the first layer to diverge' if x.layer == first else ''}"
        for x in layers
        if not x.within
    ]


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
        base = "float" if "float" in references else "frozen"
        drop = score(evaluation.metric, np.asarray(references[base][0]), evaluation.labels) - stage.metric
        if drop > settings.max_accuracy_drop + 1e-9:
            breaches.append(
                f"{target}: {metric_name(evaluation.metric)} fell by {drop:.3g} from {base} to {stage.metric:.4g}, "
                f"{settings.max_accuracy_drop:g} allowed"
            )
    return breaches


def _with_size(stage: Stage, stored: StageOutputs | None, program: FrozenProgram) -> Stage:
    if stored is not None:
        return replace(stage, bytes=stored.bytes, macs=stored.macs)
    return replace(stage, bytes=sum(layer.weight_bytes for layer in program.layers))


def _present(folder: Path, targets: Sequence[str] | None) -> list[str]:
    names = list(targets) if targets is not None else present(folder)
    for name in names:
        if not (folder / f"model{get(name).SUFFIX}").exists():
            raise InputError(f"{folder}: no model{get(name).SUFFIX}; make it with `edgekit export --target {name}`")
    return names


def _target(target: str | Any) -> tuple[str, Any]:
    if not isinstance(target, str):
        return str(getattr(target, "NAME", getattr(target, "__name__", "target"))).rsplit(".", 1)[-1], target
    module = get(target)
    missing = module.available()
    if missing:
        remedy = f"; run: pip install 'edgekit[{module.EXTRA}]'" if module.EXTRA else ""
        raise MissingTool(f"target {target} cannot be verified here: {missing}{remedy}")
    return target, module


def _named(progress: Progress | None, what: str) -> Callable[[int, int], None] | None:
    if progress is None:
        return None
    return lambda done, total: progress(what, done, total)
