"""A spiking network as a frozen program: neurons are ``edgekit::`` sequence operators, layers between them plain float ones.

With one step there is no time: each neuron is a comparison of its current with a threshold, and the program has no state
(IIR-SNN, section 2).
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from edgekit.compress.capture import tensor_of
from edgekit.compress.spiking.graph import operator_name
from edgekit.compress.spiking.neurons import CountedMax, Decode, Fold, Neuron, Repeat
from edgekit.compress.spiking.unroll import SpikingNet
from edgekit.frozen import FloatOp, FrozenOp, FrozenProgram, Unquantized, freeze_module

__all__ = ["freeze_spiking", "frozen_neuron", "stateless"]

_MOVES = frozenset({"reshape", "permute", "squeeze", "unsqueeze", "slice", "select", "cat", "expand", "pad", "sym_size"})


class _Step(nn.Module):
    """A neuron of one step: 1 where the current reaches the threshold, else 0; neither state nor time."""

    def __init__(self, threshold: Tensor) -> None:
        super().__init__()
        self.threshold: Tensor
        self.register_buffer("threshold", threshold)

    def forward(self, x: Tensor) -> Tensor:
        return (x >= self.threshold).to(torch.float32)


def stateless(net: SpikingNet) -> SpikingNet:
    """The network of one step without state, in place: initial membranes go into the thresholds.

    Raises:
        ValueError: the network has more steps, or neurons that spike more than once in one.
    """
    if net.steps != 1:
        raise ValueError(f"a network of {net.steps} steps has a state")
    for name in net.sites:
        neuron = net.neuron(name)
        if neuron.spikes != 1:
            raise ValueError(f"{net.sites[name].name}: {neuron.spikes} spikes a step are no comparison")
        kept = 1 - 1 / neuron.tau.detach() if neuron.leaky else torch.tensor(1.0)
        gain = 1 / neuron.tau.detach() if neuron.leaky and neuron.r == "one" else torch.tensor(1.0)
        gain = gain if neuron.tau_syn is None else gain / neuron.tau_syn.detach()
        threshold = (neuron.threshold.detach() - kept * neuron.v_init) / gain
        net.module.set_submodule(name, _Step(threshold))
    return replace(net, module=net.module)


def freeze_spiking(net: SpikingNet, name: str = "model") -> FrozenProgram:
    """The frozen program of a network whose spikes are 0 and 1 (:func:`edgekit.compress.spiking.amplitude.fold_amplitudes`).

    Raises:
        ModelError: the frozen graph cannot be exported.
    """
    builder = _Builder(net)
    module = builder.build()
    one = tuple(x[:1] for x in net.sample)
    return freeze_module(module, one, name=name, unquantized=builder.unquantized, sources=net.sources)


class _Builder:
    def __init__(self, net: SpikingNet) -> None:
        self.net = net
        self.root, self.out = nn.Module(), fx.Graph()
        self.values: dict[fx.Node, fx.Node] = {}
        self.unquantized: list[Unquantized] = []

    def build(self) -> fx.GraphModule:
        for node in self.net.module.graph.nodes:
            if node.op == "output":
                self.out.output(fx.map_arg(node.args[0], lambda n: self.values[n]))
            elif node.op == "get_attr":
                name = self._free("constant_" + str(node.target).replace(".", "_"))
                self.root.register_buffer(name, tensor_of(self.net.module, node).detach().clone())
                self.values[node] = self.out.get_attr(name)
            elif node.op == "call_module":
                self.values[node] = self._module(node)
            elif node.op == "call_function" and node.target is not operator.getitem:
                self.values[node] = self._float(node)
            else:
                self.values[node] = self.out.node_copy(node, lambda n: self.values[n])
        return fx.GraphModule(self.root, self.out)

    def _float(self, node: fx.Node) -> fx.Node:
        layer = self._free(self.net.names.get(node.name, node.name))
        if (op := operator_name(node)) not in _MOVES:
            self.unquantized.append(Unquantized(layer, op, "a spiking program in float: weights and currents are float32"))
        return self._add(layer, FloatOp(node.target), node)  # type: ignore[arg-type]

    def _module(self, node: fx.Node) -> fx.Node:
        part = self.net.module.get_submodule(str(node.target))
        name = self._free(self.net.names.get(node.name, str(node.target)))
        made: nn.Module
        if isinstance(part, Neuron):
            made = frozen_neuron(part)
        elif isinstance(part, Repeat):
            made = FrozenOp("repeat_steps", 1, {}, steps=part.steps)
        elif isinstance(part, Fold):
            made = FrozenOp("fold_steps", 1, {})
        elif isinstance(part, Decode):
            made = FrozenOp("accumulate", 1, {}, gain=1 / part.steps, steps=part.steps)
        else:
            made = part
            op = "max_pool2d" if isinstance(part, CountedMax) else "ge"
            self.unquantized.append(Unquantized(name, op, "a spiking program in float: weights and currents are float32"))
        return self._add(name, made, node)

    def _add(self, name: str, part: nn.Module, node: fx.Node) -> fx.Node:
        *path, leaf = name.split(".")
        owner = self.root
        for step in path:
            if not hasattr(owner, step):
                owner.add_module(step, nn.Module())
            owner = getattr(owner, step)
        owner.add_module(leaf, part)
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self.values[n])
        return self.out.create_node("call_module", name, args, kwargs)

    def _free(self, name: str) -> str:
        base, count = name, 2
        while any(n == name for n, _ in self.root.named_modules()) or hasattr(self.root, name):
            name, count = f"{base}_{count}", count + 1
        return name


def frozen_neuron(part: Neuron) -> FrozenOp:
    """A layer of neurons as an operator."""
    zero, one = torch.tensor(0.0), torch.tensor(1.0)
    common = {"v_threshold": part.threshold.detach().clone(), "v_reset": zero, "v_init": part.v_init.clone()}
    rules: dict[str, Any] = {
        "dt": 1.0, "steps": part.steps, "reset": part.reset, "tie": "ge", "max_spikes": part.spikes,
    }  # fmt: skip
    if not part.leaky:
        return FrozenOp("if_sequence", 1, {"r": one, **common}, **rules)
    tau = part.tau.detach().clone()
    r = tau.clone() if part.r == "tau" else one
    if part.tau_syn is not None:
        constants = {
            "tau_syn": part.tau_syn.detach().clone(),
            "tau_mem": tau,
            "r": r,
            "v_leak": zero.clone(),
            "w_in": one.clone(),
        }
        return FrozenOp("cuba_lif_sequence", 1, {**constants, **common}, **rules)
    return FrozenOp("lif_sequence", 1, {"tau": tau, "r": r, "v_leak": zero.clone(), **common}, **rules)
