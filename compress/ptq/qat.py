"""Quantization-aware training with Brevitas layers (the method: Jacob et al. 2018; learned scales: Esser et al. 2020, LSQ).

The twin of a plan is trained: weights and biases, each weight scale (Brevitas's learned scale, in log domain), and each
activation scale (in log domain, at the calibrated zero point). Rounding is passed straight through. Batch normalization is
folded before, dropout is gone, and what the plan leaves in float keeps its weights. Then integers and scales are read back into
a plan. On a CPU the same seed, data and number of threads give the same integers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset

from edgekit.compress.capture import Graph
from edgekit.compress.placing import on_device
from edgekit.compress.ptq.brevitas_twin import brevitas_layer, layers_of
from edgekit.compress.ptq.observers import ActQ
from edgekit.compress.ptq.plan import Plan, WeightQ, minimal_scale, quantize_weight
from edgekit.compress.ptq.settings import QAT
from edgekit.compress.ptq.sharing import fixed_activations, groups
from edgekit.compress.ptq.simulate import simulate
from edgekit.compress.ptq.units import Unit, weight_of
from edgekit.data import Data, Source, batches
from edgekit.errors import DataError, InputError, ModelError

__all__ = ["epoch_of", "read_back", "train_plan", "trainable_twin"]

_SCALE_RATE = 10.0
"""Learning rate of log scales, relative to that of weights: 0.1 % a step at a rate of 1e-4."""


def train_plan(graph: Graph, plan: Plan, settings: QAT, data: Data, progress: Callable[[int, int], None] | None = None) -> Plan:
    """The plan after training.

    Integer targets of shape (B,) are class labels (cross entropy); float targets of the output's shape give the squared error.

    Args:
        progress: called with (steps done, steps).

    Raises:
        DataError: no training data, targets that do not fit, or a loss that is not finite.
        InputError: ``device`` is "cuda" and torch sees none.
    """
    if data.training is None:
        raise DataError("qat: the data has no training samples; return Data(..., training=(x, y)) from the data factory")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise InputError("qat: device cuda was asked for, but torch sees no CUDA device; use device: cpu")
    torch.manual_seed(settings.seed)
    module, scales = trainable_twin(graph, plan, settings)
    on_device(module, settings.device)
    with torch.enable_grad():
        _fit(module, graph, settings, data.training, progress)
    return read_back(on_device(module, "cpu"), plan, scales)


def trainable_twin(graph: Graph, plan: Plan, settings: QAT) -> tuple[fx.GraphModule, Mapping[str, nn.Parameter]]:
    """A plan as a module of Brevitas layers to be trained, and the log scale of each activation that learns one."""
    scales = _activation_scales(plan)
    return _twin(graph, plan, scales, settings), scales


def _activation_scales(plan: Plan) -> dict[str, nn.Parameter]:
    """Log scale of each group of activations that share one and may learn it, by every name in the group."""
    roots = groups(plan.units)
    fixed = fixed_activations(plan.units)
    made: dict[str, nn.Parameter] = {}
    for name, root in roots.items():
        if root not in fixed and root not in made:
            made[root] = nn.Parameter(torch.tensor(math.log(plan.activations[name].scale)))
    return {name: made[root] for name, root in roots.items() if root in made}


class _Learned(nn.Module):
    """Brevitas "tensor quantizer" of an activation with a learned scale; returns (value, scale, zero point, bit width)."""

    def __init__(self, q: ActQ, activation: str, log_scale: Tensor) -> None:
        super().__init__()
        self.q, self.activation = q, activation
        self.log_scale = log_scale
        for name, value in (("zero_point", q.zero_point), ("bits", q.bits)):
            self.register_buffer(name, torch.tensor(float(value)))

    def forward(self, x: Tensor) -> tuple[Tensor, Any, Any, Any]:
        scale, zero = self.log_scale.exp(), self.q.zero_point
        size = float(scale.detach()) if self.activation == "relu6" else self.q.scale  # no other bound depends on it
        low, high = self.q.bounds(self.activation, size)
        real = (x.float() / scale + zero).clamp(low, high)
        integers = real + (torch.round(real) - real).detach()
        return (integers - zero) * scale, scale, self.zero_point, self.bits


def _twin(graph: Graph, plan: Plan, scales: Mapping[str, nn.Parameter], settings: QAT) -> fx.GraphModule:
    import brevitas.nn as qnn
    from brevitas.inject import ExtendedInjector
    from brevitas.proxy import ActQuantProxyFromInjector

    class Activation(ExtendedInjector):  # type: ignore[misc]
        proxy_class = ActQuantProxyFromInjector
        signed = True

    def layer(unit: Unit, plan: Plan) -> nn.Module:
        w = plan.weights[unit.name]
        weight = _starting_weight(weight_of(graph, unit)[0], w)
        made: nn.Module = brevitas_layer(unit, weight, _weight_quantizer(w, weight.dim(), settings.per_channel))
        made.get_parameter("weight").data.copy_(weight)
        made.get_parameter("bias").data.copy_(w.bias)
        return made

    def activation(name: str, q: ActQ, fused: str) -> nn.Module:
        log_scale = scales.get(name, torch.tensor(math.log(q.scale)))
        quantizer = Activation.let(tensor_quant=_Learned(q, fused, log_scale))
        made: nn.Module = qnn.QuantIdentity(act_quant=quantizer, return_quant_tensor=False)
        return made

    return simulate(graph, plan, layer, activation)


def _starting_weight(weight: Tensor, w: WeightQ) -> Tensor:
    """The float weight, moved as little as needed to round to the plan's integers (which may not be the nearest ones)."""
    scale = w.scale.view(-1, *[1] * (weight.dim() - 1))
    near = torch.minimum(torch.maximum(weight / scale, w.integers - 0.49), w.integers + 0.49) * scale
    limit = (1 << (w.bits - 1)) - 1
    clipped = (w.integers.abs() == limit) & (weight / scale).sign().eq(w.integers.sign()) & ((weight / scale).abs() > limit)
    return torch.where(clipped, weight, near)


def _weight_quantizer(w: WeightQ, rank: int, per_channel: bool) -> Any:
    from brevitas.inject.enum import RestrictValueType, ScalingImplType, ScalingPerOutputType
    from brevitas.quant.scaled_int import Int8WeightPerChannelFloat

    shape = (-1, *[1] * (rank - 1))
    largest = w.scale.view(shape) * ((1 << (w.bits - 1)) - 1)
    return Int8WeightPerChannelFloat.let(
        bit_width=w.bits,
        scaling_impl_type=ScalingImplType.PARAMETER,
        restrict_scaling_type=RestrictValueType.LOG_FP,
        scaling_per_output_type=ScalingPerOutputType.CHANNEL if per_channel else ScalingPerOutputType.TENSOR,
        scaling_init=largest if per_channel else float(largest.max()),
        scaling_shape=tuple(largest.shape) if per_channel else (),
    )


def _fit(
    module: fx.GraphModule, graph: Graph, settings: QAT, source: Source, progress: Callable[[int, int], None] | None
) -> None:
    size = settings.train_batch_size if graph.dynamic_batch else 1
    order = torch.Generator().manual_seed(settings.seed)
    steps = settings.epochs * sum(1 for _ in epoch_of(source, size, torch.Generator()))
    is_scale = {id(p): "scaling_impl" in n or "log_scale" in n for n, p in module.named_parameters()}
    parameters = [p for p in module.parameters() if p.requires_grad]
    rates = [
        {"params": [p for p in parameters if not is_scale[id(p)]], "lr": settings.learning_rate},
        {"params": [p for p in parameters if is_scale[id(p)]], "lr": settings.learning_rate * _SCALE_RATE},
    ]
    optimizer = torch.optim.Adam(rates)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    mixed = settings.device == "cuda" and torch.cuda.is_bf16_supported()  # matrix products; quantizers stay float32
    context = torch.autocast("cuda", torch.bfloat16) if mixed else nullcontext()
    done = 0
    module.train()
    for _ in range(settings.epochs):
        for batch in epoch_of(source, size, order):
            inputs, target = _split(batch, len(graph.sample), settings.device)
            with context:
                output = module(*inputs)
            loss = _loss(output, target)
            if not torch.isfinite(loss):
                raise DataError(f"qat: the loss was {float(loss)} in step {done}; lower learning_rate or check the training data")
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            done += 1
            if progress:
                progress(done, steps)
    module.eval()


def epoch_of(source: Source, size: int, order: torch.Generator) -> Iterator[tuple[Tensor, ...]]:
    """Batches of one epoch: tensors and datasets in a new order each time, loaders and functions as they come."""
    arrays = isinstance(source, tuple | list) and all(isinstance(t, Tensor | np.ndarray) and t.ndim for t in source)
    if arrays and len({len(t) for t in source}) == 1 and len(source[0]):  # anything else is an error of `batches`
        tensors = [torch.as_tensor(t) for t in source]
        chosen = torch.randperm(len(tensors[0]), generator=order)
        return batches(lambda: ([t[i] for t in tensors] for i in torch.split(chosen, size)), size, what="training")
    if isinstance(source, Dataset) and not isinstance(source, IterableDataset):
        source = DataLoader(source, size, shuffle=True, generator=order)
    return batches(source, size, what="training")


def _split(batch: tuple[Tensor, ...], inputs: int, device: str) -> tuple[tuple[Tensor, ...], Tensor]:
    if len(batch) != inputs + 1:
        raise DataError(f"training: a batch has {len(batch)} tensors; expected {inputs} inputs and the targets")
    *xs, y = (t.to(device) for t in batch)
    return tuple(xs), y


def _loss(output: Any, target: Tensor) -> Tensor:
    if not isinstance(output, Tensor):
        raise ModelError(f"qat: the model has {len(output)} outputs; training needs exactly one")
    output = output.float()
    if target.is_floating_point():
        if target.shape != output.shape:
            raise DataError(f"training: targets have shape {tuple(target.shape)}, the model gives {tuple(output.shape)}")
        return F.mse_loss(output, target)
    if output.dim() != 2 or target.dim() != 1 or int(target.max()) >= output.shape[1] or int(target.min()) < 0:
        raise DataError(
            f"training: class labels of shape {tuple(target.shape)} from {int(target.min())} to {int(target.max())} do not fit "
            f"an output of shape {tuple(output.shape)}; expected shape (batch,) and labels below the number of outputs"
        )
    return F.cross_entropy(output, target.long())


def read_back(module: fx.GraphModule, plan: Plan, scales: Mapping[str, nn.Parameter]) -> Plan:
    """The plan with the integers, scales and biases of a trained twin."""
    activations = dict(plan.activations)
    for name, log_scale in scales.items():
        activations[name] = activations[name].scaled(float(log_scale.detach().cpu().exp()))
    layers = layers_of(module, plan)
    weights: dict[str, WeightQ] = {}
    with torch.no_grad():
        for unit in plan.units:
            if unit.weight is None:
                continue
            layer: Any = layers[unit.name]
            bits, bias = plan.weights[unit.name].bits, layer.bias.detach()
            scale = layer.quant_weight().scale.detach().flatten().expand(len(bias)).float()
            scale = torch.maximum(scale, minimal_scale(bias, activations[unit.inputs[0].name])).contiguous()
            weights[unit.name] = WeightQ(quantize_weight(layer.weight, scale, bits), scale, bits, bias.double())
    return replace(plan, activations=activations, weights=weights)
