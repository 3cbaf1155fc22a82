"""Xylo's arithmetic against integer loops neuron by neuron, and against what SynSense's simulator recorded."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import chip_nets
import numpy as np
import pytest

from edgekit.devices import simulators
from edgekit.devices.simulation import simulate
from edgekit.errors import InputError
from edgekit.targets.neuromorphic import xylo
from edgekit.targets.neuromorphic.xylo import XyloNetwork


def sat(x: int) -> int:
    return max(-32768, min(32767, x))


def lost(x: int, shift: int) -> int:
    return 1 if x > 0 and x >> shift == 0 else x >> shift


def update(neuron: dict[str, Any], limit: int) -> int:
    """One step of one neuron by plain integers; its spikes."""
    neuron["i"] = [i - lost(i, shift) for i, shift in zip(neuron["i"], neuron["dash_syn"], strict=True)]
    change = sat(-lost(neuron["v"], neuron["dash_mem"]) + sum(neuron["i"]))
    neuron["v"] = sat(neuron["v"] + sat(change + neuron["bias"]))
    count = 0
    while neuron["v"] >= neuron["threshold"] and count < limit:
        neuron["v"] -= neuron["threshold"]
        count += 1
    return count


def neurons_of(*parameters: Any) -> list[dict[str, Any]]:
    return [
        {"v": 0, "i": [0] * len(d), "dash_syn": d, "dash_mem": m, "bias": b, "threshold": t}
        for d, m, b, t in zip(*(p.tolist() for p in parameters), strict=True)
    ]


def loops(net: XyloNetwork, spikes: Any) -> tuple[list[list[int]], list[list[int]]]:
    """Hidden and output spikes of one sample (T, I), a Python integer at a time, a spike at a time."""
    hidden: list[dict[str, Any]] = [
        {"v": 0, "i": [0] * len(d), "dash_syn": d, "dash_mem": m, "bias": b, "threshold": t}
        for d, m, b, t in zip(
            net.dash_syn.tolist(), net.dash_mem.tolist(), net.bias.tolist(), net.threshold.tolist(), strict=True
        )
    ]
    outputs: list[dict[str, Any]] = [
        {"v": 0, "i": [0], "dash_syn": [d], "dash_mem": m, "bias": b, "threshold": t}
        for d, m, b, t in zip(
            net.dash_syn_out.tolist(), net.dash_mem_out.tolist(), net.bias_out.tolist(), net.threshold_out.tolist(), strict=True
        )
    ]
    before, rasters = [0] * len(hidden), ([], [])  # type: ignore[var-annotated]
    for row in spikes.tolist():
        sources = [(net.weights_in[c], min(n, 15), net.shift_in, hidden) for c, n in enumerate(row)]
        sources += [(net.weights_rec[c], n, net.shift_rec, hidden) for c, n in enumerate(before)]
        sources += [(net.weights_out[c][:, None], n, net.shift_out, outputs) for c, n in enumerate(before)]
        for weights, count, shift, neurons in sources:
            for _ in range(count):
                for to, neuron in enumerate(neurons):
                    neuron["i"] = [sat(i + (int(w) << shift)) for i, w in zip(neuron["i"], weights[to], strict=True)]
        before = [update(neuron, 31) for neuron in hidden]
        rasters[0].append(before)
        rasters[1].append([update(neuron, 1) for neuron in outputs])
    return rasters


@pytest.mark.parametrize("case", chip_nets.XYLO_CASES)
def test_every_spike_is_that_of_integer_loops(case: str) -> None:
    network, spikes = chip_nets.xylo(case)
    trace = xylo.run(network, spikes)
    for sample in range(spikes.shape[1]):
        hidden, outputs = loops(network, spikes[:, sample])
        assert trace.hidden[:, sample].tolist() == hidden and trace.outputs[:, sample].tolist() == outputs
    assert trace.hidden.any() and (trace.saturated > 100 or case != "saturating")


@pytest.mark.parametrize("case", chip_nets.XYLO_CASES)
def test_every_spike_and_state_is_that_of_the_recorded_simulator(case: str) -> None:
    network, spikes = chip_nets.xylo(case)
    answer = chip_nets.recorded("xylosim")["cases"][case]
    assert chip_nets.digits(spikes) == answer["input"]
    trace = xylo.run(network, spikes)
    assert chip_nets.digits(trace.hidden) == answer["spikes"]["hidden"]
    assert chip_nets.digits(trace.outputs) == answer["spikes"]["output"]
    assert trace.v_hidden[-1].tolist() == answer["v_hidden"] and trace.v_outputs[-1].tolist() == answer["v_output"]
    altered = replace(network, threshold=network.threshold // np.int16(2))
    assert chip_nets.digits(xylo.run(altered, spikes).hidden) != answer["spikes"]["hidden"]


def test_limits_count_and_are_refused_beyond() -> None:
    network, spikes = chip_nets.xylo("two_synapses_many_spikes")
    assert xylo.run(network, spikes).hidden.max() == 31
    single = xylo.run(replace(network, hidden_limit=1), spikes)
    assert single.hidden.max() == 1
    assert np.array_equal(xylo.run(network, np.full_like(spikes, 200)).hidden, xylo.run(network, np.full_like(spikes, 15)).hidden)
    for change, words in (
        ({"threshold": network.threshold * 0}, "threshold has values from 0 to 0, 1 to 32767 allowed"),
        ({"weights_in": network.weights_in.astype(int) * 4}, "weights_in has values from"),
        ({"dash_mem": network.dash_mem + np.uint8(20)}, "dash_mem has values from"),
        ({"shift_in": 9}, "shift_in is 9, 0 to 8 allowed"),
        ({"bias": network.bias[:3]}, r"bias has shape \(3,\), expected \(7,\)"),
    ):
        with pytest.raises(InputError, match=words):
            replace(network, **change)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"spikes of shape \(24, 2, 4\), expected \(T, N, 5\)"):
        xylo.run(network, spikes[..., :4])


@pytest.mark.slow
def test_the_recording_is_what_the_simulator_answers() -> None:
    if "xylosim" not in simulators.installed():
        simulators.setup("xylosim")  # compiled by the user's pip: about 20 s
    network, spikes = chip_nets.xylo("saturating")
    arrays = {name: value for name, value in vars(network).items() if isinstance(value, np.ndarray)}
    settings = {name: getattr(network, name) for name in ("shift_in", "shift_rec", "shift_out")}
    found = simulate("xylosim", settings, {**arrays, "spikes": spikes})
    assert chip_nets.digits(found.spikes["hidden"]) == chip_nets.recorded("xylosim")["cases"]["saturating"]["spikes"]["hidden"]
    trace = xylo.run(network, spikes)
    assert np.array_equal(trace.v_hidden, found.states["v_hidden"]) and found.lag == {"hidden": 0, "output": 1}
