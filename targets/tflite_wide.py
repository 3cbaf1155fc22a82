"""16-bit activations with 8-bit weights (TFLite's "16x8" kernels): the program's 8-bit twin is converted and then widened.

litert-torch takes 16-bit quantizers itself, but writes INT32 biases, where TFLite's specification of these kernels has INT64, and
the finish would have to know both widths everywhere. The twin has 8 bits and every activation scale times 256, which is exact in
binary; its file has the right operators, layouts and weights. :func:`widen` then makes every integer activation INT16 with the
program's own scale and every bias INT64. Zero points are 0: the kernels demand it, and compression gives no other.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from edgekit.frozen import FrozenProgram
from edgekit.targets.tflite_edit import kind_of
from edgekit.targets.tflite_file import parse, schema, serialize

__all__ = ["is_wide", "twin", "widen"]

_FACTOR = 256.0
_SCALES = ("scale", "in_scale", "out_scale", "a_scale", "b_scale")
_BITS = ("bits", "out_bits")
_WEIGHTED = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")

_VERSIONS = {
    "ADD": 3, "AVERAGE_POOL_2D": 3, "CONV_2D": 4, "DEPTHWISE_CONV_2D": 5, "DEQUANTIZE": 3, "FULLY_CONNECTED": 7, "MAX_POOL_2D": 3,
    "MEAN": 3, "MUL": 4, "PAD": 3, "PADV2": 3, "QUANTIZE": 2, "SLICE": 4, "TRANSPOSE": 5,
}  # fmt: skip
"""Operator to the version from which its kernel takes INT16."""


def is_wide(program: FrozenProgram) -> bool:
    """Whether any activation has 16 bits."""
    return any(int(layer.args.get(key, 8)) > 8 for layer in program.layers for key in _BITS)


def twin(program: FrozenProgram) -> FrozenProgram:
    """The program with 8-bit activations of 256 times the scale: same layers, weights and biases, other results."""
    exported = copy.deepcopy(program.exported)
    for node in exported.graph.nodes:
        if node.op == "call_function" and str(node.target).startswith("edgekit."):
            names = [a.name for a in node.target._schema.arguments]
            node.args = tuple(_in_twin(name, value) for name, value in zip(names, node.args, strict=False))
    exported.graph_module.recompile()
    return FrozenProgram(exported, program.name, program.unquantized, program.sources)


def _in_twin(name: str, value: Any) -> Any:
    if name in _BITS:
        return 8
    return value * _FACTOR if name in _SCALES else value


def widen(content: bytes, name: str) -> bytes:
    """The finished file of a twin as the file of its program."""
    file = parse(content, name)
    model = file.model
    graph, kinds = model.subgraphs[0], schema().TensorType
    for tensor in file.tensors:
        if tensor.data is None and tensor.dtype == "INT8":
            graph.tensors[tensor.index].type = kinds.INT16
            _narrow_scale(graph.tensors[tensor.index])
    biases = {op.inputs[2] for op in file.ops if op.kind in _WEIGHTED and len(op.inputs) > 2 and op.inputs[2] >= 0}
    wide: dict[int, int] = {}
    for index in sorted(biases):
        tensor = graph.tensors[index]
        if tensor.buffer not in wide:
            wide[tensor.buffer] = _wide_buffer(model, file.tensors[index].values(), biases, tensor.buffer)
        tensor.type, tensor.buffer = kinds.INT64, wide[tensor.buffer]
        _narrow_scale(tensor)
    _versions(model)
    return serialize(model)


def _narrow_scale(tensor: Any) -> None:
    tensor.quantization.scale = [float(np.float32(s) / np.float32(_FACTOR)) for s in tensor.quantization.scale]


def _wide_buffer(model: Any, values: np.ndarray[Any, Any], biases: set[int], buffer: int) -> int:
    """A buffer with the values as int64: the old one where only biases use it."""
    data = np.frombuffer(values.astype(np.int64).tobytes(), np.uint8)
    users = {i for i, tensor in enumerate(model.subgraphs[0].tensors) if tensor.buffer == buffer}
    if users <= biases:
        model.buffers[buffer].data = data
        return buffer
    added = schema().BufferT()
    added.data = data
    model.buffers.append(added)
    return len(model.buffers) - 1


def _versions(model: Any) -> None:
    """Every operator at a version that takes INT16, and additions of any scale, not only powers of two."""
    for op in model.subgraphs[0].operators:
        code = model.operatorCodes[op.opcodeIndex]
        code.version = max(code.version, _VERSIONS.get(kind_of(model, op), 1))
        if hasattr(op.builtinOptions, "potScaleInt16"):
            op.builtinOptions.potScaleInt16 = False
