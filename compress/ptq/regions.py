"""The parts of a captured graph that reconstruction works on, found on the graph itself, whatever the model's classes are.

Between two places where a single value is alive lies a block: a residual block is one by its shape, so is a plain layer. A
depthwise convolution goes with the layer after it, and what has no weights (pools, means, reshapes) with the layer that reads it.
This is BRECQ's choice of units (Li et al. 2021, section 3.2) without its list of classes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from edgekit.compress.canonical import ATEN
from edgekit.compress.capture import Graph
from edgekit.compress.ptq.plan import Plan
from edgekit.compress.ptq.units import Unit

__all__ = ["Region", "extract", "find_regions", "part_plan", "run_region", "tail_of"]

_MOST_LAYERS = 8
"""A block with more weighted layers is cut again, where one more value is alive."""


@dataclass(frozen=True)
class Region:
    """Some nodes of a graph, to be computed together.

    Attributes:
        units: its integer layers to be.
        nodes: its nodes in execution order, parameters left out.
        inputs: names of the values that it reads from outside.
        outputs: names of its values that are read outside.
    """

    units: tuple[Unit, ...]
    nodes: tuple[fx.Node, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of its weighted layers."""
        return tuple(u.name for u in self.units if u.weight is not None)


@dataclass(frozen=True)
class _Atom:
    """A unit, or one node that stays in float."""

    nodes: tuple[fx.Node, ...]
    unit: Unit | None = None

    @property
    def weighted(self) -> bool:
        return self.unit is not None and self.unit.weight is not None

    @property
    def depthwise(self) -> bool:
        return self.weighted and self.unit is not None and self.unit.attributes.get("groups", 1) > 1


def find_regions(graph: Graph, units: Sequence[Unit], blocks: bool = True) -> tuple[Region, ...]:
    """All of a graph as regions in execution order.

    Args:
        blocks: blocks as the module says; False: every weighted layer by itself, what lies between two of them in one region.
    """
    atoms = _atoms(graph, units)
    parts = _blocks(atoms, 1) if blocks else _layers(atoms)
    first = next(n.meta["val"].shape[0] for n in graph.module.graph.nodes if n.op == "placeholder")
    return tuple(_region(part) for part in _batch_first(parts, str(first)))


def _atoms(graph: Graph, units: Sequence[Unit]) -> list[_Atom]:
    ends = {u.output: u for u in units}
    inside = {n for u in units for n in u.nodes}
    free = _free(graph.module.graph.nodes)
    found = []
    for node in graph.module.graph.nodes:
        if node in ends:
            found.append(_Atom(ends[node].nodes, ends[node]))
        elif node.op == "call_function" and node not in inside and node not in free:
            found.append(_Atom((node,)))
    return found


def _free(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Nodes that any region can compute for itself: parameters, sizes, and what is made of them alone."""
    free: set[fx.Node] = set()
    for node in nodes:
        if (
            node.op == "get_attr"
            or node.target == ATEN.sym_size.int
            or (node.op == "call_function" and all(n in free for n in node.all_input_nodes))
        ):
            free.add(node)
    return free


def _alive(atoms: Sequence[_Atom]) -> list[set[fx.Node]]:
    """For each atom, the values made before or by it that a later atom reads."""
    place = {n: i for i, a in enumerate(atoms) for n in a.nodes}
    last: dict[fx.Node, int] = {}
    for i, atom in enumerate(atoms):
        for node in atom.nodes:
            for value in node.all_input_nodes:
                last[value] = i
    born = {value: place.get(value, -1) for value in last if value in place or value.op == "placeholder"}
    return [{v for v, b in born.items() if b <= i < last[v]} for i in range(len(atoms))]


def _blocks(atoms: list[_Atom], alive: int) -> list[list[_Atom]]:
    """Cut after an atom where at most ``alive`` values are needed later, its own among them."""
    values = _alive(atoms)
    parts: list[list[_Atom]] = [[]]
    for atom, later in zip(atoms, values, strict=True):
        parts[-1].append(atom)
        if len(later) <= alive and (atom.nodes[-1] in later or not later):
            parts.append([])
    joined = _joined([p for p in parts if p])
    result: list[list[_Atom]] = []
    for part in joined:
        large = sum(a.weighted for a in part) > _MOST_LAYERS and alive < 8
        result += _blocks(part, alive + 1) if large else [part]
    return result


def _joined(parts: list[list[_Atom]]) -> list[list[_Atom]]:
    """Parts without weights, and those that are one depthwise layer, with the part after them; the rest with the one before."""
    result: list[list[_Atom]] = []
    held: list[_Atom] = []
    for part in parts:
        held += part
        layers = [a for a in held if a.weighted]
        if layers and not (len(layers) == 1 and layers[0].depthwise):
            result.append(held)
            held = []
    if held and result and not any(a.weighted for a in held):
        result[-1] += held
    elif held:
        result.append(held)
    return result


def _layers(atoms: list[_Atom]) -> list[list[_Atom]]:
    parts: list[list[_Atom]] = []
    for atom in atoms:
        if not parts or atom.weighted or parts[-1][0].weighted:
            parts.append([])
        parts[-1].append(atom)
    return parts


def _batch_first(parts: list[list[_Atom]], size: str) -> list[list[_Atom]]:
    """Join parts between which a value is passed that cannot be kept sample by sample, as in sequence-first attention."""

    def kept(node: fx.Node) -> bool:
        value = node.meta.get("val")
        return isinstance(value, torch.Tensor) and value.dim() > 0 and str(value.shape[0]) == size

    result: list[list[_Atom]] = []
    held: list[_Atom] = []
    for part in parts:
        held += part
        mine = {n for a in held for n in a.nodes}
        if all(kept(n) for n in mine if any(u not in mine and u.target != ATEN.sym_size.int for u in n.users)):
            result.append(held)
            held = []
    return [*result, held] if held else result


def _region(atoms: Sequence[_Atom]) -> Region:
    nodes = [n for a in atoms for n in a.nodes]
    mine = set(nodes)
    free = _free(nodes[0].graph.nodes)
    inputs = dict.fromkeys(v.name for n in nodes for v in n.all_input_nodes if v not in mine and v not in free)
    outputs = [n.name for n in nodes if any(u not in mine and u.target != ATEN.sym_size.int for u in n.users)]
    return Region(tuple(a.unit for a in atoms if a.unit), tuple(nodes), tuple(inputs), tuple(outputs))


def tail_of(regions: Sequence[Region], done: int) -> Region:
    """Everything after the first ``done`` regions as one, with the model's outputs that it makes."""
    nodes = tuple(n for r in regions[done:] for n in r.nodes)
    if not nodes:
        return Region((), (), (), ())
    whole = _region([_Atom((n,)) for n in nodes])
    return replace(whole, units=tuple(u for r in regions[done:] for u in r.units))


def extract(graph: Graph, region: Region) -> Graph:
    """The region as a graph of its own: placeholders are called as the values they stand for, all nodes keep their names.

    It takes ``region.inputs`` and returns the tuple of ``region.outputs``; parameters are shared with the given graph.
    """
    source = {n.name: n for n in graph.module.graph.nodes}
    out = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    for name in region.inputs:
        made[source[name]] = out.placeholder(name)
        made[source[name]].meta = dict(source[name].meta)

    def value(node: fx.Node) -> fx.Node:
        if node not in made:
            if node.target == ATEN.sym_size.int and node.args[0] not in made:
                made[node] = out.call_function(ATEN.sym_size.int, (made[source[region.inputs[0]]], 0))
            else:
                made[node] = out.node_copy(node, value)
        return made[node]

    for node in sorted(region.nodes, key=_order(graph.module.graph.nodes).__getitem__):
        value(node)
    out.output(tuple(made[source[name]] for name in region.outputs))
    return replace(graph, module=fx.GraphModule(graph.module, out).eval())


def _order(nodes: Iterable[fx.Node]) -> dict[fx.Node, int]:
    return {n: i for i, n in enumerate(nodes)}


def part_plan(part: Graph, region: Region, plan: Plan) -> Plan:
    """The plan of an extracted region."""
    found: Mapping[str, fx.Node] = {n.name: n for n in part.module.graph.nodes}

    def moved(unit: Unit) -> Unit:
        def of(nodes: Collection[fx.Node]) -> tuple[fx.Node, ...]:
            return tuple(found[n.name] for n in nodes)

        more: dict[str, Any] = {}
        if unit.weight is not None:
            more["weight"] = found[unit.weight.name]
            more["bias"] = None if unit.bias is None else found[unit.bias.name]
        return replace(unit, nodes=of(unit.nodes), inputs=of(unit.inputs), **more)

    units = tuple(moved(u) for u in region.units)
    return Plan(units, plan.activations, {n: plan.weights[n] for n in region.layers})


def run_region(module: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The outputs of an extracted region as a tuple."""
    found = module(*inputs)
    return found if isinstance(found, tuple) else (found,)
