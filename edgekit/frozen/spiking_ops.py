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

**Recurrence.** ``lif_recurrent``, ``if_recurrent`` and ``cuba_lif_recurrent`` are the same neurons with a layer from their spikes
back to themselves: from the second step on, ``x = x + (weight @ s + bias)``, s the spikes of the step before. A ``weight`` of two
dimensions is a linear layer; one of four a convolution that keeps the size of its image (stride 1, padding of half its odd
kernel), ``groups`` follow from its shape. ``bias`` may be None. ``feedback`` is what that layer is called in NIR files. Other
cycles are written out step by step.

The same in single steps, for programs with the state as input and output and for recurrent networks: ``lif_charge``,
``if_charge`` and ``synapse`` are step 1 (membrane, membrane, current), ``fire`` is step 2, ``fire_reset`` step 3.

**One step of an integer neuron** (firmware, chips; ``x`` the int16 current of the step, v an int16)::

    v = sat16(((v * decay + 0x4000) >> 15) + x)     decay int16 in Q15; the value 32767 means no leak: v = sat16(v + x)
    s = v >= threshold                              int8; clamp(floor(v / threshold), 0, max_spikes) where max_spikes > 1
    v = v - s * threshold                           "subtract"; "zero": v = 0 where s > 0

    j = sat16(((j * decay + 0x4000) >> 15) + x)     ``qsynapse_sequence``, a current that fades; emits j

``>>`` rounds toward minus infinity, sat16 clamps to -32768 .. 32767, threshold is int16 and at least 1, decay is not negative.
The current is that of ``spiking_linear`` or ``spiking_conv2d``: ``bias[o] + sum(weight * x)`` over int8 spikes, in int16, exact
because no partial sum leaves int16 (:func:`current_bounds`; whoever makes a program proves it). ``weight_scale[o]`` is what one
unit of current stands for; it takes no part in the arithmetic, thresholds are in the same unit. ``spikes_max`` is the largest
spike count in the input. Currents into the same neurons have one unit: ``add_currents`` sums two of them, ``add_spikes`` adds
``amplitude[c] * s`` of spikes that reach neurons directly (a shortcut), amplitude int16. Their sums fit int16 too, whatever the
spikes; whoever makes a program proves it for all branches together. A first layer with analogue input is a ``qconv2d``
or ``qlinear`` with ``out_bits`` 16. ``qlif_recurrent`` adds ``bias + weight @ s`` of the step before to x from the second step
on, then passes the sum through a synapse of ``decay_syn`` (0: there is none, j is x). ``qaccumulate`` sums currents or spikes
over the steps into int32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from edgekit.frozen import float_neurons, integer_neurons
from edgekit.frozen.float_neurons import RESETS, TIES, after_spikes, by_step, charge, fire, spikes
from edgekit.frozen.integer_neurons import NO_LEAK, current_bounds, q15_step
from edgekit.frozen.ops import register

__all__ = [
    "CURRENT_OPS", "FLOAT_OPS", "INTEGER_NEURONS", "MOVING_OPS", "NEURON_OPS", "NO_LEAK", "REAL_OPS", "RECURRENT_OPS", "RESETS",
    "SPIKING_OPS", "STATEFUL_OPS", "STEP_OPS", "SYNAPSE_OPS", "TIES", "after_spikes", "by_step", "charge", "current_bounds",
    "fire", "q15_step", "spikes",
]  # fmt: skip


RECURRENT_OPS = frozenset({"lif_recurrent", "if_recurrent", "cuba_lif_recurrent"})
"""Float neurons with a layer from their spikes back to themselves."""

INTEGER_NEURONS = frozenset({"qlif_sequence", "qlif_recurrent"})
"""Integer operators that emit spikes."""

NEURON_OPS = frozenset({"lif_sequence", "if_sequence", "cuba_lif_sequence"}) | RECURRENT_OPS | INTEGER_NEURONS
"""Operators that emit spikes."""

STATEFUL_OPS = NEURON_OPS | {"li_sequence", "cuba_li_sequence", "i_sequence"}
"""Operators with a membrane."""

SYNAPSE_OPS = frozenset({"spiking_linear", "spiking_conv2d"})
"""Integer layers from spikes to currents."""

CURRENT_OPS = SYNAPSE_OPS | {"add_currents", "add_spikes", "qsynapse_sequence"}
"""Operators whose output is an int16 current."""

STEP_OPS = frozenset({"lif_charge", "if_charge", "synapse", "fire", "fire_reset"})
"""Single steps of float neurons."""

REAL_OPS = frozenset(
    {"li_sequence", "cuba_li_sequence", "i_sequence", "accumulate", "lif_charge", "if_charge", "synapse", "fire_reset"}
)
"""Operators whose output is a float32 real number, not a count."""

MOVING_OPS = frozenset({"repeat_steps", "fold_steps", "unfold_steps", "delay_steps"})
"""Operators that move steps of any type."""

FLOAT_OPS = (STATEFUL_OPS - INTEGER_NEURONS) | STEP_OPS | {"accumulate"}
"""Operators of float networks."""

_TIME_OPS = {"repeat_steps", "fold_steps", "unfold_steps", "delay_steps", "accumulate", "qaccumulate", "spike_sum_pool2d"}
SPIKING_OPS = STATEFUL_OPS | CURRENT_OPS | STEP_OPS | _TIME_OPS
"""All operators of this module."""


def _repeat_steps(x: Tensor, steps: int) -> Tensor:
    return x.repeat(steps, *[1] * (x.dim() - 1))


def _fold_steps(x: Tensor) -> Tensor:
    return x.transpose(0, 1).clone(memory_format=torch.contiguous_format).flatten(0, 1)


def _unfold_steps(x: Tensor, steps: int) -> Tensor:
    return by_step(x, steps).transpose(0, 1).clone(memory_format=torch.contiguous_format)


def _delay_steps(x: Tensor, delay: Tensor, lengths: Sequence[int], steps: int) -> Tensor:
    """Output t is input ``t - delay``, 0 before the first; ``delay`` int32, in steps, broadcast against one sample.

    ``lengths``: the values in it, rising, for those who only see the graph.
    """
    found = sorted(set(delay.reshape(-1).tolist()))
    if list(lengths) != found:
        raise ValueError(f"delays of {found} steps, lengths {list(lengths)}: expected the same")
    sequence = by_step(x, steps)
    at = torch.arange(steps, device=x.device).view(-1, *[1] * (sequence.dim() - 1)) - delay.to(torch.int64)
    late = sequence.gather(0, at.clamp(min=0).expand(sequence.shape))
    return torch.where(at >= 0, late, torch.zeros_like(late)).reshape(x.shape)


def _accumulate(x: Tensor, gain: float, steps: int) -> Tensor:
    """Sum over the steps, first to last, then times ``gain`` (1 / steps for a mean): (T * N, ...) to (N, ...)."""
    sequence = by_step(x, steps)
    total = sequence[0].clone()
    for t in range(1, steps):
        total = total + sequence[t]
    return total * gain


def _qaccumulate(x: Tensor, steps: int) -> Tensor:
    return by_step(x, steps).sum(0, dtype=torch.int32)


def _same(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _currents(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=torch.int16)


def _folded(dtype: torch.dtype | None = None) -> Callable[..., Tensor]:
    return lambda x, *rest: x.new_empty((x.shape[0] // rest[-1], *x.shape[1:]), dtype=dtype or x.dtype)


for _name, _reference, _fake in (
    ("lif_sequence", float_neurons.lif, _same),
    ("if_sequence", float_neurons.if_, _same),
    ("cuba_lif_sequence", float_neurons.cuba_lif, _same),
    ("li_sequence", float_neurons.li, _same),
    ("cuba_li_sequence", float_neurons.cuba_li, _same),
    ("i_sequence", float_neurons.i, _same),
    ("qlif_sequence", integer_neurons.qlif, lambda x, *_: torch.empty_like(x, dtype=torch.int8)),
    ("qsynapse_sequence", integer_neurons.qsynapse, _same),
    ("lif_recurrent", float_neurons.lif_recurrent, _same),
    ("if_recurrent", float_neurons.if_recurrent, _same),
    ("cuba_lif_recurrent", float_neurons.cuba_lif_recurrent, _same),
    ("qlif_recurrent", integer_neurons.qlif_recurrent, lambda x, *_: torch.empty_like(x, dtype=torch.int8)),
    ("lif_charge", float_neurons.lif_charge, _same),
    ("if_charge", float_neurons.if_charge, _same),
    ("synapse", float_neurons.synapse_step, _same),
    ("fire", float_neurons.fire_step, _same),
    ("fire_reset", float_neurons.fire_reset, _same),
    ("spiking_linear", integer_neurons.spiking_linear, _currents),
    ("spiking_conv2d", integer_neurons.spiking_conv2d, integer_neurons.spiking_conv2d),
    ("add_currents", integer_neurons.add_currents, _same),
    ("add_spikes", integer_neurons.add_spikes, _same),
    ("spike_sum_pool2d", integer_neurons.spike_sum_pool2d, integer_neurons.spike_sum_pool2d),
    ("repeat_steps", _repeat_steps, lambda x, steps: x.new_empty((steps * x.shape[0], *x.shape[1:]))),
    ("fold_steps", _fold_steps, lambda x: x.new_empty((x.shape[0] * x.shape[1], *x.shape[2:]))),
    ("unfold_steps", _unfold_steps, lambda x, t: x.new_empty((x.shape[0] // t, t, *x.shape[1:]))),
    ("delay_steps", _delay_steps, _same),
    ("accumulate", _accumulate, _folded()),
    ("qaccumulate", _qaccumulate, _folded(torch.int32)),
):
    register(_name, _reference, _fake)
