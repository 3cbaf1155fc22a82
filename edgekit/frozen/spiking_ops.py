"""The spiking operators of a frozen program: neurons that run all time steps, float and integer, with one exact meaning.

**Time.** A program computes T steps in one call. Between operators time is folded into the batch, step by step: ``(T * N, ...)``
has the memory of ``(T, N, ...)``, so stateless layers (convolutions, pools, linear layers) run as they are, once for all steps.
``repeat_steps`` gives each step the same input (constant current), ``fold_steps`` takes ``(N, T, ...)`` in and ``unfold_steps``
brings it out again, ``accumulate`` sums over the steps. Neurons have ``steps``; N is whatever is left.

**One step of a float neuron**, in this order (float32 in programs; ``x`` the input of the step)::

    1. integrate   lif       v = v + (dt / tau) * ((v_leak - v) + r * x)
                   if, i     v = v + (r * dt) * x
                   li        as lif
                   cuba_*    i = i + (dt / tau_syn) * (w_in * x - i), then  v = v + (dt / tau_mem) * ((v_leak - v) + r * i)
    2. compare     s = 1 if v >= v_threshold else 0           tie "ge"; "gt" compares with >
                   s = clamp(floor(v / v_threshold), 0, max_spikes)      where max_spikes > 1; then tie is "ge"
    3. reset       "subtract": v = v - s * v_threshold        "zero": v = 0 where s > 0        "value": v = v_reset where s > 0
    4. emit        s (float); li, cuba_li and i have no steps 2 and 3 and emit v

``dt / tau`` and ``r * dt`` are computed in float64 and rounded once to the tensor's type; the rest is in that type, each
operation rounded by itself, in the order written. Before the first step v is ``v_init`` and the synaptic current i is 0. This is
the forward Euler step of NIR's equations (Pedersen et al., "Neuromorphic intermediate representation", Nature Communications
2024), of which reset rule, tie rule, initial state and dt are no part: NIR files of edgekit hold them as metadata.
Parameters are tensors that broadcast against one sample, ``()``, ``(F,)``, ``(C, 1, 1)`` or ``(C, H, W)``.

The same in single steps, for programs with the state as input and output and for recurrent networks: ``lif_charge``,
``if_charge`` and ``synapse`` are step 1 (membrane, membrane, current), ``fire`` is step 2, ``fire_reset`` step 3.

**One step of an integer neuron** (firmware, chips; ``x`` the int16 current of the step, v an int16)::

    v = sat16(((v * decay + 0x4000) >> 15) + x)     decay int16 in Q15; the value 32767 means no leak: v = sat16(v + x)
    s = v >= threshold                              int8; clamp(floor(v / threshold), 0, max_spikes) where max_spikes > 1
    v = v - s * threshold                           "subtract"; "zero": v = 0 where s > 0

``>>`` rounds toward minus infinity, sat16 clamps to -32768 .. 32767, threshold is int16 and at least 1, decay is not negative.
The current is that of ``spiking_linear`` or ``spiking_conv2d``: ``bias[o] + sum(weight * x)`` over int8 spikes, in int16, exact
because no partial sum leaves int16 (:func:`current_bounds`; whoever makes a program proves it). ``weight_scale[o]`` is what one
unit of current stands for; it takes no part in the arithmetic, thresholds are in the same unit. ``spikes_max`` is the largest
spike count in the input. Currents into the same neurons have one unit: ``add_currents`` sums two of them, ``add_spikes`` adds
``amplitude[c] * s`` of spikes that reach neurons directly (a shortcut), amplitude int16. Their sums fit int16 too, whatever the
spikes; whoever makes a program proves it for all branches together. A first layer with analogue input is a ``qconv2d``
or ``qlinear`` with ``out_bits`` 16. ``qaccumulate`` sums int16 currents over the steps into int32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from edgekit.frozen.ops import register

__all__ = [
    "CURRENT_OPS", "FLOAT_OPS", "MOVING_OPS", "NEURON_OPS", "NO_LEAK", "REAL_OPS", "RESETS", "SPIKING_OPS", "STATEFUL_OPS",
    "STEP_OPS", "SYNAPSE_OPS", "TIES", "after_spikes", "charge", "current_bounds", "fire", "q15_step", "spikes",
]  # fmt: skip

RESETS = ("subtract", "zero", "value")
TIES = ("ge", "gt")
NO_LEAK = 32767
"""The ``decay`` that stands for exactly 1."""

NEURON_OPS = frozenset({"lif_sequence", "if_sequence", "cuba_lif_sequence", "qlif_sequence"})
"""Operators that emit spikes."""

STATEFUL_OPS = NEURON_OPS | {"li_sequence", "cuba_li_sequence", "i_sequence"}
"""Operators with a membrane."""

SYNAPSE_OPS = frozenset({"spiking_linear", "spiking_conv2d"})
"""Integer layers from spikes to currents."""

CURRENT_OPS = SYNAPSE_OPS | {"add_currents", "add_spikes"}
"""Operators whose output is an int16 current."""

STEP_OPS = frozenset({"lif_charge", "if_charge", "synapse", "fire", "fire_reset"})
"""Single steps of float neurons."""

REAL_OPS = frozenset(
    {"li_sequence", "cuba_li_sequence", "i_sequence", "accumulate", "lif_charge", "if_charge", "synapse", "fire_reset"}
)
"""Operators whose output is a float32 real number, not a count."""

MOVING_OPS = frozenset({"repeat_steps", "fold_steps", "unfold_steps", "delay_steps"})
"""Operators that move steps of any type."""

FLOAT_OPS = (STATEFUL_OPS - {"qlif_sequence"}) | STEP_OPS | {"accumulate"}
"""Operators of float networks."""

_TIME_OPS = {"repeat_steps", "fold_steps", "unfold_steps", "delay_steps", "accumulate", "qaccumulate", "spike_sum_pool2d"}
SPIKING_OPS = STATEFUL_OPS | CURRENT_OPS | STEP_OPS | _TIME_OPS
"""All operators of this module."""


def _by_step(x: Tensor, steps: int) -> Tensor:
    """``(T * N, ...)`` as ``(T, N, ...)``."""
    if steps < 1 or x.shape[0] % steps:
        raise ValueError(f"{steps} time steps: a first dimension of {x.shape[0]} is no multiple of it")
    return x.reshape(steps, x.shape[0] // steps, *x.shape[1:])


def charge(v: Tensor, x: Tensor, k: Tensor, r: Tensor | None, v_leak: Tensor | None) -> Tensor:
    """Step 1 of every neuron, ``v + k * ((v_leak - v) + r * x)``; without leak (``v_leak`` None) ``v + k * x``.

    Args:
        k: ``dt / tau``, or ``r * dt`` without leak, rounded to the type of ``v``.
        r: None means 1.
    """
    if v_leak is None:
        return v + k * x
    return v + k * ((v_leak - v) + (x if r is None else r * x))


def fire(
    v: Tensor, v_threshold: Tensor, v_reset: Tensor, reset: str, tie: str = "ge", max_spikes: int = 1
) -> tuple[Tensor, Tensor]:
    """Steps 2 and 3: (spikes, membrane after the reset), both of v's type."""
    s = spikes(v, v_threshold, tie, max_spikes)
    return s, after_spikes(v, s, v_threshold, v_reset, reset)


def spikes(v: Tensor, v_threshold: Tensor, tie: str, max_spikes: int = 1) -> Tensor:
    """Step 2: how often each neuron spikes."""
    if max_spikes > 1:
        return torch.floor(v / v_threshold).clamp(0, max_spikes)
    return (v >= v_threshold if tie == "ge" else v > v_threshold).to(v.dtype)


def after_spikes(v: Tensor, s: Tensor, v_threshold: Tensor, v_reset: Tensor, reset: str) -> Tensor:
    """Step 3: the membrane after the reset."""
    if reset == "subtract":
        return v - s * v_threshold
    return torch.where(s > 0, torch.zeros_like(v) if reset == "zero" else v_reset.to(v.dtype), v)


def q15_step(v: Tensor, current: Tensor, decay: Tensor) -> Tensor:
    """Leak and integration of the integer neuron: int32 tensors in and out, saturated to int16."""
    leaked = torch.where(decay == NO_LEAK, v, (v * decay + 0x4000) >> 15)
    return (leaked + current).clamp(-32768, 32767)


def current_bounds(weight: Tensor, bias: Tensor, spikes_max: int = 1, spikes_min: int = 0) -> tuple[int, int]:
    """Smallest and largest value of any partial sum of ``bias + sum(weight * x)``, x in ``spikes_min`` (<= 0) .. ``spikes_max``.

    A layer fits an int16 accumulator in any order of summation if this lies within -32768 .. 32767.
    """
    w, b = weight.flatten(1).to(torch.int64), bias.to(torch.int64)
    negative, positive = w.clamp(max=0).sum(1), w.clamp(min=0).sum(1)
    low = spikes_max * negative + spikes_min * positive + b.clamp(max=0)
    high = spikes_max * positive + spikes_min * negative + b.clamp(min=0)
    return int(low.min()), int(high.max())


def _check(reset: str, tie: str, max_spikes: int) -> None:
    if reset not in RESETS or tie not in TIES or max_spikes < 1 or (max_spikes > 1 and tie != "ge"):
        raise ValueError(
            f"neuron with reset {reset!r}, tie {tie!r}, max_spikes {max_spikes}: expected {', '.join(RESETS)}; "
            f"{', '.join(TIES)}; at least 1, and tie ge above 1"
        )


def _ratio(x: Tensor, dt: float, tau: Tensor) -> Tensor:
    return (dt / tau.double()).to(x.dtype)


def _membranes(x: Tensor, steps: int, v_init: Tensor, step: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> Tensor:
    """``step(v, x) -> (output, v)`` over the steps; outputs folded, (T * N, ...)."""
    currents = _by_step(x, steps)
    v, out = v_init.to(x.dtype).expand(currents.shape[1:]), torch.empty_like(currents, memory_format=torch.contiguous_format)
    for t in range(steps):
        out[t], v = step(v, currents[t])
    return out.reshape(x.shape)


def _firing(
    x: Tensor, v_threshold: Tensor, v_reset: Tensor, v_init: Tensor, steps: int, reset: str, tie: str, max_spikes: int,
    integrating: Callable[[], Callable[[Tensor, Tensor], Tensor]],
) -> Tensor:  # fmt: skip
    """``integrating`` gives step 1, from its first state."""
    _check(reset, tie, max_spikes)
    threshold = v_threshold.to(x.dtype)
    if max_spikes == 1 and reset != "value":
        found = _firing_in_place(x, threshold, v_init, steps, reset, tie, integrating())
        if found is not None:
            return found
    integrate = integrating()
    return _membranes(
        x, steps, v_init, lambda v, current: fire(integrate(v, current), threshold, v_reset, reset, tie, max_spikes)
    )


def _firing_in_place(
    x: Tensor, threshold: Tensor, v_init: Tensor, steps: int, reset: str, tie: str, integrate: Callable[[Tensor, Tensor], Tensor]
) -> Tensor | None:
    """What :func:`fire` gives for single spikes, several times faster: with s 0 or 1, ``v - v * s`` is 0 or v, to the last bit.

    None where a membrane is not finite, which such a product does not bring back.
    """
    currents = _by_step(x, steps)
    v, out = v_init.to(x.dtype).expand(currents.shape[1:]), torch.empty_like(currents, memory_format=torch.contiguous_format)
    compare = torch.ge if tie == "ge" else torch.gt
    for t in range(steps):
        v = integrate(v, currents[t])
        s = compare(v, threshold, out=out[t])
        v.addcmul_(v if reset == "zero" else threshold, s, value=-1)
    return out.reshape(x.shape) if bool(torch.isfinite(v).all()) else None


def _cast(x: Tensor, *values: Tensor) -> list[Tensor]:
    return [value.to(x.dtype) for value in values]


def _synapse(x: Tensor, tau_syn: Tensor, w_in: Tensor, dt: float) -> Callable[[Tensor], Tensor]:
    """The current of a CUBA neuron, one step a call."""
    k, w = _ratio(x, dt, tau_syn), w_in.to(x.dtype)
    state = torch.zeros((), dtype=x.dtype, device=x.device)

    def step(current: Tensor) -> Tensor:
        nonlocal state
        state = state + k * (w * current - state)
        return state

    return step


def _lif(
    x: Tensor, tau: Tensor, r: Tensor, v_leak: Tensor, v_threshold: Tensor, v_reset: Tensor, v_init: Tensor, dt: float,
    steps: int, reset: str, tie: str, max_spikes: int,
) -> Tensor:  # fmt: skip
    k, (r, v_leak) = _ratio(x, dt, tau), _cast(x, r, v_leak)
    integrate = _plain_leak(k) if bool((r == 1).all() and (v_leak == 0).all()) else lambda v, i: charge(v, i, k, r, v_leak)
    return _firing(x, v_threshold, v_reset, v_init, steps, reset, tie, max_spikes, lambda: integrate)


def _plain_leak(k: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """:func:`charge` with r 1 and v_leak 0, where ``(0 - v) + x`` is ``x - v`` to the last bit."""
    return lambda v, x: (x - v).mul_(k).add_(v)


def _if(
    x: Tensor, r: Tensor, v_threshold: Tensor, v_reset: Tensor, v_init: Tensor, dt: float, steps: int, reset: str, tie: str,
    max_spikes: int,
) -> Tensor:  # fmt: skip
    k = (r.double() * dt).to(x.dtype)
    return _firing(
        x,
        v_threshold,
        v_reset,
        v_init,
        steps,
        reset,
        tie,
        max_spikes,
        lambda: lambda v, current: charge(v, current, k, None, None),
    )


def _cuba_lif(
    x: Tensor, tau_syn: Tensor, tau_mem: Tensor, r: Tensor, v_leak: Tensor, w_in: Tensor, v_threshold: Tensor, v_reset: Tensor,
    v_init: Tensor, dt: float, steps: int, reset: str, tie: str, max_spikes: int,
) -> Tensor:  # fmt: skip
    k, (r, v_leak) = _ratio(x, dt, tau_mem), _cast(x, r, v_leak)

    def integrating() -> Callable[[Tensor, Tensor], Tensor]:
        synapse = _synapse(x, tau_syn, w_in, dt)
        return lambda v, s: charge(v, synapse(s), k, r, v_leak)

    return _firing(x, v_threshold, v_reset, v_init, steps, reset, tie, max_spikes, integrating)


def _twice(v: Tensor) -> tuple[Tensor, Tensor]:
    return v, v


def _li(x: Tensor, tau: Tensor, r: Tensor, v_leak: Tensor, v_init: Tensor, dt: float, steps: int) -> Tensor:
    k, (r, v_leak) = _ratio(x, dt, tau), _cast(x, r, v_leak)
    return _membranes(x, steps, v_init, lambda v, current: _twice(charge(v, current, k, r, v_leak)))


def _i(x: Tensor, r: Tensor, v_init: Tensor, dt: float, steps: int) -> Tensor:
    k = (r.double() * dt).to(x.dtype)
    return _membranes(x, steps, v_init, lambda v, current: _twice(charge(v, current, k, None, None)))


def _cuba_li(
    x: Tensor, tau_syn: Tensor, tau_mem: Tensor, r: Tensor, v_leak: Tensor, w_in: Tensor, v_init: Tensor, dt: float, steps: int
) -> Tensor:
    k, (r, v_leak), synapse = _ratio(x, dt, tau_mem), _cast(x, r, v_leak), _synapse(x, tau_syn, w_in, dt)
    return _membranes(x, steps, v_init, lambda v, s: _twice(charge(v, synapse(s), k, r, v_leak)))


def _qlif(x: Tensor, threshold: Tensor, decay: Tensor, v_init: Tensor, steps: int, reset: str, max_spikes: int) -> Tensor:
    if reset not in ("subtract", "zero"):
        raise ValueError(f"integer neuron with reset {reset!r}: expected subtract or zero")
    currents, threshold, decay = _by_step(x.to(torch.int32), steps), threshold.to(torch.int32), decay.to(torch.int32)
    v, out = v_init.to(torch.int32).expand(currents.shape[1:]), torch.empty_like(currents, dtype=torch.int8)
    for t in range(steps):
        v = q15_step(v, currents[t], decay)
        out[t] = s = torch.div(v, threshold, rounding_mode="floor").clamp(0, max_spikes)
        v = v - s * threshold if reset == "subtract" else torch.where(s > 0, 0, v)
    return out.reshape(x.shape).contiguous()


def _lif_charge(x: Tensor, v: Tensor, tau: Tensor, r: Tensor, v_leak: Tensor, dt: float) -> Tensor:
    r, v_leak = _cast(x, r, v_leak)
    return charge(v, x, _ratio(x, dt, tau), r, v_leak)


def _if_charge(x: Tensor, v: Tensor, r: Tensor, dt: float) -> Tensor:
    return charge(v, x, (r.double() * dt).to(x.dtype), None, None)


def _synapse_step(x: Tensor, i: Tensor, tau_syn: Tensor, w_in: Tensor, dt: float) -> Tensor:
    return i + _ratio(x, dt, tau_syn) * (w_in.to(x.dtype) * x - i)


def _fire(x: Tensor, v_threshold: Tensor, tie: str, max_spikes: int) -> Tensor:
    _check("zero", tie, max_spikes)
    return spikes(x, v_threshold.to(x.dtype), tie, max_spikes)


def _fire_reset(x: Tensor, s: Tensor, v_threshold: Tensor, v_reset: Tensor, reset: str) -> Tensor:
    """``x``: the membrane before the reset."""
    _check(reset, "ge", 1)
    return after_spikes(x, s, v_threshold.to(x.dtype), v_reset, reset)


def _spiking_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor, spikes_max: int, weight_bits: int) -> Tensor:
    return F.linear(x.double(), weight.double(), bias.double()).clamp(-32768, 32767).to(torch.int16)


def _spiking_conv2d(
    x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor, stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int], groups: int, spikes_max: int, weight_bits: int,
) -> Tensor:  # fmt: skip
    y = F.conv2d(x.double(), weight.double(), bias.double(), list(stride), list(padding), list(dilation), groups)
    return y.clamp(-32768, 32767).to(torch.int16)


def _add_currents(a: Tensor, b: Tensor) -> Tensor:
    return (a.to(torch.int32) + b.to(torch.int32)).clamp(-32768, 32767).to(torch.int16)


def _add_spikes(x: Tensor, s: Tensor, amplitude: Tensor) -> Tensor:
    """``amplitude``: (C,) of the second dimension."""
    each = amplitude.to(torch.int32).reshape(-1, *[1] * (x.dim() - 2))
    return (x.to(torch.int32) + each * s.to(torch.int32)).clamp(-32768, 32767).to(torch.int16)


def _spike_sum_pool2d(x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]) -> Tensor:
    """Sum of spikes under a window, int8; padding adds none."""
    summed: Tensor = F.avg_pool2d(x.double(), list(kernel), list(stride), list(padding), divisor_override=1)
    return summed.to(torch.int8)


def _repeat_steps(x: Tensor, steps: int) -> Tensor:
    return x.repeat(steps, *[1] * (x.dim() - 1))


def _fold_steps(x: Tensor) -> Tensor:
    return x.transpose(0, 1).clone(memory_format=torch.contiguous_format).flatten(0, 1)


def _unfold_steps(x: Tensor, steps: int) -> Tensor:
    return _by_step(x, steps).transpose(0, 1).clone(memory_format=torch.contiguous_format)


def _delay_steps(x: Tensor, delay: Tensor, steps: int) -> Tensor:
    """Output t is input ``t - delay``, 0 before the first; ``delay`` int32, in steps, broadcast against one sample."""
    sequence = _by_step(x, steps)
    at = torch.arange(steps, device=x.device).view(-1, *[1] * (sequence.dim() - 1)) - delay.to(torch.int64)
    late = sequence.gather(0, at.clamp(min=0).expand(sequence.shape))
    return torch.where(at >= 0, late, torch.zeros_like(late)).reshape(x.shape)


def _accumulate(x: Tensor, gain: float, steps: int) -> Tensor:
    """Sum over the steps, first to last, then times ``gain`` (1 / steps for a mean): (T * N, ...) to (N, ...)."""
    sequence = _by_step(x, steps)
    total = sequence[0].clone()
    for t in range(1, steps):
        total = total + sequence[t]
    return total * gain


def _qaccumulate(x: Tensor, steps: int) -> Tensor:
    return _by_step(x, steps).sum(0, dtype=torch.int32)


def _same(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _folded(dtype: torch.dtype | None = None) -> Callable[..., Tensor]:
    return lambda x, *rest: x.new_empty((x.shape[0] // rest[-1], *x.shape[1:]), dtype=dtype or x.dtype)


for _name, _reference, _fake in (
    ("lif_sequence", _lif, _same),
    ("if_sequence", _if, _same),
    ("cuba_lif_sequence", _cuba_lif, _same),
    ("li_sequence", _li, _same),
    ("cuba_li_sequence", _cuba_li, _same),
    ("i_sequence", _i, _same),
    ("qlif_sequence", _qlif, lambda x, *_: torch.empty_like(x, dtype=torch.int8)),
    ("lif_charge", _lif_charge, _same),
    ("if_charge", _if_charge, _same),
    ("synapse", _synapse_step, _same),
    ("fire", _fire, _same),
    ("fire_reset", _fire_reset, _same),
    ("spiking_linear", _spiking_linear, lambda x, w, *_: x.new_empty((*x.shape[:-1], w.shape[0]), dtype=torch.int16)),
    ("spiking_conv2d", _spiking_conv2d, _spiking_conv2d),
    ("add_currents", _add_currents, _same),
    ("add_spikes", _add_spikes, _same),
    ("spike_sum_pool2d", _spike_sum_pool2d, _spike_sum_pool2d),
    ("repeat_steps", _repeat_steps, lambda x, steps: x.new_empty((steps * x.shape[0], *x.shape[1:]))),
    ("fold_steps", _fold_steps, lambda x: x.new_empty((x.shape[0] * x.shape[1], *x.shape[2:]))),
    ("unfold_steps", _unfold_steps, lambda x, t: x.new_empty((x.shape[0] // t, t, *x.shape[1:]))),
    ("delay_steps", _delay_steps, _same),
    ("accumulate", _accumulate, _folded()),
    ("qaccumulate", _qaccumulate, _folded(torch.int32)),
):
    register(_name, _reference, _fake)
