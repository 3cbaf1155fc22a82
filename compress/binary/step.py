"""The ``binary`` block of a recipe: layers of a captured graph are trained to be binary."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from edgekit.compress.binary.choose import Choice, choose, without_relus
from edgekit.compress.binary.settings import Binary
from edgekit.compress.binary.shortcuts import with_shortcuts
from edgekit.compress.binary.train import Epoch, train_twin
from edgekit.compress.binary.twin import baked_graph, binary_twin, moments, settle
from edgekit.compress.capture import Graph
from edgekit.compress.passes import PassRecord
from edgekit.compress.placing import on_device
from edgekit.compress.ptq.plan import fit
from edgekit.compress.repair.step import points, tapped
from edgekit.compress.threads import one_thread_if_small
from edgekit.data import Data, batches
from edgekit.errors import DataError, InputError

__all__ = ["binarize"]

Progress = Callable[[str, int, int], None]
_WORDS = {
    "binary": "1-bit weights and inputs",
    "binary_weights": "1-bit weights",
    "binary_activations": "1-bit inputs",
    "ternary_weights": "ternary weights",
}


def binarize(
    graph: Graph, settings: Binary, data: Data, original: Graph, progress: Progress | None = None, folder: Path | None = None
) -> tuple[Graph, PassRecord]:
    """Train a copy of ``graph`` with binary layers.

    Args:
        original: the float model as captured: means and spreads, and the teacher with ``distill``.
        folder: checkpoints are kept here and taken from here.

    Raises:
        DataError: no training data, labels that do not fit, or a loss that is not finite.
        InputError: ``device`` is "cuda" and torch sees none; a scope that fits no layer.
        ModelError: no layer can be binary.
    """
    source = data.training
    if source is None and (settings.distill is None or settings.distill.labels):
        raise DataError(
            "binary: the data has no training samples; return Data(..., training=(x, y)) from the data factory, or learn from "
            "the float model only (distill: {labels: 0})"
        )
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise InputError("binary: device cuda was asked for, but torch sees no CUDA device; use device: cpu")
    if settings.norm == "batch" and not graph.dynamic_batch:
        raise InputError("binary: the model takes one sample at a time, which has no batch statistics; set norm: none")
    torch.manual_seed(settings.seed)
    choice = choose(graph, settings)
    edited, gone = without_relus(graph, choice, settings.relu == "remove")
    if settings.shortcut:
        edited, choice = with_shortcuts(edited, choice)
    found = moments(edited, choice, graph, _first(graph, settings, data))
    twin = binary_twin(edited, choice, settings, found)
    on_device(twin, settings.device)
    if choice.shortcuts:
        settle(twin, [x.to(settings.device) for x in next(_first(graph, settings, data))])
    shared: list[str] = []
    teacher = None
    if settings.distill is not None:
        shared = points(original, edited, settings.distill.points) if settings.distill.features else []
        shared = [n for n in shared if any(m.name == n or m.target == f"binary_{n}" for m in twin.graph.nodes)]
        teacher = tapped(on_device(copy.deepcopy(original.module), settings.device), shared)
    student = tapped(twin, [f"binary_{n}" if n in choice.kinds else n for n in shared])
    said = None if progress is None else (lambda done, total: progress("binary", done, total))
    training = data.calibration if source is None else source
    with one_thread_if_small(graph, settings.train_batch_size):
        log = train_twin(twin, (student, teacher), graph, settings, training, folder, said)
    on_device(twin, "cpu")
    made = baked_graph(edited, choice, twin)
    return made, _record(graph, choice, settings, log, gone)


def _first(graph: Graph, settings: Binary, data: Data) -> Iterator[Sequence[Tensor]]:
    done = 0
    for batch in fit(graph, batches(data.calibration, 32, inputs=len(graph.sample), what="calibration")):
        yield batch
        done += len(batch[0])
        if done >= settings.samples:
            return


def _record(graph: Graph, choice: Choice, settings: Binary, log: list[Epoch], gone: list[str]) -> PassRecord:
    how = f"{settings.estimator}, {len(log)} epochs"
    layers = {graph.names[n]: f"{_WORDS[kind]}, {how}" for n, kind in choice.kinds.items()}
    for name in choice.shortcuts:
        layers[graph.names[name]] += ", with a shortcut"
    last = log[-1]
    figures: dict[str, float | int | str] = {
        "epochs": len(log), "loss": last.loss, "estimating error": last.estimating_error,
        "gradient instability": last.gradient_instability,
    }  # fmt: skip
    if last.quantization_error is not None:
        figures["quantization error"] = last.quantization_error
    if gone:
        figures["ReLUs taken out"] = ", ".join(gone)
    figures["log"] = [asdict(e) for e in log]  # type: ignore[assignment]
    return PassRecord(layers, dict(choice.left), figures)
