"""A copy of a ``.pte`` in memory in which every layer's int8 tensor is an output, to see what the file itself computes inside.

XNNPACK's graph marks a tensor as an external output by a flag and a number; the program then needs a value for it and one more
argument of the delegate call. Constants, scales and zero points stay the bytes of the file, so that a fault in them shows.
"""

from __future__ import annotations

import importlib.resources
import json
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.frozen import FrozenProgram, Layer
from edgekit.targets.pte_file import FileOp, PteFile, read_pte
from edgekit.targets.pte_layers import Placement
from edgekit.targets.spiking import written_out

__all__ = ["Tap", "choose", "edit_blob", "graph_of", "move", "spike_taps", "tapped"]

_CHANNEL_LAST = {"XNNConv2d", "XNNDepthwiseConv2d", "XNNMaxPooling2d", "XNNAvgPooling2d", "XNNGlobalAvgPooling2d"}
_OUTPUT_FLAG = 2
_ALIGNMENT = 16


@dataclass(frozen=True)
class Tap:
    """One extra output: the layer, the file's tensor, the axes' order back to the program's layout, and the layer's shape."""

    layer: str
    tensor: int
    order: tuple[int, ...]
    shape: tuple[int, ...]


def tapped(file: PteFile, taps: Sequence[Tap]) -> bytes:
    """The bytes of the copy, whose outputs after the file's own are the taps."""
    from executorch.exir._serialize._program import deserialize_pte_binary, serialize_pte_binary

    pte = deserialize_pte_binary(file.path.read_bytes())
    plan = pte.program.execution_plan[0]
    calls = [i.instr_args for c in plan.chains for i in c.instructions if hasattr(i.instr_args, "delegate_index")]
    extra: dict[int, int] = {}
    for number, call in enumerate(calls):
        inside = list(dict.fromkeys(t.tensor for t in taps if t.tensor >> 32 == number + 1))
        blob = pte.program.backend_delegate_data[plan.delegates[call.delegate_index].processed.index]
        if inside:
            blob.data = edit_blob(
                bytes(blob.data), partial(_mark, numbers=[n & 0xFFFFFFFF for n in inside], first=len(call.args))
            )
        for n in inside:
            extra[n] = _add_value(plan, file.tensors[n].shape, file.tensors[n].dtype)
            call.args.append(extra[n])
    for number in {t.tensor for t in taps} - set(extra):
        move(plan, number)  # planning lets a later tensor take its place
    plan.outputs += [extra.get(t.tensor, t.tensor) for t in taps]
    return _exact_scales(file, bytes(serialize_pte_binary(pte, extract_delegate_segments=True)))


def _exact_scales(file: PteFile, copy: bytes) -> bytes:
    """The copy with the file's own bytes for every scale: the text form keeps 12 decimals, too few for scales below 1e-3."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "copy.pte"
        path.write_bytes(copy)
        copied = read_pte(path).tensors
    original, exact = file.path.read_bytes(), bytearray(copy)
    for number, tensor in file.tensors.items():
        for field in ("scale", "scales"):
            if field in tensor.at:
                size = 4 if tensor.scales is None or field == "scale" else 4 * len(tensor.scales)
                start, found = copied[number].at[field], tensor.at[field]
                exact[start : start + size] = original[found : found + size]
    return bytes(exact)


def choose(file: PteFile, placement: Placement) -> tuple[Tap, ...]:
    """For each layer the first int8 tensor that an operator writes, preferably inside a delegate."""
    return _taps(file, [(placed.layer, placed.values) for placed in placement.values()])


def spike_taps(file: PteFile, program: FrozenProgram) -> tuple[Tap, ...]:
    """The layers of neurons: what joins the spikes of all steps.

    Those of one shape are told by the constants that they follow from, as branches may change places in a file; where these do
    not tell, they are counted off.
    """
    written = written_out(program, floors=True)
    joined: dict[tuple[int, ...], list[int]] = {}
    for op in file.ops:
        if op.kind == "aten::cat" or op.kind.startswith("XNNConcatenate"):
            joined.setdefault(tuple(sorted(file.tensors[op.outputs[0]].shape)), []).append(op.outputs[0])
    wanted: dict[tuple[int, ...], list[str]] = {}
    for node in written.program.module.graph.nodes:
        if str(node.target) == "aten.cat.default":
            wanted.setdefault(tuple(sorted(node.meta["val"].shape)), []).append(node.name)
    names = {node: name for name, node in written.neurons.items()}
    behind, after = _behind_nodes(written.program.module), _behind_tensors(file)
    found = []
    for shape, nodes in wanted.items():
        numbers = joined.get(shape, [])
        if len(numbers) == len(nodes):
            numbers = _in_order_of(nodes, numbers, behind, after)
            found += [(program.layer(names[n]), (i,)) for n, i in zip(nodes, numbers, strict=True) if n in names]
    return _taps(file, found)


def _in_order_of(
    nodes: Sequence[str], numbers: Sequence[int], behind: Mapping[str, frozenset[bytes]], after: Mapping[int, frozenset[bytes]]
) -> list[int]:
    """``numbers`` in the order of the nodes that follow from the same constants; as they are where that is not clear."""
    both = frozenset().union(*behind.values()) & frozenset().union(*after.values())
    of = {after[i] & both: i for i in numbers}
    wanted = [behind[n] & both for n in nodes]
    return [of[w] for w in wanted] if set(wanted) == set(of) and len(of) == len(nodes) else list(numbers)


def _behind_nodes(module: Any) -> dict[str, frozenset[bytes]]:
    """The constants of several numbers that each value of a graph follows from, as the bytes of their sorted values."""
    found: dict[str, frozenset[bytes]] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            value: Any = module
            for part in str(node.target).split("."):
                value = getattr(value, part)
            found[node.name] = _told(value.detach().numpy())
        else:
            found[node.name] = frozenset().union(*(found[n.name] for n in node.all_input_nodes))
    return found


def _behind_tensors(file: PteFile) -> dict[int, frozenset[bytes]]:
    found: dict[int, frozenset[bytes]] = {n: _told(t.data) for n, t in file.tensors.items() if t.data is not None}
    for op in file.ops:
        behind = frozenset().union(*(found.get(n, frozenset()) for n in op.inputs))
        found |= dict.fromkeys(op.outputs, behind)
    return found


def _told(values: np.ndarray) -> frozenset[bytes]:
    return frozenset({np.sort(values.astype(np.float32), axis=None).tobytes()}) if values.size > 1 else frozenset()


def _taps(file: PteFile, layers: Sequence[tuple[Layer, Sequence[int]]]) -> tuple[Tap, ...]:
    last = _channel_last(file)
    external = {n for op in file.ops if op.kind == "Link" for n in (*op.inputs, *op.outputs)}
    written = {n for op in file.ops if op.kind not in ("Link", "aten::view") for n in op.outputs}
    taps = []
    for layer, values in layers:
        usable = [n for n in values if n in written and (n < 1 << 32 or n not in external)]
        usable += [op.outputs[0] for op in file.ops if op.kind == "Link" and op.inputs[0] in values and op.outputs[0] < 1 << 32]
        if usable:
            number = usable[0]
            rank = len(file.tensors[number].shape)
            order = (0, 3, 1, 2) if number in last and rank == 4 else tuple(range(rank))
            taps.append(Tap(layer.name, number, order, layer.shape))
    return tuple(taps)


def _channel_last(file: PteFile) -> set[int]:
    """Tensors that XNNPACK keeps channel-last; transposes that only change the layout belong to no operator of the program."""
    found: set[int] = set()
    for op in file.ops:
        if op.kind in _CHANNEL_LAST or _inherits(op, found):
            found.update(op.outputs)
    return found


def _inherits(op: FileOp, channel_last: set[int]) -> bool:
    if op.kind == "XNNStaticTranspose" and not op.arguments.get("in_program", True):
        return tuple(op.arguments["perm"]) == (0, 2, 3, 1)
    return op.delegate >= 0 and op.kind not in ("XNNStaticReshape", "Link") and any(n in channel_last for n in op.inputs)


def edit_blob(blob: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """The XNNPACK blob with its graph, as the tree of its JSON form, changed in place."""
    from executorch.backends.xnnpack.serialization.xnnpack_graph_serialize import XNNHeader

    header = XNNHeader.from_bytes(blob[: XNNHeader.EXPECTED_LENGTH])
    graph = blob[header.flatbuffer_offset : header.flatbuffer_offset + header.flatbuffer_size]
    constants = blob[header.constant_data_offset : header.constant_data_offset + header.constant_data_size]
    opened = _edit_graph(graph, change)
    padded = opened + bytes(-len(opened) % _ALIGNMENT)
    start = header.flatbuffer_offset
    edited: bytes = XNNHeader(start, len(opened), start + len(padded), len(constants)).to_bytes()
    return edited + blob[len(edited) : start] + padded + constants


def graph_of(blob: bytes) -> dict[str, Any]:
    """The tree of a blob's graph."""
    found: dict[str, Any] = {}
    edit_blob(blob, found.update)
    return found


def _edit_graph(graph: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """Through JSON and back with the flatbuffer compiler of executorch (which rounds scales: see :func:`_exact_scales`)."""
    package = importlib.resources.files("executorch")
    with (
        tempfile.TemporaryDirectory() as folder,
        importlib.resources.as_file(package / "data" / "bin" / "flatc") as flatc,
        importlib.resources.as_file(package / "backends" / "xnnpack" / "serialization" / "runtime_schema.fbs") as schema,
    ):
        (Path(folder) / "graph.bin").write_bytes(graph)
        flags = [
            "--json",
            "--strict-json",
            "--defaults-json",
            "--raw-binary",
            "-o",
            folder,
            str(schema),
            "--",
            f"{folder}/graph.bin",
        ]
        subprocess.run([str(flatc), *flags], check=True, capture_output=True)
        text = Path(folder) / "graph.json"
        tree = json.loads(text.read_text().replace(": inf", ": Infinity").replace(": -inf", ": -Infinity"))
        change(tree)
        text.write_text(json.dumps(tree).replace("Infinity", "inf"))
        subprocess.run([str(flatc), "--binary", "-o", folder, str(schema), str(text)], check=True, capture_output=True)
        return (Path(folder) / "graph.bin").read_bytes()


def _mark(tree: dict[str, Any], numbers: Sequence[int], first: int) -> None:
    for value in tree["xvalues"]:
        tensor = value["xvalue_union"]
        tensor = tensor.get("tensor_value", tensor)
        if tensor["id_out"] in numbers:
            tensor["external_id"] = first + list(numbers).index(tensor["id_out"])
            tensor["flags"] |= _OUTPUT_FLAG
    tree["output_ids"] += list(numbers)
    tree["num_externs"] += len(numbers)


def _add_value(plan: Any, shape: tuple[int, ...], dtype: str) -> int:
    """A new int8 or float32 value behind everything the plan keeps in memory."""
    from executorch.exir.schema import EValue, ScalarType, Tensor, TensorShapeDynamism

    scalar = ScalarType.FLOAT if dtype == "float32" else ScalarType.CHAR
    plan.values.append(
        EValue(
            Tensor(
                scalar_type=scalar, storage_offset=0, sizes=list(shape), dim_order=list(range(len(shape))),
                requires_grad=False, layout=0, data_buffer_idx=0, allocation_info=None, shape_dynamism=TensorShapeDynamism.STATIC,
            )
        )
    )  # fmt: skip
    move(plan, len(plan.values) - 1)
    return len(plan.values) - 1


def move(plan: Any, number: int) -> None:
    """Give a value a place of its own at the end of the planned memory."""
    from executorch.exir.schema import AllocationDetails, ScalarType

    value = plan.values[number].val
    start, size = plan.non_const_buffer_sizes[1], 4 if value.scalar_type == ScalarType.FLOAT else 1
    for d in value.sizes:
        size *= d
    value.allocation_info = AllocationDetails(memory_id=1, memory_offset_low=start & 0xFFFFFFFF, memory_offset_high=start >> 32)
    plan.non_const_buffer_sizes[1] = start + -(-size // _ALIGNMENT) * _ALIGNMENT
