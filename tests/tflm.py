"""One-operator TFLite files, run by TensorFlow Lite for Microcontrollers (package tflite-micro): an oracle of int8 arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import flatbuffers
import numpy as np
from numpy.typing import NDArray
from tflite_micro import runtime
from tflite_micro.tensorflow.lite.micro.python import schema_py_generated as schema

__all__ = ["T", "run_one"]


@dataclass(frozen=True)
class T:
    """A tensor: constant if it has ``data``; quantized if it has a scale (an array for one a channel, on axis ``axis``)."""

    shape: tuple[int, ...]
    scale: Any = None
    zero_point: Any = 0
    data: NDArray[Any] | None = None
    axis: int = 0


def run_one(
    operator: str, options: dict[str, Any], inputs: Sequence[T], output: T, values: Sequence[NDArray[np.int8]]
) -> NDArray[Any]:
    """The operator's int8 output.

    Args:
        operator: name in ``BuiltinOperator``; ``options`` are members of its options table (none: no table).
        values: of the inputs without data, in order.
    """
    model, code, graph = schema.ModelT(), schema.OperatorCodeT(), schema.SubGraphT()
    builtin = getattr(schema.BuiltinOperator, operator)
    code.builtinCode, code.deprecatedBuiltinCode, code.version = builtin, min(builtin, 127), 3
    model.version, model.operatorCodes = 3, [code]
    tensors = [*inputs, output]
    model.buffers = [schema.BufferT() for _ in range(len(tensors) + 1)]
    for buffer, tensor in zip(model.buffers[1:], tensors, strict=True):
        if tensor.data is not None:
            buffer.data = np.frombuffer(tensor.data.tobytes(), np.uint8)
    graph.tensors = [_tensor(t, i + 1) for i, t in enumerate(tensors)]
    graph.inputs = [i for i, t in enumerate(inputs) if t.data is None]
    graph.outputs = [len(inputs)]
    node = schema.OperatorT()
    node.opcodeIndex, node.inputs, node.outputs = 0, list(range(len(inputs))), [len(inputs)]
    kind = next(iter(options), None)
    if kind is not None:
        node.builtinOptionsType = getattr(schema.BuiltinOptions, kind)
        node.builtinOptions = getattr(schema, f"{kind}T")()
        for key, value in options[kind].items():
            setattr(node.builtinOptions, key, value)
    graph.operators, model.subgraphs = [node], [graph]
    builder = flatbuffers.Builder(1 << 16)
    builder.Finish(model.Pack(builder), b"TFL3")
    interpreter = runtime.Interpreter.from_bytes(bytes(builder.Output()), arena_size=1 << 22)
    for i, value in enumerate(values):
        interpreter.set_input(value.reshape(graph.tensors[graph.inputs[i]].shape), i)
    interpreter.invoke()
    return np.array(interpreter.get_output(0))


def _tensor(tensor: T, buffer: int) -> Any:
    found = schema.TensorT()
    kinds = {"int8": schema.TensorType.INT8, "int32": schema.TensorType.INT32}
    found.type = kinds["int8" if tensor.data is None else str(tensor.data.dtype)]
    found.name, found.shape, found.buffer = f"t{buffer}", list(tensor.shape), buffer
    if tensor.scale is not None:
        quantization = schema.QuantizationParametersT()
        quantization.scale = np.atleast_1d(tensor.scale).astype(np.float32).tolist()
        quantization.zeroPoint = np.broadcast_to(tensor.zero_point, len(quantization.scale)).astype(np.int64).tolist()
        quantization.quantizedDimension = tensor.axis
        found.quantization = quantization
    return found
