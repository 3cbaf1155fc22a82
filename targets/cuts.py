"""A file cut into programs of one layer each, to be timed alone where a runtime tells no times of its own.

A layer's program is what the file computes between the layers before it and its own result, with the file's own constants; its
inputs are those layers' results. What comes after the last layer is a program too, called by the output's name. An operator
between layers that two of them read is in both programs, one outside of ExecuTorch's delegates in none. LiteRT's interpreter has
no profiler that Python can reach, onnxruntime's adds its own time to each operator, and ExecuTorch's wheel is built without one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.frozen import FrozenProgram
from edgekit.targets import onnx_facts, pte_cuts, tflite_file

__all__ = ["CUTS", "EMPTY", "Cut", "cuts"]

EMPTY = ""
"""Name of the program that computes nothing: what a call costs by itself."""


@dataclass(frozen=True)
class Cut:
    """One layer as a file of its own.

    Attributes:
        layer: its name; :data:`EMPTY` for the program that computes nothing; the file's output for what follows the last layer.
        op: its operators in the file.
        data: the file's bytes.
        inputs: shape and numpy dtype of each input.
    """

    layer: str
    op: str
    data: bytes
    inputs: tuple[tuple[tuple[int, ...], str], ...]

    def samples(self) -> list[NDArray[Any]]:
        """One input of each, the same at each call: integers over their range, or standard normal numbers."""
        draw = np.random.default_rng(0)
        return [
            draw.standard_normal(shape).astype(dtype)
            if np.dtype(dtype).kind == "f"
            else draw.integers(np.iinfo(dtype).min, np.iinfo(dtype).max, shape, dtype, endpoint=True)
            for shape, dtype in self.inputs
        ]


def cuts(path: Path, target: str, program: FrozenProgram) -> tuple[Cut, ...]:
    """The programs of a file in execution order, the empty one first; none where the target has no such thing, or no layers.

    Raises:
        FormatError: a damaged file.
    """
    found = CUTS[target](Path(path), program) if target in CUTS and program.layers else ()
    return tuple(found) if len(found) > 1 else ()


def _between(
    wanted: Iterable[Any], producer: Mapping[Any, int], stops: set[Any], inputs: Callable[[int], Iterable[Any]]
) -> list[int]:
    """Numbers of the operators that compute ``wanted`` from ``stops`` and from what no operator makes, in order."""
    todo = [producer[t] for t in wanted if t in producer]
    found: set[int] = set()
    while todo:
        op = todo.pop()
        if op not in found:
            found.add(op)
            todo += [producer[t] for t in inputs(op) if t in producer and t not in stops]
    return sorted(found)


def _tflite(path: Path, program: FrozenProgram) -> list[Cut]:
    file = tflite_file.read(path)
    layers = {t.index: x.name for x in program.layers if (t := file.by_name.get(x.name)) and t.index in file.producer}
    stops = set(layers)
    ends = [(name, [index]) for index, name in layers.items()]
    if rest := [i for i in file.outputs if i not in stops]:
        ends.append((file.tensors[rest[0]].name or "outputs", rest))
    first = file.inputs[0]
    producer = {index: op.index for index, op in file.producer.items()}
    found = [_tflite_cut(file, EMPTY, [], [first], [first])]
    for name, outputs in sorted(ends, key=lambda e: file.producer[e[1][0]].index if e[1][0] in file.producer else 0):
        ops = [file.ops[i] for i in _between(outputs, producer, stops, lambda i: file.ops[i].inputs)]
        made = {i for op in ops for i in op.outputs}
        needed = dict.fromkeys(i for op in ops for i in op.inputs if i >= 0 and i not in made and file.tensors[i].data is None)
        if ops and needed:
            found.append(_tflite_cut(file, name, ops, list(needed), outputs))
    return found


def _tflite_cut(file: Any, name: str, ops: Sequence[Any], inputs: Sequence[int], outputs: Sequence[int]) -> Cut:
    """A copy of the file's tree with these operators; constants of others are left out."""
    model, graph = copy.copy(file.model), copy.copy(file.model.subgraphs[0])
    graph.operators = [file.model.subgraphs[0].operators[op.index] for op in ops]
    graph.inputs, graph.outputs = np.array(inputs, np.int32), np.array(outputs, np.int32)
    used = {graph.tensors[i].buffer for op in ops for i in op.inputs if i >= 0}
    model.buffers = [b if i in used else _bare(b) for i, b in enumerate(file.model.buffers)]
    model.subgraphs, model.signatureDefs, model.metadata, model.metadataBuffer = [graph], None, None, None
    kinds = " + ".join(dict.fromkeys(op.kind for op in ops))
    shapes = tuple((file.tensors[i].shape, file.tensors[i].numpy_dtype) for i in inputs)
    return Cut(name, kinds, tflite_file.serialize(model), shapes)


def _bare(buffer: Any) -> Any:
    empty = copy.copy(buffer)
    empty.data = None
    return empty


def _onnx(path: Path, program: FrozenProgram) -> list[Cut]:
    import onnx

    model = onnx_facts.read(path)
    graph = model.graph
    every = list(graph.node)
    producer = {name: i for i, node in enumerate(every) for name in node.output}
    names = [x.name for x in program.layers if x.out_scale is not None and x.name in producer]
    types = {v.name: v for v in (*graph.input, *graph.output)}
    for layer in program.layers:
        if layer.name in names:
            types[layer.name] = onnx.helper.make_tensor_value_info(layer.name, onnx.TensorProto.UINT8, layer.shape)
    ends = [(name, [name]) for name in names]
    if rest := [v.name for v in graph.output if v.name not in names]:
        ends.append((rest[0], rest))
    one = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.UINT8, [1])
    same = onnx.helper.make_node("Identity", ["x"], ["y"])
    found = [_onnx_cut(model, EMPTY, [same], [one], [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.UINT8, [1])], [])]
    for name, outputs in ends:
        nodes = [every[i] for i in _between(outputs, producer, set(names), lambda i: every[i].input)]
        made = {o for node in nodes for o in node.output}
        read = dict.fromkeys(i for node in nodes for i in node.input if i and i not in made)
        inputs, constants = [types[i] for i in read if i in types], [t for t in graph.initializer if t.name in read]
        if nodes and inputs:
            found.append(_onnx_cut(model, name, nodes, inputs, [types[o] for o in outputs], constants))
    return found


def _onnx_cut(
    model: Any, name: str, nodes: Sequence[Any], inputs: Sequence[Any], outputs: Sequence[Any], constants: Sequence[Any]
) -> Cut:
    import onnx

    made = onnx.helper.make_model(
        onnx.helper.make_graph(nodes, name or "empty", inputs, outputs, constants),
        opset_imports=model.opset_import, ir_version=model.ir_version, functions=list(model.functions),
    )  # fmt: skip
    kinds = dict.fromkeys(n.op_type for n in nodes if n.op_type not in ("DequantizeLinear", "QuantizeLinear"))
    shapes = []
    for value in inputs:
        kind = value.type.tensor_type
        shapes.append((tuple(d.dim_value for d in kind.shape.dim), str(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))))
    return Cut(name, " + ".join(kinds) or "QuantizeLinear", made.SerializeToString(), tuple(shapes))


def _executorch(path: Path, program: FrozenProgram) -> list[Cut]:
    return [Cut(*part) for part in pte_cuts.parts(path, program)]


CUTS: Mapping[str, Callable[[Path, FrozenProgram], list[Cut]]] = {"executorch": _executorch, "tflite": _tflite, "onnx": _onnx}
"""Targets whose files can be cut."""
