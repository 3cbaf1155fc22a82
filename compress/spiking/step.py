"""The ``spiking`` block of a recipe: a captured graph becomes a spiking network, with a record of every layer."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from edgekit.compress.capture import Graph
from edgekit.compress.spiking import qcfs
from edgekit.compress.spiking.amplitude import fold_amplitudes
from edgekit.compress.spiking.calibrate import Layer, activations, calibrate, correct, threshold_of
from edgekit.compress.spiking.chip_grid import ready
from edgekit.compress.spiking.freeze import stateless
from edgekit.compress.spiking.graph import Site, Survey, average_pools, free_batches, rectifiers_first, survey
from edgekit.compress.spiking.input_layer import ENCODER, with_encoder
from edgekit.compress.spiking.judge import Judge, for_report
from edgekit.compress.spiking.measure import Course, course, points
from edgekit.compress.spiking.neurons import Neuron
from edgekit.compress.spiking.settings import Spiking
from edgekit.compress.spiking.train import shorten
from edgekit.compress.spiking.unroll import SpikingNet, outputs, unroll
from edgekit.data import Data, Source, batches
from edgekit.errors import DataError, ModelError

__all__ = ["Made", "curve", "make", "spiking"]

Progress = Callable[[str, int, int], None]
_REPORTED = 1000


@dataclass
class Made:
    """A spiking network and what was done to get it; ``tables`` and ``figures`` go into compress.json."""

    net: SpikingNet
    layers: list[Layer] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def spiking(
    graph: Graph, settings: Spiking, data: Data, progress: Progress | None = None
) -> tuple[SpikingNet, dict[str, Any], list[str]]:
    """The spiking network of a captured graph, the record of what was done, and warnings.

    Raises:
        ModelError: nothing to convert, or layers without a spiking form that ``allow`` does not name: all of them are listed.
        DataError: a method that trains, without training samples.
        InputError: a budget that cannot be met.
    """
    from edgekit.compress.spiking.budget import choose

    step = progress or (lambda *_: None)
    judge = for_report(graph, data, _REPORTED, settings.batch_size)
    made = choose(graph, settings, data, step) if settings.method == "auto" else make(graph, settings, data, step)
    net = made.net
    found = course(net, judge.batches, lambda i, n: step("spiking network", i, n))
    made.figures |= _costs(net, found)
    made.figures["judged by"] = judge.what
    made.tables["by steps"] = curve(net, found, judge)
    if settings.early_exit is not None:
        from edgekit.compress.spiking.confidence import choose_exit

        table, figures = choose_exit(net, graph, settings, data, judge)
        made.tables["early exit front"] = table
        made.figures["early exit"] = figures
    if net.steps == 1:
        made.net = net = stateless(net)
    record = {
        "network": f"{len(net.sites)} layers of neurons, {net.steps} steps", **made.figures, **made.tables,
        "layers": {layer.name: {k: v for k, v in layer.row().items() if k != "layer"} for layer in made.layers},
    }  # fmt: skip
    return net, record, made.warnings


def make(graph: Graph, settings: Spiking, data: Data, progress: Progress) -> Made:
    """The network by one method, its spikes 0 and 1."""
    if settings.method == "freeze":
        raise ModelError("spiking: method freeze is for a model of edgekit's neurons, and this one has none; take another method")
    trains = settings.method in ("qcfs", "train")
    if trains and data.training is None:
        raise DataError(
            f"spiking: method {settings.method} trains, and the data has no training samples; return Data(..., training=(x, y)) "
            "from the data factory, or take method calibrate"
        )
    batch = _calibration(graph, data, settings.samples)
    graph = free_batches(graph)
    if settings.encoding == "rate":
        graph = with_encoder(graph, batch)
    found = survey(graph, settings.frames)
    _refuse(found, settings)
    graph, found, notes = _pooled(graph, found, settings, trains)
    maker = {"balance": _balance, "calibrate": _calibrate, "qcfs": _qcfs, "train": _train}[settings.method]
    made = maker(graph, found, settings, data, batch, progress)
    made.warnings += notes
    if settings.schedule == "layered":
        made.figures["latency in steps"] = settings.steps * len(found.sites)
    for x in found.left:
        made.tables.setdefault("not converted", []).append(
            {
                "layer": x.name,
                "operator": x.op,
                "computed": "after the mean over time" if x.after else "on the mean over time (allowed)",
            }
        )
    if mid := [x.name for x in found.left if not x.after]:
        made.warnings.append(
            f"spiking: {', '.join(mid)} stay without spikes, on the mean over time: no chip runs the network as one"
        )
    return made


def _refuse(found: Survey, settings: Spiking) -> None:
    wrong = [x for x in found.left if not x.after and not any(re.fullmatch(p, x.name) for p in settings.allow)]
    if wrong:
        listed = ", ".join(f"{x.name} ({x.op}{', ' + x.source if x.source else ''})" for x in wrong)
        raise ModelError(
            f"spiking: {len(wrong)} layer(s) have no spiking form: {listed}; train the model with ReLU, or name them in `allow` "
            "to compute them on the mean over time"
        )


def _pooled(graph: Graph, found: Survey, settings: Spiking, trains: bool) -> tuple[Graph, Survey, list[str]]:
    if not found.pools:
        return graph, found, []
    names = ", ".join(graph.names.get(p, p) for p in found.pools)
    if settings.max_pool == "average" or (settings.max_pool == "auto" and trains):
        made = average_pools(graph, found.pools)
        note = f"spiking: max pools are average pools now: {names}"
        return made, survey(made, settings.frames), [note if trains else f"{note}; nothing was trained for it"]
    made = rectifiers_first(graph, found.sites)
    note = f"spiking: max pools take the maximum of spike counts, which no neuromorphic chip computes: {names}"
    return made, found, [note]


def _calibration(graph: Graph, data: Data, samples: int) -> tuple[Tensor, ...]:
    taken: list[tuple[Tensor, ...]] = []
    for batch in batches(data.calibration, samples, inputs=len(graph.sample), what="calibration"):
        taken.append(batch)
        if sum(len(b[0]) for b in taken) >= samples:
            break
    return tuple(torch.cat(column)[:samples] for column in zip(*taken, strict=True))


def _balance(graph: Graph, found: Survey, settings: Spiking, data: Data, batch: tuple[Tensor, ...], progress: Progress) -> Made:
    return _calibrate(graph, found, replace(settings, correct="none"), data, batch, progress)


def _calibrate(graph: Graph, found: Survey, settings: Spiking, data: Data, batch: tuple[Tensor, ...], progress: Progress) -> Made:
    layered = settings.schedule == "layered"
    net = unroll(graph, found, lambda _: Neuron(steps=settings.steps), settings.steps, layered=layered)
    progress("calibrate", 0, 1)
    layers = calibrate(net, graph, batch, settings)
    progress("calibrate", 1, 1)
    return _finished(Made(net, layers))


def _finished(made: Made) -> Made:
    notes = fold_amplitudes(made.net)
    for layer in made.layers:
        layer.note = "; ".join(t for t in (layer.note, notes.get(layer.name, "")) if t)
    silent = [x.name for x in made.layers if x.figures.get("silent neurons %", 0) > 99]
    if silent:
        made.warnings.append(f"spiking: no neuron of {', '.join(silent)} spikes on the calibration samples")
    return made


def _qcfs(graph: Graph, found: Survey, settings: Spiking, data: Data, batch: tuple[Tensor, ...], progress: Progress) -> Made:
    seen = activations(graph, found.sites, batch)
    first = replace(settings, threshold="percentile", per_channel=False)
    scales = {s.node: threshold_of(seen[s.node], first, settings.steps, s.cap) for s in found.sites}
    ann = qcfs.train_staircases(
        graph, found, settings, scales, _training(data), lambda i, n: progress("train staircase activations", i, n)
    )
    net = qcfs.as_spiking(ann, graph, found, settings)
    made = Made(net, correct(net, batch, settings, qcfs.staircases(ann, batch)))
    for layer, (name, site) in zip(made.layers, ann.sites.items(), strict=True):
        activation = ann.module.get_submodule(name)
        assert isinstance(activation, qcfs.QCFS)
        trained = f"trained with {activation.levels} levels, threshold from {float(scales[site.node]):.4g}"
        layer.correction = trained if layer.correction == "none" else f"{trained}; {layer.correction}"
    _compare(made, ann, graph, data, settings)
    return _finished(made)


def _compare(made: Made, ann: SpikingNet, graph: Graph, data: Data, settings: Spiking) -> None:
    """The network without time, whose activations have the same levels, beside the spiking one."""
    judge = for_report(graph, data, _REPORTED, settings.batch_size)
    made.net.run(settings.steps)
    without = torch.cat([outputs(ann, b) for b in judge.batches])
    spiked = torch.cat([outputs(made.net, b) for b in judge.batches])
    made.figures |= {
        "levels": settings.levels or settings.steps,
        "quantized network without time": round(judge.score(without), 3),
        "same class as it %": round(100 * float((without.argmax(1) == spiked.argmax(1)).float().mean()), 3),
    }


def _train(graph: Graph, found: Survey, settings: Spiking, data: Data, batch: tuple[Tensor, ...], progress: Progress) -> Made:
    learn = (*(("threshold",) if settings.learn_threshold else ()), *(("tau",) if settings.neuron.endswith("plif") else ()))
    tau_syn = (settings.tau_syn or 2.0) if settings.neuron.startswith("cuba") else None
    first = settings.stages[0] if settings.stages else settings.steps

    def neuron(site: Site) -> nn.Module:
        if site.name == ENCODER:
            return Neuron(steps=first)
        tau = None if settings.neuron == "if" else settings.tau
        return Neuron(
            steps=first, tau=tau, tau_syn=tau_syn, reset=settings.reset, surrogate=settings.surrogate, spikes=settings.spikes,
            learn=learn,
        )  # fmt: skip

    net = unroll(graph, found, neuron, first, frames=settings.frames)
    calibrate(net, graph, batch, replace(settings, per_channel=False, correct="bias"))
    fold_amplitudes(net)
    if settings.chip is not None:
        ready(net, settings.chip, ENCODER)
    judge = for_report(graph, data, _REPORTED, settings.batch_size)
    stages: list[dict[str, Any]] = []

    def note(at: SpikingNet) -> None:
        at.run(at.steps)
        score = judge.score(torch.cat([outputs(at, b) for b in judge.batches]))
        stages.append({"steps": at.steps, "score": round(score, 3)})

    net = shorten(net, _training(data), settings, note, lambda i, n: progress("train spiking network", i, n))
    made = Made(net, _layers_of(net))
    for layer in made.layers:
        layer.correction = f"trained ({settings.rule}{f', on the grid of {settings.chip}' if settings.chip else ''})"
    if settings.stages:
        made.tables["stages"] = stages
    return made


def _training(data: Data) -> Source:
    return data.training


def _layers_of(net: SpikingNet) -> list[Layer]:
    found = []
    for name, site in net.sites.items():
        neuron = net.neuron(name)
        tau = f", tau {float(neuron.tau):.4g} steps" if neuron.leaky else ""
        tau += f", tau_syn {float(neuron.tau_syn):.4g} steps" if neuron.tau_syn is not None else ""
        found.append(Layer(site.name, f"{float(neuron.threshold):.4g}{tau}"))
    return found


def _costs(net: SpikingNet, found: Course) -> dict[str, Any]:
    spikes = float(found.spikes[-1])
    return {
        "neurons": found.neurons,
        "spikes a sample": round(spikes, 1),
        "spikes a neuron and step": round(spikes / found.neurons / net.steps, 4),
        "SynOps a sample": round(float(found.synops[-1]), 1),
        "MACs a sample": round(float(found.macs[-1]), 1),
    }


def curve(net: SpikingNet, found: Course, judge: Judge) -> list[dict[str, Any]]:
    """The score, and the cost, of stopping after 1, 2, 4, ... steps."""
    return [
        {
            "steps": t, "score": round(judge.score(found.outputs[t - 1]), 3),
            "SynOps a sample": round(float(found.synops[t - 1]), 1), "spikes a sample": round(float(found.spikes[t - 1]), 1),
            "MACs a sample": round(float(found.macs[t - 1]), 1),
        }
        for t in points(net.steps)
    ]  # fmt: skip
