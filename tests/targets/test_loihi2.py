"""Loihi's arithmetic against integer loops neuron by neuron, and against what Intel's lava recorded."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import chip_nets
import numpy as np
import pytest

from edgekit.devices import simulators
from edgekit.devices.simulation import simulate
from edgekit.errors import InputError
from edgekit.targets.neuromorphic import loihi2, to_loihi2
from edgekit.targets.neuromorphic.loihi2 import LoihiLayer

DATA = Path(os.environ.get("EDGEKIT_DATA", Path(__file__).resolve().parents[2].parent / "shared" / "data"))


def left(x: int, decay: int) -> int:
    size = abs(x) * (4096 - decay) // 4096
    return size if x >= 0 else -size


def loops(layer: LoihiLayer, sent: list[list[int]]) -> list[list[int]]:
    """Spikes of a layer for one sample, a Python integer at a time; what was sent arrives one step later."""
    raster, states = [], [(0, 0)] * len(layer.bias)
    for row in [[0] * len(sent[0]), *sent[:-1]]:
        fired = []
        for neuron, (u, v) in enumerate(states):
            a = sum(int(w) for w, s in zip(layer.weights[neuron], row, strict=True) if s)
            a = a * 2**layer.weight_exp if layer.weight_exp >= 0 else a // 2**-layer.weight_exp
            u = left(u, layer.du + 1) + a * 64
            u = u - 2**24 if u > 2**23 else u + 2**24 if u <= -(2**23) else u
            v = left(v, layer.dv) + u + int(layer.bias[neuron]) * 2**layer.bias_exp
            v = max(1 - 2**23, min(2**23 - 1, v))
            fired.append(int(v > layer.threshold * 64))
            states[neuron] = (u, 0 if fired[-1] else v)
        raster.append(fired)
    return raster


@pytest.mark.parametrize("case", chip_nets.LOIHI_CASES)
def test_every_spike_is_that_of_integer_loops_and_of_the_recorded_simulator(case: str) -> None:
    layers, spikes = chip_nets.loihi(case)
    answer = chip_nets.recorded("lava")["cases"][case]
    assert chip_nets.digits(spikes) == answer["input"]
    traces = loihi2.run(layers, spikes)
    for sample in range(spikes.shape[1]):
        sent = spikes[:, sample].tolist() + [[0] * spikes.shape[2]] * len(layers)
        for layer, trace in zip(layers, traces, strict=True):
            sent = loops(layer, sent)
            assert trace.spikes[:, sample].astype(int).tolist() == sent
    for lag, (layer, trace) in enumerate(zip(layers, traces, strict=True), 1):
        assert chip_nets.digits(trace.spikes) == answer["spikes"][layer.name]
        assert trace.lag == lag and trace.aligned(20).shape == (20, 2, len(layer.bias))
    assert (traces[0].wrapped > 0) == (case == "wrapping") and traces[-1].spikes.any()


def test_weights_that_the_chip_would_cut_are_refused() -> None:
    layers, _ = chip_nets.loihi("wrapping")
    for weights, words in (
        ([[3, -2]], "mixed weights from -2 to 3, odd ones among them"),
        ([[300, 2]], "excitatory weights from 0 to 300"),
        ([[-400, 0]], "inhibitory weights from -400 to 0"),
    ):
        with pytest.raises(InputError, match=words):
            loihi2.sign_mode(np.array(weights))
    assert loihi2.sign_mode(np.array([[-256, 254]])) == "mixed"
    for change, words in (
        ({"threshold": 1 << 17}, "threshold is 131072, 0 to 131071 allowed"),
        ({"dv": 4096}, "dv is 4096, 0 to 4095 allowed"),
        ({"bias": layers[0].bias + np.int16(5000)}, "a bias is 5000, -4096 to 4095 allowed"),
        ({"bias": layers[0].bias[:2]}, r"bias \(2,\)"),
    ):
        with pytest.raises(InputError, match=words):
            replace(layers[0], **change)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="zeros and ones"):
        loihi2.run(layers, np.full((3, 1, 16), 2))


if "lava" in simulators.installed():  # it needs a Python 3.10; benchmarks/snn_simulators.py records the same

    @pytest.mark.slow
    def test_the_recording_is_what_lava_answers() -> None:
        layers, spikes = chip_nets.loihi("wrapping")
        traces = loihi2.run(layers, spikes[:, :1])
        named = dict(zip((layer.name for layer in layers), traces, strict=True))
        found = simulate("lava", *to_loihi2.for_lava(tuple(layers), named, spikes[:, :1]))
        for name, trace in named.items():
            assert np.array_equal(found.spikes[name], trace.spikes) and found.lag[name] == trace.lag


def test_the_trace_of_the_nir_paper_is_reproduced() -> None:
    """A neuron on Loihi as the NIR paper recorded it (lava, fixed point): every spike, and the membrane in every step.

    In the step of a spike the record holds the chip's mark of a refractory neuron (2 << 6), where the reset membrane is 0 here.
    """
    path = DATA / "neuromorphic" / "nir_paper" / "lif_lava_loihi_fixed.csv"
    if not path.is_file():
        pytest.skip("the NIR paper's files are not here; set EDGEKIT_DATA")
    sent, membrane, fired = np.loadtxt(path, delimiter=",").T
    layer = LoihiLayer("neuron", np.array([[10]], np.int16), np.zeros(1, np.int16), threshold=25, dv=163)
    (trace,) = loihi2.run([layer], sent.astype(int)[:, None, None])
    spikes, v = trace.spikes[: len(sent), 0, 0], trace.v[: len(sent), 0, 0]
    assert np.array_equal(spikes, fired) and fired.sum() == 4
    assert np.array_equal(v[~spikes], membrane[~spikes]) and set(membrane[spikes]) == {128}
