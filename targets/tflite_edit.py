"""Edits of a .tflite object tree that put back what the converter changes: lookup tables, and the scales around concatenations.

The tree is the schema's ``ModelT``; tensors are named already (see :mod:`edgekit.targets.tflite_finish`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.frozen import Layer
from edgekit.targets.silu_gate import GATE, is_gated
from edgekit.targets.tflite_file import enum_names, schema

__all__ = ["add_constant", "add_operator", "add_tensor", "kind_of", "opcode", "restore_scales", "write_luts"]

_NATIVE = {
    "sigmoid": ("LOGISTIC", 2, (1 / 256, -128)),
    "tanh": ("TANH", 2, (1 / 128, 0)),
    "gelu": ("GELU", 2, None),
    "leaky_relu": ("LEAKY_RELU", 2, None),
    "elu": ("ELU", 1, None),
}
"""Functions with an int8 kernel within 1 of the table: operator, version, and the only (scale, zero point) it can write."""


def kind_of(model: Any, op: Any) -> str:
    """Schema name of an operator."""
    code = model.operatorCodes[op.opcodeIndex]
    return enum_names("BuiltinOperator")[max(code.builtinCode, code.deprecatedBuiltinCode)]


def opcode(model: Any, kind: str, version: int) -> int:
    """Index of that operator code, added where the file lacks it."""
    code = {name: value for value, name in enum_names("BuiltinOperator").items()}[kind]
    known = [(max(c.builtinCode, c.deprecatedBuiltinCode), c.version) for c in model.operatorCodes]
    if (code, version) not in known:
        opcode = schema().OperatorCodeT()
        opcode.builtinCode, opcode.deprecatedBuiltinCode, opcode.version = code, min(code, 127), version
        model.operatorCodes.append(opcode)
        known.append((code, version))
    return known.index((code, version))


def add_operator(model: Any, kind: str, version: int, inputs: Sequence[int], outputs: Sequence[int], options: str = "") -> Any:
    """A new operator, not yet in the graph; ``options``: the schema's options table (default values), "" for none."""
    op = schema().OperatorT()
    op.opcodeIndex, op.inputs, op.outputs = opcode(model, kind, version), list(inputs), list(outputs)
    if options:
        op.builtinOptionsType = getattr(schema().BuiltinOptions, options)
        op.builtinOptions = getattr(schema(), f"{options}T")()
    return op


def add_tensor(graph: Any, name: str, like: Any, dtype: str, quantization: Any = None) -> int:
    """A new activation with the shape of ``like``; its index."""
    tensor = schema().TensorT()
    tensor.name, tensor.shape, tensor.hasRank = name.encode(), like.shape, True
    tensor.type, tensor.quantization = getattr(schema().TensorType, dtype), quantization
    graph.tensors.append(tensor)
    return len(graph.tensors) - 1


def add_constant(model: Any, name: str, values: NDArray[Any], dtype: str, quantization: Any = None) -> int:
    """A new constant; its tensor's index."""
    graph, buffer, tensor = model.subgraphs[0], schema().BufferT(), schema().TensorT()
    buffer.data = np.frombuffer(np.ascontiguousarray(values).tobytes(), np.uint8)
    model.buffers.append(buffer)
    tensor.name, tensor.shape, tensor.hasRank = name.encode(), np.asarray(values.shape, np.int32), True
    tensor.type, tensor.quantization, tensor.buffer = getattr(schema().TensorType, dtype), quantization, len(model.buffers) - 1
    graph.tensors.append(tensor)
    return len(graph.tensors) - 1


def write_luts(model: Any, layers: Mapping[str, Layer]) -> None:
    """Turn every placeholder (GELU named as a qlut layer) into the layer's function.

    An int8 kernel of that function where there is one for the layer's scale; SiLU as LOGISTIC and MUL, which XNNPACK runs several
    times faster than a table, where that is within 1 of the table for all 256 inputs; else the program's own table, exactly: CAST
    to int32, ADD 128, GATHER from the 256 entries. (HARD_SWISH of LiteRT is neither exact nor faster than that.)
    """
    graph, result = model.subgraphs[0], []
    for op in graph.operators:
        layer = layers.get(graph.tensors[op.outputs[0]].name.decode())
        if layer is None or layer.op != "qlut" or kind_of(model, op) != "GELU":
            result.append(op)
            continue
        kind, version, fixed = _NATIVE.get(layer.args["function"], ("", 0, None))
        if kind == "GELU":
            result.append(op)
        elif kind and (fixed is None or fixed == (layer.out_scale, layer.out_zero_point)):
            native = add_operator(model, kind, version, op.inputs, op.outputs, "LeakyReluOptions" if kind == "LEAKY_RELU" else "")
            if kind == "LEAKY_RELU":
                native.builtinOptions.alpha = 0.01
            result.append(native)
        elif is_gated(layer):
            result += _gate(model, layer, op)
        else:
            result += _gather(model, layer, op)
    graph.operators = result


def _gate(model: Any, layer: Layer, op: Any) -> list[Any]:
    graph = model.subgraphs[0]
    source, out = int(op.inputs[0]), int(op.outputs[0])
    gate = add_tensor(graph, f"{layer.name}/gate", graph.tensors[out], "INT8", _quantization(*GATE))
    return [
        add_operator(model, "LOGISTIC", 2, [source], [gate]),
        add_operator(model, "MUL", 2, [source, gate], [out], "MulOptions"),
    ]


def _gather(model: Any, layer: Layer, op: Any) -> list[Any]:
    graph = model.subgraphs[0]
    source, out = int(op.inputs[0]), int(op.outputs[0])
    wide, place = (add_tensor(graph, f"{layer.name}/{n}", graph.tensors[out], "INT32") for n in ("int32", "place"))
    offset = add_constant(model, "", np.array(128, np.int32), "INT32")
    table = add_constant(model, f"{layer.name}/table", layer.args["table"].numpy(), "INT8", graph.tensors[out].quantization)
    return [
        add_operator(model, "CAST", 1, [source], [wide], "CastOptions"),
        add_operator(model, "ADD", 1, [wide, offset], [place], "AddOptions"),
        add_operator(model, "GATHER", 2, [table, place], [out], "GatherOptions"),
    ]


def restore_scales(model: Any, layers: Mapping[str, Layer]) -> None:
    """Undo the converter's wish that the inputs of a concatenation have its output's scale already.

    It overwrites the producers' output scales; here they get the program's back and a QUANTIZE (one rounding, as the
    program's qconcat rounds every part) stands between them and the CONCATENATION.
    """
    graph, result = model.subgraphs[0], []
    joined = {int(i) for op in graph.operators if kind_of(model, op) == "CONCATENATION" for i in op.inputs}
    changed: dict[int, Any] = {}
    for index in sorted(joined):
        tensor = graph.tensors[index]
        layer = layers.get((tensor.name or b"").decode())
        if layer is not None and layer.out_scale is not None and tensor.quantization is not None:
            wanted = (float(np.float32(layer.out_scale)), layer.out_zero_point)
            if (float(tensor.quantization.scale[0]), int(tensor.quantization.zeroPoint[0])) != wanted:
                changed[index] = tensor.quantization
                tensor.quantization = _quantization(*wanted)
    for op in graph.operators:
        if kind_of(model, op) == "CONCATENATION":
            owner = graph.tensors[op.outputs[0]].name.decode()
            op.inputs = [int(i) for i in op.inputs]
            for place, index in enumerate(op.inputs):
                if index in changed:
                    joint = add_tensor(graph, f"{owner}/part{place}", graph.tensors[index], "INT8", changed[index])
                    result.append(add_operator(model, "QUANTIZE", 1, [index], [joint], "QuantizeOptions"))
                    op.inputs[place] = joint
        result.append(op)
    graph.operators = result


def _quantization(scale: float, zero_point: Any) -> Any:
    quantization = schema().QuantizationParametersT()
    quantization.scale, quantization.zeroPoint = [scale], [int(zero_point)]
    return quantization
