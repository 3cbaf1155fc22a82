"""Hostile ``.pt2`` files: each carries a payload that leaves a file ``executed`` behind if it runs (see test_archive.py).

Run as a program, ``python hostile.py FOLDER`` opens every ``.pt2`` there with plain ``torch.export.load`` and prints the names of
those whose payload ran: the proof that the payloads are real.
"""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Members = dict[str, bytes]
GRAPH = "models/model.json"
WEIGHTS = "data/weights/model_weights_config.json"
CONSTANTS = "data/constants/model_constants_config.json"
MARK = "executed"


class Payload:
    """Unpickling this opens a file for writing."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (MARK, "w")


class Net(nn.Module):
    """One buffer and one input that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, x: Tensor, idle: Tensor) -> Tensor:
        return x * 2 + self.shift


def torch_pickle() -> bytes:
    buffer = io.BytesIO()
    torch.save(Payload(), buffer)
    return buffer.getvalue()


def members_of(data: bytes) -> Members:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        return {i.filename.split("/", 1)[1]: archive.read(i) for i in archive.infolist()}


def pack(members: Members) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(f"archive/{name}", data)
    return buffer.getvalue()


def harmless() -> Members:
    buffer = io.BytesIO()
    exported = torch.export.export(Net(), (torch.randn(2, 3), torch.randn(1)))
    torch.export.save(exported, buffer)
    return members_of(buffer.getvalue())


def _edit(member: str, change: Callable[[Any], None]) -> Callable[[Members], None]:
    def apply(members: Members) -> None:
        value = json.loads(members[member])
        change(value)
        members[member] = json.dumps(value).encode()

    return apply


def _pickled_weight(members: Members) -> None:
    def change(table: Any) -> None:
        entry = table["config"]["shift"]
        entry["use_pickle"] = True
        members[f"data/weights/{entry['path_name']}"] = torch_pickle()

    _edit(WEIGHTS, change)(members)


def _constant(path: str, data: bytes) -> Callable[[Members], None]:
    def apply(members: Members) -> None:
        entry = {"path_name": path, "is_param": False, "use_pickle": True, "tensor_meta": None}
        _edit(CONSTANTS, lambda table: table["config"].update(c=entry))(members)
        members[f"data/constants/{path}"] = data

    return apply


def _size(expression: str) -> Callable[[Members], None]:
    def change(graph: Any) -> None:
        name = graph["graph_module"]["graph"]["nodes"][0]["outputs"][0]["as_tensor"]["name"]
        value = graph["graph_module"]["graph"]["tensor_values"][name]
        value["sizes"][0] = {"as_expr": {"expr_str": expression, "hint": None}}

    return _edit(GRAPH, change)


def _size_behind(key: str) -> Callable[[Members], None]:
    """The same, in a tensor whose name is a word that a careless walk over the JSON would skip."""

    def apply(members: Members) -> None:
        name = json.loads(members[GRAPH])["graph_module"]["graph"]["nodes"][0]["outputs"][0]["as_tensor"]["name"]
        _size(f"open('{MARK}', 'w')")(members)
        members[GRAPH] = members[GRAPH].replace(f'"{name}"'.encode(), f'"{key}"'.encode())

    return apply


def _target(target: str) -> Callable[[Members], None]:
    return _edit(GRAPH, lambda graph: graph["graph_module"]["graph"]["nodes"][0].update(target=target))


def _rename_idle(members: Members) -> None:
    members[GRAPH] = members[GRAPH].replace(b'"idle"', f"\"idle=open('{MARK}', 'w')\"".encode())


def _tree(spec: dict[str, Any]) -> Callable[[Members], None]:
    def change(graph: Any) -> None:
        spec["children_spec"] = []
        graph["graph_module"]["module_call_graph"][0]["signature"]["out_spec"] = json.dumps([1, spec])

    return _edit(GRAPH, change)


ENUM = json.dumps([{"__enum__": True, "fqn": "payload_module:Nothing", "name": "x"}])
FACTORY = {"default_factory_module": "payload_module", "default_factory_name": "x", "dict_context": []}

CASES: dict[str, tuple[bool, Callable[[Members], None]]] = {
    "sample inputs": (True, lambda m: m.update({"data/sample_inputs/model.pt": torch_pickle()})),
    "pickled weight": (True, _pickled_weight),
    "pickled constant": (True, _constant("tensor_0", torch_pickle())),
    "opaque object": (True, _constant("opaque_obj_0", pickle.dumps(Payload()))),
    "custom object": (False, _constant("custom_obj_0", pickle.dumps(Payload()))),
    "custom object in a folder": (False, _constant("custom_obj_/x", pickle.dumps(Payload()))),
    "old weights file": (True, lambda m: m.update({"data/weights/model.pt": torch_pickle()})),
    "old constants file": (True, lambda m: m.update({"data/constants/model.pt": torch_pickle()})),
    "size": (True, _size(f"open('{MARK}', 'w')")),
    "size in a sum": (True, _size(f"Add(Integer(1), open('{MARK}', 'w'))")),
    "size in a nested string": (True, _size(f"S(\"open('{MARK}', 'w')\")")),
    "size of metadata": (True, _size_behind("metadata")),
    "size of guards_code": (True, _size_behind("guards_code")),
    "size of as_string": (True, _size_behind("as_string")),
    "call of os.mkdir": (False, _target("torch.os.mkdir")),
    "call of load_library": (False, _target("torch.ops.load_library")),
    "call of from_file": (False, _target("torch.ops.aten.from_file.default")),
    "call of save": (False, _target("torch.ops.aten.save.default")),
    "input name": (True, _rename_idle),
    "enum in the output tree": (True, _tree({"type": "builtins.dict", "context": ENUM})),
    "factory in the output tree": (True, _tree({"type": "collections.defaultdict", "context": FACTORY})),
}
"""Name to (plain torch runs the payload while loading, the change that plants it)."""


def main(folder: Path) -> None:
    sys.path.insert(0, ".")
    for path in sorted(folder.glob("*.pt2")):
        for name in ("payload_module", MARK):
            sys.modules.pop(name, None)
        Path(MARK).unlink(missing_ok=True)
        with contextlib.suppress(Exception):
            torch.export.load(path)
        if Path(MARK).exists():
            print(path.stem)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
