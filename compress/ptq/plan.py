"""The quantization plan: every integer, scale and zero point of a model, before it is frozen."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from edgekit.compress.capture import Graph
from edgekit.compress.ptq.binary_units import SIGNS
from edgekit.compress.ptq.observers import ActQ, Observer, choose_range, narrowed, quantization_of
from edgekit.compress.ptq.settings import PTQ, Quantization, bits_of, stored_bits
from edgekit.compress.ptq.sharing import eight_bit_inputs, few_bits, fixed_activations, groups
from edgekit.compress.ptq.units import Unit, weight_of
from edgekit.errors import DataError
from edgekit.frozen import Unquantized

__all__ = [
    "Batches",
    "Plan",
    "WeightQ",
    "calibrate",
    "fit",
    "make_plan",
    "minimal_scale",
    "quantization_for",
    "quantize_weight",
    "weight_bits",
    "weight_scale",
    "with_bias",
]

_FEW = 16
"""Calibration samples below which the user is warned."""

Batches = Callable[[], Iterable[tuple[Tensor, ...]]]
"""Makes a fresh stream of calibration batches, one tensor (B, ...) for each input of the model."""

_TERNARY_FROM = 8
"""Products for one output value from which a weight of three values in each channel is no accident."""

_MAX_BIAS = {8: 1 << 20, 16: 1 << 30}
"""Largest bias integer by activation bits; up to 2^20 its float32 form goes back to the same integer in every converter."""


@dataclass(frozen=True)
class WeightQ:
    """A weighted layer's integers: ``weight ~ scale[c] * (integers - zero[c])``; ``bias`` stays real (float64) till it is frozen.

    ``zero`` is None for zero points of 0, the only ones that can be frozen.
    """

    integers: Tensor
    scale: Tensor
    bits: int
    bias: Tensor
    zero: Tensor | None = None

    @property
    def real(self) -> Tensor:
        """The weight that the integers stand for, float64."""
        shape = (-1, *[1] * (self.integers.dim() - 1))
        shifted = self.integers.double() if self.zero is None else self.integers.double() - self.zero.double().view(shape)
        return shifted * self.scale.double().view(shape)

    @property
    def bounds(self) -> tuple[Tensor | int, Tensor | int]:
        """Least and greatest ``integers - zero``: one number each, or one for each channel."""
        if self.zero is None:
            limit = (1 << (self.bits - 1)) - 1
            return -limit, limit
        shaped = self.zero.view(-1, *[1] * (self.integers.dim() - 1)).float()
        return -(1 << (self.bits - 1)) - shaped, (1 << (self.bits - 1)) - 1 - shaped


@dataclass(frozen=True)
class Plan:
    """How each unit is quantized.

    Attributes:
        units: integer layers to be, in execution order.
        activations: fx node name to quantization, for every node that is an integer layer's input or output.
        weights: layer name to integers.
        unquantized: operators that stay in float.
        warnings: sentences for the user.
        changes: layer name to what was done to it, for reports.
        facts: what else was decided, plain values, for reports.
    """

    units: tuple[Unit, ...]
    activations: Mapping[str, ActQ]
    weights: Mapping[str, WeightQ]
    unquantized: tuple[Unquantized, ...] = ()
    warnings: tuple[str, ...] = ()
    changes: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, object] = field(default_factory=dict)

    def with_weights(self, weights: Mapping[str, WeightQ]) -> Plan:
        """The same plan with some layers' integers replaced."""
        return replace(self, weights={**self.weights, **weights})


def make_plan(
    graph: Graph,
    units: tuple[Unit, ...],
    unquantized: tuple[Unquantized, ...],
    settings: Quantization,
    data: Batches,
) -> Plan:
    """Calibrate activations and round weights to nearest.

    Args:
        data: makes a fresh stream of calibration batches; called once or twice.

    Raises:
        DataError: no batches, or NaN or Inf in an activation (the layer is named).
    """
    activations, warnings = calibrate(graph, units, settings, data)
    bits = weight_bits(units, settings)
    weights: dict[str, WeightQ] = {}
    for unit in units:
        if unit.weight is None:
            continue
        weight, bias = weight_of(graph, unit)
        least = minimal_scale(bias, activations[unit.inputs[0].name])
        if (ternary := _ternary(weight, bias, least)) is not None:
            weights[unit.name] = ternary
            continue
        if isinstance(settings, PTQ) and settings.asymmetric_weights:
            weights[unit.name] = _asymmetric(weight, bias, bits[unit.name], least)
            continue
        scale = torch.maximum(weight_scale(weight, bits[unit.name], settings), least)
        weights[unit.name] = WeightQ(quantize_weight(weight, scale, bits[unit.name]), scale, bits[unit.name], bias.double())
        if not weight.any():
            warnings.append(f"layer {unit.name}: all weights are zero")
    weights |= {n: replace(weights[n], bias=weights[n].bias - half) for n, half in _before_signs(units, activations).items()}
    return Plan(units, activations, weights, unquantized, tuple(warnings))


def _asymmetric(weight: Tensor, bias: Tensor, bits: int, least: Tensor) -> WeightQ:
    """Each channel's own range, with 0 in it, on all ``2^bits`` levels; for research."""
    flat = weight.detach().flatten(1)
    low, high = flat.amin(1).clamp(max=0), flat.amax(1).clamp(min=0)
    bottom, top = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    scale = torch.maximum(((high - low) / (top - bottom)).clamp(min=1e-9), least)
    zero = torch.round(bottom - low / scale).clamp(bottom, top)
    q = torch.round(flat / scale.view(-1, 1)).add(zero.view(-1, 1)).clamp(bottom, top)
    return WeightQ(q.view(weight.shape).to(torch.int8), scale, bits, bias.double(), zero.to(torch.int32))


def _before_signs(units: Sequence[Unit], activations: Mapping[str, ActQ]) -> dict[str, float]:
    """Half a step of the output for each weighted layer that only signs at 0 read: its rounding then keeps every sign."""
    signs = {u.nodes[0] for u in units if u.kind == "binarize" and u.signs is not None and not u.signs.threshold.any()}  # type: ignore[union-attr]
    found = [u for u in units if u.weight is not None and u.activation == "none" and set(u.output.users) <= signs]
    return {u.name: activations[u.output.name].scale / 2 for u in found}


def _ternary(weight: Tensor, bias: Tensor, least: Tensor) -> WeightQ | None:
    """A weight that is ``scale * (-1, 0 or 1)`` in each channel as it is, in two bits; None for another."""
    flat = weight.detach().flatten(1)
    size = flat.abs().amax(1)
    levels = torch.round(flat / size.clamp(min=1e-30).view(-1, 1))
    if flat.shape[1] < _TERNARY_FROM or not weight.any() or not torch.equal(levels * size.view(-1, 1), flat):
        return None
    if bool((size[size > 0] < least[size > 0]).any()):
        return None
    scale = torch.where(size > 0, size, least).float()
    return WeightQ(levels.view(weight.shape).to(torch.int8), scale, 2, bias.double())


def weight_bits(units: Sequence[Unit], settings: Quantization) -> dict[str, int]:
    """Weight bits of each weighted layer: scopes first, then the first and last layer, then the default."""
    names = [u.name for u in units if u.weight is not None]
    bits = dict.fromkeys(names, bits_of(settings.weights))
    if settings.keep_first_last_8bit and names:
        bits[names[0]] = bits[names[-1]] = 8
    for name in names:
        for pattern, kind in settings.scopes.items():
            if re.fullmatch(pattern, name):
                bits[name] = bits_of(kind)
                break
    return bits


def minimal_scale(bias: Tensor, x: ActQ) -> Tensor:
    """Smallest weight scale, float32 (channels,), with which the bias still fits its integer range."""
    return (bias.abs().double() / (x.scale * _MAX_BIAS[x.bits])).clamp(min=1e-9).float()


def with_bias(w: WeightQ, bias: Tensor, x: ActQ) -> WeightQ:
    """The same weights with another bias (float64), held within what its integers can hold."""
    limit = w.scale.double() * x.scale * _MAX_BIAS[x.bits]
    return replace(w, bias=torch.minimum(torch.maximum(bias, -limit), limit))


def weight_scale(weight: Tensor, bits: int, settings: Quantization) -> Tensor:
    """Symmetric scale, float32, one for each output channel (equal ones if not ``per_channel``)."""
    qmax = (1 << (bits - 1)) - 1
    flat = weight.detach().flatten(1).float() if settings.per_channel else weight.detach().float().reshape(1, -1)
    scale = flat.abs().amax(1).clamp(min=1e-9) / qmax
    if settings.weight_scale == "mse":
        best = torch.full_like(scale, float("inf"))
        largest = scale
        for ratio in torch.linspace(0.4, 1.0, 61):
            trial = (largest * ratio).unsqueeze(1)
            error = (torch.round(flat / trial).clamp(-qmax, qmax) * trial - flat).square().sum(1)
            scale = torch.where(error < best, trial.squeeze(1), scale)
            best = torch.minimum(best, error)
    return scale.expand(weight.shape[0]).contiguous()


def quantize_weight(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """int8 tensor of the weight rounded to nearest, symmetric range of ``bits`` bits."""
    qmax = (1 << (bits - 1)) - 1
    shaped = scale.view(-1, *[1] * (weight.dim() - 1))
    return torch.round(weight.detach() / shaped).clamp(-qmax, qmax).to(torch.int8)


def calibrate(graph: Graph, units: Sequence[Unit], settings: Quantization, data: Batches) -> tuple[dict[str, ActQ], list[str]]:
    """Scale and zero point of every activation beside an integer layer, and warnings."""
    shared = groups(units)
    seen = _Samples()
    observers = {root: Observer() for root in set(shared.values())}
    watched: dict[str, str] = {}
    inherited = {u.output.name for u in units if u.inherits}
    fixed = fixed_activations(units)
    answers = {shared[u.output.name] for u in units if any(n.op == "output" for n in u.output.users)}
    for name, root in shared.items():
        if name not in inherited and name not in fixed:
            watched[name] = root
    _observe(graph, watched, observers, lambda: map(seen.add, data()), "extend")
    if settings.observer in ("percentile", "mse", "entropy"):
        _observe(graph, watched, observers, data, "count")
    few = few_bits(units, settings)
    result: dict[str, ActQ] = {}
    warnings = [*seen.warnings(), *eight_bit_inputs(units, few, settings)]
    for name, root in shared.items():
        if root in fixed and stored_bits(settings.activations) == 8:
            result[name] = fixed[root]
            continue
        observer = observers[root]
        if name == root and observer.high <= observer.low:
            what = f"layer {graph.names[name]}: its output was" if name in graph.names else f"input {name}: it was"
            warnings.append(f"{what} constant ({observer.low:.3g}) during calibration")
        result[name] = quantization_for(observer, settings, few.get(root), root in answers)
    return result | {u.output.name: SIGNS for u in units if u.packed}, warnings


class _Samples:
    """Watches calibration batches go by: how many samples, and whether they differ."""

    def __init__(self) -> None:
        self.first: tuple[Tensor, ...] | None = None
        self.count, self.differ = 0, False

    def add(self, batch: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self.first is None:
            self.first = tuple(x[:1].clone() for x in batch)
        self.count += len(batch[0])
        if not self.differ and all(x.shape[1:] == one.shape[1:] for x, one in zip(batch, self.first, strict=False)):
            self.differ = any(bool((x != one).any()) for x, one in zip(batch, self.first, strict=False))
        return batch

    def warnings(self) -> list[str]:
        """What makes the ranges doubtful."""
        if self.count < _FEW:
            return [f"calibration: {self.count} sample(s) only, ranges from so few are often too narrow; give 100 or more"]
        return [] if self.differ else [f"calibration: all {self.count} samples are equal; give samples that differ"]


def quantization_for(observer: Observer, settings: Quantization, least: float | None = None, answers: bool = False) -> ActQ:
    """What the settings make of an observed activation.

    Args:
        least: it gets the few bits that ``settings.activations`` says, and is never below this, see :func:`few_bits`.
        answers: it is an output of the model, never clipped: clipped logits would tie.
    """
    method = "minmax" if answers else settings.observer
    if least is not None:
        bits = bits_of(settings.activations)
        return narrowed(*choose_range(observer, method, settings.percentile, bits), bits, least)
    bits, symmetric = stored_bits(settings.activations), settings.symmetric_activations
    low, high = choose_range(observer, method, settings.percentile, bits, symmetric)
    return quantization_of(low, high, bits, symmetric)


class _Watcher(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, see: Callable[[str, Tensor], None], names: Iterable[str]) -> None:
        super().__init__(module)
        self.see, self.names = see, set(names)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.name in self.names:
            self.see(n.name, result)
        return result


def _observe(
    graph: Graph,
    watched: Mapping[str, str],
    observers: Mapping[str, Observer],
    data: Batches,
    step: str,
) -> None:
    def see(name: str, value: Tensor) -> None:
        if not torch.isfinite(value).all():
            raise DataError(
                f"calibration: NaN or Inf in the output of layer {graph.names.get(name, name)}; check the data's range"
            )
        getattr(observers[watched[name]], step)(value)

    count = 0
    with torch.no_grad():
        for batch in fit(graph, data()):
            _Watcher(graph.module, see, watched).run(*batch)
            count += len(batch[0])
    if count == 0:
        raise DataError("calibration data is empty; give at least one sample")


def fit(graph: Graph, batches: Iterable[tuple[Tensor, ...]]) -> Iterator[tuple[Tensor, ...]]:
    """Check each batch against the model's inputs; one sample at a time where the graph's batch is fixed."""
    for batch in batches:
        shapes = [tuple(x.shape[1:]) for x in batch]
        wanted = [tuple(x.shape[1:]) for x in graph.sample]
        if shapes != wanted:
            raise DataError(f"calibration: samples have shapes {shapes}, the model takes {wanted}")
        if graph.dynamic_batch:
            yield batch
        else:
            for i in range(len(batch[0])):
                yield tuple(x[i : i + 1] for x in batch)
