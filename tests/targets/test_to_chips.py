"""Networks quantized to chips: accuracy on the chip's arithmetic beside float, and what the numbers are made of."""

from __future__ import annotations

import numpy as np
import pytest
from neuromorphic_nets import cuba_net, lif_net, spikes

from edgekit.nir import interpret
from edgekit.targets.neuromorphic import to_loihi2, to_xylo, xylo
from edgekit.targets.neuromorphic.layers import matrices, network


def accuracy(raster: np.ndarray, labels: np.ndarray) -> float:
    return 100 * float((raster.sum(0, dtype=np.int64).argmax(1) == labels).mean())


@pytest.mark.slow
def test_digits_on_the_xylo_chip() -> None:
    import digit_snns

    lost = {}
    for limit in (31, 1):
        net = digit_snns.xylo(limit)
        made = to_xylo.quantize(net.graph, net.calibration)
        chip = to_xylo.rasters(made.network, made.places, net.spikes)
        before = interpret(net.graph, net.spikes, record=("last",)).values["last"]
        assert accuracy(before, net.labels) > 85 and made.decays["hidden"]["membrane chip"] == 0.125
        lost[limit] = accuracy(before, net.labels) - accuracy(chip["last"], net.labels)
        told = [note for note in made.notes if "spikes in a step on the chip" in note]
        assert bool(told) == (limit == 1)
        assert made.difference < 0.02 or limit == 1
    assert lost[31] <= 1.0 < lost[1]  # a network trained for single spikes is another network on the chip


@pytest.mark.slow
def test_digits_on_the_loihi_chip() -> None:
    import digit_snns

    net = digit_snns.loihi()
    made = to_loihi2.quantize(net.graph, net.calibration)
    chip = to_loihi2.rasters(made.layers, net.spikes)
    before = interpret(net.graph, net.spikes, record=("last",)).values["last"]
    assert accuracy(before, net.labels) > 92
    assert accuracy(chip["last"], net.labels) > accuracy(before, net.labels) - 1.0 and made.difference < 0.05


def test_weights_on_the_chip_are_the_graphs_in_another_unit() -> None:
    """Each neuron's weights over its threshold, times what a spike's current brings in, is the graph's ratio."""
    graph = cuba_net(reset="subtract", tie="ge", spikes=31, tau_syn=8e-3, tau_mem=8e-3, last={"spikes": 1})
    made = to_xylo.quantize(graph, spikes(20, 4, 16).astype(int))
    net = network(graph)
    (weight,), _ = matrices(net, net.layer("c1"))[0].values(), None
    # one spike charges i by w * w_in / 8 * r / 8 in the graph's membrane; on the chip by w' * (1 - 1/8), all steps included
    graphs = weight * 1.5 * 2.0 / 8 / 0.7
    chip = made.network.weights_in[..., 0].T * 2.0**made.shift * 7 / made.network.threshold[:, None].astype(float)
    clipped = np.abs(made.network.weights_in[..., 0].T) >= 127
    assert np.abs(chip - graphs)[~clipped].max() < np.abs(graphs).max() / 100


def test_a_decay_off_the_grid_is_told_and_its_charge_kept() -> None:
    graph = cuba_net(reset="subtract", tie="ge", spikes=31, tau_syn=5e-3, tau_mem=11e-3, last={"spikes": 1})
    made = to_xylo.quantize(graph, spikes(40, 4, 16).astype(int))
    assert any("c1: its membrane loses 0.09091 in a step, 0.125 on the chip's grid" in note for note in made.notes)
    assert made.decays["c1"] == pytest.approx(
        {"membrane graph": 1 / 11, "membrane chip": 0.125, "current graph": 0.2, "current chip": 0.25}
    )
    assert made.difference < 0.2


def test_what_is_chosen_is_the_best_that_was_tried() -> None:
    graph = cuba_net(reset="subtract", tie="ge", spikes=31, tau_syn=8e-3, tau_mem=8e-3, last={"spikes": 1})
    given = spikes(30, 6, 16).astype(int)
    made = to_xylo.quantize(graph, given)
    counts = interpret(graph, given, record=("c1", "c2")).values

    def difference(net: xylo.XyloNetwork) -> float:
        rasters = to_xylo.rasters(net, made.places, given)
        return float(sum(np.abs(rasters[n].sum(0, dtype=int) - counts[n].sum(0)).sum() for n in rasters))

    assert difference(made.network) / sum(counts[n].sum() for n in counts) == pytest.approx(made.difference)
    from dataclasses import replace

    worse = replace(made.network, threshold=(made.network.threshold * 0.8).astype(np.int16))
    assert difference(worse) > difference(made.network)


def test_loihi_takes_the_largest_exponent_that_stays_in_24_bits() -> None:
    made = to_loihi2.quantize(lif_net(tie="gt"), spikes(20, 4, 16).astype(int))
    for one in made.layers:
        assert one.threshold <= 131071 and one.du == 4095 and one.dv == 410
        assert 2 * one.threshold > 2000  # a finer unit than a single step of the weights
    assert made.difference < 0.05 and not any(">= threshold" in note for note in made.notes)
    ge = to_loihi2.quantize(lif_net(tie="ge"), spikes(20, 4, 16).astype(int))
    assert any("v >= threshold in the graph, on the chip where v > threshold less one unit" in note for note in ge.notes)


def test_a_readout_behind_loihi_is_the_hosts() -> None:
    from neuromorphic_nets import chain, ends, lif, nir

    from edgekit.devices import sim

    rng = np.random.default_rng(0)
    source, sink = ends((16,), (3,))
    nodes = {"input": source, "fc1": nir.Linear(rng.normal(1, 5, (20, 16))), "lif": lif(20, tie="gt")}
    graph = chain(nodes | {"read": nir.Affine(rng.normal(0, 1, (3, 20)), np.ones(3)), "out": sink})
    found = sim.run("loihi2", graph, spikes(12, 4, 16))
    assert list(found.spikes) == ["lif"] and any("the host applies them" in note for note in found.notes)
    np.testing.assert_allclose(found.outputs, found.spikes["lif"] @ graph.nodes["read"].weight.T + 1)


def test_the_specification_has_the_names_of_the_toolchain() -> None:
    graph = cuba_net(reset="subtract", tie="ge", spikes=31, tau_syn=8e-3, tau_mem=8e-3, last={"spikes": 1})
    made = to_xylo.quantize(graph, spikes(10, 2, 16).astype(int))
    found = xylo.specification(made.network)
    assert (
        found["weights_in"].shape == (16, 20) and found["weights_rec"].shape == (20, 20) and found["weights_out"].shape == (20, 6)
    )
    assert found["dash_syn"].shape == found["dash_syn_2"].shape == (20,) and len(found["aliases"]) == 20
    assert found["weight_shift_in"] == made.shift and found["threshold_out"].dtype == np.int16
