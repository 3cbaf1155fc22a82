"""Before conversion: one sentence for each thing a target cannot take, instead of the converter's own failure.

:func:`check_model` looks at a float program as ``torch.export`` captured it, :func:`check_program` at a frozen one (what
``torch.export`` raises when it captures nothing is :mod:`edgekit.compress.explain`'s). What a target takes in float is the table
:data:`ACCEPTED`; what it takes as integers is the table of rules beside its lowering.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from edgekit.compress.explain import source_line
from edgekit.errors import UnsupportedError
from edgekit.frozen import FrozenProgram, Layer
from edgekit.frozen.dynamic_ops import DYNAMIC_OPS
from edgekit.targets.accepted import ACCEPTED, REMEDIES
from edgekit.targets.binary_int8 import int8_form
from edgekit.targets.spiking import check, is_spiking, plain

__all__ = ["Problem", "check_model", "check_program"]

_VALUE_DEPENDENT = {"nonzero", "item", "_local_scalar_dense", "masked_select", "_unique2", "unique_dim", "unique_consecutive"}
_OURS = ("edgekit", "quantized_decomposed", "prim", "prims")
_CHECKS = {"_assert_tensor_metadata", "_assert_scalar", "_assert_async", "sym_constrain_range_for_size", "sym_size"}
_VIEWS = {"select", "slice", "view", "narrow", "transpose", "permute", "unsqueeze", "squeeze", "expand", "diagonal", "as_strided"}


@dataclass(frozen=True)
class Problem:
    """Something a target cannot take.

    Attributes:
        layer: dotted name of the module it is in; "" for the model itself.
        op: ATen operator, "" where it is not about one.
        source: "file.py:line" of the model, "" if unknown.
        reason: what was found.
        remedy: what to do.
    """

    layer: str
    op: str
    source: str
    reason: str
    remedy: str

    def __str__(self) -> str:
        where = f"layer {self.layer}" if self.layer else "the model"
        return f"{where}{f' ({self.source})' if self.source else ''}: {self.reason}; {self.remedy}"


def check_model(exported: ExportedProgram, target: str) -> list[Problem]:
    """Everything in a captured float model that the target would fail on, once for each source line and reason.

    Args:
        exported: the program as ``torch.export`` gave it, before any decomposition.
        target: a name of :data:`edgekit.targets.TARGETS`.
    """
    problems = [*_inputs(exported), *_state(exported)]
    # firmware takes no float operator, NIR only spiking programs: what matters is what compression makes of the model
    firmware = target.startswith("cortex-m") or target == "nir"
    for node in exported.graph.nodes:
        if node.op == "call_function" and not firmware:
            problems += _node(node, target)
    unique = {(p.layer, p.source, p.reason): p for p in problems}
    return list(unique.values())


def check_program(program: FrozenProgram, target: str) -> None:
    """Refuse a frozen program that the target cannot take.

    Raises:
        UnsupportedError: names the layer, its source line and the remedy; all problems, the first in full.
    """
    if target.startswith("cortex-m"):
        from edgekit.targets.cortex_m.lowering import build

        build(program)
        return
    if target == "nir":
        from edgekit.nir.from_program import to_nir

        to_nir(program)
        return
    if is_spiking(program):
        check(program, target)
        program = plain(program)
    if target in ("tflite", "onnx"):
        program = int8_form(program)
    problems = [p for layer in program.layers for p in _layer(layer, target, program.sources.get(layer.name, ""))]
    problems += _edges(program) if target == "onnx" else []
    # a frozen graph has no stack traces, so that its bytes do not depend on where the model lay
    problems += [replace(p, source=p.source or program.sources.get(p.layer, "")) for p in check_model(program.exported, target)]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UnsupportedError(f"target {target}, {problems[0]}{more}")


def _inputs(exported: ExportedProgram) -> Iterator[Problem]:
    for node, spec in zip(
        (n for n in exported.graph.nodes if n.op == "placeholder"), exported.graph_signature.input_specs, strict=True
    ):
        value = node.meta.get("val")
        if spec.kind != InputKind.USER_INPUT or not isinstance(value, Tensor):
            continue
        symbolic = [i for i, size in enumerate(value.shape) if not isinstance(size, int)]
        if symbolic:
            what = "batch" if symbolic == [0] else f"dimension {symbolic[0]}"
            remedy = "capture it without dynamic_shapes, for a batch of one"
            yield Problem("", "", "", f"input {node.name} has a dynamic {what}", remedy)
        if value.dtype == torch.float64:
            yield Problem("", "", "", f"input {node.name} is float64", "give it float32 samples (x.float())")


def _state(exported: ExportedProgram) -> Iterator[Problem]:
    held = {
        s.arg.name: s.target for s in exported.graph_signature.input_specs if s.kind in (InputKind.BUFFER, InputKind.PARAMETER)
    }
    for node in exported.graph.nodes:  # a graph that is not functional yet writes by an operator in place
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable and node.args and getattr(node.args[0], "name", "") in held:
            yield Problem(
                "", "", source_line(node.meta.get("stack_trace") or ""),
                f"it writes to its buffer {held[node.args[0].name]} at each call",
                "make the state an input and an output, and call it in eval mode",
            )  # fmt: skip
    for spec in exported.graph_signature.output_specs:
        if spec.kind == OutputKind.BUFFER_MUTATION:
            yield Problem(
                "", "", "", f"it writes to its buffer {spec.target} at each call",
                "make the state an input and an output, and call it in eval mode",
            )  # fmt: skip
        elif spec.kind == OutputKind.USER_INPUT_MUTATION:
            yield Problem("", "", "", f"it writes into its input {spec.target}", "work on a copy: x = x.clone()")


def _node(node: fx.Node, target: str) -> Iterator[Problem]:
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        name = getattr(node.target, "_name", getattr(node.target, "__name__", str(node.target)))
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            yield _problem(
                node, name, f"control flow ({name}) is not lowered", "compute both branches and choose with torch.where"
            )
        return
    namespace, name = schema.name.split("::")
    if namespace in _OURS or name in _CHECKS:
        return
    if namespace != "aten":
        yield _problem(node, schema.name, f"custom operator {schema.name} is not known here", "write it with torch operators")
        return
    if name in _VALUE_DEPENDENT:
        remedy = "use a mask of the full size (torch.where, multiplication) instead"
        yield _problem(node, name, f"the shape or value that {name} gives depends on the data", remedy)
        return
    kinds = {v.dtype for v in _tensors(node.meta.get("val"))}
    before = {v.dtype for source in node.all_input_nodes for v in _tensors(source.meta.get("val"))}
    if any(d.is_complex for d in kinds):
        if not any(d.is_complex for d in before):
            remedy = "compute the spectrum before the model, or as a matrix product with the DFT's cosines and sines"
            yield _problem(node, name, f"{name} gives complex numbers", remedy)
        return
    if torch.float64 in kinds and torch.float64 not in before:
        yield _problem(
            node, name, f"{name} gives float64", "remove .double() and float64 constants; float32 is what targets have"
        )
        return
    if any(d.is_complex for d in before):
        return  # its cause has been named
    yield from _in_place(node, schema, name)
    base = name.rstrip("_") if schema.is_mutable else name
    if target not in ACCEPTED.get(base, ()):
        takes = ACCEPTED.get(base, ())
        other = f"lower to {' or '.join(sorted(takes))}, or " if takes else ""
        remedy = REMEDIES.get(base, f"{other}replace it by operators that are taken")
        yield _problem(node, name, f"operator {name} is not taken by {target}", remedy)


def _in_place(node: fx.Node, schema: Any, name: str) -> Iterator[Problem]:
    """An in-place write into a view: exporters drop it or turn it into scatter operators."""
    source = node.args[0] if node.args else None
    if not schema.is_mutable or not isinstance(source, fx.Node) or source.op != "call_function":
        return
    origin = getattr(source.target, "_schema", None)
    if origin is not None and origin.name.split("::")[1] in _VIEWS:
        remedy = "build the result with torch.cat, torch.where or a multiplication instead"
        yield _problem(node, name, f"{name} writes in place into a view of another tensor", remedy)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [v for v in value if isinstance(v, Tensor)] if isinstance(value, list | tuple) else []


def _problem(node: fx.Node, op: str, reason: str, remedy: str) -> Problem:
    stack = node.meta.get("nn_module_stack") or {}
    layer = next(reversed(stack.values()))[0] if stack else ""
    return Problem(layer, op, source_line(node.meta.get("stack_trace") or ""), reason, remedy)


def _layer(layer: Layer, target: str, source: str) -> Iterator[Problem]:
    bits = {int(layer.args[k]) for k in ("out_bits", "bits") if k in layer.args}
    if bits - ({8, 16} if target == "tflite" else {8}):
        remedy = "set activations: int8; the target tflite takes int16"
        yield Problem(layer.name, layer.op, source, f"its activations have {max(bits)} bits, {target} takes 8", remedy)
    if layer.op in DYNAMIC_OPS:
        yield from _dynamic(layer, target, source)
    elif target == "onnx":
        from edgekit.targets.onnx_rules import RULES

        if layer.op not in RULES:
            yield Problem(layer.name, layer.op, source, f"operator {layer.op} has no ONNX form", "choose another target")


def _dynamic(layer: Layer, target: str, source: str) -> Iterator[Problem]:
    """Linear layers with integer weights and float activations: which of them a target's kernels take."""
    group, bits = int(layer.args["group_size"]), int(layer.args["weight_bits"])
    if layer.op == "weight_only_linear" and target == "executorch":
        remedy = "set activations: dynamic, or lower to tflite"
        yield Problem(layer.name, layer.op, source, "XNNPACK has no linear layer of integer weights and float inputs", remedy)
    elif target == "executorch" and group and (group % 32 or bits > 4):
        remedy = "give a multiple of 32, and 8-bit layers one scale for each channel"
        yield Problem(layer.name, layer.op, source, f"XNNPACK takes no groups of {group} at {bits} bits", remedy)
    elif target == "tflite" and group:
        remedy = "leave out group_size, or lower to executorch"
        yield Problem(
            layer.name, layer.op, source, "TFLite's linear kernels take one weight scale for each output channel", remedy
        )
    elif target not in ("executorch", "tflite"):
        remedy = "set activations: int8, or lower to executorch or tflite"
        what = f"{target} does not take linear layers with integer weights and float activations"
        yield Problem(layer.name, layer.op, source, what, remedy)


def _edges(program: FrozenProgram) -> Iterator[Problem]:
    """Integer tensors that cross the border of the quantized part: ONNX files hold them as uint8, plain operators expect int8."""
    named = {layer.node for layer in program.layers}
    integer = (torch.int8, torch.int16)
    for node in program.module.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and isinstance(value, Tensor) and value.dtype in integer:
            yield Problem("", "", "", f"input {node.name} holds integers", "begin with a quantize operator and float inputs")
        if node.name not in named or not isinstance(value, Tensor) or value.dtype not in integer:
            continue
        for user in node.users:
            if user.name not in named:
                to = "the program's output" if user.op == "output" else f"the float operator {user.name}"
                yield Problem(node.name, "", "", f"its integers go to {to}", "put a dequantize operator between")
