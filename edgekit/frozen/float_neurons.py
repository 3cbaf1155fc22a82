"""Float neurons of spiking programs, all steps in a call or one; what a step is stands in :mod:`edgekit.frozen.spiking_ops`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "RESETS",
    "TIES",
    "after_spikes",
    "by_step",
    "charge",
    "cuba_li",
    "cuba_lif",
    "cuba_lif_recurrent",
    "feedback",
    "fire",
    "fire_reset",
    "fire_step",
    "i",
    "if_",
    "if_charge",
    "if_recurrent",
    "li",
    "lif",
    "lif_charge",
    "lif_recurrent",
    "spikes",
    "synapse_step",
]

RESETS = ("subtract", "zero", "value")
TIES = ("ge", "gt")


def by_step(x: Tensor, steps: int) -> Tensor:
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
    currents = by_step(x, steps)
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
    currents = by_step(x, steps)
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


def lif(
    x: Tensor, tau: Tensor, r: Tensor, v_leak: Tensor, v_threshold: Tensor, v_reset: Tensor, v_init: Tensor, dt: float,
    steps: int, reset: str, tie: str, max_spikes: int,
) -> Tensor:  # fmt: skip
    """``lif_sequence``."""
    k, (r, v_leak) = _ratio(x, dt, tau), _cast(x, r, v_leak)
    integrate = _plain_leak(k) if bool((r == 1).all() and (v_leak == 0).all()) else lambda v, i: charge(v, i, k, r, v_leak)
    return _firing(x, v_threshold, v_reset, v_init, steps, reset, tie, max_spikes, lambda: integrate)


def _plain_leak(k: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """:func:`charge` with r 1 and v_leak 0, where ``(0 - v) + x`` is ``x - v`` to the last bit."""
    return lambda v, x: (x - v).mul_(k).add_(v)


def if_(
    x: Tensor, r: Tensor, v_threshold: Tensor, v_reset: Tensor, v_init: Tensor, dt: float, steps: int, reset: str, tie: str,
    max_spikes: int,
) -> Tensor:  # fmt: skip
    """``if_sequence``."""
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


def cuba_lif(
    x: Tensor, tau_syn: Tensor, tau_mem: Tensor, r: Tensor, v_leak: Tensor, w_in: Tensor, v_threshold: Tensor, v_reset: Tensor,
    v_init: Tensor, dt: float, steps: int, reset: str, tie: str, max_spikes: int,
) -> Tensor:  # fmt: skip
    """``cuba_lif_sequence``."""
    k, (r, v_leak) = _ratio(x, dt, tau_mem), _cast(x, r, v_leak)

    def integrating() -> Callable[[Tensor, Tensor], Tensor]:
        synapse = _synapse(x, tau_syn, w_in, dt)
        return lambda v, s: charge(v, synapse(s), k, r, v_leak)

    return _firing(x, v_threshold, v_reset, v_init, steps, reset, tie, max_spikes, integrating)


def _twice(v: Tensor) -> tuple[Tensor, Tensor]:
    return v, v


def li(x: Tensor, tau: Tensor, r: Tensor, v_leak: Tensor, v_init: Tensor, dt: float, steps: int) -> Tensor:
    """``li_sequence``."""
    k, (r, v_leak) = _ratio(x, dt, tau), _cast(x, r, v_leak)
    return _membranes(x, steps, v_init, lambda v, current: _twice(charge(v, current, k, r, v_leak)))


def i(x: Tensor, r: Tensor, v_init: Tensor, dt: float, steps: int) -> Tensor:
    """``i_sequence``."""
    k = (r.double() * dt).to(x.dtype)
    return _membranes(x, steps, v_init, lambda v, current: _twice(charge(v, current, k, None, None)))


def cuba_li(
    x: Tensor, tau_syn: Tensor, tau_mem: Tensor, r: Tensor, v_leak: Tensor, w_in: Tensor, v_init: Tensor, dt: float, steps: int
) -> Tensor:
    """``cuba_li_sequence``."""
    k, (r, v_leak), synapse = _ratio(x, dt, tau_mem), _cast(x, r, v_leak), _synapse(x, tau_syn, w_in, dt)
    return _membranes(x, steps, v_init, lambda v, s: _twice(charge(v, synapse(s), k, r, v_leak)))


def _recurrent(
    x: Tensor, weight: Tensor, bias: Tensor | None, threshold: Tensor, v_reset: Tensor, v_init: Tensor, steps: int, reset: str,
    tie: str, max_spikes: int, integrate: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:  # fmt: skip
    _check(reset, tie, max_spikes)
    last: Tensor | None = None

    def step(v: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal last
        given = current if last is None else current + feedback(last, weight, bias)
        last, v = fire(integrate(v, given), threshold, v_reset, reset, tie, max_spikes)
        return last, v

    return _membranes(x, steps, v_init, step)


def feedback(s: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What spikes (N, ...) give back to their own neurons: a linear layer, or a convolution that keeps the image's size."""
    weight, bias = weight.to(s.dtype), None if bias is None else bias.to(s.dtype)
    if weight.dim() == 2:
        return F.linear(s, weight, bias)
    padding = [size // 2 for size in weight.shape[2:]]
    return F.conv2d(s, weight, bias, padding=padding, groups=weight.shape[0] // weight.shape[1])


def lif_recurrent(
    x: Tensor, weight: Tensor, bias: Tensor | None, tau: Tensor, r: Tensor, v_leak: Tensor, v_threshold: Tensor,
    v_reset: Tensor, v_init: Tensor, dt: float, steps: int, reset: str, tie: str, max_spikes: int, feedback: str,
) -> Tensor:  # fmt: skip
    """``lif_recurrent``."""
    k, (r, v_leak, threshold) = _ratio(x, dt, tau), _cast(x, r, v_leak, v_threshold)
    return _recurrent(
        x, weight, bias, threshold, v_reset, v_init, steps, reset, tie, max_spikes, lambda v, i: charge(v, i, k, r, v_leak)
    )


def if_recurrent(
    x: Tensor, weight: Tensor, bias: Tensor | None, r: Tensor, v_threshold: Tensor, v_reset: Tensor, v_init: Tensor, dt: float,
    steps: int, reset: str, tie: str, max_spikes: int, feedback: str,
) -> Tensor:  # fmt: skip
    """``if_recurrent``."""
    k, threshold = (r.double() * dt).to(x.dtype), v_threshold.to(x.dtype)
    return _recurrent(
        x, weight, bias, threshold, v_reset, v_init, steps, reset, tie, max_spikes, lambda v, i: charge(v, i, k, None, None)
    )


def cuba_lif_recurrent(
    x: Tensor, weight: Tensor, bias: Tensor | None, tau_syn: Tensor, tau_mem: Tensor, r: Tensor, v_leak: Tensor, w_in: Tensor,
    v_threshold: Tensor, v_reset: Tensor, v_init: Tensor, dt: float, steps: int, reset: str, tie: str, max_spikes: int,
    feedback: str,
) -> Tensor:  # fmt: skip
    """``cuba_lif_recurrent``."""
    k, (r, v_leak, threshold) = _ratio(x, dt, tau_mem), _cast(x, r, v_leak, v_threshold)
    synapse = _synapse(x, tau_syn, w_in, dt)
    return _recurrent(
        x, weight, bias, threshold, v_reset, v_init, steps, reset, tie, max_spikes,
        lambda v, i: charge(v, synapse(i), k, r, v_leak),
    )  # fmt: skip


def lif_charge(x: Tensor, v: Tensor, tau: Tensor, r: Tensor, v_leak: Tensor, dt: float) -> Tensor:
    """``lif_charge``."""
    r, v_leak = _cast(x, r, v_leak)
    return charge(v, x, _ratio(x, dt, tau), r, v_leak)


def if_charge(x: Tensor, v: Tensor, r: Tensor, dt: float) -> Tensor:
    """``if_charge``."""
    return charge(v, x, (r.double() * dt).to(x.dtype), None, None)


def synapse_step(x: Tensor, i: Tensor, tau_syn: Tensor, w_in: Tensor, dt: float) -> Tensor:
    """``synapse``."""
    return i + _ratio(x, dt, tau_syn) * (w_in.to(x.dtype) * x - i)


def fire_step(x: Tensor, v_threshold: Tensor, tie: str, max_spikes: int) -> Tensor:
    """``fire``."""
    _check("zero", tie, max_spikes)
    return spikes(x, v_threshold.to(x.dtype), tie, max_spikes)


def fire_reset(x: Tensor, s: Tensor, v_threshold: Tensor, v_reset: Tensor, reset: str) -> Tensor:
    """``x``: the membrane before the reset."""
    _check(reset, "ge", 1)
    return after_spikes(x, s, v_threshold.to(x.dtype), v_reset, reset)
