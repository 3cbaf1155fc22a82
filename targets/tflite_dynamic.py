"""Linear layers with integer weights and float activations in a .tflite: FULLY_CONNECTED with integer weights on float tensors.

With float inputs LiteRT quantizes each row while it runs ("dynamic range"); a DEQUANTIZE between the weights and the operator
makes it compute in float ("weight only"). The converter is handed float weights, whose integers are put back here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.artifact import Mismatch
from edgekit.frozen import FrozenProgram, Layer
from edgekit.frozen.dynamic_ops import DYNAMIC_OPS
from edgekit.targets.tflite_edit import add_operator, add_tensor, opcode
from edgekit.targets.tflite_file import Op, TfliteFile, pack, schema

__all__ = ["compare_dynamic", "dynamic_layers", "integer_weight", "owned_products", "write_integers"]

_PER_CHANNEL = 12
"""Version of the operator from which on int8 weights of float tensors have a scale for each channel; older runtimes refuse it
instead of computing something else."""

_PACKED = {4: "INT4", 2: "INT2"}


def dynamic_layers(program: FrozenProgram) -> dict[str, Layer]:
    """Layers of this kind by name."""
    return {layer.name: layer for layer in program.layers if layer.op in DYNAMIC_OPS}


def owned_products(file: TfliteFile, program: FrozenProgram) -> dict[int, str]:
    """Output of each FULLY_CONNECTED to its layer, by the very numbers of its float weights: the converter's names tell less, and
    what a converter merged into the weights is no layer of the program any more."""
    found: dict[int, str] = {}
    waiting = list(dynamic_layers(program).values())
    for op in file.ops:
        tensor = file.tensors[op.inputs[1]] if op.kind == "FULLY_CONNECTED" else None
        if tensor is None or tensor.data is None or tensor.dtype != "FLOAT32":
            continue
        values = tensor.values()
        same = [x for x in waiting if tuple(values.shape) == tuple(x.args["weight"].shape) and (values == _real(x)).all()]
        same.sort(key=lambda x: f"{x.name};" not in file.tensors[op.outputs[0]].name)
        if same:
            found[op.outputs[0]] = same[0].name
            waiting.remove(same[0])
    return found


def _real(layer: Layer) -> NDArray[np.float32]:
    """The float32 weights that the converter was given."""
    real: NDArray[np.float32] = (layer.args["weight"].float() * layer.args["weight_scale"].view(-1, 1)).numpy()
    return real


def write_integers(file: TfliteFile, program: FrozenProgram, owners: Mapping[int, str], packed: bool) -> None:
    """Give each such layer's operator its integer weights in place of the float ones."""
    layers, graph = dynamic_layers(program), file.model.subgraphs[0]
    before: dict[int, Any] = {}
    readers = [index for op in file.ops for index in op.inputs]
    for op in file.ops:
        layer = layers.get(owners.get(op.outputs[0], ""))
        if layer is None or op.kind != "FULLY_CONNECTED":
            continue
        name, weight = f"{layer.name}/weight", graph.tensors[op.inputs[1]]
        index = add_tensor(graph, name, weight, "INT8")
        made = graph.tensors[index]
        _fill(file.model, made, layer, packed)
        operator = graph.operators[op.index]
        inputs = [int(i) for i in operator.inputs]
        if layer.op == "dynamic_qlinear":
            operator.builtinOptions.asymmetricQuantizeInputs = True
            operator.opcodeIndex = opcode(file.model, "FULLY_CONNECTED", _PER_CHANNEL)
            inputs[1] = index
        else:
            real = add_tensor(graph, f"{layer.name}/real", weight, "FLOAT32")
            graph.tensors[real].buffer = 0
            before[op.index] = add_operator(file.model, "DEQUANTIZE", 2, [index], [real], "DequantizeOptions")
            inputs[1] = real
        operator.inputs = inputs
        if readers.count(op.inputs[1]) == 1:
            weight.buffer = 0  # the float weights are nobody's now
    graph.operators = [o for i, own in enumerate(graph.operators) for o in ([before[i], own] if i in before else [own])]


def _fill(model: Any, tensor: Any, layer: Layer, packed: bool) -> None:
    """Integers, per-channel scales and zero points of zero."""
    values, bits = layer.args["weight"].numpy(), int(layer.args["weight_bits"])
    buffer, quantization = schema().BufferT(), schema().QuantizationParametersT()
    stored = _PACKED.get(bits) if packed else None
    tensor.type = getattr(schema().TensorType, stored or "INT8")
    buffer.data = pack(values, bits) if stored else values.astype(np.int8).reshape(-1).view(np.uint8)
    model.buffers.append(buffer)
    tensor.buffer = len(model.buffers) - 1
    quantization.scale = layer.args["weight_scale"].numpy().astype(np.float32)
    quantization.zeroPoint = np.zeros(len(values), np.int64)
    quantization.quantizedDimension = 0
    tensor.quantization = quantization


def integer_weight(file: TfliteFile, op: Op) -> Any | None:
    """The constant behind an operator's weight, through a DEQUANTIZE."""
    tensor = file.tensors[op.inputs[1]]
    if tensor.data is None and (made := file.producer.get(tensor.index)) is not None and made.kind == "DEQUANTIZE":
        tensor = file.tensors[made.inputs[0]]
    return tensor if tensor.data is not None else None


def compare_dynamic(file: TfliteFile, layer: Layer, ops: list[Op]) -> Iterator[tuple[str, NDArray[Any], NDArray[Any]] | Mismatch]:
    """Pairs of (what, found, wanted) of a layer's numbers, and what is not even of the right kind."""
    op = next((op for op in ops if op.kind == "FULLY_CONNECTED"), None)
    weight = None if op is None else integer_weight(file, op)
    if op is None or weight is None:
        yield Mismatch(layer.name, "operator", ", ".join(o.kind for o in ops) or "no operator", "FULLY_CONNECTED on constants")
        return
    if weight.dtype not in ("INT8", "INT4", "INT2"):
        yield Mismatch(layer.name, "weight type", weight.dtype, "INT8, INT4 or INT2")
        return
    direct = weight.index == op.inputs[1]
    if direct != (layer.op == "dynamic_qlinear"):
        yield Mismatch(layer.name, "operator", "dynamic range" if direct else "weight only", layer.op)
    yield "weight", weight.values(), layer.args["weight"].numpy()
    yield "weight scale", weight.scales, layer.args["weight_scale"].numpy().astype(np.float32)
    yield "weight zero point", weight.zero_points, np.zeros(len(weight.zero_points), np.int64)
    wanted = layer.args["bias"].numpy().astype(np.float32)
    has = len(op.inputs) > 2 and op.inputs[2] >= 0
    yield "bias", file.tensors[op.inputs[2]].values() if has else np.zeros_like(wanted), wanted
