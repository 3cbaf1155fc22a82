"""A frozen spiking program as a NIR graph: one step of it, with everything a clocked run needs in the metadata.

Steps, encoding and readout are no part of a NIR graph, which describes one step. They stand in its metadata, beside ``dt``::

    steps      time steps of one inference
    encoding   "repeat": each step gets the same input; "sequence": the input has a time axis, (N, T, ...)
    readout    "accumulate": the sum of the outputs over the steps, times ``gain``; "sequence": the outputs of all steps
    gain       1 / steps for a mean

Float programs only. The rounding and saturation of integer neurons have no form in NIR; targets for chips and firmware read those
programs directly.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import fx

from edgekit.errors import UnsupportedError
from edgekit.frozen import FrozenProgram
from edgekit.nir.cycles import Cycles
from edgekit.nir.file import require
from edgekit.nir.rules import REMEDIES, RULES, Call, Refused, loop
from edgekit.nir.semantics import flatten

__all__ = ["layer_names", "to_nir"]


def to_nir(program: FrozenProgram) -> Any:
    """The ``nir.NIRGraph`` of a program; nodes are called as its layers.

    Raises:
        UnsupportedError: an operator that NIR 1.0.8 cannot hold; names the layer and what to do.
        MissingTool: nir is not installed.
    """
    require()
    return _Export(program).graph()


def layer_names(program: FrozenProgram) -> dict[str, str]:
    """Name of each fx node's layer, float ones included."""
    return {x.node: x.name for x in program.float_layers} | {x.node: x.name for x in program.layers}


@dataclass(frozen=True)
class _Value:
    """What an fx node stands for: the sum of what some NIR nodes emit in a step."""

    sources: tuple[str, ...]


class _Export:
    def __init__(self, program: FrozenProgram) -> None:
        self.program = program
        self.names = layer_names(program)
        self.nodes: dict[str, Any] = {}
        self.edges: list[tuple[str, str]] = []
        self.values: dict[fx.Node, _Value] = {}
        self.cycles = Cycles(self._args)
        clocks = [float(x.args["dt"]) for x in program.layers if "dt" in x.args]
        self.facts: dict[str, Any] = {"name": program.name, "dt": clocks[0] if clocks else 1.0}

    def graph(self) -> Any:
        import nir

        for node in self.program.module.graph.nodes:  # maxima of counts are many operators; said as what they are
            if node.op == "call_function" and _op(node).startswith("aten.max_pool"):
                reason = "a max pool has no form in NIR (of spike counts, no chip computes it)"
                raise self._error(Refused(reason, REMEDIES["max_pool2d"]), self.names.get(node.name, node.name))
        for node in self.program.module.graph.nodes:
            if node.op == "placeholder":
                self._input(node)
            elif node.op == "call_function" and (node.target is not operator.getitem or self.cycles.takes(node, self.values)):
                try:
                    self._call(node)
                except Refused as error:
                    raise self._error(error, self.names.get(node.name, node.name)) from error
            elif node.op == "output":
                self._outputs(node)
        late = self._close()
        if "steps" not in self.facts and any(type(n).__name__ == "Threshold" for n in self.nodes.values()):
            self.facts |= {"steps": 1, "encoding": "repeat", "readout": "accumulate", "gain": 1.0}  # one step has no state
        if "steps" not in self.facts:
            raise self._error(Refused("it has no time steps", "target nir takes spiking programs"), "")
        made = nir.NIRGraph(self.nodes, self.edges, metadata=self.facts, type_check=False)
        if late and flatten(made).feedback != late:
            what = "a reader of the file would carry other values over from the step before"
            raise self._error(Refused(what, "connect the layer that the loop returns to more directly to the input"), "")
        return made

    def _close(self) -> set[tuple[str, str]]:
        """Add the nodes of cycles that were written out; their edges of feedback."""
        try:
            self.nodes |= self.cycles.nodes()
            edges, late = self.cycles.edges()
        except Refused as error:
            raise self._error(error, "") from error
        self.edges += edges
        return late

    def _error(self, error: Refused, layer: str) -> UnsupportedError:
        source = self.program.sources.get(layer, "")
        where = f"layer {layer}{f' ({source})' if source else ''}" if layer else f"program {self.program.name}"
        return UnsupportedError(f"target nir, {where}: {error.reason}; {error.remedy}")

    def _input(self, node: fx.Node) -> None:
        import nir

        folded = any(_op(user) == "edgekit.fold_steps" for user in node.users)
        name = self._free(node.name)
        self.nodes[name] = nir.Input({"input": np.array(_shape(node)[2 if folded else 1 :], dtype=np.int64)})
        self.values[node] = _Value((name,))

    def _outputs(self, node: fx.Node) -> None:
        import nir

        found = node.args[0] if isinstance(node.args[0], list | tuple) else [node.args[0]]
        if "readout" not in self.facts and "steps" in self.facts:
            raise self._error(Refused("its output is of all steps in one", "end it with accumulate or unfold_steps"), "")
        for i, value in enumerate(found):
            assert isinstance(value, fx.Node)
            name = self._free("output" if len(found) == 1 else f"output_{i}")
            shape = _shape(value)[2 if self.facts.get("readout") == "sequence" else 1 :]
            self.nodes[name] = nir.Output({"output": np.array(shape, dtype=np.int64)})
            self.edges += [(source, name) for source in self.values[value].sources]

    def _call(self, node: fx.Node) -> None:
        op = _op(node)
        if self.cycles.takes(node, self.values):
            source = self.values.get(node.args[0]) if isinstance(node.args[0], fx.Node) else None
            joined = self.cycles.read(node, source.sources if source else (), float(self.facts["dt"]))
            if joined is not None:
                self.values[node] = _Value((joined,))
            return
        inputs = [a for a in node.args if isinstance(a, fx.Node) and a in self.values]
        inputs = inputs or [a for a in node.all_input_nodes if a in self.values]  # in a list, as of a concatenation
        if not inputs:
            raise Refused(f"operator {op} is computed from constants alone", "fold it before")
        if op in _TIME:
            self._time(node, inputs[0], op.removeprefix("edgekit."))
        elif op in _SAME:
            self.values[node] = self.values[inputs[0]]
        elif op in _ADD and len(inputs) == 2:
            self._add(node, *inputs)
        elif op in RULES:
            call = self._described(node, inputs[0])
            self._place(node, inputs[0], RULES[op](call))
            if "feedback" in call.args:
                self._loop(self.values[node].sources[0], call)
        else:
            base = op.split(".")[1]
            raise Refused(f"operator {op} has no form in NIR", REMEDIES.get(base, "replace it by what NIR has"))

    def _described(self, node: fx.Node, x: fx.Node) -> Call:
        args = self._args(node)
        if "steps" in args and _op(node).startswith("edgekit."):
            self._fact("steps", int(args["steps"]))
        if "dt" in args:
            self._fact("dt", float(args["dt"]))
        return Call(_op(node), args, _shape(x)[1:], _shape(node)[1:], float(self.facts["dt"]))

    def _place(self, node: fx.Node, x: fx.Node, made: Any) -> None:
        if made is None:  # a shape that does not change
            self.values[node] = self.values[x]
            return
        name = self._free(self.names.get(node.name, node.name))
        self.nodes[name] = made
        self.edges += [(source, name) for source in self.values[x].sources]
        self.values[node] = _Value((name,))

    def _loop(self, neuron: str, call: Call) -> None:
        """The layer from a neuron's spikes back to itself."""
        name = self._free(call.args["feedback"])
        self.nodes[name] = loop(call)
        self.edges += [(neuron, name), (name, neuron)]

    def _add(self, node: fx.Node, a: fx.Node, b: fx.Node) -> None:
        both = (*self.values[a].sources, *self.values[b].sources)
        if len(set(both)) < len(both):
            raise Refused("it adds a value to itself, and NIR has one edge between two nodes", "multiply it by a constant")
        if _shape(a)[1:] != _shape(b)[1:]:
            raise Refused(f"it adds values of shapes {_shape(a)[1:]} and {_shape(b)[1:]}", "make them equal")
        self.values[node] = _Value(both)

    def _time(self, node: fx.Node, x: fx.Node, op: str) -> None:
        args = self._args(node)
        if op in ("repeat_steps", "fold_steps"):
            self._fact("encoding", "repeat" if op == "repeat_steps" else "sequence")
            self._fact("steps", int(args["steps"]) if op == "repeat_steps" else _shape(x)[1])
        else:
            self._fact("steps", int(args["steps"]))
            self._fact("readout", "accumulate" if op == "accumulate" else "sequence")
            if op == "accumulate":
                self._fact("gain", float(args["gain"]))
            if any(user.op != "output" for user in node.users):
                raise Refused(f"operators follow {op}, and NIR describes one step", "end the program there")
        self.values[node] = self.values[x]

    def _fact(self, key: str, value: Any) -> None:
        if self.facts.setdefault(key, value) != value:
            raise Refused(f"{key} is {value} here and {self.facts[key]} elsewhere; a NIR graph has one", "make them equal")

    def _args(self, node: fx.Node) -> dict[str, Any]:
        target: Any = node.target
        schema = target._schema.arguments
        values = {a.name: a.default_value for a in schema if a.has_default_value()}
        values |= dict(zip((a.name for a in schema), node.args, strict=False)) | dict(node.kwargs)
        if "other" in values and values["other"] in self.values:  # a constant times a value
            values["other"] = values["self"]
        return {k: self._constant(v) for k, v in values.items()}

    def _constant(self, value: Any) -> Any:
        if not isinstance(value, fx.Node):
            return value
        if value.op != "get_attr":
            return None
        found: Any = self.program.module
        for part in str(value.target).split("."):
            found = getattr(found, part)
        return found.detach()

    def _free(self, name: str) -> str:
        base, count = name.replace("/", "_"), 2
        name = base
        while name in self.nodes:
            name, count = f"{base}_{count}", count + 1
        return name


def _op(node: fx.Node) -> str:
    name = str(node.target)
    return name.removesuffix(".default") if name.startswith("edgekit.") else name


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(int(n) for n in node.meta["val"].shape)


_ADD = {"aten.add.Tensor", "aten.add_.Tensor"}
_TIME = {f"edgekit.{op}" for op in ("repeat_steps", "fold_steps", "accumulate", "unfold_steps")}
_SAME = {
    "aten.dropout.default", "aten.contiguous.default", "aten.clone.default", "aten.detach.default", "aten.alias.default",
    "aten._to_copy.default", "aten.to.dtype", "aten._assert_tensor_metadata.default", "aten.lift_fresh_copy.default",
}  # fmt: skip
"""Operators that do not change a value (a comparison is 0 or 1 in NIR anyway)."""
