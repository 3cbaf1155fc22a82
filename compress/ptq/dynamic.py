"""Weights as integers, activations as float: quantized row by row while the model runs (``activations: dynamic``) or not at all.

Linear layers only; everything else stays as it is. Weights have a scale for each output channel, or for each group of inputs
(``group_size``). GPTQ (Frantar et al. 2022) rounds column by column with what was lost carried to the columns not yet rounded,
each group's scales taken when it is reached, as in its authors' grouped form (section 4, "grouping").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from edgekit.compress.capture import Graph
from edgekit.compress.ptq.plan import Batches, Plan, WeightQ, fit, weight_bits
from edgekit.compress.ptq.settings import PTQ, bits_of
from edgekit.compress.ptq.units import Unit, find_units, weight_of
from edgekit.errors import DataError, InputError
from edgekit.frozen import Unquantized

__all__ = ["dynamic_plan", "dynamic_units", "gptq", "nearest"]

_DAMPING = 0.01
"""Of the mean of the Hessian's diagonal (Frantar et al. 2022, section 3.3, step 3)."""

_ARITHMETIC = ("qlut", "qadd", "qmul", "qmean", "qavg_pool2d")
"""Units without weights that stay in float here and are said to; moves and maxima compute nothing."""


def dynamic_units(graph: Graph, settings: PTQ) -> tuple[tuple[Unit, ...], tuple[Unquantized, ...]]:
    """Linear layers as units that read and give float, and everything else with arithmetic."""
    units, left = find_units(graph, settings.skip)
    kind = "dynamic_qlinear" if settings.activations == "dynamic" else "weight_only_linear"
    found, others = [], list(left)
    for unit in units:
        if unit.kind == "qlinear":
            found.append(replace(unit, kind=kind, nodes=unit.nodes[:1], activation="none"))
        elif unit.weight is not None or unit.signs is not None or unit.kind in _ARITHMETIC:
            op = str(unit.attributes.get("function", unit.kind))
            others.append(Unquantized(unit.name, op, f"activations: {settings.activations} takes linear layers only"))
    if not found:
        raise InputError(f"ptq: activations {settings.activations} takes linear layers, and the model has none; use int8")
    return tuple(found), tuple(others)


def dynamic_plan(graph: Graph, settings: PTQ, data: Batches, progress: Callable[[int, int], None] | None = None) -> Plan:
    """The plan of a model whose activations stay float.

    Args:
        data: streamed once for ``method: gptq``, not at all for nearest.

    Raises:
        InputError: a group size that does not divide a layer's inputs, or no linear layers.
    """
    units, left = dynamic_units(graph, settings)
    bits = weight_bits(units, settings)
    if settings.group_size and bits_of(settings.weights) == 8:
        raise InputError("ptq: group_size is for weights of 4 and 2 bits; int8 has one scale for each output channel")
    units = tuple(replace(u, attributes={"group_size": (settings.group_size or 0) if bits[u.name] < 8 else 0}) for u in units)
    moments = _moments(graph, units, data) if settings.method == "gptq" else {}
    weights: dict[str, WeightQ] = {}
    for i, unit in enumerate(units):
        weight, bias = weight_of(graph, unit)
        group = int(unit.attributes["group_size"])
        if group and weight.shape[1] % group:
            raise InputError(
                f"ptq: group_size {group} does not divide the {weight.shape[1]} inputs of {unit.name}; give a divisor of all, or "
                f"take that layer out with `skip`"
            )
        how = (weight.detach().float(), bits[unit.name], group, settings.weight_scale)
        integers, scale = gptq(*how, moments[unit.name]) if settings.method == "gptq" else nearest(*how)
        weights[unit.name] = WeightQ(integers, scale, bits[unit.name], bias.double())
        if progress:
            progress(i + 1, len(units))
    return Plan(units, {}, weights, left)


def _scales(part: Tensor, bits: int, how: str, grouped: bool) -> Tensor:
    """Symmetric scale of each row of (O, inputs of one group); bfloat16 values for groups."""
    limit = (1 << (bits - 1)) - 1
    scale = part.abs().amax(1).clamp(min=1e-9) / limit
    if how == "mse":
        best, largest = torch.full_like(scale, float("inf")), scale
        for ratio in torch.linspace(0.5, 1.0, 51):
            trial = (largest * ratio).unsqueeze(1)
            error = (torch.round(part / trial).clamp(-limit, limit) * trial - part).square().sum(1)
            scale = torch.where(error < best, trial.squeeze(1), scale)
            best = torch.minimum(best, error)
    return scale.bfloat16().float() if grouped else scale


def nearest(weight: Tensor, bits: int, group: int, how: str = "max") -> tuple[Tensor, Tensor]:
    """(integers (O, I) int8, scale (O,) or (O, I / group) float32) of a weight rounded to nearest."""
    limit, size = (1 << (bits - 1)) - 1, group or weight.shape[1]
    parts = torch.split(weight, size, 1)
    scales = torch.stack([_scales(p, bits, how, bool(group)) for p in parts], 1)
    wide = scales.repeat_interleave(size, 1)
    return torch.round(weight / wide).clamp(-limit, limit).to(torch.int8), scales if group else scales[:, 0].contiguous()


def gptq(weight: Tensor, bits: int, group: int, how: str, moment: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`nearest`, each column's error compensated by those after it.

    Args:
        moment: second moment of the inputs, (I, I) float64.
    """
    limit, columns = (1 << (bits - 1)) - 1, weight.shape[1]
    size = group or columns
    dead = moment.diagonal() == 0
    hessian = moment + torch.diag(dead.double())
    hessian = hessian + _DAMPING * hessian.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    work = weight.double().clone()
    work[:, dead] = 0
    integers, scales = torch.zeros_like(weight, dtype=torch.int8), []
    for j in range(columns):
        if j % size == 0:
            scales.append(_scales(work[:, j : j + size].float(), bits, how, bool(group)))
        scale = scales[-1].double()
        q = torch.round(work[:, j] / scale).clamp(-limit, limit)
        integers[:, j] = q.to(torch.int8)
        error = (work[:, j] - q * scale) / upper[j, j]
        work[:, j + 1 :] -= error.unsqueeze(1) * upper[j, j + 1 :]
    return integers, torch.stack(scales, 1) if group else scales[0]


class _Inputs(fx.Interpreter):
    """Adds up the second moments of what linear layers read."""

    def __init__(
        self, module: fx.GraphModule, names: dict[str, list[str]], sums: dict[str, Tensor], counts: dict[str, int]
    ) -> None:
        super().__init__(module)
        self.names, self.sums, self.counts = names, sums, counts

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        for name in self.names.get(n.name, ()):
            rows = value.detach().double().flatten(0, -2)
            self.sums[name] = self.sums.get(name, torch.zeros(())) + rows.T @ rows
            self.counts[name] = self.counts.get(name, 0) + len(rows)
        return value


def _moments(graph: Graph, units: Sequence[Unit], data: Batches) -> dict[str, Tensor]:
    names: dict[str, list[str]] = {}
    for unit in units:
        names.setdefault(unit.inputs[0].name, []).append(unit.name)
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    reader = _Inputs(graph.module, names, sums, counts)
    with torch.no_grad():
        for batch in fit(graph, data()):
            reader.run(*batch)
    if not counts:
        raise DataError("calibration data is empty; give at least one sample")
    return {name: total / counts[name] for name, total in sums.items()}
