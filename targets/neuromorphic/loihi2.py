"""The arithmetic of Loihi's leaky integrate-and-fire neurons (Intel), bit by bit, in numpy.

One step of a layer (24-bit states, products shifted toward zero)::

    fade(x, d) = sign(x) * ((abs(x) * (4096 - d)) >> 12)
    a = (sum of the weights of arriving spikes) << weight_exp
    u = wrap24(fade(u, du + 1) + (a << 6))                    du = 4095: no memory
    v = clip24(fade(v, dv) + u + bias)
    spike where v > threshold << 6, and there v = 0           threshold is unsigned, 17 bits

Weights have 8 bits and a sign mode for the whole layer: mixed (-256 to 254, even), excitatory (0 to 255), inhibitory (-255 to 0).
A spike arrives one step after it was sent, so layer k lags by k steps; what skips layers waits for as many steps (synaptic
delays, up to 62). Measured against lava-nc 0.10.0, Intel's model of the chip ("fixed_pt"): equal in every spike and state,
wrapping included (``benchmarks/snn_simulators.py``).

``reset: subtract`` (``v = v - (threshold << 6)`` at a spike) is no part of lava's LIF. Neurons of Loihi 2 are programs, so it can
be had there; in lava it is a model of the user's own, which is how it is compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import InputError

__all__ = ["LoihiLayer", "Trace", "fade", "follow", "heard", "padded", "run", "sign_mode"]

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
        reset: "zero", or "subtract" for a neuron program of one's own.
        start: membranes before the first step of the chip, int32 (O,) of 24 bits; None: 0.
        sources: layers that it hears, "" for the input, in the order of the weights' columns; empty: the layer before.
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
    reset: str = "zero"
    start: NDArray[np.int32] | None = None
    sources: tuple[str, ...] = ()

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
            ("start", 0 if self.start is None else int(np.abs(self.start).max(initial=0)), 0, _LIMIT - 1),
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
    """Run input spikes through layers from rest; one trace a layer.

    Args:
        spikes: 0 or 1, (T, N, I).

    Raises:
        InputError: the inputs do not fit.
    """
    given = padded(spikes, len(layers))
    traces: dict[str, Trace] = {}
    for layer in layers:
        traces[layer.name] = follow(layer, given, traces)
    return list(traces.values())


def padded(spikes: NDArray[Any], layers: int) -> Int:
    """Input spikes with as many silent steps behind them as there are layers.

    Raises:
        InputError: they are no zeros and ones.
    """
    given = np.asarray(spikes)
    if given.ndim != 3 or not np.isin(given, (0, 1)).all():
        raise InputError(f"Loihi: input of shape {given.shape}; expected (T, N, I) of zeros and ones")
    return np.concatenate([given, np.zeros((layers, *given.shape[1:]), given.dtype)]).astype(np.int64)


def heard(layer: LoihiLayer, before: Mapping[str, Trace]) -> tuple[tuple[str, int], ...]:
    """What a layer hears, "" for the input, and by how many steps more than one it arrives late, so that all arrives together.

    Args:
        before: traces of the layers before, in order.
    """
    names = layer.sources or (next(reversed(list(before)), ""),)
    lags = [before[name].lag if name else 0 for name in names]
    return tuple((name, max(lags) - lag) for name, lag in zip(names, lags, strict=True))


def follow(layer: LoihiLayer, given: Int, before: Mapping[str, Trace]) -> Trace:
    """A layer's trace from the input (:func:`padded`) and the traces of the layers before it.

    Raises:
        InputError: they do not fit the layer.
    """
    sources = heard(layer, before)
    sent = [before[name].spikes if name else given for name, _ in sources]
    if sum(s.shape[2] for s in sent) != layer.weights.shape[1]:
        raise InputError(
            f"Loihi layer {layer.name}: {sum(s.shape[2] for s in sent)} inputs, it has weights for {layer.weights.shape[1]}"
        )
    arriving, first = np.zeros((*given.shape[:2], layer.weights.shape[0]), np.int64), 0
    for (_, late), spikes in zip(sources, sent, strict=True):
        weights = layer.weights[:, first : first + spikes.shape[2]].T.astype(np.float64)
        sums = (spikes[: len(spikes) - 1 - late].astype(np.float64) @ weights).astype(np.int64)  # exact: far below 2**53
        arriving[1 + late :] += sums << layer.weight_exp if layer.weight_exp >= 0 else sums >> -layer.weight_exp
        first += spikes.shape[2]
    lag = 1 + max(before[name].lag if name else 0 for name, _ in sources)
    return _layer(layer, arriving << 6, lag)


def _layer(layer: LoihiLayer, arriving: Int, lag: int) -> Trace:
    shape = arriving.shape[1:]
    u, bias = np.zeros(shape, np.int64), layer.bias.astype(np.int64) << layer.bias_exp
    v = np.broadcast_to(0 if layer.start is None else layer.start.astype(np.int64), shape)
    threshold = layer.threshold << 6
    fired, currents, membranes, wrapped, clipped = [], [], [], 0, 0
    for a in arriving:
        summed = fade(u, layer.du + 1) + a
        u = np.where(summed > _LIMIT, summed - 2 * _LIMIT, np.where(summed <= -_LIMIT, summed + 2 * _LIMIT, summed))
        grown = fade(v, layer.dv) + u + bias
        v = np.clip(grown, 1 - _LIMIT, _LIMIT - 1)
        wrapped, clipped = wrapped + int(np.count_nonzero(u != summed)), clipped + int(np.count_nonzero(v != grown))
        spike = v > threshold
        v = np.where(spike, v - threshold if layer.reset == "subtract" else 0, v)
        fired.append(spike)
        currents.append(u)
        membranes.append(v)
    return Trace(np.array(fired), np.array(currents, np.int32), np.array(membranes, np.int32), lag, wrapped, clipped)
