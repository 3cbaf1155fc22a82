"""The arithmetic of Loihi's leaky integrate-and-fire neurons (Intel), bit by bit, in numpy.

One step of a layer (24-bit states, products shifted toward zero)::

    fade(x, d) = sign(x) * ((abs(x) * (4096 - d)) >> 12)
    a = (sum of the weights of arriving spikes) << weight_exp
    u = wrap24(fade(u, du + 1) + (a << 6))                    du = 4095: no memory
    v = clip24(fade(v, dv) + u + bias)
    spike where v > threshold << 6, and there v = 0           threshold is unsigned, 17 bits

Weights have 8 bits and a sign mode for the whole layer: mixed (-256 to 254, even), excitatory (0 to 255), inhibitory (-255 to 0).
A spike arrives one step after it was sent, so layer k lags by k steps. Measured against lava-nc 0.10.0, Intel's model of the
chip ("fixed_pt"): equal in every spike and state, wrapping included (``benchmarks/snn_simulators.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import InputError

__all__ = ["LoihiLayer", "Trace", "fade", "run", "sign_mode"]

Int = NDArray[np.int64]

_LIMIT = 1 << 23


@dataclass(frozen=True)
class LoihiLayer:
    """A dense layer and its neurons; O neurons, I inputs.

    Attributes:
        name: for messages and traces.
        weights: int16 (O, I), in the range of their sign mode.
        weight_exp: shift of the summed weights, -7 to 7; negative is to the right.
        bias: int16 (O,), -4096 to 4095; ``bias << bias_exp`` is added to the membrane in every step.
        bias_exp: 0 to 7.
        threshold: 0 to 131071.
        du, dv: decays of current and membrane in 4096ths, 0 to 4095; the chip adds one to ``du``.
    """

    name: str
    weights: NDArray[np.int16]
    bias: NDArray[np.int16]
    threshold: int
    dv: int
    du: int = 4095
    weight_exp: int = 0
    bias_exp: int = 0

    def __post_init__(self) -> None:
        outputs = self.weights.shape[0]
        if self.weights.ndim != 2 or self.bias.shape != (outputs,):
            found = f"weights {self.weights.shape}, bias {self.bias.shape}"
            raise InputError(f"Loihi layer {self.name}: {found}; expected (O, I) and (O,)")
        for what, value, low, high in (
            ("threshold", self.threshold, 0, 131071),
            ("du", self.du, 0, 4095),
            ("dv", self.dv, 0, 4095),
            ("weight_exp", self.weight_exp, -7, 7),
            ("bias_exp", self.bias_exp, 0, 7),
            ("a bias", int(self.bias.min(initial=0)), -4096, 4095),
            ("a bias", int(self.bias.max(initial=0)), -4096, 4095),
        ):
            if not low <= value <= high:
                raise InputError(f"Loihi layer {self.name}: {what} is {value}, {low} to {high} allowed")
        sign_mode(self.weights, self.name)


@dataclass(frozen=True)
class Trace:
    """What a layer did in the chip's own time: T steps and one more for each layer.

    Attributes:
        spikes: bool (T + L, N, O).
        u, v: current and membrane after each step, int32 (T + L, N, O).
        lag: the step of the chip at which the input's first step takes effect here.
        wrapped, clipped: how many states left 24 bits.
    """

    spikes: NDArray[np.bool_]
    u: NDArray[np.int32]
    v: NDArray[np.int32]
    lag: int
    wrapped: int
    clipped: int

    def aligned(self, steps: int) -> NDArray[np.bool_]:
        """Spikes (steps, N, O) beside the input's steps."""
        return self.spikes[self.lag : self.lag + steps]


def sign_mode(weights: NDArray[Any], name: str = "") -> str:
    """``mixed``, ``excitatory`` or ``inhibitory``.

    Raises:
        InputError: a weight is outside what the chip stores in that mode; lava truncates it silently.
    """
    w = np.asarray(weights).astype(np.int64)
    low, high = int(w.min(initial=0)), int(w.max(initial=0))
    if low >= 0 or high <= 0:
        mode, allowed, odd = ("excitatory" if low >= 0 else "inhibitory"), (-255, 255), False
    else:
        mode, allowed, odd = "mixed", (-256, 254), bool(np.any(w % 2))
    if low < allowed[0] or high > allowed[1] or odd:
        found = f"{low} to {high}" + (", odd ones among them" if odd else "")
        what = "even numbers from -256 to 254" if mode == "mixed" else "-255 to 255"
        raise InputError(f"Loihi layer {name}: {mode} weights from {found}; the chip stores {what}")
    return mode


def fade(x: Int, decay: int) -> Int:
    """What is left of a state after a step."""
    left: Int = np.sign(x) * ((np.abs(x) * (4096 - decay)) >> 12)
    return left


def run(layers: Sequence[LoihiLayer], spikes: NDArray[Any]) -> list[Trace]:
    """Run input spikes through layers, one after the other, from rest; one trace a layer.

    Args:
        spikes: 0 or 1, (T, N, I).

    Raises:
        InputError: the inputs do not fit.
    """
    given = np.asarray(spikes)
    if given.ndim != 3 or not np.isin(given, (0, 1)).all():
        raise InputError(f"Loihi: input of shape {given.shape}; expected (T, N, I) of zeros and ones")
    given = np.concatenate([given, np.zeros((len(layers), *given.shape[1:]), given.dtype)])
    traces = []
    for lag, layer in enumerate(layers, 1):
        if given.shape[2] != layer.weights.shape[1]:
            raise InputError(f"Loihi layer {layer.name}: {given.shape[2]} inputs, it has weights for {layer.weights.shape[1]}")
        traces.append(_layer(layer, given.astype(np.int64), lag))
        given = traces[-1].spikes
    return traces


def _layer(layer: LoihiLayer, sent: Int, lag: int) -> Trace:
    shape = (sent.shape[1], layer.weights.shape[0])
    u, v, bias = np.zeros(shape, np.int64), np.zeros(shape, np.int64), layer.bias.astype(np.int64) << layer.bias_exp
    sums = np.concatenate([np.zeros((1, *shape), np.int64), sent[:-1] @ layer.weights.astype(np.int64).T])
    arriving = (sums << layer.weight_exp if layer.weight_exp >= 0 else sums >> -layer.weight_exp) << 6
    fired, currents, membranes, wrapped, clipped = [], [], [], 0, 0
    for a in arriving:
        summed = fade(u, layer.du + 1) + a
        u = np.where(summed > _LIMIT, summed - 2 * _LIMIT, np.where(summed <= -_LIMIT, summed + 2 * _LIMIT, summed))
        grown = fade(v, layer.dv) + u + bias
        v = np.clip(grown, 1 - _LIMIT, _LIMIT - 1)
        wrapped, clipped = wrapped + int(np.count_nonzero(u != summed)), clipped + int(np.count_nonzero(v != grown))
        spike = v > layer.threshold << 6
        v = np.where(spike, 0, v)
        fired.append(spike)
        currents.append(u)
        membranes.append(v)
    return Trace(np.array(fired), np.array(currents, np.int32), np.array(membranes, np.int32), lag, wrapped, clipped)
