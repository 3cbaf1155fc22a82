"""Captured graph and plan to frozen program: the only place where biases become integers and layers become operators."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from edgekit.compress.capture import Graph, shapes_of, tensor_of
from edgekit.compress.ptq.binary_units import input_threshold
from edgekit.compress.ptq.observers import ActQ
from edgekit.compress.ptq.plan import Plan
from edgekit.compress.ptq.units import Unit
from edgekit.errors import ModelError
from edgekit.frozen import FloatOp, FrozenOp, FrozenProgram, freeze_module
from edgekit.frozen.binary_ops import pack_signs
from edgekit.frozen.dynamic_ops import DYNAMIC_OPS
from edgekit.frozen.ops import lut_table

__all__ = ["bias_integers", "freeze"]

ZERO_POINTS = (
    "asymmetric_weights gives weights zero points, which no target's kernels take; the setting is for simulation "
    "(quantize and simulate in Python), take it out to freeze"
)


def freeze(graph: Graph, plan: Plan, name: str = "model") -> FrozenProgram:
    """The frozen program of a plan, for a batch of one.

    Raises:
        ModelError: a bias does not fit int32, or the frozen graph cannot be exported.
    """
    builder = _Builder(graph, plan)
    module = builder.build()
    one = tuple(x[:1] for x in graph.sample)
    return freeze_module(module, one, name=name, unquantized=plan.unquantized, sources=graph.sources)


def bias_integers(bias: Tensor, in_scale: float, weight_scale: Tensor, layer: str) -> Tensor:
    """int32 bias at scale ``in_scale * weight_scale``.

    Raises:
        ModelError: a value does not fit int32.
    """
    step = (weight_scale.float() * weight_scale.new_tensor(in_scale, dtype=torch.float32)).double()
    integers = torch.round(bias.double() / step)
    if integers.numel() and float(integers.abs().max()) >= 2**31:
        raise ModelError(
            f"layer {layer}: a bias of {float(bias.abs().max()):.3g} does not fit 32 bits at its scale; check its weights"
        )
    return integers.to(torch.int32)


class _Builder:
    """Copies the graph, unit by unit; float values and integer values of a node are kept side by side."""

    def __init__(self, graph: Graph, plan: Plan) -> None:
        self.graph, self.plan = graph, plan
        self.root = nn.Module()
        self.out = fx.Graph()
        self.real: dict[fx.Node, fx.Node] = {}
        self.integer: dict[fx.Node, fx.Node] = {}
        self.shapes = shapes_of(graph)

    def build(self) -> fx.GraphModule:
        starts = {u.nodes[-1]: u for u in self.plan.units}
        inside = {n for u in self.plan.units for n in u.nodes}
        result: Any = None
        for node in self.graph.module.graph.nodes:
            if node in starts:
                self._unit(starts[node])
            elif node in inside or node.op == "get_attr":
                continue
            elif node.op == "output":
                result = fx.map_arg(node.args[0], self._real)
                self.out.output(result)
            else:
                self.real[node] = self._float(node)
        return fx.GraphModule(self.root, self.out)

    def _float(self, node: fx.Node) -> fx.Node:
        """A node that stays as it is, in a module of its layer's name."""
        if node.op != "call_function" or node.target is operator.getitem or node.name not in self.graph.names:
            return self.out.node_copy(node, self._real)
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._real)
        name = self._free(self.graph.names[node.name])
        self._place(name, FloatOp(node.target))  # type: ignore[arg-type]
        return self.out.create_node("call_module", name, args, kwargs)

    def _real(self, node: fx.Node) -> fx.Node:
        if node not in self.real:
            if node.op == "get_attr":
                self._keep_tensor(node)
            else:
                q = self.plan.activations[node.name]
                name = self._free(f"{self.graph.names.get(node.name, node.name)}_dequantize")
                self.real[node] = self._add(
                    name, FrozenOp("dequantize", 1, {}, scale=q.scale, zero_point=q.zero_point), self.integer[node]
                )
        return self.real[node]

    def _keep_tensor(self, node: fx.Node) -> None:
        name = self._free("constant_" + str(node.target).replace(".", "_"))
        self.root.register_buffer(name, tensor_of(self.graph.module, node).detach().clone())
        self.real[node] = self.out.get_attr(name)

    def _int(self, node: fx.Node) -> fx.Node:
        if node not in self.integer:
            q = self.plan.activations[node.name]
            op = FrozenOp("quantize", 1, {}, scale=q.scale, zero_point=q.zero_point, bits=q.bits)
            layer, real = self.graph.names.get(node.name, node.name), self._real(node)
            if q.few:  # int8 saturates at the upper end of its few levels, nothing else holds the lower one
                low = q.scale * (q.bounds("none")[0] - q.zero_point)
                real = self._add_float(f"{layer}_levels", torch.ops.aten.clamp.default, real, low)
            self.integer[node] = self._add(self._free(f"{layer}_quantize"), op, real)
        return self.integer[node]

    def _free(self, name: str) -> str:
        base, count = name, 2
        while any(n == name for n, _ in self.root.named_modules()) or hasattr(self.root, name):
            name, count = f"{base}_{count}", count + 1
        return name

    def _add(self, name: str, op: FrozenOp, *inputs: fx.Node) -> fx.Node:
        self._place(name, op)
        return self.out.create_node("call_module", name, inputs)

    def _add_float(self, name: str, target: Any, *inputs: Any) -> fx.Node:
        self._place(name := self._free(name), FloatOp(target))
        return self.out.create_node("call_module", name, inputs)

    def _place(self, name: str, op: nn.Module) -> None:
        owner = self.root
        *path, leaf = name.split(".")
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        owner.add_module(leaf, op)

    def _unit(self, unit: Unit) -> None:
        if unit.kind in DYNAMIC_OPS:
            w = self.plan.weights[unit.name]
            buffers = {"weight": w.integers, "weight_scale": w.scale, "bias": w.bias.float()}
            op = FrozenOp(unit.kind, 1, buffers, **unit.attributes, weight_bits=w.bits)
            self.real[unit.output] = self._add(unit.name, op, self._real(unit.inputs[0]))
            return
        ins = [] if unit.real else [self.plan.activations[i.name] for i in unit.inputs]
        out = self.plan.activations[unit.output.name]
        op = self._operator(unit, ins, out)
        self.integer[unit.output] = self._add(unit.name, op, *((self._real if unit.real else self._int)(i) for i in unit.inputs))

    def _operator(self, unit: Unit, ins: list[ActQ], out: ActQ) -> FrozenOp:
        if unit.signs is not None:
            return _binary_operator(unit, ins, out)
        attributes = dict(unit.attributes)
        to = {"out_scale": out.scale, "out_zp": out.zero_point}
        kind, buffers = unit.kind, dict[str, Tensor]()
        if unit.weight is not None:
            w = self.plan.weights[unit.name]
            if w.zero is not None and w.zero.any():
                raise ModelError(f"layer {unit.name}: {ZERO_POINTS}")
            bias = bias_integers(w.bias, ins[0].scale, w.scale, unit.name)
            buffers = {"weight": w.integers, "weight_scale": w.scale, "bias": bias}
            attributes |= {**_from(ins[0]), **to, "activation": unit.activation, "weight_bits": w.bits, "out_bits": out.bits}
        elif kind in ("qadd", "qmul"):
            attributes |= {**_from(ins[0], "a"), **_from(ins[1], "b"), **to, "activation": unit.activation, "out_bits": out.bits}
        elif kind == "qmean":
            attributes |= {**_from(ins[0]), **to, "out_bits": out.bits}
        elif kind == "qavg_pool2d":
            attributes |= {**_from(ins[0]), **to}
        elif kind == "qconcat":
            attributes |= {"scales": [q.scale for q in ins], "zero_points": [q.zero_point for q in ins], **to}
        elif kind == "qlut":
            buffers = {"table": lut_table(attributes["function"], ins[0].scale, ins[0].zero_point, out.scale, out.zero_point)}
            attributes |= {**_from(ins[0]), **to}
        else:
            if kind == "qreshape":
                attributes["shape"] = list(self.shapes[unit.output.name])
            attributes |= {"scale": out.scale, "zero_point": out.zero_point}
        return FrozenOp(kind, 0 if kind == "qconcat" else len(unit.inputs), buffers, **attributes)


def _binary_operator(unit: Unit, ins: list[ActQ], out: ActQ) -> FrozenOp:
    """A 1-bit layer; weights packed along the input channels."""
    s = unit.signs
    assert s is not None
    if unit.kind == "binarize":
        assert s.threshold is not None
        return FrozenOp(
            "binarize", 1, {"threshold": s.threshold if unit.real else input_threshold(s, ins[0], unit.name)}, **unit.attributes
        )
    if unit.kind == "binary_qmatmul":
        return FrozenOp(unit.kind, 2, {}, **unit.attributes, out_scale=out.scale, out_zp=out.zero_point, out_bits=out.bits)
    assert s.signs is not None and s.scale is not None and s.bias is not None
    weight = pack_signs(s.signs.movedim(1, -1) > 0)
    if unit.packed:
        assert s.threshold is not None
        return FrozenOp(unit.kind, 1, {"weight": weight, "threshold": s.threshold}, **unit.attributes)
    bias = bias_integers(s.bias, 1.0, s.scale, unit.name)
    numbers = {"out_scale": out.scale, "out_zp": out.zero_point, "activation": unit.activation, "out_bits": out.bits}
    return FrozenOp(unit.kind, 1, {"weight": weight, "weight_scale": s.scale, "bias": bias}, **unit.attributes, **numbers)


def _from(q: ActQ, prefix: str = "in") -> dict[str, Any]:
    return {f"{prefix}_scale": q.scale, f"{prefix}_zp": q.zero_point}
