"""A spiking program step by step: its own graph, one time step a call, membranes kept in between; and early exit from it.

The arithmetic is the operators' own (:mod:`edgekit.frozen.spiking_ops`), so all steps one by one give what the program gives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from edgekit.errors import ModelError
from edgekit.frozen import spiking_ops
from edgekit.frozen.float_neurons import feedback
from edgekit.frozen.program import FrozenProgram

__all__ = ["Steps", "run_until", "steps_of"]


@dataclass
class Steps:
    """A program in the middle of its steps.

    Attributes:
        program: a spiking program with float neurons.
        count: its steps.
        state: membranes (synaptic currents, feedback) by fx node name, rows of the samples that still run.
        sums: of the values that outputs are means of, by fx node name.
        done: steps taken.
    """

    program: FrozenProgram
    count: int
    state: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)
    done: int = 0

    def step(self, x: Tensor) -> Tensor:
        """Take one step with the program's input for the samples that still run; returns the sum of outputs so far (N, ...)."""
        with torch.no_grad():
            result = _Step(self).run(x)
        self.done += 1
        first: Tensor = result[0] if isinstance(result, tuple | list) else result
        return first

    def keep(self, rows: Tensor) -> None:
        """Go on with these samples only: a bool (N,) over those that still run."""
        self.state = {k: tuple(v[rows] for v in values) for k, values in self.state.items()}
        self.sums = {k: v[rows] for k, v in self.sums.items()}


def steps_of(program: FrozenProgram) -> Steps:
    """The program before its first step.

    Raises:
        ModelError: no spiking program of float neurons, or one with operators over time that cannot be stepped.
    """
    counts = {int(layer.args["steps"]) for layer in program.layers if "steps" in layer.args}
    if len(counts) != 1:
        raise ModelError(f"program {program.name} is no spiking program with one number of steps; there is nothing to step")
    allowed = {*_NEURONS, "repeat_steps", "fold_steps", "accumulate"}
    wrong = [f"{x.name} ({x.op})" for x in program.layers if x.op not in allowed]
    wrong += [f"{x.name} ({x.op})" for x in program.float_layers if x.op == "cumsum"]
    if wrong:
        raise ModelError(f"program {program.name} cannot run step by step: {', '.join(wrong)}")
    return Steps(program, counts.pop())


def run_until(
    program: FrozenProgram, x: Tensor, stop: Callable[[Tensor, int], Tensor], progress: Callable[[int, int], None] | None = None
) -> tuple[Tensor, Tensor]:
    """Run each sample until ``stop`` says so, at most all steps.

    Args:
        x: (N, ...).
        stop: (sums of outputs so far of the samples that still run (M, ...), steps taken) -> bool (M,).
        progress: called with (samples done, N).

    Returns:
        Outputs, means over the steps that each sample took (N, ...), and these numbers of steps (N,).
    """
    at = steps_of(program)
    running = torch.arange(len(x))
    taken = torch.zeros(len(x), dtype=torch.int64)
    outputs: Tensor | None = None
    while len(running):
        sums = at.step(x[running])
        ends = stop(sums, at.done) if at.done < at.count else torch.ones(len(running), dtype=torch.bool)
        if outputs is None:
            outputs = sums.new_zeros((len(x), *sums.shape[1:]))
        outputs[running[ends]] = sums[ends] / at.done
        taken[running[ends]] = at.done
        running = running[~ends]
        at.keep(~ends)
        if progress:
            progress(len(x) - len(running), len(x))
    assert outputs is not None
    return outputs, taken


class _Step(fx.Interpreter):
    """One step of every node."""

    def __init__(self, at: Steps) -> None:
        super().__init__(at.program.module)
        self.at = at

    def run_node(self, n: fx.Node) -> Any:
        name = str(n.target).split(".")[1] if str(n.target).startswith("edgekit.") else ""
        if not name:
            return super().run_node(n)
        given, _ = self.fetch_args_kwargs_from_env(n)
        args: dict[str, Any] = dict(zip((a.name for a in n.target._schema.arguments), given, strict=True))  # type: ignore[union-attr]
        x: Tensor = args["x"]
        if name == "repeat_steps":
            return x
        if name == "fold_steps":
            return x[:, self.at.done]
        if name == "accumulate":
            self.at.sums[n.name] = self.at.sums[n.name] + x if n.name in self.at.sums else x
            return self.at.sums[n.name]
        out, self.at.state[n.name] = _NEURONS[name](x, args, self.at.state.get(n.name))
        return out


State = tuple[Tensor, ...]


def _start(x: Tensor, args: dict[str, Any], state: State | None) -> Tensor:
    return args["v_init"].to(x.dtype).expand(x.shape) if state is None else state[0]


def _spike(v: Tensor, args: dict[str, Any]) -> tuple[Tensor, Tensor]:
    threshold = args["v_threshold"].to(v.dtype)
    return spiking_ops.fire(v, threshold, args["v_reset"], args["reset"], args["tie"], args["max_spikes"])


def _rate(args: dict[str, Any], tau: str, x: Tensor) -> Tensor:
    rate: Tensor = (args["dt"] / args[tau].double()).to(x.dtype)
    return rate


def _gain(args: dict[str, Any], x: Tensor) -> Tensor:
    gain: Tensor = (args["r"].double() * args["dt"]).to(x.dtype)
    return gain


def _if(x: Tensor, args: dict[str, Any], state: State | None) -> tuple[Tensor, State]:
    s, v = _spike(spiking_ops.charge(_start(x, args, state), x, _gain(args, x), None, None), args)
    return s, (v,)


def _lif(x: Tensor, args: dict[str, Any], state: State | None) -> tuple[Tensor, State]:
    r, leak = args["r"].to(x.dtype), args["v_leak"].to(x.dtype)
    s, v = _spike(spiking_ops.charge(_start(x, args, state), x, _rate(args, "tau", x), r, leak), args)
    return s, (v,)


def _cuba_lif(x: Tensor, args: dict[str, Any], state: State | None) -> tuple[Tensor, State]:
    i = torch.zeros_like(x) if state is None else state[1]
    i = i + _rate(args, "tau_syn", x) * (args["w_in"].to(x.dtype) * x - i)
    r, leak = args["r"].to(x.dtype), args["v_leak"].to(x.dtype)
    s, v = _spike(spiking_ops.charge(_start(x, args, state), i, _rate(args, "tau_mem", x), r, leak), args)
    return s, (v, i)


def _li(x: Tensor, args: dict[str, Any], state: State | None) -> tuple[Tensor, State]:
    r, leak = args["r"].to(x.dtype), args["v_leak"].to(x.dtype)
    v = spiking_ops.charge(_start(x, args, state), x, _rate(args, "tau", x), r, leak)
    return v, (v,)


def _recurrent(
    x: Tensor, args: dict[str, Any], state: State | None, neuron: Callable[..., tuple[Tensor, State]]
) -> tuple[Tensor, State]:
    """The last part of the state is what the spikes of the step before give back; nothing before the first step."""
    s, after = neuron(x, args, None) if state is None else neuron(x + state[-1], args, state[:-1])
    return s, (*after, feedback(s, args["weight"], args["bias"]))


def _late(x: Tensor, args: dict[str, Any], state: State | None) -> tuple[Tensor, State]:
    """What came in ``delay`` steps ago; the state is all that is on its way, (N, longest delay, ...)."""
    delay: Tensor = args["delay"].to(torch.int64)
    longest = int(delay.max())
    waiting = x.new_zeros(x.shape[0], longest, *x.shape[1:]) if state is None else state[0]
    line = torch.cat([waiting, x.unsqueeze(1)], 1)
    at = (longest - delay).expand(x.shape).unsqueeze(1)
    return line.gather(1, at).squeeze(1), (line[:, 1:],)


_NEURONS: dict[str, Callable[[Tensor, dict[str, Any], State | None], tuple[Tensor, State]]] = {
    "if_sequence": _if,
    "lif_sequence": _lif,
    "cuba_lif_sequence": _cuba_lif,
    "li_sequence": _li,
    "delay_steps": _late,
    "if_recurrent": partial(_recurrent, neuron=_if),
    "lif_recurrent": partial(_recurrent, neuron=_lif),
    "cuba_lif_recurrent": partial(_recurrent, neuron=_cuba_lif),
}
