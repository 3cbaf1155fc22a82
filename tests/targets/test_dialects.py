"""Graphs rewritten for importers: run as the importers run them, by a few lines of numpy, they spike as the original does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from neuromorphic_nets import conv_net, cuba_net, lif, lif_net, nir, recurrent_net, scaled_net, spikes

from edgekit.errors import InputError, UnsupportedError
from edgekit.nir import interpret
from edgekit.nir.nodes import stateless
from edgekit.targets.neuromorphic.dialects import DIALECTS, Legal, legalize

POOLS = {"spikingjelly": "AvgPool2d", "snntorch": "AvgPool2d", "norse": "SumPool2d", "sinabs": "SumPool2d"}


def rate_and_gain(dialect: str, node: Any) -> tuple[float, float]:
    """What a membrane loses in a step and what its input is multiplied by, as each importer has it (see its source)."""
    if isinstance(node, nir.IF):
        assert dialect != "spikingjelly" or np.allclose(node.r, 1000)
        return 0.0, 1.0
    tau, r = float(node.tau.flat[0]), float(node.r.flat[0])
    if dialect == "spikingjelly":
        return 1e-3 / tau, 1e-3 / tau if r == 1 else 1.0
    if dialect == "snntorch":  # its dt is 1e-4, whatever the file says, and input is added as it is
        assert np.isclose(r * 1e-4 / tau, 1)
        return 1e-4 / tau, 1.0
    if dialect == "norse":
        return 1e-3 / tau, 1e-3 / tau
    return 1 - np.exp(-1 / tau), 1.0  # sinabs


def as_imported(dialect: str, legal: Legal, inputs: np.ndarray) -> dict[str, np.ndarray]:
    """Rasters of a chain."""
    value, rasters = inputs, {}
    names = ["input"]
    while names[-1] != "out":
        names.append(next(b for a, b in legal.graph.edges if a == names[-1]))
    for name in names:
        node = legal.graph.nodes[name]
        if name not in legal.settings["neurons"]:
            y = stateless(name, node, value.reshape(-1, *value.shape[2:]))
            value = y.reshape(*value.shape[:2], *y.shape[1:])
            continue
        how, (rate, gain) = legal.settings["neurons"][name], rate_and_gain(dialect, node)
        assert set(np.unique(node.v_threshold)) == {how["threshold"]}
        v, out = np.broadcast_to(how["v_init"], value.shape[1:]).astype(float), []
        for x in value:
            v = v * (1 - rate) + gain * x
            fired = v >= how["threshold"] if DIALECTS[dialect].tie == "ge" else v > how["threshold"]
            v = v - fired * how["threshold"] if how["reset"] == "subtract" else np.where(fired, 0.0, v)
            out.append(fired)
        value = rasters[name] = np.array(out, float)
    return rasters


NETS = {
    "zero": lambda: lif_net(reset="zero"),
    "subtract": lambda: lif_net(reset="subtract"),
    "r_and_leak": lambda: lif_net(tie="gt", r=3.0, leak=-0.4),
    "conv": conv_net,
    "conv_groups": lambda: conv_net(groups=2),
    "conv_scaled": scaled_net,
    "conv_zero": lambda: conv_net(reset="zero", start=0.0),
    "conv_average": lambda: conv_net(reset="zero", start=0.0, pool="AvgPool2d"),
}
TAKES = {
    "spikingjelly": set(NETS), "sinabs": set(NETS),
    "snntorch": {"zero", "conv_zero", "conv_average"}, "norse": {"zero", "conv_zero", "conv_average"},
}  # fmt: skip


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("net", NETS)
def test_what_is_rewritten_spikes_as_before(dialect: str, net: str) -> None:
    graph = NETS[net]()
    if net not in TAKES[dialect]:
        with pytest.raises(UnsupportedError, match=rf"^{dialect}: node \w+1 .* cannot be expressed: (reset|it starts)"):
            legalize(graph, dialect)
        return
    legal = legalize(graph, dialect)
    shape = tuple(int(n) for n in graph.nodes["input"].input_type["input"])
    given = spikes(16, 3, *shape)
    expected = interpret(graph, given, record=None).values
    rasters = as_imported(dialect, legal, given)
    assert len(rasters) >= 2
    for name, raster in rasters.items():
        assert np.array_equal(raster, expected[legal.names[name]]), name
        assert raster.any()
    pools = {type(node).__name__ for node in legal.graph.nodes.values() if "Pool" in type(node).__name__}
    assert pools <= {POOLS[dialect]}


def test_without_its_rewriting_a_graph_is_read_as_another() -> None:
    """The check above can fail: thresholds, pools and gains matter."""
    graph = conv_net(reset="zero", start=0.0)
    legal = legalize(graph, "spikingjelly")
    legal.graph.nodes["conv2"].weight = legal.graph.nodes["conv2"].weight / 4
    given = spikes(16, 3, 1, 8, 8)
    expected = interpret(graph, given, record=None).values
    rasters = as_imported("spikingjelly", legal, given)
    assert np.array_equal(rasters["if1"], expected["if1"]) and not np.array_equal(rasters["if2"], expected["if2"])


def test_what_cannot_be_said_is_refused_with_node_and_reason() -> None:
    def refused(graph: Any, dialect: str, words: str) -> None:
        with pytest.raises(UnsupportedError, match=words):
            legalize(graph, dialect)

    refused(recurrent_net(), "spikingjelly", r"node \w+ .* it is in a cycle")
    refused(cuba_net(), "sinabs", r"node c1 \(CubaLIF\) .* its importer has no such node")
    refused(cuba_net(spikes=4, tie="ge"), "spikingjelly", "node c1 .* up to 4 spikes a step")
    graph = lif_net()
    graph.nodes["lif1"].tau = np.linspace(5e-3, 1e-2, 20)
    refused(graph, "snntorch", r"node lif1 .* tau differs between its neurons \(0.005 to 0.01\)")
    graph = lif_net()
    graph.nodes["lif2"] = nir.LI(np.full(6, 1e-2), np.ones(6), np.zeros(6))
    refused(graph, "spikingjelly", r"node lif2 \(LI\) .* its importer has no such node")
    graph = lif_net()
    graph.nodes["lif1"].v_reset = np.full(20, 0.25)
    graph.nodes["lif1"].metadata = {"reset": "value", "tie": "ge"}
    refused(graph, "norse", "node lif1 .* it is reset to another membrane than its leak's")
    graph = lif_net()
    graph.nodes["fc1"] = nir.Flatten({"input": np.array([16])}, 0, -1)
    graph.nodes["lif1"] = lif(16, r=3.0)
    refused(graph, "spikingjelly", "node lif1 .* a gain of .* has no weights of its own before it")
    with pytest.raises(InputError, match="dialect 'brian' is unknown; choose one of: spikingjelly"):
        legalize(lif_net(), "brian")


def test_sums_are_left_to_importers_that_compute_them() -> None:
    """norse 1.1.0 and sinabs 3.1.3 read a node of two sources as something else, without a word."""
    graph = recurrent_net()
    graph.edges = [edge for edge in graph.edges if "rec" not in edge]
    del graph.nodes["rec"]
    for dialect in ("norse", "sinabs"):
        with pytest.raises(UnsupportedError, match=r"node last .* it sums fc2, skip; its importer takes chains only"):
            legalize(graph, dialect)
    assert legalize(graph, "spikingjelly").names == {"lif": "lif", "last": "last"} == legalize(graph, "snntorch").names


def test_neurons_stand_in_order_of_execution_whatever_their_names() -> None:
    """A file read back has its nodes in alphabetical order; the first layer that differs must be the first to run."""
    graph = lif_net()
    called = {"lif1": "z", "lif2": "a"}
    nodes = {called.get(name, name): node for name, node in graph.nodes.items()}
    edges = [(called.get(a, a), called.get(b, b)) for a, b in graph.edges]
    other = nir.NIRGraph(dict(sorted(nodes.items())), edges, metadata=graph.metadata, type_check=False)
    assert list(legalize(other, "spikingjelly").names) == ["z", "a"]


def test_what_was_done_is_told() -> None:
    graph = lif_net(tie="gt")
    graph.nodes["lif1"].v_threshold = np.linspace(0.8, 1.2, 20)
    legal = legalize(graph, "spikingjelly")
    assert any("node lif1: thresholds went into the weights" in line for line in legal.rewritten)
    assert any("node lif2: compares by gt" in line for line in legal.rewritten)
    given = spikes(16, 3, 16)
    expected = interpret(graph, given, record=None).values
    rasters = as_imported("spikingjelly", legal, given)
    assert np.array_equal(rasters["lif1"], expected["lif1"]) and np.array_equal(rasters["lif2"], expected["lif2"])
