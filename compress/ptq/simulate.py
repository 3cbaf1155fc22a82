"""A plan in float arithmetic: fake quantization, any batch size.

Weights stand at their grid, biases at theirs, and every activation of an integer layer passes a quantize-dequantize with the
activation's clamp. It computes what the frozen program computes, but for the last bit of float sums: the "compressed" stage.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from edgekit.compress.canonical import ATEN
from edgekit.compress.capture import Graph
from edgekit.compress.ptq.binary_units import input_threshold
from edgekit.compress.ptq.freeze import bias_integers
from edgekit.compress.ptq.observers import ActQ
from edgekit.compress.ptq.plan import Plan, WeightQ
from edgekit.compress.ptq.units import Unit
from edgekit.frozen.dynamic_ops import DYNAMIC_OPS, dynamic_linear, weight_only_linear

__all__ = ["DynamicLayer", "FakeQuantize", "SignedLayer", "WeightedLayer", "layer_of", "simulate", "taps"]


class FakeQuantize(nn.Module):
    """Float to the nearest ``scale * (q - zero_point)`` within the clamp of an activation; no gradient."""

    def __init__(self, q: ActQ, activation: str = "none") -> None:
        super().__init__()
        self.q = q
        self.low, self.high = q.bounds(activation)

    def forward(self, x: Tensor) -> Tensor:
        """x: any shape, float32."""
        zero = self.q.zero_point  # a true division, as ties of averages need; in place: ten times as fast as torch's fused kernel
        return x.div(self.q.scale).round_().add_(zero).clamp_(self.low, self.high).sub_(zero).mul_(self.q.scale)


class WeightedLayer(nn.Module):
    """conv2d or linear with its attributes; ``weight`` and ``bias`` are parameters that a rounding method may read and set."""

    def __init__(self, unit: Unit, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.unit_name, self.kind, self.attributes = unit.name, unit.kind, dict(unit.attributes)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (N, C, H, W) for a conv, (..., features) for a linear."""
        return self.compute(x, self.weight, self.bias)

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The layer with another weight and bias."""
        if self.kind == "qlinear":
            return F.linear(x, weight, bias)
        a = self.attributes
        return F.conv2d(x, weight, bias, a["stride"], a["padding"], a["dilation"], a["groups"])


class SignedLayer(nn.Module):
    """A 1-bit layer or a sign, in float32: sums of signs are exact, and compared with the program's own thresholds."""

    def __init__(self, unit: Unit, plan: Plan) -> None:
        super().__init__()
        s = unit.signs
        assert s is not None
        self.unit_name, self.kind, self.attributes, self.packed = unit.name, unit.kind, dict(unit.attributes), unit.packed
        self.layer: nn.Module | None = None
        self.unsigned = s.unsigned
        limit = torch.zeros(1)
        if unit.kind == "binary_qmatmul":
            self.transposed = unit.nodes[0].target == ATEN.permute.default
        elif unit.real:
            assert s.threshold is not None
            limit = s.threshold
        elif unit.kind == "binarize":
            x = plan.activations[unit.inputs[0].name]
            limit = input_threshold(s, x, unit.name).double().sub(x.zero_point + 0.5) * x.scale  # between two integers
        else:
            assert s.signs is not None and s.scale is not None and s.bias is not None
            conv = replace(unit, kind="qconv2d" if "stride" in unit.attributes else "qlinear")
            scale = torch.ones_like(s.scale) if unit.packed else s.scale
            shape = (-1, *[1] * (s.signs.dim() - 1))
            real = bias_integers(s.bias, 1.0, s.scale, unit.name).double() * s.scale.double()
            bias = torch.zeros(len(s.signs)) if unit.packed else real.float()
            self.layer = WeightedLayer(conv, s.signs.float() * scale.view(shape), bias)
            limit = limit if s.threshold is None else s.threshold.double() - 0.5
        image = "stride" in unit.attributes or unit.attributes.get("dim") == 1
        self.register_buffer("limit", limit.float().view(-1, 1, 1) if image else limit.float())

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        """x: (N, C, H, W) for a conv, (..., features) for a linear; packed outputs are -1 and +1 (or 0 and 1)."""
        if other is not None:
            return x @ (other.mT if self.transposed else other) * float(self.attributes["scale"])
        y: Tensor = x if self.layer is None else self.layer(x)
        low = 0.0 if self.unsigned else -1.0
        return torch.where(y >= self.limit, 1.0, low) if self.packed else y  # type: ignore[operator]


class DynamicLayer(nn.Module):
    """A linear layer with integer weights that reads and gives float."""

    def __init__(self, unit: Unit, w: WeightQ) -> None:
        super().__init__()
        self.compute = dynamic_linear if unit.kind == "dynamic_qlinear" else weight_only_linear
        self.group_size = int(unit.attributes["group_size"])
        self.register_buffer("integers", w.integers)
        self.register_buffer("scale", w.scale)
        self.register_buffer("bias", w.bias.float())

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., features)."""
        return self.compute(x, self.integers, self.scale, self.bias, self.group_size)  # type: ignore[arg-type]


def layer_of(unit: Unit, plan: Plan) -> nn.Module:
    """A weighted unit with its weights and bias at their grids."""
    w, x = plan.weights[unit.name], plan.activations[unit.inputs[0].name]
    step = w.scale.double() * x.scale
    bias = bias_integers(w.bias, x.scale, w.scale, unit.name).double() * step
    return WeightedLayer(unit, w.real.float(), bias.float())


def simulate(
    graph: Graph,
    plan: Plan,
    layer: Callable[[Unit, Plan], nn.Module] = layer_of,
    quantizer: Callable[[str, ActQ, str], nn.Module] | None = None,
) -> fx.GraphModule:
    """The plan as a float module over the graph's inputs.

    Args:
        layer: makes the module of a weighted unit; it becomes ``layer_<i>``, i the unit's place in the plan.
        quantizer: makes the module that quantizes an activation from (fx node name, quantization, fused activation); it becomes
            ``quantize_<node>``; :class:`FakeQuantize` if left out.
    """
    make = quantizer or (lambda _, q, activation: FakeQuantize(q, activation))
    root = nn.Module()
    out = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    entered: dict[fx.Node, fx.Node] = {}
    starts = {u.nodes[-1]: u for u in plan.units}
    inside = {n for u in plan.units for n in u.nodes}

    def quantized(node: fx.Node, activation: str, source: fx.Node) -> fx.Node:
        name = f"quantize_{node.name}"
        root.add_module(name, make(node.name, plan.activations[node.name], activation))
        return out.call_module(name, (source,))

    def enter(node: fx.Node) -> fx.Node:
        """The quantized value of an integer layer's input."""
        if node in starts:
            return values[node]
        if node not in entered:
            entered[node] = quantized(node, "none", values[node])
        return entered[node]

    for node in graph.module.graph.nodes:
        if node in starts and starts[node].kind in DYNAMIC_OPS:
            unit = starts[node]
            root.add_module(name := f"layer_{plan.units.index(unit)}", DynamicLayer(unit, plan.weights[unit.name]))
            values[node] = out.call_module(name, (values[unit.inputs[0]],))
        elif node in starts:
            unit = starts[node]
            ins = {i: values[i] if unit.real else enter(i) for i in unit.inputs}
            if unit.weight is not None or unit.signs is not None:
                name = f"layer_{plan.units.index(unit)}"
                root.add_module(name, layer(unit, plan) if unit.signs is None else SignedLayer(unit, plan))
                made = out.call_module(name, tuple(ins[i] for i in unit.inputs))
            else:
                made = out.node_copy(unit.nodes[0], {**values, **ins}.__getitem__)
            exact = unit.packed or (unit.inherits and unit.kind != "qavg_pool2d")  # averages are rounded
            values[node] = made if exact else quantized(node, unit.activation, made)
        elif node in inside:
            continue
        elif node.op == "output":
            out.output(fx.map_arg(node.args[0], values.__getitem__))
        else:
            values[node] = out.node_copy(node, values.__getitem__)
            if node.op == "get_attr":
                _copy_tensor(graph.module, root, str(node.target))
    module = fx.GraphModule(root, out).eval()
    module.graph.eliminate_dead_code()
    module.recompile()
    return module


class _Done(Exception):
    """Everything asked for has been computed."""


def taps(module: fx.GraphModule, names: Collection[str], batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Values of the named nodes (fx node name, or target of a module call); what comes after the last one is not computed."""
    seen: dict[str, Tensor] = {}

    class Tapper(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            name = str(n.target) if n.op == "call_module" else n.name
            if name in names:
                seen[name] = result
                if len(seen) == len(names):
                    raise _Done
            return result

    try:
        with torch.no_grad():
            Tapper(module).run(*batch)
    except _Done:
        pass
    return seen


def _copy_tensor(source: nn.Module, root: nn.Module, name: str) -> None:
    value: Any = source
    owner = root
    *path, leaf = name.split(".")
    for part in path:
        value = getattr(value, part)
        if not hasattr(owner, part):
            owner.add_module(part, nn.Module())
        owner = getattr(owner, part)
    if leaf not in owner._buffers:
        owner.register_buffer(leaf, getattr(value, leaf).detach())
