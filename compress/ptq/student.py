"""A region of a reconstruction while it learns: soft weights, learned activation scales, and the loop over optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx, nn

from edgekit.compress.capture import Graph
from edgekit.compress.ptq.observers import ActQ, Observer
from edgekit.compress.ptq.plan import Plan, WeightQ, quantization_for, with_bias
from edgekit.compress.ptq.prediction import prediction_difference
from edgekit.compress.ptq.regions import Region, extract, part_plan, run_region, tail_of
from edgekit.compress.ptq.simulate import simulate
from edgekit.compress.ptq.soft import Chances, LearnedActivation, SoftLayer, rounding_loss
from edgekit.compress.ptq.units import Unit, weight_of

if TYPE_CHECKING:
    from edgekit.compress.ptq.reconstruct import Engine

__all__ = ["Student", "Tail", "learn"]

_SEEN = 256
"""Samples that activation ranges are taken from."""
_WARM = 0.2
_SCALE_RATE = 1e-3


class Tail:
    """The float layers after a region, through which its outputs become the model's."""

    def __init__(self, engine: Engine, i: int) -> None:
        self.engine, self.region = engine, engine.regions[i]
        self.rest = tail_of(engine.regions, i + 1)
        self.module = extract(engine.graph, self.rest).module.to(engine.settings.device) if self.rest.nodes else None

    def difference(self, outputs: Sequence[Tensor], index: Tensor | slice) -> Tensor:
        """The prediction difference of the region's outputs for some samples; other values come from the quantized model."""
        engine = self.engine
        values = dict(zip(self.region.outputs, outputs, strict=True))
        if self.module is not None:
            missing = [n for n in self.rest.inputs if n not in values]
            values |= dict(zip(missing, engine.rows("q", missing, index), strict=True))
            found = run_region(self.module, [values[n] for n in self.rest.inputs])
            values |= dict(zip(self.rest.outputs, found, strict=True))
        names = [n for n in engine.outputs if n in values]
        wanted = engine.rows("p", names, index)
        return prediction_difference([values[n] for n in names], wanted, engine.how.temperature)


class Student:
    """A region that can learn: the simulation of its plan with soft weights and learned activation scales."""

    def __init__(self, engine: Engine, part: Graph, region: Region) -> None:
        self.engine, self.region = engine, region
        self.plan = part_plan(part, region, engine.plan)
        self.scales: dict[str, nn.Parameter] = {}
        self.layers: dict[str, SoftLayer] = {}
        self.quantizers: list[LearnedActivation] = []
        self.inside = set(region.inputs) & engine.made
        self.part = part
        self.module: fx.GraphModule = simulate(part, self.plan, self._layer, self._quantizer).to(engine.settings.device)
        self.ready = {q.name for q in self.quantizers if engine.shared[q.name] in engine.settled}

    def _layer(self, unit: Unit, plan: Plan) -> nn.Module:
        made = SoftLayer(unit, weight_of(self.part, unit)[0].cpu(), plan.weights[unit.name])
        self.layers[unit.name] = made
        return made

    def _quantizer(self, name: str, q: ActQ, activation: str) -> nn.Module:
        if name in self.inside:  # its maker has quantized it
            return nn.Identity()
        root = self.engine.shared[name]
        if root not in self.scales:
            self.scales[root] = nn.Parameter(torch.tensor(math.log(q.scale)))
        made = LearnedActivation(name, q, activation, self.scales[root])
        self.quantizers.append(made)
        return made

    def calibrate(self) -> None:
        """Choose each scale from what the layers before it give when quantized; float weights."""
        engine, observers = self.engine, {root: Observer() for root in self.scales}
        done: set[str] = set(engine.settled)

        def see(quantizer: LearnedActivation, x: Tensor) -> None:
            root = engine.shared[quantizer.name]
            if root in done:
                return
            low_clipped = x.clamp(min=0) if quantizer.activation != "none" else x
            low_clipped = low_clipped.clamp(max=6) if quantizer.activation == "relu6" else low_clipped
            observer = observers[root]
            observer.extend(low_clipped.cpu())
            observer.count(low_clipped.cpu())
            q = quantization_for(observer, engine.settings, engine.few.get(root))
            for other in self.quantizers:
                if engine.shared[other.name] == root:
                    other.q = q
            self.scales[root].data.fill_(math.log(q.scale))
            done.add(root)

        for quantizer in self.quantizers:
            quantizer.seen = see
        count = min(_SEEN, engine.learned) if engine.graph.dynamic_batch else 1
        with torch.no_grad():
            self.module(*engine.rows("q", self.region.inputs, slice(0, count)))
        for quantizer in self.quantizers:
            quantizer.seen = None
        engine.settled |= done

    def search(self, tail: Tail) -> None:
        """Choose each scale among nine around its calibrated one by the prediction difference, in execution order."""
        index = slice(0, min(_SEEN // 2, self.engine.learned) if self.engine.graph.dynamic_batch else 1)
        x = self.engine.rows("q", self.region.inputs, index)
        with torch.no_grad():
            for root in dict.fromkeys(self.engine.shared[q.name] for q in self.quantizers if q.name not in self.ready):
                scale, calibrated = self.scales[root], self.scales[root].detach().clone()
                best = (float("inf"), calibrated)
                for ratio in (1.0, 0.6, 0.7, 0.8, 0.9, 1.1, 1.2, 1.3, 1.4):
                    scale.copy_(calibrated + math.log(ratio))
                    wrong = float(tail.difference(run_region(self.module, x), index))
                    best = min(best, (wrong, scale.detach().clone()), key=lambda pair: pair[0])
                scale.copy_(best[1])

    def activations(self) -> dict[str, ActQ]:
        """Names that share a scale with a quantizer of this region, with the scale as it is now (a float32 value)."""
        qs = {self.engine.shared[q.name]: q for q in self.quantizers if q.name not in self.ready}
        found = {}
        for name, root in self.engine.shared.items():
            if root in qs:
                found[name] = qs[root].q.scaled(float(self.scales[root].detach().exp().cpu()))
        return found

    def weights(self, plan: Plan) -> dict[str, WeightQ]:
        """Integers and biases as they are now."""
        found = {}
        now = self.activations()
        for unit in self.plan.units:
            if unit.weight is not None:
                layer, w = self.layers[unit.name], plan.weights[unit.name]
                x = now.get(unit.inputs[0].name, plan.activations[unit.inputs[0].name])
                w = replace(w, integers=layer.integers().cpu())
                found[unit.name] = with_bias(w, layer.bias.detach().double().cpu(), x)
        return found


def learn(
    engine: Engine, student: Student, region: Region, generator: torch.Generator, done: int, tail: Tail | None = None
) -> None:
    """Optimize a region's gates, biases and scales for ``steps`` steps.

    Args:
        done: regions that were learned before, for the progress.
        tail: adds the prediction difference to the loss, weighed by ``prediction``.
    """
    how, device = engine.how, engine.settings.device
    layers = list(student.layers.values())
    learned = engine.learned
    spread = [float(y.var()) for y in engine.rows("f", region.outputs, slice(0, min(_SEEN, learned)))]
    free = [p for root, p in student.scales.items() if how.learn_scales and not any(
        engine.shared[q.name] == root and q.name in student.ready for q in student.quantizers)]  # fmt: skip
    for p in student.scales.values():
        p.requires_grad_(any(p is f for f in free))
    gates = torch.optim.Adam([layer.gate for layer in layers], how.learning_rate)
    rest = [{"params": [layer.bias for layer in layers], "lr": how.learning_rate * math.sqrt(max(spread)) / 10}]
    rest += [{"params": free, "lr": _SCALE_RATE}] if free else []
    others = torch.optim.Adam(rest)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(others, how.steps)
    chances = Chances(how.drop, generator, device=device) if how.drop else None
    for quantizer in student.quantizers:
        quantizer.chances = chances if quantizer.q.bits == 8 and quantizer.name not in engine.outputs else None
    total = sum(1 for r in engine.regions if r.layers) * how.steps
    corrected = f"d:{region.inputs[0]}" in engine.store
    for step in range(how.steps):
        size = how.batch_size if engine.graph.dynamic_batch else 1
        index = torch.randint(learned, (size,), generator=generator)
        plain = x = engine.rows("q", region.inputs, index)
        if chances is not None:
            x = _mixed(x, engine.rows("d" if corrected else "f", region.inputs, index), chances)
        targets = engine.rows("d" if corrected else "f", region.outputs, index)
        loss = _error(run_region(student.module, x), targets, spread)
        if tail is not None and how.prediction:
            loss = loss + how.prediction * tail.difference(run_region(student.module, plain), index)
        if step >= _WARM * how.steps:
            beta = 20 - 18 * (step / how.steps - _WARM) / (1 - _WARM)
            loss = loss + how.rounding * rounding_loss(layers, beta)
        gates.zero_grad()
        others.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        gates.step()
        others.step()
        cosine.step()
        if engine.progress and step % 20 == 0:
            engine.progress(done * how.steps + step, total)
    for quantizer in student.quantizers:
        quantizer.chances = None


def _error(found: Sequence[Tensor], targets: Sequence[Tensor], spread: Sequence[float]) -> Tensor:
    """Squared error of each output over its variance, summed."""
    parts = [(a - b).square().mean() / max(v, 1e-12) for a, b, v in zip(found, targets, spread, strict=True)]
    return torch.stack(parts).sum()


def _mixed(quantized: Sequence[Tensor], real: Sequence[Tensor], chances: Chances) -> tuple[Tensor, ...]:
    """Each value from the quantized or, with the probability of ``chances``, from the float model."""
    return tuple(
        torch.lerp(q, f, chances.mask(q.shape)) if q.is_floating_point() else q for q, f in zip(quantized, real, strict=True)
    )
