"""Reconstruction: rounding, biases and activation scales of one layer or block at a time, learned from its own output's error.

One engine for AdaRound (Nagel et al. 2020; regions of one layer), BRECQ (Li et al. 2021; blocks) and QDrop (Wei et al. 2022;
activations that stay float at random). Regions go in execution order: each one's activations are first calibrated on what the
quantized layers before it really give, then it learns to give what the float model gives. Inputs and targets of a region are kept
for all samples (:mod:`edgekit.compress.ptq.sample_store`), so no step computes anything outside its region.

Part of the samples is not learned from. A region whose error does not fall on them keeps what it had; a model that is worse on
them than before altogether keeps the plan it came with.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, fx, nn

from edgekit.compress.capture import Graph
from edgekit.compress.ptq.augment import augmented
from edgekit.compress.ptq.distribution import corrected, has_statistics
from edgekit.compress.ptq.observers import ActQ
from edgekit.compress.ptq.plan import Batches, Plan, WeightQ, fit
from edgekit.compress.ptq.region_files import read_region, write_region
from edgekit.compress.ptq.regions import Region, extract, find_regions, part_plan, run_region
from edgekit.compress.ptq.sample_store import Store
from edgekit.compress.ptq.settings import PTQ
from edgekit.compress.ptq.sharing import few_bits, fixed_activations, groups
from edgekit.compress.ptq.simulate import simulate
from edgekit.compress.ptq.student import Student, Tail, learn
from edgekit.errors import DataError, InputError

__all__ = ["Engine", "Outcome", "reconstruct"]

_PASS = 64
"""Samples in one pass without gradients."""


@dataclass(frozen=True)
class Outcome:
    """What became of a region: squared error over the output's variance on held-out samples, before and after; which was kept."""

    layers: tuple[str, ...]
    before: float
    after: float
    learned: float

    @property
    def kept(self) -> bool:
        """The learned state is better on the held-out samples."""
        return self.after < self.before

    def __str__(self) -> str:
        if self.kept:
            return f"held-out error {self.before:.4f} -> {self.after:.4f}"
        return f"held-out error {self.before:.4f}, not learned ({self.after:.4f} after, {self.learned:.4f} where it learned)"


def reconstruct(
    graph: Graph,
    plan: Plan,
    data: Batches,
    settings: PTQ,
    progress: Callable[[int, int], None] | None = None,
    folder: Path | None = None,
) -> tuple[Plan, tuple[Outcome, ...]]:
    """The plan with learned integers, biases and activation scales, and what became of each region.

    Args:
        data: streamed once.
        progress: called with (optimizer steps done, steps in all).
        folder: finished regions are kept here and taken from here.

    Raises:
        DataError: fewer than two samples.
        InputError: ``device`` is "cuda" and torch sees none.
    """
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise InputError("ptq: device cuda was asked for, but torch sees no CUDA device; use device: cpu")
    with Store(settings.reconstruct.memory_mb << 20) as store:
        engine = Engine(graph, plan, settings, store, folder, progress)
        engine.load(data)
        for i in range(len(engine.regions)):
            engine.region(i)
        return engine.judged(plan)


class Engine:
    """The state between regions: the plan so far and the values that later regions read."""

    def __init__(
        self,
        graph: Graph,
        plan: Plan,
        settings: PTQ,
        store: Store,
        folder: Path | None,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.graph, self.plan, self.settings, self.store = graph, plan, settings, store
        self.how = settings.reconstruct
        self.regions = find_regions(graph, plan.units, settings.method == "brecq")
        self.folder, self.progress = folder, progress
        self.outcomes: list[Outcome] = []
        self.shared = groups(plan.units)
        self.few = few_bits(plan.units, settings)
        fixed = set(fixed_activations(plan.units))
        self.outputs = [n.name for n in _outputs(graph.module)]
        self.made = {u.output.name for u in plan.units}
        self.settled = {self.shared[n] for n in self.shared if n in fixed} | {
            self.shared[n] for n in self.outputs if n in self.shared
        }
        self.samples = self.held_out = 0

    # Values of all samples: "f:<node>" in the float model, "q:<node>" in the quantized one; inputs are the same in both.
    # "d:<node>" are float values after distribution correction, "p:<node>" the float model's outputs from the beginning on.
    # Samples that are learned from come first, then their augmented forms, then those that are held out.

    def load(self, data: Batches) -> None:
        """Keep the model's inputs."""
        names = [n.name for n in self.graph.module.graph.nodes if n.op == "placeholder"]
        done, room = 0, self.settings.samples * (1 if self.how.augment == "none" else 2)
        for batch in fit(self.graph, data()):
            for name, x in zip(names, batch, strict=True):
                if done == 0:
                    self.store.new(f"f:{name}", (room, *x.shape[1:]), x.dtype)
                self.store[f"f:{name}"].write(done, x)
            done += len(batch[0])
        if done < 2:
            raise DataError(
                f"{self.settings.method}: {done} calibration samples; at least 2 are needed, 256 or more are sensible"
            )
        self.held_out = max(1, round(done * self.how.held_out))
        self.samples = done + (self._augment(names, done) if self.how.augment != "none" else 0)
        for name in names:
            self.store[f"f:{name}"].trim(self.samples)
        if self.how.prediction or self.how.search_scales:
            self._predict(names)

    @property
    def learned(self) -> int:
        """How many samples are learned from."""
        return self.samples - self.held_out

    def _augment(self, names: Sequence[str], count: int) -> int:
        if len(names) != 1:
            raise DataError(f"augment: the model has {len(names)} inputs; use none")
        generator = torch.Generator().manual_seed(self.settings.seed)
        values, learned = self.store[f"f:{names[0]}"], count - self.held_out
        held = values.rows(slice(learned, count))
        own = values.rows(slice(0, learned))
        moved = self._moved(own, generator) if self.how.augment == "meta" else augmented(own, self.how.augment, generator)
        values.write(learned, moved)
        values.write(2 * learned, held)
        return learned

    def _moved(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Images by a transformation that is learned on them."""
        from edgekit.compress.ptq.meta_augment import train_transform

        if x.dim() != 4 or not x.is_floating_point():
            raise DataError(f"augment: meta takes float images (N, C, H, W), the calibration samples have shape {tuple(x.shape)}")
        with torch.enable_grad():
            how = self.how
            transform = train_transform(self.graph, self.plan, x, how.meta, how.rounding, how.temperature, generator)
        with torch.no_grad():
            return torch.cat([transform(part) for part in torch.split(x, _PASS)])

    def _predict(self, names: Sequence[str]) -> None:
        """Keep what the float model says."""
        module = self.graph.module.to(self.settings.device)
        with torch.no_grad():
            for part in self.parts(0, self.samples):
                for name, value in zip(self.outputs, run_region(module, self.rows("f", names, part)), strict=True):
                    if part.start == 0:
                        self.store.new(f"p:{name}", (self.samples, *value.shape[1:]), value.dtype)
                    self.store[f"p:{name}"].write(part.start, value)
        module.cpu()

    def correct(self, part: Graph, region: Region) -> None:
        """Keep the region's float inputs after distribution correction, and what it makes of them as its targets."""
        (name,) = region.inputs
        parts = [slice(a, min(a + self.how.batch_size, self.learned)) for a in range(0, self.learned, self.how.batch_size)]
        for some in parts:
            (x,) = self.rows("f", [name], some)
            with torch.enable_grad():
                x = corrected(part.module, x, self.how.correction_steps, self.how.correction_anchor)
            with torch.no_grad():
                values = dict(zip((name, *region.outputs), (x, *run_region(part.module, [x])), strict=True))
            for key, value in values.items():
                if some.start == 0:
                    self.store.new(f"d:{key}", (self.learned, *value.shape[1:]), value.dtype)
                self.store[f"d:{key}"].write(some.start, value)

    def rows(self, kind: str, names: Sequence[str], index: Tensor | slice) -> tuple[Tensor, ...]:
        """Samples of values in the float ("f") or quantized ("q") model."""
        keys = [f"{kind}:{n}" if f"{kind}:{n}" in self.store else f"f:{n}" for n in names]
        return tuple(_placed(self.store[k].rows(index), self.settings.device) for k in keys)

    def run(self, kind: str, module: nn.Module, region: Region) -> None:
        """Keep a region's outputs for all samples."""
        with torch.no_grad():
            for part in self.parts(0, self.samples):
                values = run_region(module, self.rows(kind, region.inputs, part))
                for name, value in zip(region.outputs, values, strict=True):
                    if part.start == 0:
                        self.store.new(f"{kind}:{name}", (self.samples, *value.shape[1:]), value.dtype)
                    self.store[f"{kind}:{name}"].write(part.start, value)

    def parts(self, start: int, stop: int) -> list[slice]:
        """Batches of samples."""
        size = _PASS if self.graph.dynamic_batch else 1
        return [slice(a, min(a + size, stop)) for a in range(start, stop, size)]

    def region(self, i: int) -> None:
        """One region: targets, calibration, learning, and its outputs for those after it."""
        region = self.regions[i]
        part = extract(self.graph, region)
        part.module.to(self.settings.device)
        self.run("f", part.module, region)
        file = None if self.folder is None else self.folder / f"{i:04d}.safetensors"
        found = None if file is None else read_region(file, region.layers)
        if found is None:
            found = self._improved(i, part, region)
            if file is not None:
                with contextlib.suppress(InputError):  # a cache that cannot be written only costs the way back
                    write_region(file, *found)
        weights, activations, figures = found
        self.plan = replace(
            self.plan, weights={**self.plan.weights, **weights}, activations={**self.plan.activations, **activations}
        )
        self.settled |= {self.shared[n] for n in activations}
        if region.layers:
            self.outcomes.append(Outcome(region.layers, *figures))
        self.run("q", simulate(part, part_plan(part, region, self.plan)).to(self.settings.device), region)
        self._free(i)
        part.module.cpu()
        if self.progress:
            done = sum(1 for r in self.regions[: i + 1] if r.layers) * self.how.steps
            self.progress(done, sum(1 for r in self.regions if r.layers) * self.how.steps)

    def _free(self, i: int) -> None:
        later = {n for r in self.regions[i + 1 :] for n in r.inputs} | set(self.outputs)
        first = {n.name for n in self.graph.module.graph.nodes if n.op == "placeholder"}
        for key in self.store.names:
            if key[0] == "d" or (key[0] in "fq" and key[2:] not in later | first):
                self.store.drop(key)

    def _improved(
        self, i: int, part: Graph, region: Region
    ) -> tuple[Mapping[str, WeightQ], Mapping[str, ActQ], tuple[float, float, float]]:
        """New weights and activations of a region, and its errors (held-out before, after, on the learned samples)."""
        student = Student(self, part, region)
        student.calibrate()
        before = replace(self.plan, activations={**self.plan.activations, **student.activations()})
        if not region.layers:
            return {}, student.activations(), (0.0, 0.0, 0.0)
        if self.how.correction_steps and len(region.inputs) == 1 and has_statistics(part.module):
            self.correct(part, region)
        generator = torch.Generator().manual_seed(self.settings.seed * 10007 + i)
        tail = Tail(self, i) if self.how.prediction or self.how.search_scales else None
        if tail and self.how.search_scales:
            student.search(tail)
            before = replace(self.plan, activations={**self.plan.activations, **student.activations()})
        with torch.enable_grad():
            learn(self, student, region, generator, sum(1 for r in self.regions[:i] if r.layers), tail)
        after = replace(
            before,
            weights={**before.weights, **student.weights(before)},
            activations={**before.activations, **student.activations()},
        )
        held = (self.learned, self.samples)
        figures = (
            self.error(part, region, before, *held),
            self.error(part, region, after, *held),
            self.error(part, region, after, 0, min(self.learned, self.held_out)),
        )
        best = after if figures[1] < figures[0] else before
        names = student.activations()
        return {n: best.weights[n] for n in region.layers}, {n: best.activations[n] for n in names}, figures

    def error(self, part: Graph, region: Region, plan: Plan, start: int, stop: int) -> float:
        """Squared error of a region's outputs over their variance, with quantized inputs."""
        module = simulate(part, part_plan(part, region, plan)).to(self.settings.device)
        wrong, total = 0.0, 0.0
        with torch.no_grad():
            for some in self.parts(start, stop):
                found = run_region(module, self.rows("q", region.inputs, some))
                for value, target in zip(found, self.rows("f", region.outputs, some), strict=True):
                    wrong += float((value - target).square().sum())
                    total += float((target - target.mean()).square().sum())
        return wrong / max(total, 1e-12)

    def judged(self, plan: Plan) -> tuple[Plan, tuple[Outcome, ...]]:
        """The new plan, or the one that was given if it is better on the held-out samples."""
        names = [n.name for n in self.graph.module.graph.nodes if n.op == "placeholder"]
        given = simulate(self.graph, plan)
        errors = [0.0, 0.0]
        with torch.no_grad():
            for some in self.parts(self.learned, self.samples):
                old = run_region(given, [x.cpu() for x in self.rows("f", names, some)])
                wanted = [x.cpu() for x in self.rows("f", self.outputs, some)]
                new = [x.cpu() for x in self.rows("q", self.outputs, some)]
                for k, found in enumerate((old, new)):
                    errors[k] += sum(float((a - b).square().sum()) for a, b in zip(found, wanted, strict=True))
        if errors[1] < errors[0]:
            return self.plan, tuple(self.outcomes)
        ratio = errors[1] / max(errors[0], 1e-12)
        said = (
            f"{self.settings.method}: on {self.held_out} held-out samples the outputs' error is {ratio:.2f} times that of "
            "rounding to nearest, which was kept; give more calibration samples"
        )
        return replace(plan, warnings=(*plan.warnings, said)), ()


def _placed(x: Tensor, device: str) -> Tensor:
    if device != "cpu":
        return x.to(device)
    return x


def _outputs(module: fx.GraphModule) -> list[fx.Node]:
    (node,) = [n for n in module.graph.nodes if n.op == "output"]
    return list(node.all_input_nodes)
