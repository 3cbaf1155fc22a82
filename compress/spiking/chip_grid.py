"""Training for a chip's numbers: weights and decays on its grid in the forward pass, gradients straight through.

======  ==========================================  =============================================
chip    weights                                     what membrane and current lose in a step
======  ==========================================  =============================================
xylo    int8, a scale for each neuron               2**-1, 2**-2, ... 2**-15 (bit shifts)
loihi2  int8, a scale for each layer                1/4096, 2/4096, ...
speck   int8, a scale for each layer and its bias   nothing
======  ==========================================  =============================================

Before each backward pass the parameters are put on the grid, and back afterwards; the optimizer moves the real ones (straight-
through estimation, Courbariaux et al., "BinaryConnect", NeurIPS 2015). At the end they stay there. Layers that hear no spikes run
on the host and are left as they are, and so is a readout, but for Xylo, where it becomes output neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx, nn

from edgekit.compress.spiking.fit import Backward
from edgekit.compress.spiking.graph import operator_name
from edgekit.compress.spiking.unroll import SpikingNet

__all__ = ["CHIPS", "on_grid", "place", "ready"]

CHIPS = ("xylo", "loihi2", "speck")
_LEVELS = 127


def ready(net: SpikingNet, chip: str, encoder: str) -> None:
    """What a chip's neurons are before training: on Xylo membranes begin at 0, and so do leaky ones on Loihi 2.

    (There biases begin before the input arrives; a start that takes this back must not be above the threshold.)
    """
    for name, site in net.sites.items():
        neuron = net.neuron(name)
        if site.name != encoder and (chip == "xylo" or (chip == "loihi2" and neuron.leaky)):
            neuron.v_init = torch.zeros_like(neuron.v_init)


def on_grid(backward: Backward, net: SpikingNet, chip: str) -> Backward:
    """A backward that sees the parameters on the chip's grid and leaves them as they were."""

    def through(module: nn.Module, inputs: Sequence[Tensor], target: Tensor, order: torch.Generator) -> Tensor:
        kept = place(net, chip)
        try:
            return backward(module, inputs, target, order)
        finally:
            for value, before in kept:
                value.data = before

    return through


def place(net: SpikingNet, chip: str) -> list[tuple[Tensor, Tensor]]:
    """Put weights and time constants on the chip's grid, in place; the tensors that changed, and what they were."""
    found: list[tuple[Tensor, Tensor]] = []
    for values in _groups(net, chip):
        found += [(value, value.data) for value in values]
        step = _scale([v.data for v in values], chip)
        for value in values:
            value.data = torch.round(value.data / step).clamp(-_LEVELS, _LEVELS) * step
    for name in net.sites:
        neuron = net.neuron(name)
        for tau in (neuron.tau if neuron.leaky else None, neuron.tau_syn):
            if tau is not None and chip in _DECAYS:
                found.append((tau, tau.data))
                tau.data = _DECAYS[chip](tau.data)
    return found


def _scale(values: Sequence[Tensor], chip: str) -> Tensor:
    if chip == "xylo":
        rows = values[0].flatten(1).abs().amax(1)
        return (rows / _LEVELS).clamp(min=1e-12).reshape(-1, *[1] * (values[0].dim() - 1))
    return torch.stack([v.abs().max() for v in values]).max().clamp(min=1e-12) / _LEVELS


def _shifts(tau: Tensor) -> Tensor:
    return 2.0 ** torch.round(torch.log2(tau)).clamp(1, 15)


def _parts_of_4096(tau: Tensor) -> Tensor:
    return 4096 / torch.round(4096 / tau).clamp(1, 4096)


_DECAYS: dict[str, Callable[[Tensor], Tensor]] = {"xylo": _shifts, "loihi2": _parts_of_4096}


def _groups(net: SpikingNet, chip: str) -> list[list[Tensor]]:
    """Parameters that share scales on the chip: all that leads to a layer of neurons from others, and for Xylo to the output."""
    nodes = list(net.module.graph.nodes)
    neurons = {node for node in nodes if node.op == "call_module" and str(node.target) in net.sites}
    spiking = set[fx.Node]()
    for node in nodes:
        if node in neurons or any(i in spiking for i in node.all_input_nodes):
            spiking.add(node)
    ends = [node.args[0] for node in nodes if node in neurons]
    ends += [i for node in nodes if node.op == "output" and chip == "xylo" for i in node.all_input_nodes]
    groups, seen = list[list[Tensor]](), set[fx.Node]()
    for end in ends:
        group: list[Tensor] = []
        _gather(end, net, chip, (neurons, spiking, seen), group)
        if group:
            groups += [[value] for value in group] if chip == "xylo" else [group]
    return groups


def _gather(node: fx.Node, net: SpikingNet, chip: str, known: tuple[set[fx.Node], ...], group: list[Tensor]) -> None:
    """Weights and amplitudes between neurons and ``node``, the nearest first."""
    neurons, spiking, seen = known
    if node in neurons or node not in spiking or node in seen:
        return
    seen.add(node)
    op = operator_name(node) if node.op == "call_function" else ""
    given = [a for a in node.args if isinstance(a, fx.Node) and a.op == "get_attr"]
    if op in ("conv2d", "linear", "mul") and given:
        kept = given if chip == "speck" else given[:1]  # a bias has bits of its own elsewhere
        group += [net.module.get_parameter(str(a.target)) for a in kept]
        if op != "mul":
            return
    for before in node.all_input_nodes:
        _gather(before, net, chip, known, group)
