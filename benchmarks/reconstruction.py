"""What makes a reconstruction step fast: processor time of one optimizer step of a block, ours and a straightforward loop.

    python benchmarks/reconstruction.py [--models resnet8] [--steps 40]

All variants do the same maths on the same block (the first residual or separable one): rounding gates, learned scales, QDrop.
The straightforward loop computes the block's inputs from the images in every step, keeps PyTorch's default layout, draws new
masks and selects by them, and quantizes with plain operators under autograd; each is also measured alone, the rest being ours.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import subjects
import torch
from subjects import log
from torch import Tensor
from torch.nn import functional as F

from edgekit.compress.capture import capture
from edgekit.compress.ptq import PTQ
from edgekit.compress.ptq.plan import make_plan
from edgekit.compress.ptq.quantize import calibration_stream
from edgekit.compress.ptq.reconstruct import Engine
from edgekit.compress.ptq.regions import extract, part_plan, run_region
from edgekit.compress.ptq.sample_store import Store
from edgekit.compress.ptq.settings import Reconstruct
from edgekit.compress.ptq.simulate import simulate
from edgekit.compress.ptq.soft import LearnedActivation
from edgekit.compress.ptq.student import Student, learn
from edgekit.compress.ptq.units import find_units
from edgekit.data import Data
from edgekit.frozen.ops import activation_bounds

GOAL = 2.0
VARIANTS = {
    "edgekit": (),
    "inputs computed in every step": ("inputs",),
    "default memory layout": ("layout",),
    "fresh masks, plain operators": ("operators",),
    "straightforward loop": ("inputs", "layout", "operators"),
}


def plain(quantizer: LearnedActivation, drop: float) -> Any:
    """A learned quantizer written as one would: straight-through rounding, a new mask, ``where``."""

    def forward(x: Tensor) -> Tensor:
        scale = quantizer.log_scale.exp()
        zero = quantizer.q.zero_point
        low, high = activation_bounds(quantizer.activation, float(scale.detach()), zero, quantizer.q.bits)
        real = (x / scale).clamp(low - zero, high - zero)
        quantized = (real + (real.round() - real).detach()) * scale
        kept = F.relu(x) if quantizer.activation == "relu" else x
        return torch.where(torch.rand_like(x) < drop, kept, quantized)

    return forward


def seconds(net: subjects.Subject, changes: tuple[str, ...], steps: int) -> float:
    """Processor seconds of one step."""
    graph = capture(net.model, (net.calibration[:1],))
    how = PTQ(weights="int4", activations="int4", method="brecq", samples=128, reconstruct=Reconstruct(steps=steps))
    stream = calibration_stream(graph, how, Data(net.calibration))
    units, floats = find_units(graph)
    with Store(1 << 30) as store:
        engine = Engine(graph, make_plan(graph, units, floats, how, stream), how, store, None, None)
        engine.load(stream)
        first = extract(graph, engine.regions[0])
        engine.run("f", first.module, engine.regions[0])
        quantized = simulate(first, part_plan(first, engine.regions[0], engine.plan))
        engine.run("q", quantized, engine.regions[0])
        region = engine.regions[1]
        part = extract(graph, region)
        engine.run("f", part.module, region)
        student = Student(engine, part, region)
        student.calibrate()
        kept = engine.rows

        def rows(kind: str, names: Any, index: Any) -> tuple[Tensor, ...]:
            found = kept(kind, names, index)
            if "inputs" in changes:
                x = kept("f", engine.regions[0].inputs, index)
                with torch.no_grad():
                    for module in (
                        quantized if kind == "q" else first.module,
                        *([part.module] if names == region.outputs else []),
                    ):
                        x = run_region(module, x)
                found = x
            return tuple(v.contiguous() for v in found) if "layout" in changes else found

        engine.rows = rows  # type: ignore[method-assign]
        if "layout" in changes:
            for layer in student.layers.values():
                layer.gate.data = layer.gate.data.contiguous()
                layer.floor = layer.floor.contiguous()  # type: ignore[operator, assignment]
        if "operators" in changes:
            for quantizer in student.quantizers:
                quantizer.forward = plain(quantizer, how.reconstruct.drop)  # type: ignore[method-assign]
        start = time.process_time()
        with torch.enable_grad():
            learn(engine, student, region, torch.Generator().manual_seed(0), 0)
        return (time.process_time() - start) / steps


def main() -> None:
    given = subjects.arguments(__doc__ or "", steps=40, rounds=3)
    rows = []
    for name in given.models:
        net = subjects.subject(name)
        taken = {v: statistics.median(seconds(net, c, given.steps) for _ in range(given.rounds)) for v, c in VARIANTS.items()}
        for variant, value in taken.items():
            row: dict[str, Any] = {"model": name, "variant": variant, "device": "host", "step_ms": round(1000 * value, 2)}
            if variant != "edgekit":
                row["times_edgekit"] = round(value / taken["edgekit"], 2)
            if variant == "straightforward loop":
                row["times_edgekit_bound"] = GOAL
            rows.append(row)
            log(f"{name}: {variant}: {row['step_ms']} ms a step, {row.get('times_edgekit', 1)} times edgekit")
    subjects.write("reconstruction", rows)


if __name__ == "__main__":
    main()
