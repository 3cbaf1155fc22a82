"""From layers and calibration moments to the thin layers that replace them; no graph and no module in sight."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil

from torch import Tensor

from edgekit.compress.lowrank.choose import Candidate, choose, nothing_pays, spend
from edgekit.compress.lowrank.layers import Layer, Part, effective_weight
from edgekit.compress.lowrank.metered import Line, Meter
from edgekit.compress.lowrank.moments import Moments
from edgekit.compress.lowrank.settings import BUDGETS, METERED, LowRank, Rank, parse_rank
from edgekit.compress.lowrank.split import Option, Split, split_layer
from edgekit.errors import InputError

__all__ = ["Factorized", "Model", "factorize_layers", "refusal", "schemes_of"]


@dataclass(frozen=True)
class Model:
    """What a budget needs to know of the whole model.

    Attributes:
        params: values of all its tensors.
        size: bytes of them in a frozen program with 8-bit weights: four for each value of a vector (a bias), one for others.
        macs: multiply-accumulates for one sample.
        outputs: the model's outputs on some calibration samples with the weights of these parameter names replaced.
        meter: what measures, for budgets of what a target measures; ``metered`` is the model's own cost in that.
        less: what a budget is made smaller by: where the model that it led to cost more than its layers promised, or where it
            is a share of a model that something was already done to.
        lines: costs that were measured already; new ones are added.
    """

    params: int
    size: int
    macs: int
    outputs: Callable[[Mapping[str, Tensor]], Sequence[Tensor]]
    meter: Meter | None = None
    metered: float = 0.0
    less: float = 0.0
    lines: dict[str, Line] = field(default_factory=dict)


@dataclass(frozen=True)
class Factorized:
    """A layer that was split: what was chosen, and the thin layers."""

    layer: Layer
    option: Option
    parts: tuple[Part, ...]

    @property
    def text(self) -> str:
        """For records: "64 x 576 to rank 28 (ced), ..."."""
        o, dense = self.option, self.layer
        kept = o.params / dense.weight.numel()
        return (
            f"{dense.rows} x {dense.columns} to rank {o.rank} ({'linear' if dense.is_linear else o.scheme}), "
            f"{kept:.0%} of the weights, relative error {o.error:.3g}"
        )


def schemes_of(settings: LowRank) -> tuple[str, ...]:
    """The schemes tried on a convolution."""
    if settings.scheme != "auto":
        return (settings.scheme,)
    return ("ced",) if settings.solver == "snmf" else ("ced", "spatial", "tucker")


def refusal(layer: Layer, settings: LowRank) -> str:
    """Why a layer is not to be touched, "" if it may be."""
    if settings.include and not any(re.fullmatch(p, layer.name) for p in settings.include):
        return "not in `include`"
    if any(re.fullmatch(p, layer.name) for p in settings.exclude):
        return "in `exclude`"
    if layer.groups > 1 and layer.weight.shape[1] == 1:
        return "a depthwise convolution has nothing to factorize"
    least = min(layer.rows, layer.columns)
    return f"only {least} features (`min_features`)" if least < settings.min_features else ""


def factorize_layers(
    layers: Sequence[Layer],
    moments: Mapping[str, Moments],
    settings: LowRank,
    model: Model | None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[dict[str, Factorized], dict[str, str]]:
    """Split every layer for which it pays.

    Args:
        layers: those that :func:`refusal` lets through.
        moments: layer name to moments; empty for solvers without data.
        model: needed by budgets.
        progress: called with (layers done, layers).

    Returns:
        Layer name to what was done, and to why nothing was.

    Raises:
        InputError: a budget that cannot be reached.
    """
    rank = parse_rank(settings.rank)
    done: dict[str, Factorized] = {}
    left: dict[str, str] = {}
    chosen: Mapping[str, Option | None] = {}
    if rank.kind in BUDGETS:
        assert model is not None
        chosen = _by_budget(layers, moments, settings, rank, model)
    for i, layer in enumerate(layers):
        split = _split(layer, moments, settings, int(rank.value) if rank.kind == "rank" else None)
        if rank.kind not in BUDGETS:
            option = choose(split, rank, settings.multiple)
        elif split.options:
            option = chosen[layer.name] or "it costs the model more than it saves within the budget"
        else:
            option = nothing_pays(split, settings.multiple)
        if isinstance(option, str):
            left[layer.name] = option
        else:
            done[layer.name] = Factorized(layer, option, split.build(option))
        if progress:
            progress(i + 1, len(layers))
    return done, left


def _split(layer: Layer, moments: Mapping[str, Moments], settings: LowRank, exact: int | None) -> Split:
    return split_layer(
        layer,
        moments.get(layer.name) if settings.solver == "svd_data" else None,
        solver=settings.solver,
        schemes=schemes_of(settings),
        multiple=settings.multiple,
        iterations=settings.iterations,
        seed=settings.seed,
        exact=exact,
    )


def _by_budget(
    layers: Sequence[Layer], moments: Mapping[str, Moments], settings: LowRank, rank: Rank, model: Model
) -> Mapping[str, Option | None]:
    candidates = _candidates(layers, moments, settings, rank, model)
    if not candidates:
        raise InputError(f"lowrank: {settings.rank} cannot be reached: no layer can be factorized with a saving")
    wanted = model.outputs({})
    totals = {"params": model.params, "size": model.size, "macs": model.macs}
    total = totals.get(rank.kind, model.metered)
    fixed = total - sum(c.dense for c in candidates)
    budget = (rank.value if rank.kind == "size" else rank.value * total) - fixed - model.less
    by_name = {layer.name: layer for layer in layers}

    def damage(chosen: Mapping[str, Option | None]) -> float:
        weights: dict[str, Tensor] = {}
        for name, option in chosen.items():
            if option is not None:
                weights |= _stand_in(_split(by_name[name], moments, settings, option.rank), option)
        return _harm(wanted, model.outputs(weights))

    def reachable(least: float) -> str:
        """A setting that this least cost keeps to: rounded up, not to the nearest."""
        if rank.kind == "size":
            return f"size:{ceil(fixed + least)}B"
        return f"{rank.kind}:{ceil((fixed + least) / total * 1000) / 1000:g}"

    trials = [
        spend(
            [replace(c, sensitivity=c.sensitivity**power) for c in candidates],
            _COSTS.get(rank.kind, _COSTS["macs"]),
            budget,
            str(settings.rank),
            reachable,
        )
        for power in _POWERS
    ]
    return min(trials, key=damage)


def _candidates(
    layers: Sequence[Layer], moments: Mapping[str, Moments], settings: LowRank, rank: Rank, model: Model
) -> list[Candidate]:
    """Layers with options, what they cost dense, and what their error does to the outputs."""
    wanted = model.outputs({})
    splits = {layer.name: split for layer in layers if (split := _split(layer, moments, settings, None)).options}
    harms = {name: _sensitivity(split, wanted, model) for name, split in splits.items()}
    if rank.kind in METERED:
        assert model.meter is not None
        if not model.lines:
            model.lines.update(model.meter.layers([s.layer for s in splits.values()], {n: s.options for n, s in splits.items()}))
        return [Candidate(n, model.lines[n].dense, s.options, harms[n], model.lines[n]) for n, s in splits.items()]
    dense = "macs" if rank.kind == "macs" else "params"
    return [Candidate(n, getattr(s, dense), s.options, harms[n]) for n, s in splits.items()]


_POWERS = (1.0, 0.75, 0.5, 0.25, 0.0)
"""Sensitivities are measured with one layer replaced; with all replaced layers are less unlike, so weaker forms are tried too."""


_COSTS: dict[str, Callable[[Option], float]] = {
    "params": lambda o: o.params + o.biases,
    "size": lambda o: o.params + 4 * o.biases,
    "macs": lambda o: o.macs,
}


def _sensitivity(split: Split, wanted: Sequence[Tensor], model: Model) -> float:
    """Relative squared error of the model's outputs for each unit of the layer's, at the rank whose error is nearest to 0.1."""
    option = min(split.options, key=lambda o: abs(o.error - 0.1))
    return max(_harm(wanted, model.outputs(_stand_in(split, option))), 1e-12) / max(option.error, 1e-6)


def _stand_in(split: Split, option: Option) -> dict[str, Tensor]:
    """The layer's own parameters with the values that compute what its parts compute."""
    layer, parts = split.layer, split.build(option)
    values = {layer.parameter: effective_weight(layer, parts).to(layer.weight.dtype)}
    if layer.bias_parameter and parts[-1].bias is not None:
        values[layer.bias_parameter] = parts[-1].bias
    return values


def _harm(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Squared error of outputs relative to their variance over the samples."""
    total = 0.0
    for a, b in zip(wanted, found, strict=True):
        spread = (a - a.mean(0, keepdim=True)).square().sum() if len(a) > 1 else a.square().sum()
        total += float((a - b).square().sum() / spread.clamp(min=1e-30))
    return total
