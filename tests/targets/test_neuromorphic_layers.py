"""Layers of a NIR graph: their weights as matrices against torch's own operators, and what each hears."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from neuromorphic_nets import conv_net, cuba_net, lif, nir, recurrent_net
from torch.nn import functional as F

from edgekit.errors import UnsupportedError
from edgekit.targets.neuromorphic.layers import matrices, network


def test_matrices_are_what_torch_computes() -> None:
    graph = conv_net()
    net = network(graph)
    assert [layer.name for layer in net.layers] == ["if1", "if2", "if3"]
    second = net.layer("if2")
    assert second.through == ("pool", "conv2") and second.sources == (("if1", 0),) and second.size == 96
    found, bias = matrices(net, second)
    x = torch.rand(3, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    node = graph.nodes["conv2"]
    y = F.conv2d(4 * F.avg_pool2d(x, 2), torch.tensor(node.weight), torch.tensor(node.bias), padding=1)
    ours = x.flatten(1).numpy() @ found["if1", 0].T + bias
    np.testing.assert_allclose(ours, y.flatten(1).numpy(), atol=1e-12)


def test_cycles_and_branches_are_sources_of_their_own() -> None:
    graph = recurrent_net()
    net = network(graph)
    hidden, last = net.layer("lif"), net.layer("last")
    assert set(hidden.sources) == {("input", 0), ("lif", 1)} and hidden.recurrent and not last.recurrent
    found, bias = matrices(net, hidden)
    np.testing.assert_array_equal(found["lif", 1], graph.nodes["rec"].weight)
    np.testing.assert_allclose(found["input", 0], graph.nodes["fc1"].weight, atol=1e-15)
    np.testing.assert_array_equal(bias, graph.nodes["fc1"].bias)
    found, bias = matrices(net, last)
    np.testing.assert_array_equal(found["input", 0], graph.nodes["skip"].weight)
    assert not bias.any()


def test_what_has_no_weights_is_refused_by_name() -> None:
    graph = cuba_net()
    graph.nodes["fc2"] = nir.Threshold(np.ones(20))
    graph.nodes["c2"], graph.nodes["out"] = lif(20), nir.Output({"output": np.array([20])})
    net = network(graph)
    with pytest.raises(UnsupportedError, match="node fc2: a Threshold between neurons is not linear"):
        matrices(net, net.layer("c2"))
    graph.nodes["fc2"] = nir.Delay(np.full(20, 2e-3))
    with pytest.raises(UnsupportedError, match="node fc2: a Delay cannot be written as layers"):
        network(graph)
