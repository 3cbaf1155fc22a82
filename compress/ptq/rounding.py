"""Rounding of weights other than to nearest: GPTQ and GPFQ (through Brevitas), and learned rounding.

Learned rounding is AdaRound (Nagel et al. 2020): each weight goes down or up, chosen by gradient descent on the layer's output
error over calibration samples. It is own code: Brevitas has it in its examples only, needs ``accelerate``, replaces weight
quantizers on the way, and compares with the layer's float output on quantized inputs; here the target is what the float model
computes, activation included, so a layer also makes up for the errors before it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx, nn

from edgekit.compress.capture import Graph
from edgekit.compress.ptq.brevitas_twin import activated, error_compensation, layers_of
from edgekit.compress.ptq.plan import Batches, Plan, WeightQ, fit, with_bias
from edgekit.compress.ptq.settings import PTQ
from edgekit.compress.ptq.simulate import WeightedLayer, layer_of, simulate, taps
from edgekit.compress.ptq.units import Unit, weight_of

__all__ = ["learned_round", "round_weights"]

Step = Callable[[int, int], None]

_BATCH = 32
_RATE = 1e-2
_WARM, _REGULARIZATION = 0.2, 0.01
_LOW, _HIGH = -0.1, 1.1  # the stretched sigmoid of AdaRound, so that 0 and 1 are reached
_CACHE_BYTES = 256 << 20


def round_weights(graph: Graph, plan: Plan, data: Batches, settings: PTQ, progress: Step | None = None) -> dict[str, WeightQ]:
    """Every weighted layer rounded by ``settings.method``; ``progress`` is called with (layers done, layers)."""
    if settings.method == "nearest":
        return {}
    if settings.method == "learned_round":
        return learned_round(graph, plan, data, settings.learned_round_steps, settings.seed, progress)
    return error_compensation(graph, plan, data, settings.method, progress)


def learned_round(
    graph: Graph, plan: Plan, data: Batches, steps: int = 200, seed: int = 0, progress: Step | None = None
) -> dict[str, WeightQ]:
    """AdaRound, layer after layer in execution order.

    Args:
        data: streamed once for each layer; of one layer's inputs and outputs at most 256 MB are held.
        steps: optimizer steps for each layer.
        seed: of the order of samples.
    """
    units = [u for u in plan.units if u.weight is not None]
    module = simulate(graph, plan)
    layers = layers_of(module, plan)
    rounded: dict[str, WeightQ] = {}
    for i, unit in enumerate(units):
        x, target = _samples(graph, plan, module, unit, data)
        with torch.enable_grad():
            w = _learn(graph, plan, unit, x, target, steps, torch.Generator().manual_seed(seed + i))
        rounded[unit.name] = w
        layers[unit.name].load_state_dict(layer_of(unit, plan.with_weights({unit.name: w})).state_dict())
        if progress:
            progress(i + 1, len(units))
    return rounded


def _samples(graph: Graph, plan: Plan, module: fx.GraphModule, unit: Unit, data: Batches) -> tuple[Tensor, Tensor]:
    """Inputs of a layer in the quantized model and its outputs in the float model, before the activation."""
    name = f"layer_{plan.units.index(unit)}"
    source = next(n for n in module.graph.nodes if n.op == "call_module" and n.target == name).args[0]
    source = str(source.target) if source.op == "call_module" else source.name
    xs, targets, held = [], [], 0
    for batch in fit(graph, data()):
        xs.append(taps(module, [source], batch)[source])
        targets.append(taps(graph.module, [unit.nodes[0].name], batch)[unit.nodes[0].name])
        held += 4 * (xs[-1].numel() + targets[-1].numel())
        if held > _CACHE_BYTES:
            break
    return torch.cat(xs), torch.cat(targets)


def _learn(graph: Graph, plan: Plan, unit: Unit, x: Tensor, target: Tensor, steps: int, order: torch.Generator) -> WeightQ:
    w = plan.weights[unit.name]
    weight, _ = weight_of(graph, unit)
    limit = (1 << (w.bits - 1)) - 1
    scale = w.scale.view(-1, *[1] * (weight.dim() - 1))
    floor = torch.floor(weight / scale).clamp(-limit, limit)
    rest = (weight / scale - floor).clamp(0.01, 0.99)
    gate = nn.Parameter(-torch.log((_HIGH - _LOW) / (rest - _LOW) - 1))
    layer = WeightedLayer(unit, weight.clone(), w.bias.float())
    bias = nn.Parameter(w.bias.float().clone())
    optimizer = torch.optim.Adam([{"params": [gate], "lr": _RATE}, {"params": [bias], "lr": _RATE * float(target.std()) / 10}])
    for step in range(steps):
        chosen = torch.randint(len(x), (_BATCH,), generator=order)
        up = (torch.sigmoid(gate) * (_HIGH - _LOW) + _LOW).clamp(0, 1)
        result = layer.compute(x[chosen], (floor + up).clamp(-limit, limit) * scale, bias)
        error = activated(result, unit.activation) - activated(target[chosen], unit.activation)
        loss = error.square().mean() / target.var().clamp(min=1e-12)
        done = step / steps
        if done > _WARM:
            beta = 20 - 18 * (done - _WARM) / (1 - _WARM)
            loss = loss + _REGULARIZATION * (1 - (2 * up - 1).abs().pow(beta)).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    integers = (floor + (gate.detach() >= 0)).clamp(-limit, limit).to(torch.int8)
    return with_bias(WeightQ(integers, w.scale, w.bits, w.bias), bias.detach().double(), plan.activations[unit.inputs[0].name])
