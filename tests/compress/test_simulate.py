"""The float simulation of a plan against the frozen program, which counts in integers."""

from __future__ import annotations

import pytest
import torch
from float_models import SHAPES, build
from torch import nn

from edgekit.compress.capture import capture
from edgekit.compress.ptq import PTQ
from edgekit.compress.ptq.freeze import freeze
from edgekit.compress.ptq.quantize import quantize
from edgekit.compress.ptq.simulate import simulate
from edgekit.data import Data


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_simulation_is_the_frozen_program_but_for_the_last_bit(kind: type[nn.Module], weights: str) -> None:
    model, x = build(kind)
    graph = capture(model, (x[:1],))
    graph, plan = quantize(graph, PTQ(weights=weights), Data(x))
    program = freeze(graph, plan)
    step = next(n.args["scale"] for n in reversed(program.layers) if n.op == "dequantize")
    with torch.no_grad():
        simulated = simulate(graph, plan)(x)
    lsb = (simulated - program.run(x)[0]).abs() / step
    assert float(lsb.max()) <= 2.01
    assert float((lsb > 0.5).float().mean()) < 0.1, "ties of float sums fall either way"
