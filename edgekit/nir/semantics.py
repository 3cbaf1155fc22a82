"""What a NIR graph says, and what edgekit adds in metadata because NIR 1.0.8 has no field for it.

NIR describes neurons by continuous equations. A clocked run needs four facts more; edgekit writes them as metadata, which survive
a file, and reads them back:

==============  ========  ==============================================================================  ==================
fact            on        values                                                                          without it
==============  ========  ==============================================================================  ==================
``dt``          graph     length of a step, in the unit of the time constants                             1.0
``reset``       neuron    "subtract" (v - v_threshold), "zero" (v = 0), "value" (v = v_reset)             "value"
``tie``         neuron    "gt": a spike where v > v_threshold, as NIR's text has it; "ge": where v >= it  "gt"
``v_init``      neuron    membrane before the first step: a number or an array                            0
``max_spikes``  neuron    spikes a step; above 1 a neuron gives floor(v / v_threshold) up to it           1
==============  ========  ==============================================================================  ==================

A step is the forward Euler step written down in :mod:`edgekit.frozen.spiking_ops`. An edge that closes a cycle carries the value
of the step before (0 at the first): inside a cycle these are the edges to a node that is not farther from the inputs than the
one they come from, distance counted in edges.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgekit.errors import UnsupportedError

__all__ = [
    "FIRING", "INTEGRATING", "KINDS", "MOST_STEPS", "Flat", "Rule", "check_threshold", "check_times", "flatten", "kind",
    "number_of_steps", "rule", "step_length", "with_output",
]  # fmt: skip

FIRING = ("LIF", "IF", "CubaLIF")
INTEGRATING = ("LI", "I", "CubaLI")
_STATELESS = (
    "Input", "Output", "Affine", "Linear", "Scale", "Conv1d", "Conv2d", "SumPool2d", "AvgPool2d", "Flatten", "Threshold",
)  # fmt: skip
KINDS = (*_STATELESS, *FIRING, *INTEGRATING, "Delay")
"""Every kind of node that NIR 1.0.8 can hold, beside graphs in graphs."""

MOST_STEPS = 1 << 16
"""Time steps of one inference that a file or a user may ask for."""

_CHOICES = {"reset": ("subtract", "zero", "value"), "tie": ("gt", "ge")}


def kind(node: Any) -> str:
    """The kind of a NIR node, such as "CubaLIF"."""
    return type(node).__name__


@dataclass(frozen=True)
class Rule:
    """The facts of a neuron that NIR leaves open.

    Attributes:
        reset: "subtract", "zero" or "value".
        tie: "gt" or "ge".
        v_init: membrane before the first step, a number or an array of the neuron's shape.
        max_spikes: largest number of spikes in a step.
    """

    reset: str = "value"
    tie: str = "gt"
    v_init: Any = 0.0
    max_spikes: int = 1

    def metadata(self) -> dict[str, Any]:
        """All of them, as they stand in a file."""
        return {"reset": self.reset, "tie": self.tie, "v_init": self.v_init, "max_spikes": self.max_spikes}


def rule(name: str, node: Any, overrides: Mapping[str, Any] | None = None) -> Rule:
    """The rule of a neuron from its metadata.

    Args:
        overrides: facts for a file that has none; what the node says itself goes before.

    Raises:
        UnsupportedError: a value that is none of those allowed.
    """
    facts = {**(overrides or {}), **{k: v for k, v in _metadata(node).items() if k in Rule.__dataclass_fields__}}
    for key, allowed in _CHOICES.items():
        if key in facts and facts[key] not in allowed:
            raise UnsupportedError(
                f"node {name} ({kind(node)}): metadata {key} is {facts[key]!r}, edgekit knows {' and '.join(allowed)}"
            )
    try:
        facts["max_spikes"] = int(facts.get("max_spikes", 1))
        start = np.asarray(facts.get("v_init", 0.0), np.float64)
    except (TypeError, ValueError) as error:
        raise UnsupportedError(f"node {name} ({kind(node)}): metadata v_init or max_spikes is no number ({error})") from error
    facts["v_init"] = start if start.ndim else float(start)
    found = Rule(**facts)
    if found.max_spikes < 1 or (found.max_spikes > 1 and found.tie != "ge"):
        raise UnsupportedError(f"node {name}: max_spikes {found.max_spikes} needs tie ge and at least 1; correct its metadata")
    if found.reset == "zero" and np.any(np.asarray(getattr(node, "v_reset", 0.0))):
        raise UnsupportedError(f"node {name}: metadata reset is zero and v_reset is not; write reset: value, or clear v_reset")
    return found


def check_threshold(name: str, node: Any, overrides: Mapping[str, Any] | None = None) -> None:
    """Look whether a reset brings a neuron's membrane below its threshold: else it spikes for ever, which is no network.

    Raises:
        UnsupportedError: it does not; names the node.
    """
    how = rule(name, node, overrides)
    threshold = np.asarray(getattr(node, "v_threshold", np.inf), np.float64)
    below = np.asarray(getattr(node, "v_reset", 0.0) if how.reset == "value" else 0.0, np.float64)
    if threshold.shape and below.shape and threshold.shape != below.shape:
        raise UnsupportedError(
            f"node {name} ({kind(node)}): v_threshold has shape {threshold.shape} and v_reset {below.shape}; make them equal"
        )
    wrong = threshold <= below
    if np.any(wrong):
        found = float(threshold.reshape(-1)[int(np.argmax(np.broadcast_to(wrong, threshold.shape).reshape(-1)))])
        what = f"v_reset {float(below.reshape(-1)[0]):g}" if how.reset == "value" else "0"
        raise UnsupportedError(
            f"node {name} ({kind(node)}): v_threshold is {found:g}, not above {what}, which a reset leads to; correct the file"
        )


def check_times(name: str, node: Any, dt: float = 0.0) -> None:
    """Look whether time constants are above 0 and a step of ``dt`` can follow them: above twice one, values grow without bound.

    Raises:
        UnsupportedError: it cannot, or a time constant is not above 0; names the node.
    """
    for key in ("tau", "tau_mem", "tau_syn"):
        least = float(np.min(np.asarray(getattr(node, key, np.inf), np.float64), initial=np.inf))
        if not least > 0:
            raise UnsupportedError(
                f"node {name} ({kind(node)}): {key} is {least:g}, a positive number expected; correct the file"
            )
        if dt > 2 * least:
            raise UnsupportedError(
                f"node {name} ({kind(node)}): {key} is {least:g}, and a step of {dt:g} is more than twice as long: its values "
                "grow without bound; give the length of a step in the unit of the time constants (dt)"
            )


def number_of_steps(graph: Any, steps: int | None = None) -> int | None:
    """Time steps of one inference: ``steps`` if given, else what the graph's metadata say; None where they say nothing.

    Raises:
        UnsupportedError: it is no whole number from 1 to :data:`MOST_STEPS`.
    """
    value = steps if steps is not None else _metadata(graph).get("steps")
    if value is None:
        return None
    try:
        found = int(value)
        whole = found == float(value)
    except (TypeError, ValueError, OverflowError):
        found, whole = 0, False
    if not whole or not 1 <= found <= MOST_STEPS:
        where = "the number of steps" if steps is not None else "the graph's metadata steps"
        raise UnsupportedError(f"{where} is {value!r}, a whole number from 1 to {MOST_STEPS:,} expected")
    return found


def with_output(graph: Any, name: str | None) -> Any:
    """The graph with one of its outputs, and without what leads to others only; None: as it is.

    Raises:
        UnsupportedError: there is no output of that name.
    """
    import nir

    flat = flatten(graph)
    if name is None or flat.outputs == (name,):
        return graph
    if name not in flat.outputs:
        raise UnsupportedError(f"the graph has no output {name!r}; choose one of: {', '.join(flat.outputs)}")
    kept, waiting = {name}, [name]
    while waiting:
        for source in flat.sources[waiting.pop()]:
            if source not in kept:
                kept.add(source)
                waiting.append(source)
    nodes = {n: node for n, node in flat.nodes.items() if n in kept}
    edges = [(source, n) for n in nodes for source in flat.sources[n]]
    return nir.NIRGraph(nodes, edges, metadata=graph.metadata, type_check=False)


def step_length(graph: Any, dt: float | None = None) -> float:
    """Length of a step: ``dt`` if given, else the graph's metadata, else 1.0.

    Raises:
        UnsupportedError: it is no positive number.
    """
    value = dt if dt is not None else _metadata(graph).get("dt", 1.0)
    try:
        length = float(value)
    except (TypeError, ValueError):
        length = 0.0
    if not 0 < length < float("inf"):
        raise UnsupportedError(f"the graph's metadata dt is {value!r}, a positive number expected")
    return length


def _metadata(node: Any) -> Mapping[str, Any]:
    value = getattr(node, "metadata", None)
    return value if isinstance(value, Mapping) else {}


@dataclass(frozen=True)
class Flat:
    """A graph without graphs in it.

    Attributes:
        nodes: by name; nodes of inner graphs are called "graph.node", their inputs and outputs too (they pass values on).
        sources: for each node the nodes whose sum it gets, in the order of the edges.
        inputs, outputs: names of the outermost inputs and outputs.
        groups: nodes in order of execution; a group of more than one node, or of one that feeds itself, is a cycle.
        feedback: edges (from, to) that carry the value of the step before.
    """

    nodes: Mapping[str, Any]
    sources: Mapping[str, tuple[str, ...]]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...]
    feedback: frozenset[tuple[str, str]]

    def is_cycle(self, group: Sequence[str]) -> bool:
        """Whether the nodes of a group feed each other."""
        return len(group) > 1 or group[0] in self.sources[group[0]]


def flatten(graph: Any) -> Flat:
    """A graph with its inner graphs written out, its cycles found, and its nodes in order.

    Raises:
        UnsupportedError: a node of an unknown kind, an edge to a node that is not there, an inner graph with several inputs or
            outputs, or a cycle that no input reaches.
    """
    nodes: dict[str, Any] = {}
    edges: list[tuple[str, str]] = []
    _collect(graph, "", nodes, edges)
    edges = list(dict.fromkeys(edges))
    for a, b in edges:
        for end in (a, b):
            if end not in nodes:
                raise UnsupportedError(f"edge {a} -> {b}: there is no node {end}; the graph is damaged")
    sources = {name: tuple(a for a, b in edges if b == name) for name in nodes}
    inputs, outputs = (tuple(n for n, node in graph.nodes.items() if kind(node) == k) for k in ("Input", "Output"))
    roots = [n for n in nodes if not sources[n] and n not in inputs]
    if roots or not inputs or not outputs:
        what = f"node {roots[0]} gets no value" if roots else "it has no Input or no Output node"
        raise UnsupportedError(f"the graph cannot be run: {what}; connect it")
    distance = _distances(inputs, edges)
    lost = [n for n in nodes if n not in distance]
    if lost:
        raise UnsupportedError(f"node {lost[0]} is in a cycle that no input reaches; connect it or remove it")
    groups = _components(nodes, edges)
    inside = {n: i for i, group in enumerate(groups) for n in group}
    feedback = frozenset((a, b) for a, b in edges if inside[a] == inside[b] and distance[b] <= distance[a])
    ordered = tuple(_ordered(group, [e for e in edges if e not in feedback]) for group in groups)
    return Flat(nodes, sources, inputs, outputs, ordered, feedback)


def _collect(graph: Any, prefix: str, nodes: dict[str, Any], edges: list[tuple[str, str]]) -> None:
    first: dict[str, str] = {}
    last: dict[str, str] = {}
    for name, node in graph.nodes.items():
        full = prefix + name
        if kind(node) == "NIRGraph":
            ends = {k: [n for n, inner in node.nodes.items() if kind(inner) == k] for k in ("Input", "Output")}
            if any(len(found) != 1 for found in ends.values()):
                raise UnsupportedError(
                    f"graph {full}: {len(ends['Input'])} inputs and {len(ends['Output'])} outputs; an inner graph has one of each"
                )
            first[name], last[name] = f"{full}.{ends['Input'][0]}", f"{full}.{ends['Output'][0]}"
            _collect(node, f"{full}.", nodes, edges)
        elif kind(node) in KINDS:
            nodes[full] = node
        else:
            raise UnsupportedError(f"node {full} is a {kind(node)}, which NIR 1.0.8 does not have")
    edges += [(last.get(a, prefix + a), first.get(b, prefix + b)) for a, b in graph.edges]


def _distances(inputs: Sequence[str], edges: Sequence[tuple[str, str]]) -> dict[str, int]:
    following: dict[str, list[str]] = {}
    for a, b in edges:
        following.setdefault(a, []).append(b)
    distance, queue = dict.fromkeys(inputs, 0), deque(inputs)
    while queue:
        a = queue.popleft()
        for b in following.get(a, []):
            if b not in distance:
                distance[b] = distance[a] + 1
                queue.append(b)
    return distance


def _components(nodes: Mapping[str, Any], edges: Sequence[tuple[str, str]]) -> list[tuple[str, ...]]:
    """Strongly connected components, sources first (Kosaraju 1978)."""
    forward: dict[str, list[str]] = {n: [] for n in nodes}
    backward: dict[str, list[str]] = {n: [] for n in nodes}
    for a, b in edges:
        forward[a].append(b)
        backward[b].append(a)
    finished: list[str] = []
    for start in nodes:
        _walk(start, forward, set(finished), finished)
    seen: set[str] = set()
    groups = []
    for start in reversed(finished):
        if start not in seen:
            group: list[str] = []
            _walk(start, backward, seen, group)
            seen |= set(group)
            groups.append(tuple(group))
    return groups


def _walk(start: str, following: Mapping[str, Sequence[str]], seen: set[str], finished: list[str]) -> None:
    """Depth first from ``start``; nodes are appended when all that follows them is done."""
    if start in seen:
        return
    visited, stack = {start}, [(start, iter(following[start]))]
    while stack:
        node, rest = stack[-1]
        after = next((n for n in rest if n not in seen and n not in visited), None)
        if after is None:
            finished.append(node)
            stack.pop()
        else:
            visited.add(after)
            stack.append((after, iter(following[after])))


def _ordered(group: Sequence[str], edges: Sequence[tuple[str, str]]) -> tuple[str, ...]:
    """A group's nodes, each after those that feed it in the same step."""
    waiting, done = sorted(group), list[str]()
    inner = [(a, b) for a, b in edges if a in group and b in group]
    while waiting:
        ready = [n for n in waiting if all(a in done for a, b in inner if b == n)]
        done += ready
        waiting = [n for n in waiting if n not in ready]
    return tuple(done)
