"""Spiking neurons as modules that run a folded sequence: (T*N, ...) in, time first, and the same shape out.

One step is: integrate, compare, reset (docs/spiking.md)::

    integrate-and-fire           v = v + i
    leaky integrate-and-fire     v = v + (1/tau) * ((0 - v) + r * i)
    current-based (tau_syn)      j = j + (1/tau_syn) * (i - j), then as leaky with j in the place of i
    spike                        s = v >= threshold
    reset                        subtract: v = v - threshold * s;   zero: v = 0 where s

A neuron that spikes up to ``spikes`` times a step (Loihi, Xylo) gives ``min(floor(v / threshold), spikes)`` and subtracts as
many thresholds. Gradients pass a spike by a surrogate (:data:`SURROGATES`; Neftci et al. 2019); the reset term carries one
unless ``detach_reset``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

__all__ = [
    "SURROGATES", "CountedMax", "Decode", "Fold", "Neuron", "Observing", "Repeat", "Reset", "Surrogate", "carry", "detach_state",
    "fire", "neurons_of", "set_steps",
]  # fmt: skip

Reset = Literal["subtract", "zero"]


def _triangle(x: Tensor) -> Tensor:
    return (1 - x.abs()).clamp(min=0)


def _rectangle(x: Tensor) -> Tensor:
    return (x.abs() < 0.5).to(x.dtype)


def _sigmoid(x: Tensor) -> Tensor:
    s = torch.sigmoid(4 * x)
    return 4 * s * (1 - s)


def _arctangent(x: Tensor) -> Tensor:
    return 1 / (1 + (torch.pi * x) ** 2)


def _narrow_triangle(x: Tensor) -> Tensor:
    return 0.3 * _triangle(x)


SURROGATES: dict[str, Callable[[Tensor], Tensor]] = {
    "triangle": _triangle,
    "rectangle": _rectangle,
    "sigmoid": _sigmoid,
    "arctangent": _arctangent,
    "linear": _narrow_triangle,
}
"""Name to the derivative of a spike by u = v / threshold - 1; "linear" is IIR-SNN's, 0.3 of the triangle."""


@runtime_checkable
class Observing(Protocol):
    """A surrogate that depends on the membranes seen so far."""

    def observe(self, u: Tensor) -> Callable[[Tensor], Tensor]:
        """The derivative for this step, whose u is given."""
        ...


Surrogate = Callable[[Tensor], Tensor] | Observing


class _Fire(torch.autograd.Function):
    """Spikes as given; their derivative by u = v / threshold - 1 is the surrogate's, around the nearest threshold."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, spikes: Tensor, surrogate: Callable[[Tensor], Tensor], most: int) -> Tensor:
        ctx.save_for_backward(u)
        ctx.surrogate, ctx.most = surrogate, most
        return spikes

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (u,) = ctx.saved_tensors
        if ctx.most > 1:
            u = u - torch.round(u).clamp(0, ctx.most - 1)
        return grads[0] * ctx.surrogate(u), None, None, None


def fire(v: Tensor, threshold: Tensor, surrogate: Surrogate, spikes: int = 1) -> Tensor:
    """Spikes of a membrane: 1 where ``v >= threshold``; up to ``spikes`` of them where more thresholds fit."""
    with torch.no_grad():
        counted = (v >= threshold).to(v.dtype) if spikes == 1 else torch.floor(v / threshold).clamp(0, spikes)
    u = v / threshold - 1
    shape = surrogate.observe(u.detach()) if isinstance(surrogate, Observing) else surrogate
    spike: Tensor = _Fire.apply(u, counted, shape, spikes)  # type: ignore[no-untyped-call]
    return spike


class Neuron(nn.Module):
    """A layer of neurons.

    Args:
        threshold: shape () or one that broadcasts against one sample (C, 1, 1); more than 0.
        v_init: membrane before the first step, the same shapes or one sample's.
        tau: time constant of the leak in steps; None: none (integrate-and-fire).
        tau_syn: time constant of the synaptic current in steps; None: it does not stay.
        r: what a leaky neuron's current is multiplied with, "one" (NIR's default) or "tau", which takes the current whole.
        learn: which of "threshold" and "tau" are parameters; "tau": tau_syn with it.
        spikes: most spikes of one step.

    Attributes:
        amplitude: what a spike stands for, as ``threshold``; 1 once it is folded into the layers that read it.
        recorded: membranes after each step (T, N, ...) of the last call, if ``record``.
    """

    def __init__(
        self,
        threshold: Tensor | float = 1.0,
        v_init: Tensor | float = 0.0,
        *,
        steps: int = 1,
        tau: float | None = None,
        tau_syn: float | None = None,
        r: Literal["one", "tau"] = "tau",
        reset: Reset = "subtract",
        surrogate: str = "triangle",
        spikes: int = 1,
        detach_reset: bool = False,
        learn: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.steps, self.reset, self.spikes, self.r = steps, reset, spikes, r
        self.surrogate: Surrogate = SURROGATES[surrogate]
        self.detach_reset, self.leaky = detach_reset, tau is not None
        self.threshold: Tensor
        self.tau: Tensor
        self._put("threshold", torch.as_tensor(threshold, dtype=torch.float32), "threshold" in learn)
        self._put("tau", torch.tensor(1.0 if tau is None else tau), "tau" in learn and tau is not None)
        self.tau_syn: Tensor | None
        self._put("tau_syn", None if tau_syn is None else torch.tensor(tau_syn), "tau" in learn and tau_syn is not None)
        self.v_init: Tensor
        self.register_buffer("v_init", torch.as_tensor(v_init, dtype=torch.float32))
        self.amplitude: Tensor | None = None
        self.record = False
        self.recorded: Tensor | None = None
        self.carried = False
        self.state: Tensor | None = None
        self.current: Tensor | None = None

    def _put(self, name: str, value: Tensor | None, learn: bool) -> None:
        self.register_parameter(name, nn.Parameter(value)) if learn and value is not None else self.register_buffer(name, value)

    def receive(self, i: Tensor) -> Tensor:
        """The current that reaches the membrane in a step."""
        if self.tau_syn is None:
            return i
        before = torch.zeros_like(i) if self.current is None else self.current
        self.current = before + (1 / self.tau_syn) * (i - before)
        return self.current

    def integrate(self, v: Tensor, i: Tensor) -> Tensor:
        """The membrane after one step's current."""
        if not self.leaky:
            return v + i
        return v + (1 / self.tau) * (-v + (self.tau * i if self.r == "tau" else i))

    def forward(self, x: Tensor) -> Tensor:
        sequence = x.reshape(self.steps, -1, *x.shape[1:])
        v = self.state if self.carried and self.state is not None else self.v_init.expand_as(sequence[0])
        self.current = self.current if self.carried else None
        out = []
        membranes = []
        for i in sequence:
            v = self.integrate(v, self.receive(i))
            s = fire(v, self.threshold, self.surrogate, self.spikes)
            back = s.detach() if self.detach_reset else s
            v = v - self.threshold * back if self.reset == "subtract" else v * (1 - back.clamp(max=1))
            out.append(s)
            if self.record:
                membranes.append(v)
        self.state, self.current = (v, self.current) if self.carried else (None, None)
        if self.record:
            self.recorded = torch.stack(membranes)
        spikes = torch.stack(out).reshape(x.shape)
        return spikes if self.amplitude is None else spikes * self.amplitude


class Repeat(nn.Module):
    """A constant (N, ...) as a current of every step: (T*N, ...)."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        return x.unsqueeze(0).expand(self.steps, *x.shape).reshape(-1, *x.shape[1:])


class Decode(nn.Module):
    """Mean over time: (T*N, ...) to (N, ...); summed in the order of ``edgekit::accumulate``.

    Attributes:
        recorded: what came in at each step (T, N, ...) in the last call, if ``record``.
    """

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps, self.record = steps, False
        self.recorded: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        sequence = x.reshape(self.steps, -1, *x.shape[1:])
        if self.record:
            self.recorded = sequence
        total = sequence[0]
        for part in sequence[1:]:
            total = total + part
        return total * (1 / self.steps)


class Fold(nn.Module):
    """Frames (N, T, ...) as a folded sequence (T*N, ...)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1).flatten(0, 1)


class CountedMax(nn.Module):
    """Max pooling of spikes that is exact in their counts.

    A step's output is how much the largest count of a window grew in it: one spike at most, as every count grows by one at most.
    """

    def __init__(self, steps: int, arguments: tuple[Any, ...]) -> None:
        super().__init__()
        self.steps, self.arguments = steps, arguments
        self.carried = False
        self.state: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        counts = x.reshape(self.steps, -1, *x.shape[1:]).cumsum(0)
        if self.carried and self.state is not None:
            counts = counts + self.state
        before = self.state if self.carried and self.state is not None else torch.zeros_like(counts[0])
        if self.carried:
            self.state = counts[-1]
        both = torch.cat([before.unsqueeze(0), counts])
        pooled: Tensor = torch.ops.aten.max_pool2d.default(both.reshape(-1, *x.shape[1:]), *self.arguments)
        pooled = pooled.reshape(self.steps + 1, -1, *pooled.shape[1:])
        return (pooled[1:] - pooled[:-1]).reshape(-1, *pooled.shape[2:])


_TIMED = (Neuron, Repeat, Decode, CountedMax)


def set_steps(module: nn.Module, steps: int) -> None:
    """Let every part of a spiking network run that many steps a call."""
    for part in module.modules():
        if isinstance(part, _TIMED):
            part.steps = steps


def carry(module: nn.Module, on: bool) -> None:
    """Keep membranes from one call to the next (``on``), from their initial values; or start every call there."""
    for part in module.modules():
        if isinstance(part, Neuron | CountedMax):
            part.carried, part.state = on, None
            if isinstance(part, Neuron):
                part.current = None


def detach_state(module: nn.Module) -> None:
    """Cut carried membranes from the graph of the step before (SLTT)."""
    for part in module.modules():
        if isinstance(part, Neuron | CountedMax) and part.state is not None:
            part.state = part.state.detach()
            if isinstance(part, Neuron) and part.current is not None:
                part.current = part.current.detach()


def neurons_of(module: nn.Module) -> dict[str, Neuron]:
    """Submodule name to neuron, in order."""
    return {name: part for name, part in module.named_modules() if isinstance(part, Neuron)}
