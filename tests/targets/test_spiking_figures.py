"""Spikes, synaptic operations and updates against a count by hand, and against NeuroBench 2.3.0 on the same networks."""

from __future__ import annotations

import numpy as np
import pytest
from neuromorphic_nets import chain, ends, lif, lif_net, nir, recurrent_net, spikes

from edgekit.nir import interpret
from edgekit.nir.semantics import flatten
from edgekit.targets.neuromorphic.figures import count

NEUROBENCH = {"Linear": (1384.0, 5280.0), "Conv2d": (1890.8, 7236.0)}
"""SynapticOperations of neurobench 2.3.0 (Effective_ACs, Dense) on the two networks below, in snntorch 1.0.0
(``benchmarks/snn_figures.py`` asks it again)."""


def networks() -> dict[str, tuple[object, np.ndarray]]:
    """A linear network with zero weights among its own, and a strided convolution; LIF with beta 0.9; five samples, 12 steps."""
    rng = np.random.default_rng(11)
    w1 = rng.normal(0.2, 1, (20, 16))
    w1[rng.random(w1.shape) < 0.3] = 0
    b1, w2, cw = rng.normal(0, 0.3, 20), rng.normal(0, 1.2, (6, 20)), rng.normal(0.3, 0.6, (3, 1, 3, 3))
    cw[0, 0, 1, 1] = 0
    cb, fw, fb = rng.normal(0, 0.1, 3), rng.normal(0, 0.5, (5, 48)), rng.normal(0, 0.1, 5)
    w1, b1, w2, cw, cb, fw, fb = (x.astype(np.float32).astype(np.float64) for x in (w1, b1, w2, cw, cb, fw, fb))
    flat, image = ((rng.random((12, 5, *shape)) < 0.3).astype(np.float64) for shape in ((16,), (1, 8, 8)))
    source, sink = ends((16,), (6,))
    neurons = lambda shape: lif(shape, tie="gt", r=10.0)  # noqa: E731
    linear = {"input": source, "fc1": nir.Affine(w1, b1), "l1": neurons(20), "fc2": nir.Linear(w2), "l2": neurons(6), "out": sink}
    source, sink = ends((1, 8, 8), (5,))
    convolution = {
        "input": source, "c": nir.Conv2d((8, 8), cw, 2, 1, 1, 1, cb), "l1": neurons((3, 4, 4)),
        "flat": nir.Flatten({"input": np.array([3, 4, 4])}, 0, -1), "f": nir.Affine(fw, fb), "l2": neurons(5), "out": sink,
    }  # fmt: skip
    return {"Linear": (chain(linear), flat), "Conv2d": (chain(convolution), image)}


@pytest.mark.parametrize("name", NEUROBENCH)
def test_synaptic_operations_are_neurobenchs(name: str) -> None:
    graph, given = networks()[name]
    found = count(graph, given)
    assert (found.acs, found.dense_macs * found.steps) == NEUROBENCH[name] and found.macs == 0


def test_every_figure_is_that_of_a_count_by_hand() -> None:
    graph, given = lif_net(), spikes(10, 3, 16)
    graph.nodes["fc1"].weight[:, :5] = 0
    values = interpret(graph, given, record=None).values
    found = count(graph, given)
    operations = 0
    for node, source in (("fc1", given), ("fc2", values["lif1"])):
        weight = graph.nodes[node].weight
        operations += sum(int((weight[:, i] != 0).sum()) for *_, i in np.argwhere(source))
    assert found.acs == pytest.approx(operations / 3)
    figures = found.figures()
    assert figures["spikes"] == pytest.approx((values["lif1"].sum() + values["lif2"].sum()) / 3)
    assert figures["membrane_updates"] == 10 * 26 and figures["steps"] == 10 and figures["dense_macs_of_one_pass"] == 440
    assert figures["energy_proxy_nanojoules"] == pytest.approx(operations / 3 * 0.9e-3)
    assert figures["dense_energy_proxy_nanojoules"] == pytest.approx(440 * 4.6e-3)
    extra = figures["energy_proxy_with_membranes_nanojoules"] - figures["energy_proxy_nanojoules"]
    assert extra == pytest.approx(260 * 4.6e-3)


def test_an_analogue_input_costs_multiplications_and_a_cycle_is_counted_a_step_later() -> None:
    graph = lif_net()
    found = count(graph, np.full((4, 2, 16), 0.5))
    assert found.layers[0].macs == 4 * 320 and found.layers[0].acs == 0 and found.layers[2].macs == 0
    graph, given = recurrent_net(), spikes(8, 2, 16)
    values = interpret(graph, given, record=None).values
    rows = {row.name: row for row in count(graph, given).layers}
    late = ("lif", "rec") in flatten(graph).feedback  # which edge of the cycle is the late one
    sent = values["lif"][:-1] if late else values["lif"]
    assert rows["rec"].acs == pytest.approx(sent.sum() * 20 / 2)
