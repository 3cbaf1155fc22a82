"""Constant folding on an exported program: what depends only on weights and numbers is computed once, before a converter sees it.

Converters that match patterns need it: a bias that is still a product of a scale and an integer tensor breaks a graph apart.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument

__all__ = ["copied", "fold_constants", "lift", "prune"]

_CONSTANT = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
_PLAIN = (int, float, bool, str, complex, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


def fold_constants(program: ExportedProgram, keep: Collection[Callable[..., Any]] = ()) -> ExportedProgram:
    """A copy of the program in which every node that depends on constants alone is a constant.

    Args:
        program: an exported program; buffers that it writes to are not constants.
        keep: operators that stay in the graph even over constants, with their constant inputs.

    Returns:
        A program whose folded tensors are lifted constants named ``_folded_0``, ``_folded_1``, ... in graph order; unused
        nodes, parameters, buffers and constants are gone.
    """
    result = copied(program)
    known = _constants(result)
    before = set(known)
    with torch.no_grad():
        for node in result.graph.nodes:
            if node.op == "call_function" and node.target not in keep and _foldable(node, known):
                known[node] = node.target(*_values(node.args, known), **_values(node.kwargs, known))
    number = 0
    for node in [n for n in result.graph.nodes if n in known and n not in before]:
        if isinstance(known[node], Tensor) and any(user not in known for user in node.users):
            node.replace_all_uses_with(lift(result, f"_folded_{number}", known[node], node.meta["val"]))
            number += 1
    prune(result)
    result.graph_module.recompile()
    return result


def copied(program: ExportedProgram) -> ExportedProgram:
    """A copy whose graph, signature and sets of tensors can be edited; the tensors are the same."""
    result = copy.copy(program)
    result._graph_module = copy.deepcopy(program.graph_module)
    result._graph_signature = copy.deepcopy(program.graph_signature)
    result._state_dict = dict(program.state_dict)
    result._constants = dict(program.constants)
    return result


def _constants(program: ExportedProgram) -> dict[fx.Node, Any]:
    """Placeholders of tensors that never change, with their values."""
    signature = program.graph_signature
    written = {*signature.buffers_to_mutate.values(), *getattr(signature, "parameters_to_mutate", {}).values()}
    found: dict[fx.Node, Any] = {}
    for node, spec in zip(_placeholders(program), signature.input_specs, strict=True):
        if spec.kind in _CONSTANT and spec.target is not None and spec.target not in written:
            value = program.state_dict.get(spec.target, program.constants.get(spec.target))
            if isinstance(value, Tensor):
                found[node] = value.detach()
    return found


def _placeholders(program: ExportedProgram) -> list[fx.Node]:
    return [n for n in program.graph.nodes if n.op == "placeholder"]


def _foldable(node: fx.Node, known: dict[fx.Node, Any]) -> bool:
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        tags = getattr(node.target, "tags", ())
        if schema.is_mutable or not schema.returns or torch.Tag.nondeterministic_seeded in tags:
            return False
    return _is_constant((node.args, node.kwargs), known)


def _is_constant(value: Any, known: dict[fx.Node, Any]) -> bool:
    if isinstance(value, fx.Node):
        return value in known
    if isinstance(value, list | tuple):
        return all(_is_constant(v, known) for v in value)
    if isinstance(value, dict):
        return all(_is_constant(v, known) for v in value.values())
    return isinstance(value, _PLAIN)


def _values(value: Any, known: dict[fx.Node, Any]) -> Any:
    return fx.node.map_arg(value, lambda node: known[node])


def lift(program: ExportedProgram, name: str, value: Tensor, fake: Any) -> fx.Node:
    """A new constant placeholder of that name, before the first input of the user; ``fake``: what its node's "val" is."""
    specs = program.graph_signature.input_specs
    placeholders = _placeholders(program)
    at = next((i for i, spec in enumerate(specs) if spec.kind == InputKind.USER_INPUT), len(specs))
    anchor = placeholders[at] if at < len(placeholders) else next(n for n in program.graph.nodes if n.op != "placeholder")
    with program.graph.inserting_before(anchor):
        new: fx.Node = program.graph.placeholder(name)
    new.meta["val"] = fake
    specs.insert(at, InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(new.name), name, None))
    program.constants[name] = value.detach().clone(memory_format=torch.contiguous_format)
    return new


def prune(program: ExportedProgram) -> None:
    """Remove nodes without a use, then constants without a use."""
    graph, signature = program.graph, program.graph_signature
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users and not node.is_impure():
            graph.erase_node(node)
    kept: list[InputSpec] = []
    for node, spec in zip(_placeholders(program), list(signature.input_specs), strict=True):
        if spec.kind in _CONSTANT and not node.users:
            graph.erase_node(node)
        else:
            kept.append(spec)
    signature.input_specs[:] = kept
    used = {spec.target for spec in kept}
    for store in (program.state_dict, program.constants):
        for key in [k for k in store if k not in used]:
            del store[key]
