"""Post-training quantization from end to end: capture, calibrate, round, freeze."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from edgekit.compress.capture import Graph, capture
from edgekit.compress.ptq.binary_units import is_sign
from edgekit.compress.ptq.freeze import freeze
from edgekit.compress.ptq.plan import Batches, Plan, make_plan
from edgekit.compress.ptq.settings import PTQ, QAT, Quantization, stored_bits
from edgekit.compress.ptq.units import find_units
from edgekit.data import Data, batches, sample_inputs
from edgekit.errors import InputError
from edgekit.frozen import FrozenProgram

__all__ = ["Progress", "calibration_stream", "check_patterns", "quantize", "quantize_model", "train"]

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, how much is done, how much there is)."""


def quantize(
    graph: Graph,
    settings: PTQ,
    data: Data,
    plan: Plan | None = None,
    progress: Progress | None = None,
    folder: Path | None = None,
) -> tuple[Graph, Plan]:
    """Quantize a captured model after training.

    Args:
        plan: not used; quantization after training starts from the float weights.
        folder: finished parts of a long method are kept here and taken from here.

    Returns:
        The graph that was quantized (equalized if asked for) and its plan.
    """
    torch.manual_seed(settings.seed)
    changes: dict[str, str] = {}
    if settings.equalize:
        from edgekit.compress.ptq.equalize import equalize

        graph, equalized = equalize(graph)
        changes = dict.fromkeys(equalized, "equalized")
    if settings.smooth is not None:
        from edgekit.compress.ptq.smooth import smooth

        graph, smoothed = smooth(graph, settings.smooth, calibration_stream(graph, settings, data))
        changes |= dict.fromkeys(smoothed, "smoothed")
    check_patterns(graph, settings)
    facts: dict[str, object] = {}
    if settings.activations in ("dynamic", "float"):
        from edgekit.compress.ptq.dynamic import dynamic_plan

        made = dynamic_plan(graph, settings, calibration_stream(graph, settings, data), _labelled(progress, settings.method))
        said = {n: f"weights int{w.bits}, {settings.method}" for n, w in made.weights.items()}
        return graph, replace(made, changes={n: ", ".join(filter(None, (s, changes.get(n)))) for n, s in said.items()})
    if settings.mixed is not None:
        from edgekit.compress.ptq.mixed import choose_bits

        stream = calibration_stream(graph, settings, data)
        settings, facts = choose_bits(graph, settings, data, stream, _labelled(progress, "choose bits"), folder)
    units, unquantized = find_units(graph, settings.skip, stored_bits(settings.activations))
    made = make_plan(graph, units, unquantized, settings, calibration_stream(graph, settings, data, progress))
    made = _improve(graph, made, settings, calibration_stream(graph, settings, data), progress, folder)
    for name, w in made.weights.items():
        how = ", ".join([settings.method, *([made.changes[name]] if name in made.changes else [])])
        steps = [f"weights int{w.bits}, {how}", *(["bias corrected"] if settings.bias_correction else [])]
        changes[name] = ", ".join([*steps, *([changes[name]] if name in changes else [])])
    changes |= {u.name: "1-bit weights and inputs" for u in made.units if u.signs is not None and u.kind != "binarize"}
    return graph, replace(made, changes=changes, facts=facts)


def check_patterns(graph: Graph, settings: Quantization) -> None:
    """Raise InputError for a pattern of ``scopes`` that fits no layer with weights, or one of ``skip`` that fits no layer."""
    every = sorted(set(graph.names.values()))
    weighted = sorted({unit.name for unit in find_units(graph)[0] if unit.weight is not None})
    for key, patterns, names in (("scopes", tuple(settings.scopes), weighted), ("skip", settings.skip, every)):
        for pattern in patterns:
            if not any(re.fullmatch(pattern, name) for name in names):
                what = "layer with weights" if key == "scopes" else "layer of the model"
                close = difflib.get_close_matches(pattern, names, 3, 0.3) or (weighted or every)[:5]
                raise InputError(f"{key}: {pattern!r} fits no {what}; layers are called {', '.join(close)}, ...")


def _improve(graph: Graph, plan: Plan, settings: PTQ, stream: Batches, progress: Progress | None, folder: Path | None) -> Plan:
    """Round by the method asked for, then correct biases."""
    if settings.method in ("adaround", "brecq"):
        from edgekit.compress.ptq.reconstruct import reconstruct

        plan, outcomes = reconstruct(graph, plan, stream, settings, _labelled(progress, settings.method), folder)
        plan = replace(plan, changes={name: str(o) for o in outcomes for name in o.layers})
    elif settings.method != "nearest":
        from edgekit.compress.ptq.rounding import round_weights

        plan = plan.with_weights(round_weights(graph, plan, stream, settings, _labelled(progress, settings.method)))
    if settings.bias_correction:
        from edgekit.compress.ptq.bias_correction import correct_biases

        plan = plan.with_weights(correct_biases(graph, plan, stream, _labelled(progress, "correct biases")))
    return plan


def _labelled(progress: Progress | None, label: str) -> Callable[[int, int], None] | None:
    return None if progress is None else partial(progress, label)


def train(
    graph: Graph, settings: QAT, data: Data, plan: Plan | None = None, progress: Progress | None = None
) -> tuple[Graph, Plan]:
    """Train with quantization in the loop.

    Args:
        plan: start from it and keep its bits, zero points and units; None: calibrate and round by ``settings`` first.
    """
    from edgekit.compress.ptq.qat import train_plan

    torch.manual_seed(settings.seed)
    if any(is_sign(n) for n in graph.module.graph.nodes):
        raise InputError("qat: 1-bit layers cannot be trained by it; let ptq follow `binary`")
    if plan is None:
        check_patterns(graph, settings)
        units, unquantized = find_units(graph, settings.skip, stored_bits(settings.activations))
        plan = make_plan(graph, units, unquantized, settings, calibration_stream(graph, settings, data, progress))
    plan = train_plan(graph, plan, settings, data, _labelled(progress, "train"))
    changes = {n: f"weights int{w.bits}, trained {settings.epochs} epochs" for n, w in plan.weights.items()}
    return graph, replace(plan, changes=changes)


def calibration_stream(graph: Graph, settings: Quantization, data: Data, progress: Progress | None = None) -> Batches:
    """Makes fresh streams of ``settings.samples`` calibration samples, spread over all, labels dropped."""

    def stream() -> Iterator[tuple[Tensor, ...]]:
        done, size = 0, settings.batch_size
        for batch in batches(data.calibration, size, inputs=len(graph.sample), what="calibration", samples=settings.samples):
            yield batch
            done += len(batch[0])
            if progress:
                progress("calibrate", done, settings.samples)

    return stream


def quantize_model(
    model: nn.Module, data: Data, settings: PTQ | None = None, *, name: str = "model", progress: Progress | None = None
) -> FrozenProgram:
    """Capture, quantize and freeze ``model``: the short way in Python.

    Raises:
        ModelError, DataError: the model or the data cannot be used; the message says why.
    """
    graph, plan = quantize(capture(model, sample_inputs(model, data)), settings or PTQ(), data, None, progress)
    return freeze(graph, plan, name)
