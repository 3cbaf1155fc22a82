"""A float spiking program as a program of one step, with the state as inputs and outputs.

``(x, *state) -> (y, *state)``: x is the input of the step, (N, ...) without a time axis; y what the readout gets in it, before it
is summed; the state holds for each layer of neurons its membrane, then its synaptic current where it has one, then what its
spikes give back to it where it is recurrent, all of one shape; for each delay what is on its way, (N, longest, ...); in the
program's order. Starting from :func:`initial_state` and run T times, it gives the steps of the program it was made of: the
arithmetic of neurons is the same to the last bit, sums of weights may be rounded otherwise for one step than for many.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

from edgekit.errors import ModelError
from edgekit.frozen.float_layers import FloatOp
from edgekit.frozen.program import FrozenOp, FrozenProgram, Layer, freeze_module
from edgekit.frozen.spiking_ops import INTEGER_NEURONS, RECURRENT_OPS, STATEFUL_OPS

__all__ = ["initial_state", "stepping"]

_PASSED = ("repeat_steps", "fold_steps", "unfold_steps", "accumulate")
_RESHAPES = ("aten.view.default", "aten.reshape.default", "aten._unsafe_view.default")


def initial_state(program: FrozenProgram) -> tuple[Tensor, ...]:
    """The state before the first step, batch of one, of the program with all steps."""
    found: list[Tensor] = []
    for layer in _stateful(program):
        shape = (1, *layer.shape[1:])
        if layer.op == "delay_steps":
            found.append(torch.zeros(1, int(layer.args["delay"].max()), *layer.shape[1:]))
            continue
        found.append(layer.args["v_init"].float().expand(shape).clone())
        found += [torch.zeros(shape) for _ in _states(layer)[1:]]
    return tuple(found)


def stepping(program: FrozenProgram) -> FrozenProgram:
    """The program of one step.

    Raises:
        ModelError: no neurons with time, several inputs, or an operator that has no single step (integer neurons).
    """
    neurons = _neurons(program)
    if not neurons:
        raise ModelError(f"program {program.name} has no time steps: it is its own step")
    if len(program.input_shapes) != 1:
        raise ModelError(f"program {program.name} has {len(program.input_shapes)} inputs; a step is made of one")
    builder = _Builder(program)
    module = builder.build()
    shape = program.input_shapes[0]
    sequence = any(layer.op == "fold_steps" for layer in program.layers)
    sample = (torch.zeros(1, *shape[2 if sequence else 1 :]), *initial_state(program))
    return freeze_module(module, sample, name=f"{program.name}-step", unquantized=program.unquantized, sources=program.sources)


def _neurons(program: FrozenProgram) -> list[Layer]:
    return [layer for layer in program.layers if layer.op in STATEFUL_OPS and layer.op not in INTEGER_NEURONS]


def _states(layer: Layer) -> list[str]:
    """Membrane, synaptic current, feedback; of a delay what is on its way."""
    if layer.op == "delay_steps":
        return ["line"]
    return ["v", *(["i"] if "tau_syn" in layer.args else []), *(["f"] if layer.op in RECURRENT_OPS else [])]


def _stateful(program: FrozenProgram) -> list[Layer]:
    """Neurons and delays."""
    return [layer for layer in program.layers if layer in _neurons(program) or layer.op == "delay_steps"]


class _Builder:
    def __init__(self, program: FrozenProgram) -> None:
        self.program = program
        self.layers = {layer.node: layer for layer in program.layers}
        self.names = {x.node: x.name for x in program.float_layers}
        self.root, self.out = nn.Module(), fx.Graph()
        self.values: dict[fx.Node, Any] = {}
        self.states: list[fx.Node] = []
        self.given: dict[str, list[fx.Node]] = {}

    def build(self) -> fx.GraphModule:
        nodes = list(self.program.module.graph.nodes)
        for node in nodes:
            if node.op == "placeholder":
                self.values[node] = self.out.placeholder(node.name)
        for layer in _stateful(self.program):
            self.given[layer.name] = [
                self.out.placeholder(f"state_of_{layer.name.replace('.', '_')}_{n}") for n in _states(layer)
            ]
        for node in nodes:
            if node.op == "get_attr":
                self._constant(node)
            elif node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                found = node.args[0] if isinstance(node.args[0], list | tuple) else [node.args[0]]
                self.out.output((*(self.values[n] for n in found), *self.states))
        return fx.GraphModule(self.root, self.out)

    def _constant(self, node: fx.Node) -> None:
        name = "constant_" + str(node.target).replace(".", "_")
        value: Any = self.program.module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        self.root.register_buffer(name, value.detach().clone())
        self.values[node] = self.out.get_attr(name)

    def _call(self, node: fx.Node) -> None:
        layer = self.layers.get(node.name)
        if layer is None:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self.values[n])
            if node.target is operator.getitem:
                self.values[node] = self.out.call_function(operator.getitem, args, kwargs)
                return
            if str(node.target) in _RESHAPES:
                shape: Any = args[1]
                args = (args[0], [1, *shape[1:]])
            target: Any = torch.ops.aten.reshape.default if str(node.target) in _RESHAPES else node.target
            self.values[node] = self._add(self.names[node.name], FloatOp(target), args, kwargs)
        elif layer.op in _PASSED:
            self.values[node] = self.values[node.args[0]]  # type: ignore[index]
        elif layer.op == "delay_steps":
            self.values[node] = self._late(layer, self.values[node.args[0]])  # type: ignore[index]
        elif layer.name in self.given:
            self.values[node] = self._neuron(layer, self.values[node.args[0]])  # type: ignore[index]
        else:
            raise ModelError(f"program {self.program.name}, layer {layer.name}: {layer.op} has no single step")

    def _neuron(self, layer: Layer, x: fx.Node) -> fx.Node:
        a, state = layer.args, list(self.given[layer.name])
        after: list[fx.Node] = []
        if layer.op in RECURRENT_OPS:
            x = self._add(f"{layer.name}.add", FloatOp(torch.ops.aten.add.Tensor), (x, state[-1]), {})
        if "tau_syn" in a:
            x = self._op(layer, "synapse", {k: a[k] for k in ("tau_syn", "w_in")}, x, state[1], dt=a["dt"])
            after = [x]
        tau = a.get("tau", a.get("tau_mem"))
        if tau is None:
            v = self._op(layer, "if_charge", {"r": a["r"]}, x, state[0], dt=a["dt"])
        else:
            v = self._op(layer, "lif_charge", {"tau": tau, "r": a["r"], "v_leak": a["v_leak"]}, x, state[0], dt=a["dt"])
        if "v_threshold" not in a:
            self.states += [v, *after]
            return v
        s = self._op(layer, "fire", {"v_threshold": a["v_threshold"]}, v, tie=a["tie"], max_spikes=a["max_spikes"])
        constants = {k: a[k] for k in ("v_threshold", "v_reset")}
        if layer.op in RECURRENT_OPS:
            after.append(self._add(str(a["feedback"]), _feedback(a["weight"], a["bias"]), (s,), {}))
        self.states += [self._op(layer, "fire_reset", constants, v, s, reset=a["reset"]), *after]
        return s

    def _late(self, layer: Layer, x: fx.Node) -> fx.Node:
        made = self._add(f"{layer.name}.line", _Line(layer.args["delay"]), (x, *self.given[layer.name]), {})
        self.states.append(self.out.call_function(operator.getitem, (made, 1)))
        return self.out.call_function(operator.getitem, (made, 0))

    def _op(self, layer: Layer, op: str, constants: dict[str, Tensor], *inputs: fx.Node, **rules: Any) -> fx.Node:
        return self._add(f"{layer.name}.{op}", FrozenOp(op, len(inputs), constants, **rules), inputs, {})

    def _add(self, name: str, part: nn.Module, args: Any, kwargs: Any) -> fx.Node:
        owner, path = self.root, list[str]()
        for step in name.split("."):
            at, count = step, 2
            while len(path) < name.count(".") and type(getattr(owner, at, None)) not in (nn.Module, type(None)):
                at, count = f"{step}_{count}", count + 1  # a layer has the name of the folder
            path.append(at)
            if len(path) <= name.count("."):
                if not hasattr(owner, at):
                    owner.add_module(at, nn.Module())
                owner = getattr(owner, at)
        while hasattr(owner, path[-1]):
            path[-1] += "_"
        owner.add_module(path[-1], part)
        return self.out.create_node("call_module", ".".join(path), args, kwargs)


def _feedback(weight: Tensor, bias: Tensor | None) -> nn.Module:
    """A recurrent neuron's layer back to itself."""
    made: nn.Linear | nn.Conv2d
    if weight.dim() == 2:
        made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    else:
        channels, kernel = len(weight), (int(weight.shape[2]), int(weight.shape[3]))
        padding, groups = (kernel[0] // 2, kernel[1] // 2), channels // weight.shape[1]
        made = nn.Conv2d(channels, channels, kernel, padding=padding, groups=groups, bias=bias is not None)
    made.weight = nn.Parameter(weight.float())
    if bias is not None:
        made.bias = nn.Parameter(bias.float())
    return made


class _Line(nn.Module):
    """A delay: ``(x (N, ...), what is on its way (N, longest, ...)) -> (what comes out, what is on its way)``."""

    def __init__(self, delay: Tensor) -> None:
        super().__init__()
        self.lengths = sorted({int(d) for d in delay.reshape(-1).tolist()})
        for length in self.lengths if len(self.lengths) > 1 else ():
            self.register_buffer(f"mask_{length}", (delay == length).float())

    def forward(self, x: Tensor, waiting: Tensor) -> tuple[Tensor, Tensor]:
        line = torch.cat([waiting, x.unsqueeze(1)], 1)
        longest = self.lengths[-1]
        late = [line[:, longest - length] for length in self.lengths]
        if len(late) > 1:
            late = [part * self.get_buffer(f"mask_{length}") for part, length in zip(late, self.lengths, strict=True)]
        total = late[0]
        for part in late[1:]:
            total = total + part
        return total, line[:, 1:]
