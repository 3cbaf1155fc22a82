"""Cycles of a NIR graph that a program has written out step by step, as nodes and edges again.

:mod:`edgekit.nir.to_module` writes the nodes of a cycle out: in step t each is called once, on what the others gave in t or, over
an edge that closes the cycle, in t - 1. So the i-th call of a submodule is its step i, and the step that a value is from says
which edges close the cycle. What is read must be the same in every step.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from edgekit.nir.rules import RULES, Call, Refused

__all__ = ["Cycles"]

Moment = frozenset[tuple[str, int]]
"""What a value of one step is the sum of: (node, step)."""

_PARTS = ("synapse", "if_charge", "lif_charge", "fire", "fire_reset")
_KINDS = {("if_charge", True): "if_sequence", ("lif_charge", True): "lif_sequence", ("synapse", True): "cuba_lif_sequence"}
_KINDS |= {("if_charge", False): "i_sequence", ("lif_charge", False): "li_sequence", ("synapse", False): "cuba_li_sequence"}


@dataclass
class Cycles:
    """Reads the operators of one program, in order.

    Attributes:
        arguments: an fx node to its arguments by schema name; values of the graph are None.
        steps: time steps, 0 until a cycle is met.
        at: what values of single steps are.
        calls: what each node got in each of its steps.
        parts: operators of a neuron in its first step, by their names: their arguments.
        shapes: of neurons.
        made: NIR nodes without state.
        starts: initial states.
        states: what a neuron goes on from: its name, "v" or "i", and the step it is from.
        whole: sequences that are cut into steps.
    """

    arguments: Callable[[fx.Node], Mapping[str, Any]]
    steps: int = 0
    at: dict[fx.Node, Moment] = field(default_factory=dict)
    calls: dict[str, list[Moment]] = field(default_factory=dict)
    parts: dict[str, dict[str, Mapping[str, Any]]] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)
    starts: dict[fx.Node, Any] = field(default_factory=dict)
    states: dict[fx.Node, tuple[str, str, int]] = field(default_factory=dict)
    whole: dict[fx.Node, tuple[str, ...]] = field(default_factory=dict)

    def takes(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> bool:
        """Whether an operator is part of a cycle: it cuts a sequence into steps, or works on values of one."""
        op = _op(node)
        known = any(x in table for table in (self.at, self.starts, self.states, self.whole) for x in node.all_input_nodes)
        return known or (op == "aten.chunk.default" and node.args[0] in values)

    def read(self, node: fx.Node, sources: tuple[str, ...], dt: float) -> str | None:
        """Take an operator in; the node that its output is the sequence of, where it joins the steps.

        Args:
            sources: of the sequence that is cut.
        """
        op = _op(node)
        if op == "aten.chunk.default":
            self.steps, self.whole[node] = int(node.args[1]), sources  # type: ignore[arg-type]
        elif node.target is operator.getitem:
            self.at[node] = frozenset((s, int(node.args[1])) for s in self.whole[node.args[0]])  # type: ignore[arg-type, index]
        elif op == "aten.zeros_like.default":
            self.starts[node] = None
        elif op == "aten.cat.default":
            return self._joined(node)
        elif op.startswith("aten.add") and any(x in self.starts for x in node.all_input_nodes):
            self.starts[node] = next(v for k, v in self.arguments(node).items() if k in ("other", "self") and v is not None)
        elif op.startswith("aten.add") and all(x in self.at for x in node.all_input_nodes):
            self.at[node] = frozenset().union(*(self.at[x] for x in node.all_input_nodes))
        elif op.removeprefix("edgekit.") in _PARTS:
            self._part(node, op.removeprefix("edgekit."))
        else:
            self._stateless(node, op, dt)
        return None

    def _joined(self, node: fx.Node) -> str:
        rows = [self.at.get(x, frozenset()) for x in node.all_input_nodes]
        names = {name for row in rows for name, _ in row}
        if len(names) != 1 or [sorted(row)[0][1] for row in rows if row] != list(range(self.steps)):
            raise Refused("it joins values of different steps", "let it join all steps of one layer")
        return names.pop()

    def _called(self, name: str, given: Moment) -> Moment:
        calls = self.calls.setdefault(name, [])
        calls.append(given)
        return frozenset({(name, len(calls) - 1)})

    def _part(self, node: fx.Node, part: str) -> None:
        name, (first, *rest) = _module(node).rpartition(".")[0], node.all_input_nodes
        known, args = self.parts.setdefault(name, {}), dict(self.arguments(node))
        step = len(self.calls.get(name, ()))
        charges = part.endswith("charge")
        if charges or part == "synapse":
            step -= charges and "synapse" in known
            self._continued(node, name, part, step, rest[0])
        if charges and not step:
            args["v_init"] = self.starts[rest[0]]
        same = known.setdefault(part, args)
        if any(not _equal(same[key], value) for key, value in args.items()):
            raise Refused(f"{name} does not do the same in each step", "let every step be the same")
        if part == "fire_reset":
            self.states[node] = name, "v", step - 1
        elif part == "fire":
            self.at[node] = self.at[first]
        elif charges:
            self.shapes[name], self.states[node] = _shape(node), (name, "v", step)
            self.at[node] = self.at[first] if "synapse" in known else self._called(name, self.at[first])
        else:
            self.states[node] = name, "i", step
            self.at[node] = self._called(name, self.at[first])

    def _continued(self, node: fx.Node, name: str, part: str, step: int, state: fx.Node) -> None:
        """A neuron goes on from its own state of the step before."""
        expected = (name, "i" if part == "synapse" else "v", step - 1)
        if (step and self.states.get(state) != expected) or (not step and state not in self.starts):
            raise Refused(f"{name} goes on from a state that is not its own", "let every step be the same")

    def _stateless(self, node: fx.Node, op: str, dt: float) -> None:
        name, given = _module(node), [x for x in node.all_input_nodes if x in self.at]
        if op not in RULES or len(given) != 1:
            raise Refused(f"operator {op} in a cycle has no form in NIR", "replace it by what NIR has")
        if name not in self.made:
            self.made[name] = RULES[op](Call(op, self.arguments(node), _shape(given[0]), _shape(node), dt))
        self.at[node] = self._called(name, self.at[given[0]]) if self.made[name] is not None else self.at[given[0]]

    def nodes(self) -> dict[str, Any]:
        """The NIR nodes of all cycles."""
        if self.steps == 1:
            raise Refused("it has loops and runs one step, which does not show what comes back", "run more steps")
        found = {name: node for name, node in self.made.items() if node is not None}
        for name, parts in self.parts.items():
            first = next(iter(parts))
            args = {k: v for part in reversed(parts.values()) for k, v in part.items()}
            fires = "fire" in parts
            if first == "synapse":
                args["tau_mem"] = args["tau"]
            call = Call(f"edgekit.{_KINDS[first, fires]}", args, self.shapes[name], self.shapes[name], float(args["dt"]))
            found[name] = RULES[call.op](call)
        return found

    def edges(self) -> tuple[list[tuple[str, str]], set[tuple[str, str]]]:
        """All edges into nodes of cycles, and those that carry the value of the step before."""
        found: list[tuple[str, str]] = []
        late: set[tuple[str, str]] = set()
        for name, calls in self.calls.items():
            each = [{(s, t - step) for s, step in given} for t, given in enumerate(calls)]
            same = len(calls) == self.steps and all(row == each[-1] for row in each[1:])
            if not same or each[0] != {x for x in each[-1] if x[1] == 0} or any(d not in (0, 1) for _, d in each[-1]):
                raise Refused(f"{name} does not do the same in each step", "let every step be the same")
            found += [(s, name) for s, _ in sorted(each[-1], key=lambda x: (x[1], x[0]))]
            late |= {(s, name) for s, delta in each[-1] if delta}
        return found, late


def _equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else bool(a == b)


def _op(node: fx.Node) -> str:
    name = str(node.target)
    return name.removesuffix(".default") if name.startswith("edgekit.") else name


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(int(n) for n in node.meta["val"].shape[1:])


def _module(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return next(reversed(stack.values()))[0] if stack else node.name
