"""Which layer's quantization hurts the model's output, and what would help: measured on calibration data.

Each layer is quantized alone (its weights, its output, both) and then together with all before it, everything else in float, and
the model's output is compared with the float model's. Beside what was measured stands a prediction from curvature: with ``g``
the gradient of the outputs along a random direction, ``sum(E[g^2] dw^2)`` is the Gauss-Newton estimate of the output error that a
weight error ``dw`` makes (the trace of HAWQ-V2, Dong et al. 2020, weighed by the error itself).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from edgekit.compress.capture import Graph
from edgekit.compress.ptq.brevitas_twin import activated
from edgekit.compress.ptq.equalize import equalize
from edgekit.compress.ptq.observers import ActQ
from edgekit.compress.ptq.plan import Batches, Plan, fit, make_plan
from edgekit.compress.ptq.prediction import prediction_difference
from edgekit.compress.ptq.settings import PTQ, Quantization, WeightType, bits_of, stored_bits
from edgekit.compress.ptq.simulate import FakeQuantize, WeightedLayer, layer_of, simulate
from edgekit.compress.ptq.units import Unit, find_units, weight_of

__all__ = ["Layer", "Remedy", "Switched", "first_samples", "hurting", "sensitivity", "sqnr_db"]

EXACT_DB = 120.0
"""No difference, or one below what float32 sums make."""
_DIRECTIONS = 8
_ENOUGH_DB = 0.5
_TEMPERATURE = 4.0


@dataclass(frozen=True)
class Remedy:
    """A setting that was tried for a layer, and the layer's signal to noise ratio at the model's output with it."""

    setting: str
    alone_db: float


@dataclass(frozen=True)
class Layer:
    """How much the quantization of one layer hurts.

    Attributes:
        name, kind: the layer and its operator.
        weight_bits: 0 for a layer without weights.
        weight_bytes: packed at those bits.
        weights_db, output_db, alone_db: signal to quantization noise ratio at the model's output when only the layer's weights,
            only its output, or both are quantized, in dB.
        difference: prediction difference at the model's output, both quantized (0: the same prediction).
        together_db, together_difference: the same with all layers up to this one quantized.
        predicted_db: what curvature predicts for ``weights_db``; None without weights.
        share: of the noise of all layers one at a time.
        remedies: what helped, best first; only tried for the layers that hurt most.
    """

    name: str
    kind: str
    weight_bits: int
    weight_bytes: int
    weights_db: float | None
    output_db: float
    alone_db: float
    difference: float
    together_db: float
    together_difference: float
    predicted_db: float | None
    share: float
    remedies: tuple[Remedy, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "remedies": [asdict(r) for r in self.remedies]}


def sqnr_db(signal: float, noise: float) -> float:
    """``10 log10(signal / noise)`` of two energies, at most :data:`EXACT_DB`."""
    return EXACT_DB if noise <= signal * 10 ** (-EXACT_DB / 10) else 10 * math.log10(max(signal, 1e-30) / noise)


class _Either(nn.Module):
    """A module with its float form beside it."""

    def __init__(self, quantized: nn.Module, real: nn.Module) -> None:
        super().__init__()
        self.quantized, self.real, self.on = quantized, real, False

    def forward(self, x: Tensor) -> Tensor:
        """x: what either takes."""
        found: Tensor = (self.quantized if self.on else self.real)(x)
        return found


class _Activation(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        """x: any shape."""
        return activated(x, self.kind)


class Switched:
    """A model whose layers can be quantized one by one, with its samples and float outputs."""

    def __init__(self, graph: Graph, plan: Plan, samples: Sequence[tuple[Tensor, ...]]) -> None:
        self.plan, self.samples = plan, samples
        self.weights: dict[str, _Either] = {}
        self.outputs: dict[str, list[_Either]] = {}
        owner = _owners(plan)

        def layer(unit: Unit, plan: Plan) -> nn.Module:
            weight, bias = weight_of(graph, unit)
            made = _Either(layer_of(unit, plan), WeightedLayer(unit, weight.clone(), bias.clone()))
            self.weights[unit.name] = made
            return made

        def quantizer(name: str, q: ActQ, activation: str) -> nn.Module:
            made = _Either(FakeQuantize(q, activation), _Activation(activation))
            self.outputs.setdefault(owner[name], []).append(made)
            return made

        self.module: fx.GraphModule = simulate(graph, plan, layer, quantizer)
        self.real = [self.run(batch) for batch in samples]
        self.signal = sum(float(y.double().square().sum()) for ys in self.real for y in ys)

    def run(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The model's outputs."""
        found = self.module(*batch)
        return tuple(found) if isinstance(found, tuple | list) else (found,)

    def switch(self, weights: Iterable[str], outputs: Iterable[str]) -> None:
        """Quantize these layers' weights and outputs, and nothing else."""
        weights, outputs = set(weights), set(outputs)
        for name, either in self.weights.items():
            either.on = name in weights
        for name, group in self.outputs.items():
            for either in group:
                either.on = name in outputs

    def noise(self, weights: Iterable[str], outputs: Iterable[str]) -> float:
        """Energy of the output's error over all samples."""
        self.switch(weights, outputs)
        with torch.no_grad():
            pairs = [
                pair
                for batch, real in zip(self.samples, self.real, strict=True)
                for pair in zip(self.run(batch), real, strict=True)
            ]
        return sum(float((a - b).double().square().sum()) for a, b in pairs)

    def measure(self, weights: Iterable[str], outputs: Iterable[str]) -> tuple[float, float]:
        """(SQNR in dB, prediction difference) of the model's output."""
        self.switch(weights, outputs)
        noise, difference = 0.0, 0.0
        with torch.no_grad():
            for batch, real in zip(self.samples, self.real, strict=True):
                found = self.run(batch)
                noise += sum(float((a - b).double().square().sum()) for a, b in zip(found, real, strict=True))
                difference += float(prediction_difference(found, real, _TEMPERATURE)) * len(batch[0])
        return sqnr_db(self.signal, noise), max(0.0, difference / sum(len(b[0]) for b in self.samples))

    def predicted(self, seed: int) -> dict[str, float]:
        """Weighted layer to the output noise that curvature predicts for its weight error."""
        self.switch((), ())
        generator = torch.Generator().manual_seed(seed)
        real = {name: either.real.get_parameter("weight") for name, either in self.weights.items()}
        error = {n: (e.quantized.get_parameter("weight") - real[n].detach()).square() for n, e in self.weights.items()}
        total = dict.fromkeys(real, 0.0)
        for p in real.values():
            p.requires_grad_(True)
        with torch.enable_grad():
            for batch in self.samples:
                outputs = self.run(batch)
                for k in range(_DIRECTIONS):
                    along = [torch.randint(0, 2, y.shape, generator=generator).float() * 2 - 1 for y in outputs]
                    whole = torch.stack([(y * v).sum() for y, v in zip(outputs, along, strict=True)]).sum()
                    grads = torch.autograd.grad(whole, list(real.values()), retain_graph=k < _DIRECTIONS - 1)
                    for name, g in zip(real, grads, strict=True):
                        total[name] += float((g.square() * error[name]).sum()) / _DIRECTIONS
        for p in real.values():
            p.requires_grad_(False)
        return total


def _owners(plan: Plan) -> dict[str, str]:
    """Quantized node to the unit that it is counted with: the one that makes it, else the first that reads it."""
    owner = {u.output.name: u.name for u in plan.units}
    for unit in plan.units:
        for node in unit.inputs:
            owner.setdefault(node.name, unit.name)
    return owner


def sensitivity(
    graph: Graph,
    settings: Quantization,
    data: Batches,
    *,
    samples: int = 64,
    worst: int = 3,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Layer, ...]:
    """Every integer layer of a model in execution order.

    Args:
        settings: bits, ranges and exceptions; weights are rounded to nearest whatever ``method`` says.
        data: calibration batches; ranges are taken from all, outputs are compared on the first ``samples``.
        worst: how many layers remedies are tried for.
        progress: called with (measurements done, in all).

    Raises:
        DataError: as :func:`edgekit.compress.ptq.plan.make_plan`.
    """
    units, unquantized = find_units(graph, settings.skip, stored_bits(settings.activations))
    plan = make_plan(graph, units, unquantized, settings, data)
    some = first_samples(graph, data, samples)
    model = Switched(graph, plan, some)
    names = [u for u in plan.units if u.weight is not None or u.name in model.outputs]
    counted = _Counter(progress, 4 * len(names) + 8 * worst)
    noise = model.predicted(settings.seed)
    found: list[Layer] = []
    for i, unit in enumerate(names):
        one, before = [unit.name], [u.name for u in names[: i + 1]]
        weights = counted(model.measure(one, ()))[0] if unit.weight is not None else None
        output, (alone, difference) = counted(model.measure((), one))[0], counted(model.measure(one, one))
        together = counted(model.measure(before, before))
        w = plan.weights.get(unit.name)
        bits, size = (w.bits, math.ceil(w.integers.numel() * w.bits / 8)) if w else (0, 0)
        predicted = sqnr_db(model.signal, noise[unit.name]) if unit.name in noise else None
        found.append(Layer(unit.name, unit.kind, bits, size, weights, output, alone, difference, *together, predicted, share=0.0))
    total = sum(10 ** (-x.alone_db / 10) for x in found)
    found = [replace(x, share=10 ** (-x.alone_db / 10) / total) for x in found]
    tried = _remedies(graph, plan, settings, data, some, sorted(found, key=lambda x: x.alone_db)[:worst], counted)
    return tuple(replace(x, remedies=tried.get(x.name, ())) for x in found)


def hurting(layers: Sequence[Layer]) -> list[Layer]:
    """The layers that hurt, worst first: those with remedies, or more than twice an equal share of the noise."""
    return sorted((x for x in layers if x.remedies or x.share > 2 / len(layers)), key=lambda x: x.alone_db)


class _Counter:
    """Calls the progress once for each value that passes."""

    def __init__(self, progress: Callable[[int, int], None] | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def __call__(self, value: tuple[float, float]) -> tuple[float, float]:
        self.done += 1
        if self.progress:
            self.progress(min(self.done, self.total), self.total)
        return value


def first_samples(graph: Graph, data: Batches, samples: int) -> list[tuple[Tensor, ...]]:
    """The first so many calibration samples, in batches."""
    found: list[tuple[Tensor, ...]] = []
    left = samples
    for batch in fit(graph, data()):
        found.append(tuple(t[:left] for t in batch))
        left -= len(found[-1][0])
        if left <= 0:
            break
    return found


def _remedies(
    graph: Graph,
    plan: Plan,
    settings: Quantization,
    data: Batches,
    samples: Sequence[tuple[Tensor, ...]],
    layers: Sequence[Layer],
    counted: _Counter,
) -> dict[str, tuple[Remedy, ...]]:
    """For each layer, the settings that raise its ratio by half a dB or more."""
    gained: dict[str, list[Remedy]] = {x.name: [] for x in layers}
    for label, (other, changed) in _trials(graph, settings, plan, layers).items():
        units, unquantized = find_units(other, settings.skip, stored_bits(changed.activations))
        model = Switched(other, make_plan(other, units, unquantized, changed, data), samples)
        for x in layers:
            db = counted(model.measure([x.name], [x.name]))[0]
            if db >= x.alone_db + _ENOUGH_DB and (label != "keep it at 8 bits" or 0 < x.weight_bits < 8):
                gained[x.name].append(Remedy(label, db))
    return {name: tuple(sorted(found, key=lambda r: -r.alone_db)) for name, found in gained.items()}


def _trials(
    graph: Graph, settings: Quantization, plan: Plan, layers: Sequence[Layer]
) -> Mapping[str, tuple[Graph, Quantization]]:
    """What to try, in words, with the graph and settings to try it by."""
    found: dict[str, tuple[Graph, Quantization]] = {}
    if any(0 < x.weight_bits < 8 for x in layers):
        own: dict[str, WeightType] = {re.escape(x.name): "int8" for x in layers}
        scopes = {**own, **{k: v for k, v in settings.scopes.items() if k not in own}}  # the first that fits wins
        found["keep it at 8 bits"] = (graph, replace(settings, scopes=scopes))
    if not settings.per_channel:
        found["per_channel: true"] = (graph, replace(settings, per_channel=True))
    other: Literal["max", "mse"] = "max" if settings.weight_scale == "mse" else "mse"
    found[f"weight_scale: {other}"] = (graph, replace(settings, weight_scale=other))
    observers: tuple[Literal["minmax", "mse", "percentile"], ...] = ("minmax", "mse", "percentile")
    for observer in observers:
        if observer != settings.observer:
            found[f"observer: {observer}"] = (graph, replace(settings, observer=observer))
    if bits_of(settings.activations) < 8:
        found["activations: int8"] = (graph, replace(settings, activations="int8"))
    if not (isinstance(settings, PTQ) and settings.equalize):
        equalized, names = equalize(graph)
        if any(x.name in names for x in layers):
            found["equalize: true"] = (equalized, settings)
    return found
