"""QCFS: train the staircase that integrate-and-fire neurons compute, then convert without loss at as many steps as it has levels.

Bu et al., "Optimal ANN-SNN Conversion for High-accuracy and Ultra-low-latency Spiking Neural Networks", ICLR 2022. The activation
is ``h(z) = scale * clip(floor(z * L / scale + 1/2) / L, 0, 1)`` with a learned scale for each layer; the floor passes gradients
straight through. Converted, scale is the threshold and half of it the initial membrane. With constant input a neuron then gives h
exactly; behind other neurons the order of spikes matters too, so each layer is corrected towards its staircase
(:mod:`edgekit.compress.spiking.calibrate`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from edgekit.compress.capture import Graph
from edgekit.compress.spiking.fit import fit
from edgekit.compress.spiking.graph import Site, Survey
from edgekit.compress.spiking.settings import Spiking
from edgekit.compress.spiking.unroll import SpikingNet, unroll
from edgekit.data import Source

__all__ = ["QCFS", "as_spiking", "copy_parameters", "staircases", "train_staircases"]


class QCFS(nn.Module):
    """The activation of ``levels`` + 1 values from 0 to the learned scale; input and output of any shape."""

    def __init__(self, scale: Tensor | float, levels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.as_tensor(scale, dtype=torch.float32).clone())
        self.levels = levels

    def forward(self, z: Tensor) -> Tensor:
        share = (z / self.scale).clamp(0, 1) * self.levels
        rounded = torch.floor(share + 0.5)
        return (share + (rounded - share).detach()) * (self.scale / self.levels)


def train_staircases(
    graph: Graph,
    found: Survey,
    settings: Spiking,
    scales: Mapping[str, Tensor],
    training: Source,
    progress: Callable[[int, int], None] | None = None,
) -> SpikingNet:
    """The network without time whose activations are trained staircases.

    Args:
        scales: fx node name of each site to the first scale; one far above the activations wastes all levels.
    """
    levels = settings.levels or settings.steps
    net = unroll(graph, found, lambda site: QCFS(scales[site.node], levels), 1)
    fit(net.module, training, settings, progress, inputs=len(graph.sample))
    return net


def as_spiking(ann: SpikingNet, graph: Graph, found: Survey, settings: Spiking) -> SpikingNet:
    """The same weights over ``settings.steps`` steps, neurons in the place of staircases (section 2.3)."""
    from edgekit.compress.spiking.neurons import Neuron

    def make(site: Site) -> nn.Module:
        name = next(n for n, s in ann.sites.items() if s.node == site.node)
        activation = ann.module.get_submodule(name)
        assert isinstance(activation, QCFS)
        scale = activation.scale.detach().abs()
        neuron = Neuron(scale, scale * 0.5, steps=settings.steps)
        neuron.amplitude = scale
        return neuron

    net = unroll(graph, found, make, settings.steps, layered=settings.schedule == "layered")
    copy_parameters(ann.module, net.module)
    return net


def staircases(ann: SpikingNet, batch: Sequence[Tensor]) -> dict[str, Tensor]:
    """fx node name of each site in the captured graph to what its staircase gives, (N, ...)."""
    seen: dict[str, Tensor] = {}

    class Recorder(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.op == "call_module" and str(n.target) in ann.sites:
                seen[ann.sites[str(n.target)].node] = value
            return value

    with torch.no_grad():
        Recorder(ann.module).run(*batch)
    return seen


def copy_parameters(source: fx.GraphModule, target: fx.GraphModule) -> None:
    """Weights of the same names."""
    given = dict(source.named_parameters())
    for name, value in target.named_parameters():
        if name in given and given[name].shape == value.shape and not name.startswith("neurons_"):
            value.data = given[name].detach().clone()
