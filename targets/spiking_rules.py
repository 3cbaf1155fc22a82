"""Float spiking operators in plain ATen operators, for converters: the steps of a neuron are written out one after the other.

The same operations in the same order as :mod:`edgekit.frozen.spiking_ops`, so the spikes are the same. State lives inside of a
call and never in a buffer that a call writes to: LiteRT would freeze such a buffer at its first value without a word.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

__all__ = ["UNLOWERED", "spiking_rules"]

Fire = Callable[[Tensor, Tensor, str, int], Tensor]

_ATEN: Any = torch.ops.aten

UNLOWERED = frozenset(
    {
        "qlif_sequence",
        "qlif_recurrent",
        "qsynapse_sequence",
        "spiking_linear",
        "spiking_conv2d",
        "add_currents",
        "add_spikes",
        "qaccumulate",
        "spike_sum_pool2d",
    }
)
"""Spiking operators without a rule: the integer form, which firmware runs."""


def _ratio(dt: float, tau: Tensor) -> Tensor:
    return (dt / tau.double()).to(torch.float32)


def _by_step(x: Tensor, steps: int) -> list[Tensor]:
    n = x.shape[0] // steps
    return [_ATEN.slice.Tensor(x, 0, t * n, (t + 1) * n) for t in range(steps)]


def _start(v_init: Tensor, x: Tensor) -> Tensor:
    return v_init.to(torch.float32).expand(x.shape).contiguous()


def _fire(v: Tensor, threshold: Tensor, tie: str, max_spikes: int) -> Tensor:
    if max_spikes > 1:
        return _floored(v, threshold, tie, max_spikes)
    above: Tensor = _ATEN.ge.Tensor(v, threshold) if tie == "ge" else _ATEN.gt.Tensor(v, threshold)
    return above.to(torch.float32)


def _floored(v: Tensor, threshold: Tensor, tie: str, max_spikes: int) -> Tensor:
    """``v >= threshold`` as a floor, for XNNPACK, which has no comparison: each would end a delegated piece of the graph.

    For a threshold above 0 the rounded quotient is at least 1 exactly where v >= threshold: for the next number below the
    threshold the quotient is at most 1 - 2**-24, which float32 has. TFLite's converter makes a product with the rounded
    reciprocal of it, which is not the same.
    """
    return torch.clamp(torch.floor(v / threshold), 0.0, float(max_spikes)) if tie == "ge" else _fire(v, threshold, tie, 1)


def _after(v: Tensor, s: Tensor, threshold: Tensor, v_reset: Tensor, reset: str) -> Tensor:
    """Without a choice, which few kernels have: ``v * 1 + v_reset * 0`` is v, and ``v * 0 + v_reset * 1`` is v_reset."""
    if reset == "subtract":
        return v - s * threshold
    once = torch.clamp(s, 0.0, 1.0)
    kept = v * (1.0 - once)
    return kept if reset == "zero" else kept + once * v_reset


def _charge(v: Tensor, x: Tensor, k: Tensor, r: Tensor | None, v_leak: Tensor | None) -> Tensor:
    if v_leak is None:
        return v + k * x
    return v + k * ((v_leak - v) + (x if r is None else r * x))


def _lif(
    fire: Fire, x: Tensor, tau: Tensor, r: Tensor, v_leak: Tensor, v_threshold: Tensor, v_reset: Tensor, v_init: Tensor,
    dt: float, steps: int, reset: str, tie: str, max_spikes: int,
) -> Tensor:  # fmt: skip
    k = _ratio(dt, tau)
    return _firing(fire, x, v_threshold, v_reset, v_init, steps, reset, tie, max_spikes, lambda v, c: _charge(v, c, k, r, v_leak))


def _if(
    fire: Fire, x: Tensor, r: Tensor, v_threshold: Tensor, v_reset: Tensor, v_init: Tensor, dt: float, steps: int, reset: str,
    tie: str, max_spikes: int,
) -> Tensor:  # fmt: skip
    k = (r.double() * dt).to(torch.float32)
    return _firing(
        fire, x, v_threshold, v_reset, v_init, steps, reset, tie, max_spikes, lambda v, c: _charge(v, c, k, None, None)
    )


def _cuba_lif(
    fire: Fire, x: Tensor, tau_syn: Tensor, tau_mem: Tensor, r: Tensor, v_leak: Tensor, w_in: Tensor, v_threshold: Tensor,
    v_reset: Tensor, v_init: Tensor, dt: float, steps: int, reset: str, tie: str, max_spikes: int,
) -> Tensor:  # fmt: skip
    x = _synapses(x, tau_syn, w_in, dt, steps)
    return _lif(fire, x, tau_mem, r, v_leak, v_threshold, v_reset, v_init, dt, steps, reset, tie, max_spikes)


def _synapses(x: Tensor, tau_syn: Tensor, w_in: Tensor, dt: float, steps: int) -> Tensor:
    """Currents of all steps."""
    k, rows = _ratio(dt, tau_syn), []
    current: Tensor | None = None
    for given in _by_step(x, steps):
        before = torch.zeros_like(given) if current is None else current
        current = before + k * (w_in * given - before)
        rows.append(current)
    return _ATEN.cat.default(rows, 0)  # type: ignore[no-any-return]


def _firing(
    fire: Fire, x: Tensor, v_threshold: Tensor, v_reset: Tensor, v_init: Tensor, steps: int, reset: str, tie: str,
    max_spikes: int,
    integrate: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:  # fmt: skip
    currents = _by_step(x, steps)
    v, rows = _start(v_init, currents[0]), []
    for t, current in enumerate(currents):
        v = integrate(v, current)
        s = fire(v, v_threshold, tie, max_spikes)
        rows.append(s)
        if t + 1 < steps:
            v = _after(v, s, v_threshold, v_reset, reset)
    return _ATEN.cat.default(rows, 0)  # type: ignore[no-any-return]


def _recurrent(fire: Fire, op: str, x: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
    """A neuron with a layer from its spikes back to itself; ``args`` are the neuron's own."""
    *constants, dt, steps, reset, tie, max_spikes, _ = args
    *given, threshold, v_reset, v_init = constants
    back = partial(_ATEN.linear.default, weight=weight, bias=bias) if weight.dim() == 2 else partial(_same_size, weight, bias)
    r: Tensor | None = None
    v_leak: Tensor | None = None
    if op == "if":
        k = (given[0].double() * dt).to(torch.float32)
    else:
        tau, r, v_leak = given[1:4] if op == "cuba_lif" else given
        k = _ratio(dt, tau)
    v, rows, kept = _start(v_init, _by_step(x, steps)[0]), list[Tensor](), torch.zeros(())
    for t, current in enumerate(_by_step(x, steps)):
        current = current + back(rows[-1]) if t else current
        if op == "cuba_lif":
            kept = kept if t else torch.zeros_like(current)
            current = kept = kept + _ratio(dt, given[0]) * (given[4] * current - kept)
        v = _charge(v, current, k, r, v_leak)
        rows.append(fire(v, threshold, tie, max_spikes))
        if t + 1 < steps:
            v = _after(v, rows[-1], threshold, v_reset, reset)
    return _ATEN.cat.default(rows, 0)  # type: ignore[no-any-return]


def _same_size(weight: Tensor, bias: Tensor | None, s: Tensor) -> Tensor:
    padding, groups = [n // 2 for n in weight.shape[2:]], weight.shape[0] // weight.shape[1]
    found: Tensor = _ATEN.conv2d.default(s, weight, bias, [1, 1], padding, [1, 1], groups)
    return found


def _integrating(x: Tensor, v_init: Tensor, steps: int, integrate: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    currents = _by_step(x, steps)
    v, rows = _start(v_init, currents[0]), []
    for current in currents:
        v = integrate(v, current)
        rows.append(v)
    return _ATEN.cat.default(rows, 0)  # type: ignore[no-any-return]


def _li(x: Tensor, tau: Tensor, r: Tensor, v_leak: Tensor, v_init: Tensor, dt: float, steps: int) -> Tensor:
    k = _ratio(dt, tau)
    return _integrating(x, v_init, steps, lambda v, c: _charge(v, c, k, r, v_leak))


def _i(x: Tensor, r: Tensor, v_init: Tensor, dt: float, steps: int) -> Tensor:
    k = (r.double() * dt).to(torch.float32)
    return _integrating(x, v_init, steps, lambda v, c: _charge(v, c, k, None, None))


def _cuba_li(
    x: Tensor, tau_syn: Tensor, tau_mem: Tensor, r: Tensor, v_leak: Tensor, w_in: Tensor, v_init: Tensor, dt: float, steps: int
) -> Tensor:
    return _li(_synapses(x, tau_syn, w_in, dt, steps), tau_mem, r, v_leak, v_init, dt, steps)


def _repeat(x: Tensor, steps: int) -> Tensor:
    return _ATEN.cat.default([x] * steps, 0)  # type: ignore[no-any-return]


def _fold(x: Tensor) -> Tensor:
    n, steps = x.shape[:2]
    if n != 1:
        x = _ATEN.permute.default(x, [1, 0, *range(2, x.dim())])
    return _ATEN.view.default(x, [n * steps, *x.shape[2:]])  # type: ignore[no-any-return]


def _delay(x: Tensor, delay: Tensor, lengths: Sequence[int], steps: int) -> Tensor:
    """What comes ``delay`` steps late, for each length of a delay by itself: a shift, and a mask where there are several."""
    n, found = x.shape[0] // steps, []
    for length in lengths:
        late = min(length, steps)
        none = torch.zeros([late * n, *x.shape[1:]], dtype=x.dtype)
        kept = _ATEN.slice.Tensor(x, 0, 0, (steps - late) * n)
        moved = _ATEN.cat.default([none, kept], 0) if late else x
        moved = none if late == steps else moved
        found.append(moved if len(lengths) == 1 else moved * (delay == length).to(x.dtype))
    total: Tensor = found[0]
    for part in found[1:]:
        total = total + part
    return total


def _unfold(x: Tensor, steps: int) -> Tensor:
    n = x.shape[0] // steps
    y = _ATEN.view.default(x, [steps, n, *x.shape[1:]]) if n != 1 else _ATEN.view.default(x, [1, steps, *x.shape[1:]])
    return y if n == 1 else _ATEN.permute.default(y, [1, 0, *range(2, y.dim())])  # type: ignore[no-any-return]


def _accumulate(x: Tensor, gain: float, steps: int) -> Tensor:
    parts = _by_step(x, steps)
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total * gain


def spiking_rules(floors: bool = False) -> dict[str, Callable[..., Tensor]]:
    """``edgekit`` operator to the function of the same arguments that stands for it in a converter's graph.

    Args:
        floors: comparisons as floors of quotients.
    """
    fire = _floored if floors else _fire
    firing: dict[str, Callable[..., Tensor]] = {"lif_sequence": _lif, "if_sequence": _if, "cuba_lif_sequence": _cuba_lif}
    loops = {f"{op}_recurrent": partial(_recurrent, fire, op) for op in ("lif", "if", "cuba_lif")}
    return {**_RULES, **{name: partial(rule, fire) for name, rule in firing.items()}, **loops, "fire": fire}


_RULES: Mapping[str, Callable[..., Tensor]] = {
    "li_sequence": _li,
    "i_sequence": _i,
    "cuba_li_sequence": _cuba_li,
    "lif_charge": lambda x, v, tau, r, v_leak, dt: _charge(v, x, _ratio(dt, tau), r, v_leak),
    "if_charge": lambda x, v, r, dt: _charge(v, x, (r.double() * dt).to(torch.float32), None, None),
    "synapse": lambda x, i, tau_syn, w_in, dt: i + _ratio(dt, tau_syn) * (w_in * x - i),
    "fire_reset": lambda x, s, v_threshold, v_reset, reset: _after(x, s, v_threshold, v_reset, reset),
    "repeat_steps": _repeat,
    "fold_steps": _fold,
    "unfold_steps": _unfold,
    "accumulate": _accumulate,
    "delay_steps": _delay,
}
