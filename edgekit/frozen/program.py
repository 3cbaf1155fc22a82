"""The frozen program: a ``torch.export`` graph whose compressed layers are ``edgekit::`` operators.

It is edgekit's only intermediate representation. Its eager run is the reference of every later check; each target reads its
integers and none recomputes a scale. What is not quantized stays plain ATen and is listed in :attr:`FrozenProgram.unquantized`.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from edgekit.errors import ModelError
from edgekit.frozen import ops
from edgekit.frozen.binary_ops import PACKED_OPS
from edgekit.frozen.float_layers import FloatLayer, float_layers
from edgekit.frozen.spiking_ops import CURRENT_OPS, NEURON_OPS, SPIKING_OPS, STATEFUL_OPS, SYNAPSE_OPS

__all__ = ["FrozenOp", "FrozenProgram", "Layer", "Unquantized", "freeze_module"]


@dataclass(frozen=True)
class Unquantized:
    """An operator left in float: ``layer`` (dotted name), ATen ``op``, and the ``reason`` in words."""

    layer: str
    op: str
    reason: str


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


class FrozenOp(nn.Module):
    """One ``edgekit::`` operator as a module, so that its dotted name survives export (``nn_module_stack``).

    Args:
        op: operator name, such as "qconv2d".
        activations: number of tensor inputs; 0 means one list of tensors (qconcat).
        buffers: constant tensors by schema name.
        **attributes: the scalar arguments by schema name.
    """

    def __init__(self, op: str, activations: int, buffers: Mapping[str, Tensor], **attributes: Any) -> None:
        super().__init__()
        self.op, self.activations, self.attributes = op, activations, attributes
        for key, value in buffers.items():
            self.register_buffer(key, value)
        self._schema = getattr(ops.OPS, op).default._schema

    def forward(self, *xs: Tensor) -> Tensor:
        names = [a.name for a in self._schema.arguments]
        args: dict[str, Any] = {**dict(self.named_buffers(recurse=False)), **self.attributes}
        if self.activations == 0:
            args[names[0]] = list(xs)
        else:
            args.update(zip(names, xs, strict=False))
        result: Tensor = getattr(ops.OPS, self.op).default(*(args[n] for n in names))
        return result


@dataclass(frozen=True)
class FrozenProgram:
    """An exported graph of ``edgekit::`` and ATen operators, for a batch of one.

    Attributes:
        exported: the ``torch.export`` program.
        name: a short name for files and reports.
        unquantized: every operator with arithmetic that stays float, with the reason.
        sources: layer name to "file.py:line" of the source model.
    """

    exported: ExportedProgram
    name: str = "model"
    unquantized: tuple[Unquantized, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def module(self) -> fx.GraphModule:
        """The graph as a callable module, batch of one."""
        return self.exported.module(check_guards=False)

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """All ``edgekit::`` nodes in execution order."""
        return _layers(self.module)

    @cached_property
    def float_layers(self) -> tuple[FloatLayer, ...]:
        """All operators that stay in float, in execution order."""
        return float_layers(self.module)

    @cached_property
    def counted(self) -> tuple[Layer | FloatLayer, ...]:
        """All integer layers, and the float operators that have products or store numbers, in execution order."""
        return self._in_order([x for x in self.float_layers if x.macs or x.parameters])

    @cached_property
    def listed(self) -> tuple[Layer | FloatLayer, ...]:
        """:attr:`counted` and every operator of :attr:`unquantized`, in execution order: the rows of a table of layers."""
        left = {u.layer for u in self.unquantized}
        return self._in_order([x for x in self.float_layers if x.macs or x.parameters or x.name in left])

    def _in_order(self, floats: Sequence[FloatLayer]) -> tuple[Layer | FloatLayer, ...]:
        order = {node.name: i for i, node in enumerate(self.module.graph.nodes)}
        found: list[Layer | FloatLayer] = [*self.layers, *floats]
        return tuple(sorted(found, key=lambda x: order[x.node]))

    @property
    def parameters(self) -> int:
        """Number of weights and biases, those of float operators included."""
        return sum(x.parameters for x in self.counted)

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one sample, those of float operators included."""
        return sum(x.macs for x in self.counted)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, biases, scales and tables, and of what float operators store."""
        return sum(x.weight_bytes for x in self.counted)

    def layer(self, name: str) -> Layer:
        """The layer of that name.

        Raises:
            ModelError: there is none; the message has the names nearest to it.
        """
        for layer in self.layers:
            if layer.name == name:
                return layer
        names = [layer.name for layer in self.layers]
        close = difflib.get_close_matches(name, names, 3, 0.3) or names[:5]
        raise ModelError(f"program {self.name} has no integer layer {name!r}; layers are called {', '.join(close)}, ...")

    @cached_property
    def input_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the inputs, batch of one first."""
        return tuple(tuple(n.meta["val"].shape) for n in self.module.graph.nodes if n.op == "placeholder")

    @cached_property
    def input_dtypes(self) -> tuple[torch.dtype, ...]:
        """dtypes of the inputs."""
        return tuple(n.meta["val"].dtype for n in self.module.graph.nodes if n.op == "placeholder")

    def run(self, *inputs: Tensor, progress: Callable[[int, int], None] | None = None) -> tuple[Tensor, ...]:
        """The reference result.

        Args:
            *inputs: one tensor for each program input, shape (N, ...); each sample runs by itself.
            progress: called with (samples done, N).

        Returns:
            One tensor for each output, shape (N, ...).

        Raises:
            ModelError: an input is no tensor, or its shape does not fit the program.
        """
        self.check_inputs(inputs)
        outputs: list[tuple[Tensor, ...]] = []
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # layers are small: threads that wait for a busy core make this many times slower
        try:
            with torch.no_grad():
                for i in range(len(inputs[0])):
                    result = self.module(*(x[i : i + 1] for x in inputs))
                    many = isinstance(result, tuple | list)
                    outputs.append(tuple(result) if many else (result,))
                    if progress:
                        progress(i + 1, len(inputs[0]))
        finally:
            torch.set_num_threads(threads)
        return tuple(torch.cat(column) for column in zip(*outputs, strict=True))

    def check_inputs(self, inputs: Sequence[Tensor]) -> None:
        """Raise ModelError unless the inputs, shape (N, ...), fit this program."""
        if len(inputs) != len(self.input_shapes):
            raise ModelError(f"program {self.name}: {len(inputs)} inputs given, it takes {len(self.input_shapes)}")
        for i, (x, shape) in enumerate(zip(inputs, self.input_shapes, strict=True)):
            if not isinstance(x, Tensor):
                kind = f"{type(x).__module__}.{type(x).__name__}".removeprefix("builtins.")
                remedy = "; convert it with torch.from_numpy" if kind == "numpy.ndarray" else ""
                raise ModelError(f"program {self.name}, input {i}: {kind} given, a torch.Tensor expected{remedy}")
            if tuple(x.shape[1:]) != shape[1:] or len(x) == 0:
                wanted = ", ".join(map(str, ("N >= 1", *shape[1:])))
                raise ModelError(f"program {self.name}, input {i}: shape {tuple(x.shape)} given, ({wanted}) expected")

    def trace(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Output of every ``edgekit::`` layer for one sample (batch of one), by layer name."""
        return self._interpret(inputs, None)[0]

    def forced(self, taps: Mapping[str, Tensor], *inputs: Tensor) -> dict[str, Tensor]:
        """What each layer computes when every earlier layer's output is the TARGET's (``taps``, int8, this program's layouts).

        A fault then shows in its own layer only, not smeared over all later ones. Layers without a tap run free.
        """
        return self._interpret(inputs, taps)[0]

    def forced_outputs(self, taps: Mapping[str, Tensor], *inputs: Tensor) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        """As :meth:`forced`, and the program's outputs that follow from the taps."""
        return self._interpret(inputs, taps)

    def forced_arguments(self, name: str, taps: Mapping[str, Tensor], *inputs: Tensor) -> dict[str, Any]:
        """What the layer ``name`` gets, by the operator's argument names, when every earlier layer's output is the target's."""
        found: dict[str, Any] = {}
        self._interpret(inputs, taps, self.layer(name).node, found)
        return found

    def _interpret(
        self, inputs: Sequence[Tensor], taps: Mapping[str, Tensor] | None, at: str = "", into: dict[str, Any] | None = None
    ) -> tuple[dict[str, Tensor], tuple[Tensor, ...]]:
        names = {layer.node: layer.name for layer in self.layers}
        seen: dict[str, Tensor] = {}

        class Interpreter(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                if n.name == at and into is not None:
                    schema: Any = n.target
                    into.update(
                        zip((a.name for a in schema._schema.arguments), self.fetch_args_kwargs_from_env(n)[0], strict=False)
                    )
                result = super().run_node(n)
                if n.name in names:
                    seen[names[n.name]] = result
                    if taps is not None and names[n.name] in taps:
                        return taps[names[n.name]].reshape(result.shape).to(result.dtype)
                return result

        with torch.no_grad():
            result = Interpreter(self.module).run(*inputs)
        return seen, tuple(result) if isinstance(result, tuple | list) else (result,)


def freeze_module(
    module: nn.Module,
    sample: Sequence[Tensor],
    *,
    name: str = "model",
    unquantized: Sequence[Unquantized] = (),
    sources: Mapping[str, str] | None = None,
) -> FrozenProgram:
    """Export a module made of :class:`FrozenOp` and float layers, for a batch of one.

    Args:
        module: the module, in eval mode.
        sample: example inputs; only the first sample is used, and it is not kept.

    Raises:
        ModelError: the module cannot be exported.
    """
    one = tuple(x[:1].clone() for x in sample)
    try:
        exported = torch.export.export(module.eval(), one, strict=False)
    except Exception as error:
        raise ModelError(f"the frozen module of {name} cannot be exported: {str(error).splitlines()[0]}") from error
    exported._example_inputs = None  # it would be pickled into the file
    for node in exported.graph.nodes:
        node.meta.pop("stack_trace", None)  # absolute paths: not reproducible, not anybody's business
    return FrozenProgram(exported, name, tuple(unquantized), dict(sources or {}))


def _layers(module: fx.GraphModule) -> tuple[Layer, ...]:
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
