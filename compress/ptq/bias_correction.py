"""Bias correction (Nagel et al. 2019, section 4.2, with means measured on calibration data).

Quantization shifts the mean of each channel. Layer by layer in execution order, the difference between the float layer's mean
output and the quantized one's, both before the activation, is added to the bias; a later layer sees the earlier ones corrected.

Own code: Brevitas's ``bias_correction_mode`` corrects all layers from one pass in which each sees float inputs, so the errors
that activations and earlier layers bring are not part of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from edgekit.compress.capture import Graph
from edgekit.compress.ptq.brevitas_twin import layers_of
from edgekit.compress.ptq.plan import Batches, Plan, WeightQ, fit, with_bias
from edgekit.compress.ptq.simulate import layer_of, simulate, taps

__all__ = ["correct_biases"]


def correct_biases(
    graph: Graph, plan: Plan, data: Batches, progress: Callable[[int, int], None] | None = None
) -> dict[str, WeightQ]:
    """Layer name to the layer with its bias corrected; ``data`` is streamed once for each layer and once more.

    Args:
        progress: called with (layers done, layers).
    """
    units = [u for u in plan.units if u.weight is not None]
    wanted = _means(graph.module, [u.nodes[0].name for u in units], graph, data)
    module = simulate(graph, plan)
    layers = layers_of(module, plan)
    corrected: dict[str, WeightQ] = {}
    for i, unit in enumerate(units):
        name = f"layer_{plan.units.index(unit)}"
        found = _means(module, [name], graph, data)[name]
        w = plan.weights[unit.name]
        w = with_bias(w, w.bias + wanted[unit.nodes[0].name] - found, plan.activations[unit.inputs[0].name])
        corrected[unit.name] = w
        layers[unit.name].load_state_dict(layer_of(unit, plan.with_weights({unit.name: w})).state_dict())
        if progress:
            progress(i + 1, len(units))
    return corrected


def _means(module: fx.GraphModule, names: list[str], graph: Graph, data: Batches) -> dict[str, Tensor]:
    """Mean of each channel of the named nodes' values, float64 (channels,)."""
    sums = dict.fromkeys(names, torch.zeros(()).double())
    counts = dict.fromkeys(names, 0)
    for batch in fit(graph, data()):
        for name, value in taps(module, names, batch).items():
            flat = value.transpose(1, -1).flatten(0, -2) if value.dim() == 4 else value.flatten(0, -2)
            sums[name] = sums[name] + flat.double().sum(0)
            counts[name] += len(flat)
    return {name: sums[name] / counts[name] for name in names}
