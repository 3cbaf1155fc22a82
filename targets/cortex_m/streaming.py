"""Spiking firmware that takes one time step a call: state in RAM between calls, every other tensor one step large.

The program is rewritten to one step (:func:`one_step`) and lowered like any other; then its neurons and its readout sum keep a
tensor of their own in the arena. Layers that read a constant input run once, at the reset. Operators and integers are those of
the program with all steps, so each step gives what that program gives for it, to the last bit.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor as Value
from torch import fx, nn

from edgekit.errors import UnsupportedError
from edgekit.frozen import FrozenOp, FrozenProgram, freeze_module
from edgekit.frozen.spiking_ops import INTEGER_NEURONS
from edgekit.targets.cortex_m.graph import Firmware, Stream, Tensor

__all__ = ["one_step", "streamed", "time_steps"]

_STEPPING = {
    "neurons": "neurons_step",
    "recurrent": "recurrent_step",
    "accumulate": "accumulate_step",
    "fade": "fade_step",
    "delay": "delay_step",
}
"""Kernel of a whole sequence to that of one step, which keeps a state."""

_STATES = {"neurons": 1, "recurrent": 3}
"""Numbers of 16 bits that a neuron keeps beside its output; of the others the output is the state."""


def time_steps(program: FrozenProgram) -> int:
    """The number of time steps.

    Raises:
        UnsupportedError: the program has none.
    """
    counts = {int(x.args["steps"]) for x in program.layers if x.op in INTEGER_NEURONS}
    if len(counts) != 1:
        raise UnsupportedError(
            f"program {program.name} has no integer neurons; leave out `stream`, which is for spiking networks"
        )
    return counts.pop()


def one_step(program: FrozenProgram) -> FrozenProgram:
    """The integer program with one time step instead of all, its layers under the same names.

    Raises:
        UnsupportedError: operators that are not integer ones, or without a single step.
    """
    known = {x.node for x in program.layers}
    nodes = list(program.module.graph.nodes)
    others = [n.name for n in nodes if n.op == "call_function" and n.name not in known]
    if others:
        raise UnsupportedError(f"program {program.name} cannot stream: {', '.join(others)} have no single time step in integers")
    root, out = nn.Module(), fx.Graph()
    values: dict[str, fx.Node] = {n.name: out.placeholder(n.name) for n in nodes if n.op == "placeholder"}
    for layer in program.layers:
        given = [k for k, v in layer.args.items() if isinstance(v, str) and v in values]
        inputs = [values[layer.args[k]] for k in given]
        lists = [v for v in layer.args.values() if isinstance(v, list | tuple) and v and isinstance(v[0], str)]
        inputs = inputs or [values[v] for v in (lists[0] if lists else ())]
        buffers = {k: v for k, v in layer.args.items() if isinstance(v, Value)}
        rules = {k: v for k, v in layer.args.items() if k not in given and k not in buffers and v not in lists}
        part = FrozenOp(layer.op, 0 if lists else len(inputs), buffers, **_single(layer.op, rules))
        values[layer.name] = values[layer.node] = _add(root, out, layer.name, part, inputs)
    (end,) = (n for n in nodes if n.op == "output")
    found = end.args[0] if isinstance(end.args[0], list | tuple) else [end.args[0]]
    out.output(tuple(values[n.name] for n in found))
    sequence = any(x.op == "fold_steps" for x in program.layers)
    samples = tuple(torch.zeros(1, 1, *s[2:]) if sequence else torch.zeros(s) for s in program.input_shapes)
    return freeze_module(fx.GraphModule(root, out), samples, name=program.name, sources=program.sources)


def _single(op: str, rules: dict[str, Any]) -> dict[str, Any]:
    if "steps" in rules:
        return {**rules, "steps": 1}
    return {**rules, "shape": [1, *rules["shape"][1:]]} if op == "qreshape" else rules


def _add(root: nn.Module, out: fx.Graph, name: str, part: nn.Module, inputs: list[fx.Node]) -> fx.Node:
    owner = root
    *path, leaf = name.split(".")
    for step in path:
        if not hasattr(owner, step):
            owner.add_module(step, nn.Module())
        owner = getattr(owner, step)
    owner.add_module(leaf, part)
    return out.create_node("call_module", name, tuple(inputs))


def streamed(firmware: Firmware, program: FrozenProgram, whole: Stream) -> Firmware:
    """The firmware of :func:`one_step` with its states; steps that only constant inputs reach come first.

    Args:
        program: the program with all steps.
        whole: its sizes; ``once`` is filled in here.
    """
    tensors, steps = list(firmware.tensors), []
    for step in firmware.steps:
        if step.kind == "delay":
            index, n = len(tensors), max(1, int(step.values["longest"]) * int(step.values["n"]))
            tensors.append(Tensor(index, f"{step.layer}.line", (1, n), False, 1.0, 0, index))
            steps.append(replace(step, kind=_STEPPING[step.kind], state=index))
        elif step.kind in _STATES:
            index, n = len(tensors), _STATES[step.kind] * int(step.values["n"])
            tensors.append(Tensor(index, f"{step.layer}.membrane", (1, n), False, 1.0, 0, index, width=2))
            steps.append(replace(step, kind=_STEPPING[step.kind], state=index))
        elif step.kind in _STEPPING:
            steps.append(replace(step, kind=_STEPPING[step.kind], state=step.output))
        else:
            steps.append(step)
    before = _constant(program)
    steps.sort(key=lambda s: s.layer not in before)  # stable
    once = sum(s.layer in before for s in steps)
    return replace(firmware, tensors=tuple(tensors), steps=tuple(steps), stream=replace(whole, once=once))


def _constant(program: FrozenProgram) -> set[str]:
    """Layers whose value is the same in every step: what ``repeat_steps`` repeats, and all before it."""
    found = {x.inputs[0] for x in program.layers if x.op == "repeat_steps"}
    for layer in reversed(program.layers):
        if layer.name in found:
            found.update(layer.inputs)
    return found
