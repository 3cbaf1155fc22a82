"""A plan as a module of Brevitas layers, and the algorithms of Brevitas 0.13 that round its weights.

The twin has ``brevitas.nn`` layers where the plan has weighted units and Brevitas activation quantizers wherever the plan
quantizes, all at the plan's scales and zero points. GPTQ and GPFQ move its float weights; the integers are read back on the same
scales, so nothing but the rounding changes. (Brevitas's own quantizers recompute scales by another formula, and may differ in
the last bit: a plan's scale is what the frozen program carries.)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from edgekit.compress.capture import Graph
from edgekit.compress.ptq.observers import ActQ
from edgekit.compress.ptq.plan import Batches, Plan, WeightQ, fit, quantize_weight
from edgekit.compress.ptq.simulate import FakeQuantize, simulate
from edgekit.compress.ptq.units import Unit, weight_of
from edgekit.errors import ModelError

__all__ = ["activated", "brevitas_layer", "error_compensation", "layers_of", "twin"]


class _Grid(nn.Module):
    """Brevitas "tensor quantizer" of a weight: rounds to the plan's grid; returns (value, scale, zero point, bit width)."""

    def __init__(self, scale: Tensor, bits: int, rank: int) -> None:
        super().__init__()
        self.register_buffer("scale", scale.view(-1, *[1] * (rank - 1)).clone())
        self.register_buffer("bits", torch.tensor(float(bits)))
        self.limit = (1 << (bits - 1)) - 1

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        scale: Tensor = self.scale  # type: ignore[assignment]
        value = torch.round(x / scale).clamp(-self.limit, self.limit) * scale
        return value, scale, torch.zeros_like(self.bits), self.bits  # type: ignore[arg-type, return-value]


class _Fixed(nn.Module):
    """Brevitas "tensor quantizer" of an activation at the plan's scale and zero point."""

    def __init__(self, q: ActQ, activation: str) -> None:
        super().__init__()
        self.fake = FakeQuantize(q, activation)
        for name, value in (("scale", q.scale), ("zero_point", float(q.zero_point)), ("bits", float(q.bits))):
            self.register_buffer(name, torch.tensor(value))

    def forward(self, x: Tensor) -> tuple[Tensor, Any, Any, Any]:
        return self.fake(x), self.scale, self.zero_point, self.bits


def activated(x: Tensor, activation: str) -> Tensor:
    """The float activation that is fused into a unit."""
    return F.relu(x) if activation == "relu" else F.relu6(x) if activation == "relu6" else x


class _Activation(nn.Module):
    """The float activation, for passes in which Brevitas switches quantization off."""

    def __init__(self, activation: str) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return activated(x, self.activation)


def twin(graph: Graph, plan: Plan) -> fx.GraphModule:
    """The plan as Brevitas layers with the graph's float weights; module names as in :func:`simulate`."""
    import brevitas.nn as qnn
    from brevitas.inject import ExtendedInjector
    from brevitas.proxy import ActQuantProxyFromInjector, WeightQuantProxyFromInjector

    class WeightGrid(ExtendedInjector):  # type: ignore[misc]
        proxy_class = WeightQuantProxyFromInjector
        signed, narrow_range = True, True

    class FixedActivation(ExtendedInjector):  # type: ignore[misc]
        proxy_class = ActQuantProxyFromInjector
        signed = True

    def layer(unit: Unit, plan: Plan) -> nn.Module:
        weight, _ = weight_of(graph, unit)
        w = plan.weights[unit.name]
        quantizer = WeightGrid.let(tensor_quant=_Grid(w.scale, w.bits, weight.dim()))
        made: nn.Module = brevitas_layer(unit, weight, quantizer)
        made.get_parameter("weight").data.copy_(weight)
        made.get_parameter("bias").data.copy_(w.bias)
        return made

    def activation(_: str, q: ActQ, fused: str) -> nn.Module:
        quantizer = FixedActivation.let(tensor_quant=_Fixed(q, fused))
        layer: nn.Module = qnn.QuantIdentity(act_quant=quantizer, return_quant_tensor=False)
        layer.get_submodule("act_quant.fused_activation_quant_proxy").activation_impl = _Activation(fused)
        return layer

    return simulate(graph, plan, layer, activation)


def brevitas_layer(unit: Unit, weight: Tensor, weight_quant: Any) -> Any:
    """An empty ``QuantConv2d`` or ``QuantLinear`` of the unit's geometry, with a bias."""
    import brevitas.nn as qnn

    if unit.kind == "qlinear":
        return qnn.QuantLinear(weight.shape[1], weight.shape[0], bias=True, weight_quant=weight_quant, return_quant_tensor=False)
    a = unit.attributes
    return qnn.QuantConv2d(
        weight.shape[1] * a["groups"], weight.shape[0], tuple(weight.shape[2:]), tuple(a["stride"]), tuple(a["padding"]),
        tuple(a["dilation"]), a["groups"], bias=True, weight_quant=weight_quant, return_quant_tensor=False,
    )  # fmt: skip


def layers_of(module: fx.GraphModule, plan: Plan) -> dict[str, nn.Module]:
    """Layer name to the module that stands for it in a simulation or twin of the plan."""
    return {u.name: module.get_submodule(f"layer_{i}") for i, u in enumerate(plan.units) if u.weight is not None}


def error_compensation(
    graph: Graph, plan: Plan, data: Batches, method: str, progress: Callable[[int, int], None] | None = None
) -> dict[str, WeightQ]:
    """Weights rounded column by column, each column's error made up for by the later ones.

    Layers are rounded in execution order, each on inputs from the layers before it that are already rounded and with quantized
    activations; ``data`` is streamed once for each layer.

    Args:
        method: "gptq" (Frantar et al. 2022) or "gpfq" (Lybrand and Saab 2021), both with columns in order of activation energy.
        progress: called with (layers done, layers).

    Raises:
        ModelError: GPTQ cannot invert a layer's input correlations.
    """
    module = twin(graph, plan)
    layers = layers_of(module, plan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="Failed to compute the inverse")
        try:
            _run_mode(module, method, lambda: fit(graph, data()), progress)
        except UserWarning as error:
            raise ModelError(
                f"gptq: {str(error).split(' GPTQ will')[0]}; give more calibration samples or take method learned_round"
            ) from error
    return {name: _rounded(plan.weights[name], layers[name]) for name in layers}


def _run_mode(
    module: fx.GraphModule,
    method: str,
    stream: Callable[[], Iterable[tuple[Tensor, ...]]],
    progress: Callable[[int, int], None] | None,
) -> None:
    from brevitas.graph.gpfq import gpfq_mode
    from brevitas.graph.gptq import gptq_mode

    mode = {"gptq": gptq_mode, "gpfq": gpfq_mode}[method]
    with torch.no_grad(), mode(module, act_order=True, use_quant_activations=True) as run:
        for i in range(run.num_layers):
            for batch in stream():
                run.model(*batch)
            run.update()
            if progress:
                progress(i + 1, run.num_layers)


def _rounded(w: WeightQ, layer: Any) -> WeightQ:
    if not torch.equal(layer.quant_weight().scale.flatten(), w.scale.flatten()):
        raise AssertionError("Brevitas changed a weight scale")
    return WeightQ(quantize_weight(layer.weight, w.scale, w.bits), w.scale, w.bits, w.bias)
