"""Runs a NIR graph in float64 with numpy: no simulator, no framework. The oracle of every spiking file.

Semantics: :mod:`edgekit.nir.semantics` (metadata, cycles) and :mod:`edgekit.frozen.spiking_ops` (a step). Every kind of node of
NIR 1.0.8 is known, graphs in graphs and recurrent graphs too. What no cycle holds is computed for all steps at once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgekit.errors import InputError, UnsupportedError
from edgekit.nir.nodes import stateless
from edgekit.nir.semantics import FIRING, INTEGRATING, Flat, Rule, check_times, flatten, kind, rule, step_length

__all__ = ["Neuron", "Trace", "interpret", "neuron", "whole_steps"]

Array = np.ndarray
State = tuple[Array, ...]


@dataclass(frozen=True)
class Trace:
    """What a run gave, float64, time first: (T, N, ...).

    Attributes:
        outputs: by name of the output node.
        values: what each recorded node emitted: spikes of neurons, membranes of integrators, values of others.
        charged: membrane of each recorded firing node after integration, before comparison and reset.
        membranes: membrane of each recorded neuron after the step.
    """

    outputs: Mapping[str, Array]
    values: Mapping[str, Array]
    charged: Mapping[str, Array]
    membranes: Mapping[str, Array]

    @property
    def output(self) -> Array:
        """The one output.

        Raises:
            InputError: the graph has several.
        """
        if len(self.outputs) != 1:
            raise InputError(f"the graph has {len(self.outputs)} outputs ({', '.join(self.outputs)}); choose one by name")
        return next(iter(self.outputs.values()))


def interpret(
    graph: Any,
    inputs: Array | Mapping[str, Array],
    *,
    dt: float | None = None,
    facts: Mapping[str, Any] | None = None,
    record: Collection[str] | None = (),
    forced: Mapping[str, Array] | None = None,
) -> Trace:
    """Run a graph from its initial state.

    Args:
        graph: a ``nir.NIRGraph``.
        inputs: (T, N, *shape) for each input node by its name; an array alone where there is one.
        dt: length of a step instead of the graph's.
        facts: metadata for neurons that have none, such as ``{"reset": "subtract", "tie": "ge"}``.
        record: nodes to keep ("graph.node" for those of inner graphs); None: all.
        forced: values, (T, N, ...), that nodes pass on in place of their own; ``Trace.values`` has their own.

    Raises:
        InputError: inputs whose number, shape or length does not fit.
        UnsupportedError: a graph that cannot be run; names the node.
    """
    flat = flatten(graph)
    given = _inputs(flat, inputs)
    length = step_length(graph, dt)
    for name, node in flat.nodes.items():
        check_times(name, node)
    steps, batch = next(iter(given.values())).shape[:2]
    run = _Run(flat, length, facts or {}, steps, batch, set(flat.nodes) if record is None else set(record), forced or {})
    for group in flat.groups:
        if flat.is_cycle(group):
            run.cycle(group)
        elif group[0] in given:
            run.emit(group[0], given[group[0]])
        else:
            run.sequence(group[0])
    kept = {n: run.own[n] for n in flat.nodes if n in run.record}
    return Trace({n: run.values[n] for n in flat.outputs}, kept, run.charged, run.membranes)


def _inputs(flat: Flat, inputs: Array | Mapping[str, Array]) -> dict[str, Array]:
    if not isinstance(inputs, Mapping):
        if len(flat.inputs) != 1:
            raise InputError(f"the graph has {len(flat.inputs)} inputs ({', '.join(flat.inputs)}); give each by its name")
        inputs = {flat.inputs[0]: inputs}
    if set(inputs) != set(flat.inputs):
        raise InputError(f"inputs {', '.join(sorted(inputs))} given, the graph has {', '.join(flat.inputs)}")
    given = {name: np.asarray(x, np.float64) for name, x in inputs.items()}
    first = next(iter(given.values())).shape[:2]
    for name, x in given.items():
        shape = flat.nodes[name].input_type["input"]
        wanted = () if shape is None else tuple(int(n) for n in np.atleast_1d(shape))
        if (shape is not None and x.shape[2:] != wanted) or x.shape[:2] != first or 0 in first or len(first) < 2:
            raise InputError(f"input {name}: shape {x.shape} given, (T, N, {', '.join(map(str, wanted))}) expected")
    return given


@dataclass(frozen=True)
class Neuron:
    """A node with state: ``start(shape) -> state`` and ``step(state, x) -> (emitted, charged membrane, state)``."""

    start: Callable[[tuple[int, ...]], State]
    step: Callable[[State, Array], tuple[Array, Array, State]]


def neuron(name: str, node: Any, dt: float, facts: Mapping[str, Any] | None = None) -> Neuron | None:
    """The clocked form of a neuron or delay; None for a node without state.

    Raises:
        UnsupportedError: a delay that is no whole number of steps, metadata that is not known.
    """
    if kind(node) == "Delay":
        return _delay(name, node, dt)
    if kind(node) not in FIRING + INTEGRATING:
        return None
    p = {k: np.asarray(v, np.float64) for k, v in vars(node).items() if isinstance(v, np.ndarray | float | int)}
    how = rule(name, node, facts)
    integrate = _integrator(kind(node), p, dt)
    cuba = kind(node).startswith("Cuba")

    def start(shape: tuple[int, ...]) -> State:
        v = np.broadcast_to(np.asarray(how.v_init, np.float64), shape).copy()
        return (v, np.zeros(shape)) if cuba else (v,)

    def step(state: State, x: Array) -> tuple[Array, Array, State]:
        v, *current = integrate(state, x)
        if kind(node) not in FIRING:
            return v, v, (v, *current)
        spikes, after = _fire(v, p["v_threshold"], p["v_reset"], how)
        return spikes, v, (after, *current)

    return Neuron(start, step)


def _integrator(which: str, p: Mapping[str, Array], dt: float) -> Callable[[State, Array], State]:
    if which in ("IF", "I"):
        return lambda s, x: (s[0] + p["r"] * dt * x,)
    if which in ("LIF", "LI"):
        return lambda s, x: (s[0] + dt / p["tau"] * ((p["v_leak"] - s[0]) + p["r"] * x),)

    def cuba(state: State, x: Array) -> State:
        v, i = state
        i = i + dt / p["tau_syn"] * (p["w_in"] * x - i)
        return v + dt / p["tau_mem"] * ((p["v_leak"] - v) + p["r"] * i), i

    return cuba


def _fire(v: Array, threshold: Array, v_reset: Array, how: Rule) -> tuple[Array, Array]:
    if how.max_spikes > 1:
        spikes = np.clip(np.floor(v / threshold), 0, how.max_spikes)
    else:
        spikes = (v >= threshold if how.tie == "ge" else v > threshold).astype(np.float64)
    if how.reset == "subtract":
        return spikes, v - spikes * threshold
    return spikes, np.where(spikes > 0, 0.0 if how.reset == "zero" else v_reset, v)


def whole_steps(name: str, node: Any, dt: float) -> Array:
    """The steps of a delay, int64.

    Raises:
        UnsupportedError: they are negative or no whole number.
    """
    exact = np.asarray(node.delay, np.float64) / dt
    steps = np.rint(exact).astype(np.int64)
    if np.any(np.abs(exact - steps) > 1e-6 * np.maximum(1, np.abs(exact))) or np.any(steps < 0):
        worst = float(exact.reshape(-1)[np.argmax(np.abs(exact - steps))])
        raise UnsupportedError(f"node {name} (Delay): a delay of {worst:g} steps of dt {dt:g}; delays are whole steps here")
    return steps


def _delay(name: str, node: Any, dt: float) -> Neuron:
    steps = whole_steps(name, node, dt)
    longest = int(steps.max(initial=0))

    def start(shape: tuple[int, ...]) -> State:
        return (np.zeros((longest, *shape)),)

    def step(state: State, x: Array) -> tuple[Array, Array, State]:
        past = np.concatenate([x[None], state[0]])  # past[d] is the input of d steps ago
        late = np.take_along_axis(past, np.broadcast_to(steps, x.shape)[None], 0)[0]
        return late, late, (past[:longest],)

    return Neuron(start, step)


class _Run:
    """The values of one run, node by node."""

    def __init__(
        self,
        flat: Flat,
        dt: float,
        facts: Mapping[str, Any],
        steps: int,
        batch: int,
        record: set[str],
        forced: Mapping[str, Array],
    ) -> None:
        self.flat, self.steps, self.batch, self.record, self.forced = flat, steps, batch, record, forced
        self.neurons = {n: found for n, node in flat.nodes.items() if (found := neuron(n, node, dt, facts)) is not None}
        self.values: dict[str, Array] = {}
        self.own: dict[str, Array] = {}
        self.charged: dict[str, Array] = {}
        self.membranes: dict[str, Array] = {}

    def emit(self, name: str, value: Array) -> None:
        self.own[name] = value
        self.values[name] = np.asarray(self.forced.get(name, value), np.float64)

    def _sum(self, parts: Sequence[Array], name: str) -> Array:
        shapes = {p.shape for p in parts}
        if len(shapes) > 1:
            raise UnsupportedError(f"node {name} sums values of different shapes: {', '.join(map(str, sorted(shapes)))}")
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def _apply(self, name: str, x: Array) -> Array:
        try:
            return stateless(name, self.flat.nodes[name], x)
        except ValueError as error:
            found = kind(self.flat.nodes[name])
            raise UnsupportedError(f"node {name} ({found}) does not take a value of shape {x.shape[1:]}: {error}") from error

    def sequence(self, name: str) -> None:
        """A node outside of cycles, all steps at once."""
        x = self._sum([self.values[s] for s in self.flat.sources[name]], name)
        if name not in self.neurons:
            y = self._apply(name, x.reshape(-1, *x.shape[2:]))
            self.emit(name, y.reshape(self.steps, self.batch, *y.shape[1:]))
            return
        state, rows = self._start(name, x[0].shape), []
        for t in range(self.steps):
            y, charged, state = self._step(name, state, x[t])
            rows.append((y, charged, state[0]))
        self._keep(name, rows)

    def _start(self, name: str, shape: tuple[int, ...]) -> State:
        try:
            return self.neurons[name].start(shape)
        except ValueError as error:
            raise UnsupportedError(f"node {name}: its v_init does not fit its values of shape {shape[1:]}") from error

    def _step(self, name: str, state: State, x: Array) -> tuple[Array, Array, State]:
        try:
            result = self.neurons[name].step(state, x)
        except ValueError as error:
            raise UnsupportedError(f"node {name}: its parameters do not fit its values of shape {x.shape[1:]}") from error
        if result[0].shape != x.shape:
            raise UnsupportedError(f"node {name}: its parameters do not fit its values of shape {x.shape[1:]}")
        return result

    def _keep(self, name: str, rows: Sequence[tuple[Array, Array, Array]]) -> None:
        self.emit(name, np.stack([y for y, _, _ in rows]))
        if name in self.record and kind(self.flat.nodes[name]) != "Delay":
            self.charged[name] = np.stack([v for _, v, _ in rows])
            self.membranes[name] = np.stack([v for _, _, v in rows])

    def cycle(self, group: Sequence[str]) -> None:
        """Nodes that feed each other, step by step."""
        shapes = self._shapes(group)
        states = {n: self._start(n, shapes[n]) for n in group if n in self.neurons}
        before = {n: np.zeros(self._out_shape(n, shapes)) for n in group}
        rows: dict[str, list[tuple[Array, Array, Array]]] = {n: [] for n in group}
        for t in range(self.steps):
            now: dict[str, Array] = {}
            for n in group:
                parts = [
                    self.values[s][t] if s not in rows else before[s] if (s, n) in self.flat.feedback else now[s]
                    for s in self.flat.sources[n]
                ]
                x = self._sum(parts, n)
                if n in states:
                    y, charged, states[n] = self._step(n, states[n], x)
                    rows[n].append((y, charged, states[n][0]))
                else:
                    y = self._apply(n, x)
                    rows[n].append((y, y, y))
                now[n] = np.asarray(self.forced[n][t], np.float64) if n in self.forced else y
            before = now
        for n in group:
            self._keep(n, rows[n]) if n in states else self.emit(n, np.stack([y for y, _, _ in rows[n]]))

    def _shapes(self, group: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """Shape of what each node of a cycle gets in one step, found by following values from outside of it."""
        shapes: dict[str, tuple[int, ...]] = {}
        given: dict[str, tuple[int, ...]] = {}
        for n in group:
            known = [self.values[s].shape[1:] for s in self.flat.sources[n] if s not in group]
            known += [given[s] for s in self.flat.sources[n] if s in given and (s, n) not in self.flat.feedback]
            if not known:
                raise UnsupportedError(
                    f"node {n} is in a cycle and gets values from the step before only; connect it to an input"
                )
            shapes[n] = known[0]
            given[n] = self._out_shape(n, shapes)
        return shapes

    def _out_shape(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        return shapes[name] if name in self.neurons else self._apply(name, np.zeros(shapes[name])).shape
