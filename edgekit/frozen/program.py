"""The frozen program: a ``torch.export`` graph whose compressed layers are ``edgekit::`` operators.

It is edgekit's only intermediate representation. Its eager run is the reference of every later check; each target reads its
integers and none recomputes a scale. What is not quantized stays plain ATen and is listed in :attr:`FrozenProgram.unquantized`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from edgekit.errors import ModelError
from edgekit.frozen import ops
from edgekit.frozen.float_layers import FloatLayer, float_layers
from edgekit.frozen.layer import Layer, layers_of

__all__ = ["Exit", "FrozenOp", "FrozenProgram", "Layer", "Unquantized", "freeze_module"]


@dataclass(frozen=True)
class Exit:
    """When a sample stops: the first step with ``max softmax(sum of outputs / temperature) > threshold``, else the last."""

    temperature: float
    threshold: float


@dataclass(frozen=True)
class Unquantized:
    """An operator left in float: ``layer`` (dotted name), ATen ``op``, and the ``reason`` in words."""

    layer: str
    op: str
    reason: str


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
        exit: when a sample of a spiking program may stop early, if that was chosen.
    """

    exported: ExportedProgram
    name: str = "model"
    unquantized: tuple[Unquantized, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)
    exit: Exit | None = None

    @cached_property
    def module(self) -> fx.GraphModule:
        """The graph as a callable module, batch of one."""
        return self.exported.module(check_guards=False)

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """All ``edgekit::`` nodes in execution order."""
        return layers_of(self.module)

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
