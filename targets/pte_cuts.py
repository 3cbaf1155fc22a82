"""A ``.pte`` cut into programs of one layer each: parts of its XNNPACK graphs and 1-bit layers, with the file's own constants.

A part of a graph is a delegate of its own in a program of one call. A 1-bit layer is its kernel's call, behind a delegate that
computes nothing, so that the same is to be taken off both. What else runs outside delegates is in none of them. Scales go through
text and lose digits (:mod:`edgekit.targets.pte_taps`), which times do not feel and results do by a step or two.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from edgekit.frozen import FrozenProgram
from edgekit.targets.executorch_binary import KERNELS, NAMESPACE
from edgekit.targets.pte_file import read_pte
from edgekit.targets.pte_layers import place
from edgekit.targets.pte_taps import Tap, choose, edit_blob, graph_of, move

__all__ = ["Part", "parts"]

Part = tuple[str, str, bytes, tuple[tuple[tuple[int, ...], str], ...]]
"""Layer, operators, bytes of the file, shape and numpy dtype of each input; the first computes nothing and has no name."""

_NOWHERE = 0xFFFFFFFF
_DTYPES = {"xnn_datatype_fp32": "float32", "xnn_datatype_qint8": "int8", "xnn_datatype_quint8": "uint8"}


def parts(path: Path, program: FrozenProgram) -> list[Part]:
    """The parts of a file in execution order, the empty one first."""
    from executorch.exir._serialize._program import deserialize_pte_binary

    file = read_pte(Path(path))
    pte = deserialize_pte_binary(Path(path).read_bytes())
    plan = pte.program.execution_plan[0]
    steps = [i.instr_args for c in plan.chains for i in c.instructions]
    delegates = [step.delegate_index for step in steps if hasattr(step, "delegate_index")]
    if not delegates:
        return []
    placement = place(file, program)
    taps = choose(file, placement)
    empty = _made(pte, delegates[0], _nothing(_tree(pte, delegates[0])))
    found: list[Part] = [("", "XNNCopy", *_stored(empty))]
    kernels = {n: (name, p.ops[0].kind) for name, p in placement.items() if p.layer.op in KERNELS and p.found for n in p.values}
    number = 0
    for step in steps:
        if hasattr(step, "delegate_index"):
            number += 1
            inside = {t.tensor & 0xFFFFFFFF: t for t in taps if t.tensor >> 32 == number}
            parts_of = _split(_tree(pte, step.delegate_index), inside)
            found += [(name, kinds, *_stored(_made(pte, step.delegate_index, part))) for name, kinds, part in parts_of]
        elif hasattr(step, "op_index") and _is_kernel(plan.operators[step.op_index]) and step.args[-1] in kernels:
            found.append((*kernels[step.args[-1]], *_stored(_with_kernel(empty, pte, step))))
    return found


def _tree(pte: Any, delegate: int) -> dict[str, Any]:
    """The graph of a delegate."""
    index = pte.program.execution_plan[0].delegates[delegate].processed.index
    return graph_of(bytes(pte.program.backend_delegate_data[index].data))


def _is_kernel(operator: Any) -> bool:
    return bool(operator.name.startswith(f"{NAMESPACE}::"))


def _split(tree: dict[str, Any], layers: dict[int, Tap]) -> list[tuple[str, str, dict[str, Any]]]:
    """(layer, operators, tree) of each part of a graph."""
    nodes, values = tree["xnodes"], {_tensor(v)["id_out"]: _tensor(v) for v in tree["xvalues"]}
    producer = {out: i for i, node in enumerate(nodes) for out in _ids(node, "output")}
    ends = [(tap.layer, [n]) for n, tap in layers.items() if n in producer]
    if rest := [n for n in tree["output_ids"] if n not in layers]:
        ends.append(("output", rest))
    found = []
    for name, outputs in sorted(ends, key=lambda e: producer[e[1][0]]):
        todo, inside = [producer[n] for n in outputs], set[int]()
        while todo:
            i = todo.pop()
            inside.add(i)
            todo += [producer[n] for n in _ids(nodes[i], "") if n in producer and n not in layers and producer[n] not in inside]
        chosen = [nodes[i] for i in sorted(inside)]
        made = {n for node in chosen for n in _ids(node, "output")}
        read = dict.fromkeys(n for node in chosen for n in _ids(node, "") if n in values and n not in made)
        inputs = [n for n in read if not values[n]["constant_buffer_idx"]]
        if inputs and not set(inputs) & set(outputs):
            kinds = " + ".join(dict.fromkeys(node["xnode_union_type"] for node in chosen))
            found.append((name, kinds, _subtree(tree, chosen, inputs, outputs)))
    return found


def _subtree(tree: dict[str, Any], nodes: Sequence[Any], inputs: Sequence[int], outputs: Sequence[int]) -> dict[str, Any]:
    """A graph of these nodes; ``inputs`` and ``outputs`` are its external values, in that order."""
    used = {n for node in nodes for n in (*_ids(node, ""), *_ids(node, "output"))}
    part = {**tree, "xnodes": copy.deepcopy(list(nodes))}
    part["xvalues"] = copy.deepcopy([v for v in tree["xvalues"] if _tensor(v)["id_out"] in used])
    order = {n: i for i, n in enumerate([*inputs, *outputs])}
    for value in map(_tensor, part["xvalues"]):
        number = value["id_out"]
        value["external_id"] = order.get(number, _NOWHERE)
        value["flags"] = (value["flags"] & ~3) | (1 if number in inputs else 2 if number in outputs else 0)
    part |= {"input_ids": list(inputs), "output_ids": list(outputs), "num_externs": len(order)}
    return part


def _nothing(tree: dict[str, Any]) -> dict[str, Any]:
    """A graph that copies one number: what a call of a delegate costs by itself."""
    number = {"datatype": "xnn_datatype_fp32", "num_dims": 1, "dims": [1], "constant_buffer_idx": 0, "flags": 0}
    number["dq_datatype"] = "xnn_datatype_invalid"
    values = [
        {"xvalue_union_type": "XNNTensorValue", "xvalue_union": {**number, "id_out": i, "external_id": i}} for i in range(2)
    ]
    node = {"xnode_union_type": "XNNCopy", "xnode_union": {"input_id": 0, "output_id": 1, "flags": 0}, "debug_handle": 0}
    return _subtree({**tree, "xvalues": values}, [node], [0], [1])


def _made(pte: Any, delegate: int, tree: dict[str, Any]) -> Any:
    """A file that calls one delegate with this graph."""
    from executorch.exir.schema import Buffer, Chain, DelegateCall, Instruction

    made = copy.deepcopy(pte)
    plan = made.program.execution_plan[0]
    values = {_tensor(v)["id_out"]: _tensor(v) for v in tree["xvalues"]}
    external = [values[n] for n in (*tree["input_ids"], *tree["output_ids"])]
    plan.values, plan.non_const_buffer_sizes, plan.operators = [], [0, 0], []
    for value in external:
        plan.values.append(_value(value, plan))
    count = len(tree["input_ids"])
    every = list(range(len(external)))
    plan.inputs, plan.outputs = every[:count], every[count:]
    plan.delegates = [plan.delegates[delegate]]
    blob = made.program.backend_delegate_data[plan.delegates[0].processed.index]
    blob.data = edit_blob(bytes(blob.data), lambda old: old.update(tree))
    made.program.backend_delegate_data, plan.delegates[0].processed.index = [blob], 0
    made.program.constant_buffer = [Buffer(storage=b"")]
    call = Instruction(DelegateCall(0, every))
    plan.chains = [Chain(inputs=[], outputs=[], instructions=[call], stacktrace=None)]
    keys = {tree["constant_data"][v["constant_buffer_idx"]]["named_key"] for v in values.values() if v["constant_buffer_idx"]}
    keys |= set(_keys(tree, tree["xvalues"]))
    made.named_data = _kept(made.named_data, keys)
    return made


def _with_kernel(empty: Any, pte: Any, step: Any) -> Any:
    """``empty`` with a kernel's call behind it: its constants, and its activations as further inputs."""
    from executorch.exir.schema import Instruction, IntList, KernelCall, Tensor

    made, whole = copy.deepcopy(empty), pte.program.execution_plan[0]
    plan, numbers = made.program.execution_plan[0], dict[int, int]()

    def number(old: int) -> int:
        if old not in numbers:
            value = copy.deepcopy(whole.values[old])
            if isinstance(value.val, IntList):
                value.val.items = [number(i) for i in value.val.items]
            elif isinstance(value.val, Tensor) and value.val.data_buffer_idx:
                made.program.constant_buffer.append(pte.program.constant_buffer[value.val.data_buffer_idx])
                value.val.data_buffer_idx = len(made.program.constant_buffer) - 1
            plan.values.append(value)
            numbers[old] = len(plan.values) - 1
            if isinstance(value.val, Tensor) and not value.val.data_buffer_idx:
                move(plan, numbers[old])
                (plan.outputs if old == step.args[-1] else plan.inputs).append(numbers[old])
        return numbers[old]

    plan.operators = [whole.operators[step.op_index]]
    plan.chains[0].instructions.append(Instruction(KernelCall(0, [number(i) for i in step.args])))
    return made


def _stored(made: Any) -> tuple[bytes, tuple[tuple[tuple[int, ...], str], ...]]:
    """A file's bytes, and what it takes."""
    from executorch.exir._serialize._program import serialize_pte_binary
    from executorch.exir.schema import ScalarType

    names = {ScalarType.FLOAT: "float32", ScalarType.CHAR: "int8", ScalarType.BYTE: "uint8"}
    plan = made.program.execution_plan[0]
    inputs = [plan.values[i].val for i in plan.inputs]
    data = bytes(serialize_pte_binary(made, extract_delegate_segments=True))
    return data, tuple((tuple(t.sizes), names[t.scalar_type]) for t in inputs)


def _kept(store: Any, keys: set[str]) -> Any:
    """The named constants of these names only: a part need not carry the whole file's weights."""
    if store is None:
        return None
    chosen = {key: entry for key, entry in store.pte_data.items() if key in keys}
    numbers = {old: new for new, old in enumerate(dict.fromkeys(entry.buffer_index for entry in chosen.values()))}
    entries = {key: dataclasses.replace(entry, buffer_index=numbers[entry.buffer_index]) for key, entry in chosen.items()}
    return dataclasses.replace(store, buffers=[store.buffers[old] for old in numbers], pte_data=entries)


def _keys(tree: dict[str, Any], values: Iterable[Any]) -> Iterable[str]:
    """Names of the constants that scales of these values lie in."""
    for value in values:
        params = value["xvalue_union"].get("quant_params") or {}
        index = params.get("scale_buffer_idx")
        if index:
            yield tree["constant_data"][index]["named_key"]


def _value(tensor: dict[str, Any], plan: Any) -> Any:
    from executorch.exir.schema import AllocationDetails, EValue, ScalarType, Tensor, TensorShapeDynamism

    kind = {"float32": ScalarType.FLOAT, "int8": ScalarType.CHAR, "uint8": ScalarType.BYTE}[
        _DTYPES.get(tensor["datatype"], "float32")
    ]
    size = 4 if kind == ScalarType.FLOAT else 1
    for d in tensor["dims"]:
        size *= d
    start = plan.non_const_buffer_sizes[1]
    plan.non_const_buffer_sizes[1] = start + -(-size // 16) * 16
    place_ = AllocationDetails(memory_id=1, memory_offset_low=start & 0xFFFFFFFF, memory_offset_high=start >> 32)
    return EValue(
        Tensor(
            scalar_type=kind, storage_offset=0, sizes=list(tensor["dims"]), dim_order=list(range(len(tensor["dims"]))),
            requires_grad=False, layout=0, data_buffer_idx=0, allocation_info=place_, shape_dynamism=TensorShapeDynamism.STATIC,
        )
    )  # fmt: skip


def _tensor(value: Any) -> dict[str, Any]:
    union: dict[str, Any] = value["xvalue_union"]
    inner: dict[str, Any] = union.get("tensor_value", union)
    return inner


def _ids(node: Any, kind: str) -> list[int]:
    """Values of a node: "output", or "" for those that it reads."""
    found = node["xnode_union"].items()
    return [v for k, v in found if k.endswith("_id") and k.startswith("output") == (kind == "output")]
