"""From the converter's file to edgekit's: frozen names, exact biases, packed weights, float inputs and outputs.

Names in the finished file, from which everything is read back later:

* ``layer``: the tensor that a frozen layer computes; ``layer/1``, ``layer/2``: what a layer of several operators has on the way;
* ``layer/weight``, ``layer/bias``: its constants (of the first layer where two share them); other constants have no name;
* ``~node``: the output of an operator that the program leaves in float.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from edgekit.frozen import FrozenProgram, Layer
from edgekit.frozen.dynamic_ops import DYNAMIC_OPS
from edgekit.targets.tflite_convert import BARRIER
from edgekit.targets.tflite_dynamic import owned_products, write_integers
from edgekit.targets.tflite_edit import add_operator, add_tensor, restore_scales, write_luts
from edgekit.targets.tflite_file import Op, TfliteFile, pack, parse, schema, serialize

__all__ = ["LAYOUTS", "MOVING", "VIEWS", "WEIGHTED", "finish", "same_quantization"]

WEIGHTED = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
"""Operators whose second input is a weight and third a bias."""

LAYOUTS = "edgekit.inputs"
"""Name of the metadata entry that holds the inputs' layouts, "NHWC" or "-", separated by commas."""

_STORED = {4: {"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"}, 2: {"FULLY_CONNECTED"}}
"""Operators that take packed weights of so many bits (ai-edge-litert 2.3)."""


MOVING = ("RESHAPE", "TRANSPOSE", "SLICE", "STRIDED_SLICE", "SPLIT", "CONCATENATION", "PAD", "GATHER", "SQUEEZE", "EXPAND_DIMS")
"""Operators that move values without changing them."""

VIEWS = ("qpad", "qreshape", "qpermute", "qslice", "dequantize")
"""Layers that may leave no trace in the file: merged into a neighbour with the same scale, or done by the caller."""


def same_quantization(tensor: Any, layer: Layer) -> bool:
    """True if the tensor has the layer's output scale (as float32) and zero point."""
    return (
        layer.out_scale is not None
        and tensor.scale == float(np.float32(layer.out_scale))
        and tensor.zero_point == layer.out_zero_point
    )


def finish(content: bytes, program: FrozenProgram, *, channel_last: bool, float_io: bool, packed: bool) -> bytes:
    """The converter's bytes with edgekit's names, the program's biases to the last unit, and what was asked for."""
    file = _without_barriers(parse(content, program.name), program.name)
    owners = _owners(file, program)
    model = file.model
    graph = model.subgraphs[0]
    names = _names(file, program, owners)
    for tensor in file.tensors:
        graph.tensors[tensor.index].name = names.get(tensor.index, "").encode()
    write_integers(file, program, owners, packed)
    _constants(file, program, owners, packed)
    layers = {layer.name: layer for layer in program.layers}
    write_luts(model, layers)
    restore_scales(model, layers)
    if float_io:
        _float_io(file, model, program, names)
    model.description, model.metadata, graph.name = None, [], None
    _drop_unused_buffers(model)
    _write_layouts(model, program, channel_last)
    return serialize(model)


def _without_barriers(file: TfliteFile, where: str) -> TfliteFile:
    """The file with every reader of a barrier's output reading its input instead; a model's own FLOOR stays."""
    source: dict[int, int] = {}
    for op in file.ops:
        if op.kind == "FLOOR" and file.tensors[op.outputs[0]].name.startswith(BARRIER):  # the operator's own label comes first
            source[op.outputs[0]] = source.get(op.inputs[0], op.inputs[0])
    graph = file.model.subgraphs[0]
    graph.operators = [op for op in graph.operators if int(op.outputs[0]) not in source]
    for op in graph.operators:
        op.inputs = [source.get(int(i), int(i)) for i in op.inputs]
    return parse(serialize(file.model), where) if source else file


def _labels(name: str) -> list[str]:
    """The traced names in a converter's tensor name, such as "down;;pad;1" (the number only makes it unique)."""
    return [part for part in re.sub(r";\d*$", "", name).split(";") if part]


def _owners(file: TfliteFile, program: FrozenProgram) -> dict[int, str]:
    """Activation tensor to the frozen layer (or "~node") that it belongs to."""
    layers = {layer.name: layer for layer in program.layers}
    order = {node.name: i for i, node in enumerate(program.module.graph.nodes)}
    rank = {name: order[layer.node] for name, layer in layers.items()} | {f"~{name}": i for name, i in order.items()}
    owners: dict[int, str] = {}
    for tensor in file.tensors:
        found = [label for label in _labels(tensor.name) if label in rank]
        exact = [label for label in found if label in layers and same_quantization(tensor, layers[label])]
        if tensor.data is None and found:
            owners[tensor.index] = max(_computing(file, tensor.index, exact, layers) or exact or found, key=rank.__getitem__)
    owners |= owned_products(file, program)
    owners |= _io_owners(file, program)
    owners |= _shared_dequantizers(file, program, owners)
    return owners | _moved_quantizers(file, program, owners)


def _computing(file: TfliteFile, index: int, names: Sequence[str], layers: Mapping[str, Layer]) -> list[str]:
    """Those of several layers merged into one operator that compute: the others only move, and may have left no trace."""
    made_by = file.producer.get(index)
    if made_by is None or made_by.kind in MOVING:
        return []
    return [name for name in names if layers[name].op not in VIEWS]


def _shared_dequantizers(file: TfliteFile, program: FrozenProgram, owners: Mapping[int, str]) -> dict[int, str]:
    """A DEQUANTIZE that only float operators read is the program's own, although the converter, which merges equal operators, may
    have named it for the integer layer that reads the same tensor."""
    own = {layer.inputs[0]: layer.name for layer in program.layers if layer.op == "dequantize"}
    readers: dict[int, set[str]] = {}
    for op in file.ops:
        for index in op.inputs:
            readers.setdefault(index, set()).add(owners.get(op.outputs[0], ""))
    return {
        out: own[source]
        for op in file.ops
        if op.kind == "DEQUANTIZE" and (source := owners.get(op.inputs[0], "")) in own
        for out in op.outputs
        if owners.get(out, "") not in readers.get(out, ())
    }


def _moved_quantizers(file: TfliteFile, program: FrozenProgram, owners: Mapping[int, str]) -> dict[int, str]:
    """The converter moves a quantize in front of reshapes and transposes, or makes the float operator before it int8: then
    the quantize's integers are what its consumer reads."""
    names = {layer.node: layer.name for layer in program.layers}
    nodes = {node.name: node for node in program.module.graph.nodes}
    present, found = set(owners.values()), {}
    for layer in program.layers:
        if layer.op != "quantize" or layer.name in present:
            continue
        users = {names[user.name] for user in nodes[layer.node].users if user.name in names}
        for op in file.ops:
            for index in op.inputs if owners.get(op.outputs[0]) in users else ():
                if file.tensors[index].data is None and same_quantization(file.tensors[index], layer):
                    found[index] = layer.name
    return found


def _io_owners(file: TfliteFile, program: FrozenProgram) -> dict[int, str]:
    """Inputs and outputs have names of their own in the converter's file: find their layers through the program's graph."""
    names = {layer.node: layer for layer in program.layers}
    nodes = list(program.module.graph.nodes)
    owners: dict[int, str] = {}
    for node, index in zip((n for n in nodes if n.op == "placeholder"), file.inputs, strict=True):
        quantizers = [names[u.name] for u in node.users if u.name in names and names[u.name].op == "quantize"]
        match = [layer for layer in quantizers if same_quantization(file.tensors[index], layer)]
        owners[index] = match[0].name if match else f"~{node.name}"
    results = nodes[-1].args[0]
    made_by = {out: op.kind for op in file.ops for out in op.outputs}
    for node, index in zip(results, file.outputs, strict=True):
        # the file ends before the program's dequantize, and the converter may have merged a last reshape into the operator before
        ended = ["dequantize"] if file.tensors[index].dtype != "FLOAT32" else []
        ended += ["qreshape"] if ended and made_by.get(index) != "RESHAPE" else []
        while node.name in names and names[node.name].op in ended:
            node = node.args[0]
        owners[index] = names[node.name].name if node.name in names else f"~{node.name}"
    return owners


def _names(file: TfliteFile, program: FrozenProgram, owners: Mapping[int, str]) -> dict[int, str]:
    """Final names of the activations: the layer's own is its last in execution order, if possible with the layer's scale."""
    order = [*file.inputs, *(out for op in file.ops for out in op.outputs)]
    mine: dict[str, list[int]] = {}
    for index in order:
        if index in owners:
            mine.setdefault(owners[index], []).append(index)
    layers = {layer.name: layer for layer in program.layers}
    names: dict[int, str] = {}
    for owner, indices in mine.items():
        exact = [i for i in indices if owner in layers and same_quantization(file.tensors[i], layers[owner])]
        names |= {index: f"{owner}/{i + 1}" for i, index in enumerate(indices)} | {(exact or indices)[-1]: owner}
    return names


def _constants(file: TfliteFile, program: FrozenProgram, owners: Mapping[int, str], packed: bool) -> None:
    """Name weights and biases, make the biases exact, pack weights that the program has in 4 or 2 bits."""
    layers = {layer.name: layer for layer in program.layers if layer.weight_bits and layer.op not in DYNAMIC_OPS}
    tensors = file.model.subgraphs[0].tensors
    packable = _packable(file, layers, owners) if packed else {}
    for op in file.ops:
        layer = layers.get(owners.get(op.outputs[0], ""))
        if layer is None or op.kind not in WEIGHTED:
            continue
        for index, role in zip(op.inputs[1:3], ("weight", "bias"), strict=False):
            if index >= 0 and not tensors[index].name:
                tensors[index].name = f"{layer.name}/{role}".encode()
        if len(op.inputs) > 2 and op.inputs[2] >= 0:
            _exact_bias(file, op.inputs[2], layer)
    for index, bits in packable.items():
        values = file.tensors[index].values()
        tensors[index].type = getattr(schema().TensorType, f"INT{bits}")
        _replace_buffer(file.model, tensors[index], pack(values, bits))


def _packable(file: TfliteFile, layers: Mapping[str, Layer], owners: Mapping[int, str]) -> dict[int, int]:
    """Weight tensor to bits, where every operator that reads it takes so few bits and every value fits."""
    users: dict[int, list[tuple[Op, Layer | None]]] = {}
    for op in file.ops:
        for index in op.inputs:
            users.setdefault(index, []).append((op, layers.get(owners.get(op.outputs[0], ""))))
    found: dict[int, int] = {}
    for index, uses in users.items():
        bits = {layer.weight_bits if layer else None for _, layer in uses}
        if len(bits) != 1 or index < 0 or file.tensors[index].dtype != "INT8" or file.tensors[index].data is None:
            continue
        wanted = bits.pop()
        if wanted in _STORED and all(op.kind in _STORED[wanted] and op.inputs[1] == index for op, _ in uses):
            found[index] = wanted
    return found


def _exact_bias(file: TfliteFile, index: int, layer: Layer) -> None:
    """The converter takes biases as float32, which is off by a few units above 2^20: put the integers back."""
    tensor = file.tensors[index]
    wanted = layer.args["bias"].numpy().astype(np.int32)
    if tensor.data is None or tensor.dtype != "INT32" or tensor.shape != wanted.shape:
        return
    found = tensor.values().astype(np.int64)
    if (found != wanted).any() and (np.abs(found - wanted) <= np.abs(wanted.astype(np.int64)) // (1 << 20) + 1).all():
        _replace_buffer(file.model, file.model.subgraphs[0].tensors[index], wanted.view(np.uint8))


def _replace_buffer(model: Any, tensor: Any, data: np.ndarray[Any, Any]) -> None:
    """Give a tensor a buffer of its own (others may share the old one)."""
    buffer = schema().BufferT()
    buffer.data = data
    model.buffers.append(buffer)
    tensor.buffer = len(model.buffers) - 1


def _drop_unused_buffers(model: Any) -> None:
    """Keep buffer 0 (the empty one of all activations) and what a tensor uses; equal contents are stored once."""
    kept: list[Any] = [schema().BufferT()]
    places: dict[bytes, int] = {b"": 0}
    for tensor in model.subgraphs[0].tensors:
        data = model.buffers[tensor.buffer].data
        content = b"" if data is None else bytes(np.asarray(data, np.uint8))
        if content not in places:
            places[content] = len(kept)
            kept.append(model.buffers[tensor.buffer])
        tensor.buffer = places[content]
    model.buffers = kept


def _write_layouts(model: Any, program: FrozenProgram, channel_last: bool) -> None:
    """Metadata that says for each input whether it is channel-last: shapes alone cannot tell for a 3 x 3 x 3 input."""
    graph, marks = model.subgraphs[0], []
    for index, shape in zip(graph.inputs, program.input_shapes, strict=True):
        stored = tuple(int(d) for d in graph.tensors[index].shape)
        last = channel_last and len(shape) == 4 and stored == (shape[0], *shape[2:], shape[1])
        marks.append("NHWC" if last else "-")
    buffer, entry = schema().BufferT(), schema().MetadataT()
    buffer.data = np.frombuffer(",".join(marks).encode(), np.uint8)
    model.buffers.append(buffer)
    entry.name, entry.buffer = LAYOUTS.encode(), len(model.buffers) - 1
    model.metadata = [entry]


def _float_io(file: TfliteFile, model: Any, program: FrozenProgram, names: Mapping[int, str]) -> None:
    """Put the program's own quantize before every int8 input and its dequantize behind every int8 output."""
    graph, layers = model.subgraphs[0], {layer.name: layer for layer in program.layers}
    nodes = list(program.module.graph.nodes)
    placeholders = [n for n in nodes if n.op == "placeholder"]
    inputs, outputs = list(file.inputs), list(file.outputs)
    first, last = [], []
    for i, index in enumerate(file.inputs):
        if file.tensors[index].dtype == "INT8" and names[index].split("/")[0] in layers:
            inputs[i] = add_tensor(graph, placeholders[i].name, graph.tensors[index], "FLOAT32")
            first.append(add_operator(model, "QUANTIZE", 1, [inputs[i]], [index], "QuantizeOptions"))
    for i, index in enumerate(file.outputs):
        result = nodes[-1].args[0][i]
        if file.tensors[index].dtype == "INT8" and str(result.target).startswith("edgekit.dequantize"):
            name = next(layer.name for layer in program.layers if layer.node == result.name)
            outputs[i] = add_tensor(graph, name, graph.tensors[index], "FLOAT32")
            last.append(add_operator(model, "DEQUANTIZE", 2, [index], [outputs[i]], "DequantizeOptions"))
    graph.operators = [*first, *graph.operators, *last]
    graph.inputs, graph.outputs = inputs, outputs
    for signature in model.signatureDefs or []:
        _redirect(signature.inputs, file.inputs, inputs)
        _redirect(signature.outputs, file.outputs, outputs)


def _redirect(entries: Sequence[Any], old: Sequence[int], new: Sequence[int]) -> None:
    moved = dict(zip(old, new, strict=True))
    for entry in entries:
        entry.tensorIndex = moved.get(int(entry.tensorIndex), int(entry.tensorIndex))
