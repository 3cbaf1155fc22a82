"""Small random networks in the chips' own numbers, and what the chips' simulators answered (``recorded/*.json``)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.targets.neuromorphic.loihi2 import LoihiLayer
from edgekit.targets.neuromorphic.xylo import XyloNetwork

RECORDED = Path(__file__).parent / "recorded"

XYLO_CASES: dict[str, dict[str, Any]] = {
    "plain": {"synapses": 1, "scale": 30, "shift": 3, "threshold": 900, "bias": 0, "rate": 0.3},
    "two_synapses_many_spikes": {"synapses": 2, "scale": 60, "shift": 1, "threshold": 60, "bias": 0, "rate": 2.0},
    "saturating": {"synapses": 1, "scale": 80, "shift": 8, "threshold": 20000, "bias": 30000, "rate": 8.0},
    "short_memory": {"synapses": 1, "scale": 80, "shift": 4, "threshold": 1000, "bias": 100, "rate": 1.0, "dash": 1},
}
"""What the networks of :func:`xylo` are drawn from."""

LOIHI_CASES: dict[str, dict[str, Any]] = {
    "no_current_memory": {"du": 4095, "dv": 410, "threshold": 300, "weight_exp": 0, "bias": 0, "bias_exp": 0},
    "current_and_bias": {"du": 2000, "dv": 100, "threshold": 1500, "weight_exp": 2, "bias": 40, "bias_exp": 3},
    "wrapping": {"du": 100, "dv": 4095, "threshold": 60000, "weight_exp": 7, "bias": 0, "bias_exp": 0},
    "right_shift": {"du": 3000, "dv": 10, "threshold": 50, "weight_exp": -2, "bias": 100, "bias_exp": 0},
}


def xylo(case: str) -> tuple[XyloNetwork, NDArray[np.uint8]]:
    """A network of 5 inputs, 7 hidden neurons and 3 outputs, and spikes (24, 2, 5)."""
    given = XYLO_CASES[case]
    rng = np.random.default_rng(sorted(XYLO_CASES).index(case))
    inputs, hidden, outputs, synapses = 5, 7, 3, given["synapses"]

    def weights(*shape: int) -> NDArray[np.int8]:
        return np.clip(np.round(rng.normal(0, given["scale"], shape)), -128, 127).astype(np.int8)

    def dash(*shape: int) -> NDArray[np.uint8]:
        return rng.integers(0, 9, shape).astype(np.uint8) if "dash" not in given else np.full(shape, given["dash"], np.uint8)

    def bias(count: int) -> NDArray[np.int16]:
        return rng.integers(-given["bias"], given["bias"] + 1, count).astype(np.int16)

    def threshold(count: int) -> NDArray[np.int16]:
        return rng.integers(given["threshold"] // 2, given["threshold"], count).astype(np.int16)

    network = XyloNetwork(
        weights(inputs, hidden, synapses), weights(hidden, hidden, synapses), weights(hidden, outputs), threshold(hidden),
        threshold(outputs), dash(hidden), dash(outputs), dash(hidden, synapses), dash(outputs), bias(hidden), bias(outputs),
        given["shift"], given["shift"], given["shift"],
    )  # fmt: skip
    return network, rng.poisson(given["rate"], (24, 2, inputs)).astype(np.uint8)


def loihi(case: str) -> tuple[list[LoihiLayer], NDArray[np.uint8]]:
    """Layers of 12, 8 and 4 neurons and spikes (20, 2, 16)."""
    given = LOIHI_CASES[case]
    rng = np.random.default_rng(100 + sorted(LOIHI_CASES).index(case))
    layers = [
        LoihiLayer(
            f"layer{at}", (2 * rng.integers(-128, 128, (outputs, inputs))).astype(np.int16),
            rng.integers(-given["bias"], given["bias"] + 1, outputs).astype(np.int16), given["threshold"], given["dv"],
            given["du"], given["weight_exp"], given["bias_exp"],
        )
        for at, (inputs, outputs) in enumerate(((16, 12), (12, 8), (8, 4)))
    ]  # fmt: skip
    return layers, (rng.random((20, 2, 16)) < 0.4).astype(np.uint8)


def recorded(simulator: str) -> dict[str, Any]:
    """What a simulator answered: its version, and for each case its inputs' and rasters' numbers by layer."""
    found: dict[str, Any] = json.loads((RECORDED / f"{simulator}.json").read_text())
    return found


def digits(raster: NDArray[Any]) -> list[str]:
    """A raster (T, N, neurons) of counts below 36 as one string a sample and step, a character a neuron."""
    signs = np.array(list("0123456789abcdefghijklmnopqrstuvwxyz"))
    return ["".join(signs[row]) for row in np.asarray(raster, np.int64).reshape(-1, raster.shape[-1])]
