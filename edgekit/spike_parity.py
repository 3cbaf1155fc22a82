"""Spikes of a file against the frozen program's: which differ, and which of these follow from rounding alone.

A spike is there or not; there is no step between. Two correct float computations of one network still differ now and then: where
a membrane meets its threshold within the rounding of the sums that led to it, either answer is right, and the neuron then goes on
from another membrane. So a neuron's first spike that differs is *explained* if the membrane that the frozen program computes from
the target's own inputs lies within :data:`ROUNDING` of the threshold, relative to the threshold and the largest current; all that
follows in the same neuron and sample is explained with it. Integer neurons have no rounding: nothing is explained there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from edgekit.frozen import Layer
from edgekit.frozen.float_neurons import feedback
from edgekit.frozen.ops import OPS
from edgekit.frozen.spiking_ops import INTEGER_NEURONS, NEURON_OPS, RECURRENT_OPS

__all__ = ["FLOAT_STEP", "ROUNDING", "SPIKES", "explained", "membranes"]

ROUNDING = 3e-5
"""Relative distance from the threshold within which float32 sums in another order may land on the other side."""

SPIKES = NEURON_OPS | {"fire"}
"""Operators whose outputs are spikes."""

FLOAT_STEP = 1e-4
"""Step in which outputs of float membranes are compared, relative to the largest of the layer."""


def membranes(op: str, arguments: Mapping[str, Any], spikes: Tensor) -> Tensor:
    """Membrane before comparison in each step, (T, N, ...), of a float neuron that emits ``spikes``."""
    a, steps = arguments, int(arguments["steps"])
    x, s = (value.reshape(steps, -1, *value.shape[1:]) for value in (a["x"], spikes.to(a["x"].dtype)))
    v = a["v_init"].to(x.dtype).expand(x.shape[1:]).contiguous()
    current, rows = torch.zeros_like(v), []
    for t in range(steps):
        given = x[t]
        if op in RECURRENT_OPS and t:
            given = given + feedback(s[t - 1], a["weight"], a["bias"])
        if "tau_syn" in a:
            given = current = OPS.synapse.default(given, current, a["tau_syn"], a["w_in"], a["dt"])
        if op in ("if_sequence", "if_recurrent"):
            v = OPS.if_charge.default(given, v, a["r"], a["dt"])
        else:
            v = OPS.lif_charge.default(given, v, a.get("tau", a.get("tau_mem")), a["r"], a["v_leak"], a["dt"])
        rows.append(v)
        v = OPS.fire_reset.default(v, s[t], a["v_threshold"], a["v_reset"], a["reset"])
    return torch.stack(rows)


def explained(layer: Layer, arguments: Mapping[str, Any], expected: Tensor, found: Tensor) -> Tensor:
    """Which spikes of ``found`` may differ from ``expected`` by rounding: bool, of expected's shape.

    Args:
        arguments: what the layer got in the frozen program when fed the target's own inputs.
        expected, found: (T * N, ...) spikes of the frozen program from these inputs, and of the target.
    """
    if layer.op in INTEGER_NEURONS:
        return torch.zeros(expected.shape, dtype=torch.bool)
    v = arguments["x"][None] if layer.op == "fire" else membranes(layer.op, arguments, expected)
    threshold = arguments["v_threshold"].to(v.dtype)
    level = torch.round(v / threshold).clamp(1, int(arguments["max_spikes"])) * threshold
    largest = arguments["x"].reshape(v.shape).abs().amax(0) + threshold.abs()
    close = (v - level).abs() <= ROUNDING * largest
    differs = (expected != found).reshape(v.shape)
    first = differs & (differs.long().cumsum(0) == 1)
    after: Tensor = (first & close).long().cumsum(0) > 0
    return after.reshape(expected.shape)
