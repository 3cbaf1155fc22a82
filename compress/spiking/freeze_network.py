"""A network of edgekit's own spiking parts as a frozen program: neurons, learned delays, Meta-SpikeFormer's blocks.

The network is any ``nn.Module`` that folds time into the batch (:class:`~edgekit.compress.spiking.neurons.Repeat` or
:class:`~edgekit.compress.spiking.neurons.Fold` first, :class:`~edgekit.compress.spiking.neurons.Decode` last). Everything else in
it stays plain PyTorch. Folded first: RepConvs, and batch normalizations behind convolutions and linear layers of a Sequential.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from edgekit.compress.spiking.delays import Delayed
from edgekit.compress.spiking.freeze import frozen_neuron
from edgekit.compress.spiking.metaformer import fuse_repconv
from edgekit.compress.spiking.neurons import Decode, Fold, Neuron, Repeat, neurons_of
from edgekit.errors import ModelError
from edgekit.frozen import FrozenOp, FrozenProgram, Unquantized, freeze_module

__all__ = ["freeze_network"]

_REASON = "a spiking program in float: weights and currents are float32"


def freeze_network(module: nn.Module, sample: Sequence[Tensor], name: str = "model") -> FrozenProgram:
    """The frozen program of a network, which is left as it is.

    Args:
        sample: example inputs, (N, ...) or (N, T, ...).

    Raises:
        ModelError: no neurons, parts that disagree about the number of steps, delays of sequences that are not folded, or a
            graph that cannot be exported.
    """
    found = neurons_of(module)
    if not found:
        raise ModelError("spiking: the network has no neurons (edgekit.compress.spiking.Neuron); nothing would spike")
    steps = {part.steps for part in module.modules() if isinstance(part, Neuron | Repeat | Decode)}
    steps |= {part.steps or 0 for part in module.modules() if isinstance(part, Delayed)}
    if 0 in steps:
        raise ModelError("spiking: a Delayed runs sequences (T, N, ...); give it steps=T, as neurons have them")
    if len(steps) > 1:
        raise ModelError(f"spiking: parts of the network run {' and '.join(map(str, sorted(steps)))} steps; give all the same")
    network = copy.deepcopy(module).cpu().eval()
    fuse_repconv(network)
    _fold_norms(network)
    for path, part in list(network.named_modules()):
        if (made := _frozen(path, part)) is not None:
            network.set_submodule(path, made) if path else None
    program = freeze_module(network, sample, name=name)
    floats = {(x.name, x.op): x for x in program.float_layers if x.macs}
    return replace(program, unquantized=tuple(Unquantized(layer, op, _REASON) for layer, op in floats))


def _frozen(path: str, part: nn.Module) -> nn.Module | None:
    if isinstance(part, Neuron):
        if part.amplitude is not None:
            raise ModelError(f"spiking: neurons {path} have an amplitude; put it into the weights that read them")
        return frozen_neuron(part)
    if isinstance(part, Repeat):
        return FrozenOp("repeat_steps", 1, {}, steps=part.steps)
    if isinstance(part, Fold):
        return FrozenOp("fold_steps", 1, {})
    if isinstance(part, Decode):
        return FrozenOp("accumulate", 1, {}, gain=1 / part.steps, steps=part.steps)
    return _Delays(part) if isinstance(part, Delayed) else None


class _Delays(nn.Module):
    """A linear layer for each length of a delay, which gets its input that much later."""

    def __init__(self, part: Delayed) -> None:
        super().__init__()
        assert part.steps is not None
        weight = part.weight.detach()
        delay = part.taps // 2 - torch.round(part.position.detach()).long()
        self.lengths = sorted(set(delay[weight != 0].tolist())) or [0]
        for i, length in enumerate(self.lengths):
            if length:
                line = {"delay": torch.tensor(length, dtype=torch.int32)}
                self.add_module(f"delay_{length}", FrozenOp("delay_steps", 1, line, lengths=[length], steps=part.steps))
            layer = nn.Linear(weight.shape[1], weight.shape[0], part.bias is not None and not i)
            layer.weight = nn.Parameter(torch.where(delay == length, weight, 0.0))
            if part.bias is not None and not i:
                layer.bias = nn.Parameter(part.bias.detach().clone())
            self.add_module(f"weight_{length}", layer)

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor | None = None
        for length in self.lengths:
            late = self.get_submodule(f"delay_{length}")(x) if length else x
            part = self.get_submodule(f"weight_{length}")(late)
            total = part if total is None else total + part
        assert total is not None
        return total


def _fold_norms(network: nn.Module) -> None:
    for sequence in [m for m in network.modules() if isinstance(m, nn.Sequential)]:
        for i in range(len(sequence) - 1):
            first, norm = sequence[i], sequence[i + 1]
            if isinstance(first, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                sequence[i], sequence[i + 1] = fuse_conv_bn_eval(first, norm), nn.Identity()
            elif isinstance(first, nn.Linear) and isinstance(norm, nn.BatchNorm1d):
                sequence[i], sequence[i + 1] = fuse_linear_bn_eval(first, norm), nn.Identity()
