"""What the float and the fake-quantized model answer on the evaluation samples, so that ``edgekit verify RUN`` works alone later.

The pipeline calls, while it still has the module::

    evaluation = evaluation_set(data, inputs=1)
    save_stage(folder, evaluate_stage("float", model, evaluation))
    save_stage(folder, evaluate_stage("compressed", fake, evaluation, simulated=True))

(the second after QAT, or after any pass that leaves a fake-quantized module), which write ``stage_float.npz`` and
``stage_compressed.npz``: the outputs for every evaluation sample, the labels, the inputs' SHA-256, parameter bytes, MACs,
and a few whole inputs (:data:`KEPT`, at most :data:`KEPT_BYTES`), on which verify falls back when nobody gives it the data
again. The same model and data give the same bytes. Nothing in the file is a pickle.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from edgekit.data import Data, batches, first_sample
from edgekit.errors import DataError, EdgekitError, FormatError, ModelError, cause
from edgekit.files import write_whole
from edgekit.frozen import FrozenProgram
from edgekit.frozen.float_layers import count_macs
from edgekit.metrics import Metric, metric_name, score

__all__ = [
    "KEPT",
    "KEPT_BYTES",
    "UNLABELLED",
    "Evaluation",
    "StageOutputs",
    "digest",
    "evaluate",
    "evaluate_stage",
    "evaluation_set",
    "judged_on",
    "load_stage",
    "output_tensors",
    "save_stage",
    "spread",
]

KEPT = 32
"""Inputs stored with a stage."""
KEPT_BYTES = 8 << 20
"""Upper bound of their size."""
UNLABELLED = 256
"""Calibration samples that stand in for an evaluation set where the data has none."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """Evaluation samples: ``inputs`` tensors (N, ...), ``labels`` (N, ...) or None, and the task ``metric``.

    ``where`` says in words which samples they are.
    """

    inputs: tuple[Tensor, ...]
    labels: NDArray[Any] | None
    metric: Metric
    where: str

    def __len__(self) -> int:
        return len(self.inputs[0])

    def take(self, index: NDArray[np.int64]) -> Evaluation:
        """The samples of these numbers."""
        picked = torch.from_numpy(index)
        labels = None if self.labels is None else self.labels[index]
        return Evaluation(tuple(x[picked] for x in self.inputs), labels, self.metric, self.where)


@dataclass(frozen=True)
class StageOutputs:
    """A stage's answers.

    Attributes:
        name: "float" or "compressed".
        outputs: one float32 array (N, ...) for each model output.
        labels: (N, ...) or None.
        digest: of the N inputs (:func:`digest`).
        metric: name of the task metric.
        kept: numbers of the samples whose inputs are stored.
        inputs: those inputs, one array (K, ...) for each model input.
        bytes: parameters and buffers as they are in memory (float32: 4 bytes each); None if the stage's module is a simulation.
        macs: multiply-accumulates for one sample, counted from shapes; None where they cannot be counted.
    """

    name: str
    outputs: tuple[NDArray[Any], ...]
    labels: NDArray[Any] | None
    digest: str
    metric: str
    kept: NDArray[np.int64]
    inputs: tuple[NDArray[Any], ...]
    bytes: int | None = None
    macs: int | None = None


def spread(total: int, wanted: int | None) -> NDArray[np.int64]:
    """``wanted`` sample numbers evenly over ``total`` (all for None): a prefix of a sorted data set would show few classes."""
    count = total if wanted is None else min(total, wanted)
    return np.unique(np.linspace(0, total - 1, count).round().astype(np.int64))


def digest(inputs: Sequence[Tensor]) -> str:
    """SHA-256 over dtype, shape and every value of the inputs."""
    total = hashlib.sha256()
    for x in inputs:
        total.update(f"{x.dtype}{tuple(x.shape)}".encode())
        total.update(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def evaluation_set(data: Data, inputs: int = 1) -> Evaluation:
    """The samples a run is judged on: ``data.evaluation``, else the first calibration samples without labels.

    Args:
        inputs: number of inputs of the model.

    Raises:
        DataError: as :func:`edgekit.data.batches`, or inputs and labels of different lengths.
    """
    if data.evaluation is None:
        found: list[tuple[Tensor, ...]] = []
        for batch in batches(data.calibration, UNLABELLED, inputs=inputs, what="calibration"):
            found.append(batch)
            if sum(len(b[0]) for b in found) >= UNLABELLED:
                break
        joined = tuple(torch.cat(parts)[:UNLABELLED] for parts in zip(*found, strict=True))
        where = f"the first {len(joined[0])} calibration samples, without labels: the data has no evaluation part"
        return Evaluation(joined, None, data.metric, where)
    x, y = data.evaluation
    tensors = x if isinstance(x, tuple) else (x,)
    for _ in batches(tensors, 256, what="evaluation"):  # checks every value
        pass
    sample = first_sample(data.calibration, inputs=inputs, what="calibration")
    for i, (t, c) in enumerate(zip(tensors, sample, strict=False)):
        if t.shape[1:] != c.shape[1:]:
            given, wanted = tuple(t.shape[1:]), tuple(c.shape[1:])
            raise DataError(
                f"evaluation: samples of input {i} have shape {given}, those of calibration {wanted}; they must be equal"
            )
    labels = None if y is None else np.asarray(y)
    if labels is not None and labels.shape[:1] != tensors[0].shape[:1]:
        raise DataError(f"evaluation: labels of shape {labels.shape} for {len(tensors[0])} inputs; there must be one for each")
    return Evaluation(tensors, labels, data.metric, f"the {len(tensors[0])} evaluation samples")


def evaluate(
    model: nn.Module, inputs: Sequence[Tensor], batch_size: int = 64, device: str = "cpu", progress: Progress | None = None
) -> tuple[NDArray[Any], ...]:
    """Outputs of a module in eval mode, one float32 array (N, ...) each; its train/eval mode is put back.

    Raises:
        ModelError: outputs that are not tensors, or not finite.
    """
    training, parts, total = model.training, [], len(inputs[0])
    model.eval()
    try:
        with torch.no_grad():
            for start in range(0, total, batch_size):
                batch = [x[start : start + batch_size].to(device) for x in inputs]
                try:
                    result = model(*batch)
                except EdgekitError:
                    raise
                except Exception as error:
                    last = min(total, start + batch_size) - 1
                    raise ModelError(f"the model fails on evaluation samples {start} to {last}: {cause(error)}") from error
                parts.append([y.detach().float().cpu().numpy() for y in output_tensors(result)])
                if progress:
                    progress(min(total, start + batch_size), total)
    finally:
        model.train(training)
    outputs = tuple(np.concatenate(column) for column in zip(*parts, strict=True))
    for i, y in enumerate(outputs):
        if not np.isfinite(y).all():
            sample = int(np.argwhere(~np.isfinite(y))[0][0])
            raise ModelError(f"the model's output {i} is NaN or Inf for evaluation sample {sample}")
    return outputs


def output_tensors(result: Any) -> list[Tensor]:
    """The tensors that a model returned, alone or in tuples, lists and dicts, in the order ``torch.export`` gives them.

    Raises:
        ModelError: there is none, or something else is among them.
    """
    leaves = [leaf for leaf in tree_leaves(result) if leaf is not None]
    if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
        kinds = ", ".join(type(leaf).__name__ for leaf in leaves) or "nothing"
        raise ModelError(f"the model returns {kinds}; expected a Tensor, or a tuple or dict of Tensors")
    return leaves


def evaluate_stage(
    name: str, model: nn.Module, evaluation: Evaluation, *, simulated: bool = False, batch_size: int = 64, device: str = "cpu",
    progress: Progress | None = None,
) -> StageOutputs:  # fmt: skip
    """Run a stage's module over all evaluation samples.

    Args:
        simulated: the module only simulates integers in float, so the bytes of its parameters say nothing.

    Raises:
        ModelError: as :func:`evaluate`.
        DataError: the labels do not fit the outputs, or the metric fails: said now, not after everything was made.
    """
    outputs = evaluate(model, evaluation.inputs, batch_size, device, progress)
    if evaluation.labels is not None:
        score(evaluation.metric, outputs[0], evaluation.labels)
    kept = spread(len(evaluation), max(1, min(KEPT, KEPT_BYTES // _sample_bytes(evaluation))))
    stored = evaluation.take(kept)
    size = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    return StageOutputs(
        name=name,
        outputs=outputs,
        labels=evaluation.labels,
        digest=digest(evaluation.inputs),
        metric=metric_name(evaluation.metric),
        kept=kept,
        inputs=tuple(x.detach().cpu().numpy() for x in stored.inputs),
        bytes=None if simulated else size,
        macs=_count_macs(model, [x[:1].to(device) for x in stored.inputs]),
    )


def save_stage(folder: Path, stage: StageOutputs) -> Path:
    """Write ``stage_<name>.npz``; the same stage gives the same bytes."""
    facts = {"name": stage.name, "digest": stage.digest, "metric": stage.metric, "bytes": stage.bytes, "macs": stage.macs}
    arrays: dict[str, Any] = {f"output{i}": y for i, y in enumerate(stage.outputs)} | {
        f"input{i}": x for i, x in enumerate(stage.inputs)
    }
    arrays |= {"kept": stage.kept, "facts": np.array(json.dumps(facts, sort_keys=True))}
    if stage.labels is not None:
        arrays["labels"] = stage.labels
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    path = Path(folder) / f"stage_{stage.name}.npz"
    write_whole(path, buffer.getvalue())
    return path


def load_stage(path: Path) -> StageOutputs:
    """Read a stage.

    Raises:
        FormatError: the file is missing or damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            a = {k: archive[k] for k in archive.files}
        facts = json.loads(str(a["facts"]))
        return StageOutputs(
            outputs=tuple(a[f"output{i}"] for i in range(sum(k.startswith("output") for k in a))),
            inputs=tuple(a[f"input{i}"] for i in range(sum(k.startswith("input") for k in a))),
            labels=a.get("labels"),
            kept=a["kept"],
            **facts,
        )
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        raise FormatError(f"{path}: missing or damaged ({error}); run `edgekit run` again") from error


def judged_on(
    program: FrozenProgram, data: Data | None, stored: Mapping[str, StageOutputs], samples: int | None = None
) -> tuple[Evaluation, dict[str, Sequence[NDArray[Any]]], list[str]]:
    """The samples a run is verified on, the stored stages' outputs on them, and notes for the reader.

    Args:
        data: without it, the samples stored with a stage are used, and without these random inputs.
        stored: recorded stages by name.
        samples: how many evaluation samples, evenly spread; None: all.

    Raises:
        DataError: ``data`` is not what the stages were recorded with.
    """
    if data is not None:
        evaluation = evaluation_set(data, inputs=len(program.input_shapes))
        for stage in stored.values():
            if stage.digest != digest(evaluation.inputs):
                raise DataError(
                    f"the evaluation samples are not those the {stage.name} stage was recorded with; run `edgekit run` again, "
                    "or give the data of that run"
                )
        index = spread(len(evaluation), samples)
        notes = [] if data.evaluation is not None else [f"Judged on {evaluation.where}."]
        if len(index) < len(evaluation):
            notes.append(f"{len(index)} of {len(evaluation)} evaluation samples were used (verify.samples).")
        return evaluation.take(index), {n: [y[index] for y in s.outputs] for n, s in stored.items()}, notes
    if stored:
        stage = next(iter(stored.values()))
        index, inputs = stage.kept, tuple(torch.from_numpy(x) for x in stage.inputs)
        labels = None if stage.labels is None else stage.labels[index]
        note = (
            f"The data was not given: only the {len(index)} samples stored in the run folder were used, no accuracy was demanded."
        )
        if stage.metric != "accuracy" and labels is not None:
            note += f" The metric {stage.metric} needs the data."
        evaluation = Evaluation(inputs, labels, stage.metric, "stored samples")
        return evaluation, {n: [y[index] for y in s.outputs] for n, s in stored.items()}, [note]
    note = "No data and no stored samples: random inputs (seed 0) were used, which say nothing about the task."
    return Evaluation(_random_inputs(program), None, "accuracy", "random inputs"), {}, [note]


def _random_inputs(program: FrozenProgram, count: int = 16) -> tuple[Tensor, ...]:
    """Uniform over what the input's quantize can represent."""
    generator = torch.Generator().manual_seed(0)
    ranges = {x.inputs[0]: (x.args["scale"], x.args["zero_point"]) for x in program.layers if x.op == "quantize" and x.inputs}
    names = [n.name for n in program.module.graph.nodes if n.op == "placeholder"]
    found = []
    for name, shape, dtype in zip(names, program.input_shapes, program.input_dtypes, strict=True):
        scale, zero_point = ranges.get(name, (1 / 128, 0))
        q = torch.rand(count, *shape[1:], generator=generator) * 255 - 128
        found.append(((q - zero_point) * scale).to(dtype))
    return tuple(found)


def _sample_bytes(evaluation: Evaluation) -> int:
    return max(1, sum(x[:1].numel() * x.element_size() for x in evaluation.inputs))


def _count_macs(model: nn.Module, sample: Sequence[Tensor]) -> int | None:
    """Multiply-accumulates of convolutions and matrix products for one sample; None where the counter knows an operator not."""
    training = model.training
    try:
        return count_macs(model.eval(), *sample)
    except Exception:  # a count is a nicety; no model may fail for it
        return None
    finally:
        model.train(training)
