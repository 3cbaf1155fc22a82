"""One ``edgekit::`` operator of a frozen program: its arguments, shapes, bits and work."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from edgekit.frozen.binary_ops import PACKED_OPS
from edgekit.frozen.spiking_ops import CURRENT_OPS, NEURON_OPS, SPIKING_OPS, STATEFUL_OPS, SYNAPSE_OPS

__all__ = ["Layer", "layers_of"]


@dataclass(frozen=True)
class Layer:
    """One ``edgekit::`` node of a program.

    Attributes:
        name: dotted name, that of the source module where there is one.
        op: operator name without namespace, such as "qconv2d".
        node: name of the fx node.
        args: the operator's arguments by schema name; constants are tensors, activations are names of producing layers
            (or of fx nodes where the producer is a float op or a program input).
        shape: output shape, batch first.
    """

    name: str
    op: str
    node: str
    args: Mapping[str, Any]
    shape: tuple[int, ...]

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the producers of the activation inputs, in order."""
        found: list[str] = []
        for key in ("x", "a", "b", "xs", "v", "i", "s"):
            value = self.args.get(key)
            if isinstance(value, str):
                found.append(value)
            elif isinstance(value, list | tuple):
                found += [v for v in value if isinstance(v, str)]
        return tuple(found)

    @property
    def weight_bits(self) -> int | None:
        """Bits of a stored weight, None for a layer without weights."""
        if self.op.startswith("binary_"):
            return 1 if isinstance(self.args.get("weight"), Tensor) else None
        bits = self.args.get("weight_bits")
        return None if bits is None else int(bits)

    @property
    def packed(self) -> bool:
        """Whether the output is packed signs (see :mod:`edgekit.frozen.binary_ops`)."""
        return self.op in PACKED_OPS

    @property
    def input_bits(self) -> int | None:
        """Bits of the activations that a layer with products reads: 1 for signs and single spikes, else those of its output."""
        if self.op in SYNAPSE_OPS:
            return int(self.args["spikes_max"]).bit_length()
        return 1 if self.op.startswith("binary_") else self.activation_bits

    @property
    def activation_bits(self) -> int | None:
        """Bits of an output value; None where the output is float."""
        if self.packed:
            return 1
        if self.op in NEURON_OPS:
            return int(self.args["max_spikes"]).bit_length()
        if self.op in CURRENT_OPS:
            return 16
        return None if self.out_scale is None else int(self.args.get("out_bits", self.args.get("bits", 8)))

    @property
    def out_scale(self) -> float | None:
        """Scale of the output integers; None where the output is float."""
        value = self.args.get("out_scale", self.args.get("scale"))
        return None if self.op == "dequantize" or value is None else float(value)

    @property
    def out_zero_point(self) -> int | None:
        """Zero point of the output integers; None where the output is float."""
        value = self.args.get("out_zp", self.args.get("zero_point"))
        return None if self.op == "dequantize" or value is None else int(value)

    @property
    def parameters(self) -> int:
        """Number of weights and biases (of a binary layer, thresholds; of neurons, all their constants)."""
        if self.op in STATEFUL_OPS:
            return sum(value.numel() for value in self.args.values() if isinstance(value, Tensor))
        others = sum(self.args[k].numel() for k in ("bias", "threshold") if isinstance(self.args.get(k), Tensor))
        others += self.args["amplitude"].numel() if self.op == "add_spikes" else 0
        weight = self.args.get("weight")
        return int(others) + (len(weight) * self._products(weight) if isinstance(weight, Tensor) else 0)

    def _products(self, weight: Tensor) -> int:
        """Multiply-accumulates for one output value."""
        if not self.op.startswith("binary_"):
            return weight[0].numel()
        # packed along the last dimension, which may end in bits that stand for nothing
        reduced = int(self.args.get("channels", self.args.get("features", 0))) // int(self.args.get("groups", 1))
        return weight[0, ..., 0].numel() * reduced

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one sample (0 for layers without weights), over all time steps of a spiking layer.

        For ``spiking_linear`` and ``spiking_conv2d`` this is the dense bound: the accumulates if every input spiked at each step.
        """
        weight = self.args.get("weight")
        # the program's batch is one, and not always first: torch's attention works on (time, batch, features)
        if not isinstance(weight, Tensor):
            return math.prod(self.shape) * int(self.args["features"]) if self.op == "binary_qmatmul" else 0
        outputs = math.prod(self.shape[:-1]) * len(weight) if self.packed else math.prod(self.shape)
        if self.op.endswith("_recurrent"):  # nothing comes back in the first step
            outputs -= outputs // int(self.args["steps"])
        return outputs * self._products(weight)

    @property
    def weight_bytes(self) -> int:
        """Bytes of packed weights, biases, float32 scales, the thresholds of binary layers and the constants of neurons."""
        if self.op in STATEFUL_OPS:
            return sum(value.numel() * value.element_size() for value in self.args.values() if isinstance(value, Tensor))
        weight = self.args.get("weight")
        if self.op == "binarize" or self.op.startswith("binary_"):
            stored = (self.args.get(k) for k in ("weight", "bias", "weight_scale", "threshold"))
            return sum(t.numel() * t.element_size() for t in stored if isinstance(t, Tensor))
        if not isinstance(weight, Tensor):
            return int(self.args["table"].numel()) if isinstance(self.args.get("table"), Tensor) else 0
        packed = -(-weight.numel() * (self.weight_bits or 8) // 8)
        bias, scale = self.args["bias"], self.args["weight_scale"]
        return packed + int(bias.numel()) * int(bias.element_size()) + 4 * int(scale.numel())

    @property
    def steps(self) -> int | None:
        """Time steps of a spiking operator, None where time is not its business."""
        value = self.args.get("steps") if self.op in SPIKING_OPS else None
        return None if value is None else int(value)

    @property
    def state_updates(self) -> int:
        """Membrane updates for one sample: neurons times steps, 0 for operators without a membrane."""
        return math.prod(self.shape) if self.op in STATEFUL_OPS else 0


def layers_of(module: fx.GraphModule) -> tuple[Layer, ...]:
    """All ``edgekit::`` nodes of a graph in execution order."""
    names: dict[fx.Node, str] = {}
    layers: list[Layer] = []
    used: dict[str, int] = {}

    def resolve(value: Any) -> Any:
        if isinstance(value, fx.Node):
            if value.op == "get_attr":
                target: Any = module
                for part in str(value.target).split("."):
                    target = getattr(target, part)
                return target.detach()
            return names.get(value, value.name)
        if isinstance(value, list | tuple):
            return type(value)(resolve(v) for v in value)
        return value

    for node in module.graph.nodes:
        if node.op != "call_function" or not str(node.target).startswith("edgekit."):
            continue
        stack = node.meta.get("nn_module_stack") or {}
        base = next(reversed(stack.values()))[0] if stack else node.name
        used[base] = used.get(base, 0) + 1
        names[node] = base if used[base] == 1 else f"{base}_{used[base]}"
        schema = node.target._schema
        bound = dict(zip((a.name for a in schema.arguments), node.args, strict=False)) | dict(node.kwargs)
        layers.append(
            Layer(
                name=names[node],
                op=schema.name.split("::")[1],
                node=node.name,
                args={k: resolve(v) for k, v in bound.items()},
                shape=tuple(node.meta["val"].shape),
            )
        )
    return tuple(layers)
