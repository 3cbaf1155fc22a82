"""Frozen programs on disk: the same bytes, the same results, a clear error for anything damaged, no code from a file is run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from core import hostile
from nets import images, residual_net

from edgekit.errors import FormatError
from edgekit.frozen import FrozenProgram, Unquantized, freeze_module, load, read_exported, save
from edgekit.frozen.archive import FORMAT, _digest, to_bytes

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def program() -> FrozenProgram:
    net = residual_net(bits=4)
    return FrozenProgram(
        net.exported, "residual", (Unquantized("softmax", "aten.softmax", "stays float"),), {"stem": "model.py:7"}
    )


@pytest.fixture(scope="module")
def data(program: FrozenProgram) -> bytes:
    return to_bytes(program)


def seal(members: dict[str, bytes], **changes: Any) -> bytes:
    """An archive with a right checksum, as a forger would make it: the checksum is no signature."""
    facts = {"format": FORMAT, "edgekit": "0", "name": "m", "sources": {}, "unquantized": []} | changes
    facts["sha256"] = _digest(members, facts)
    return hostile.pack({**members, "extra/edgekit.json": json.dumps(facts).encode()})


def test_round_trip_keeps_everything(program: FrozenProgram, tmp_path: Path) -> None:
    save(program, tmp_path / "a.pt2")
    loaded = load(tmp_path / "a.pt2")
    assert (loaded.name, loaded.unquantized, loaded.sources) == (program.name, program.unquantized, program.sources)
    assert loaded.input_shapes == program.input_shapes
    for a, b in zip(loaded.layers, program.layers, strict=True):
        assert (a.name, a.op, a.shape, a.inputs, a.macs) == (b.name, b.op, b.shape, b.inputs, b.macs)
        assert a.args.keys() == b.args.keys()
        for key, value in a.args.items():
            assert torch.equal(value, b.args[key]) if isinstance(value, torch.Tensor) else value == b.args[key]
    x = images(5)
    assert torch.equal(loaded.run(x)[0], program.run(x)[0])


def test_a_run_folder_is_taken_for_its_program(program: FrozenProgram, tmp_path: Path) -> None:
    save(program, tmp_path / "frozen.pt2")
    assert to_bytes(load(tmp_path)) == to_bytes(program)


def test_same_program_same_bytes(program: FrozenProgram, data: bytes, tmp_path: Path) -> None:
    assert to_bytes(program) == data
    save(program, tmp_path / "one.pt2")
    save(load(tmp_path / "one.pt2"), tmp_path / "another-name.pt2")
    assert (tmp_path / "one.pt2").read_bytes() == (tmp_path / "another-name.pt2").read_bytes() == data


@pytest.mark.slow
def test_same_bytes_in_another_process(tmp_path: Path) -> None:
    script = "import nets, pathlib, edgekit.frozen as f; f.save(nets.residual_net(), pathlib.Path('x.pt2'))"
    environment = os.environ | {"PYTHONPATH": str(HERE.parent), "PYTHONHASHSEED": "77"}
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, check=True)
    save(residual_net(), tmp_path / "y.pt2")
    assert (tmp_path / "x.pt2").read_bytes() == (tmp_path / "y.pt2").read_bytes()


def test_the_file_names_no_folder_and_no_data(data: bytes) -> None:
    members = hostile.members_of(data)
    assert members["data/sample_inputs/model.pt"] == b""
    for folder in (str(Path.home()), str(HERE.parents[1]), sys.prefix):
        assert folder.encode() not in data


def test_truncated_anywhere(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut.pt2"
    for size in [*range(0, len(data), len(data) // 40), *range(len(data) - 30, len(data))]:
        path.write_bytes(data[:size])
        with pytest.raises(FormatError, match=r"cut\.pt2: "):
            load(path)


def test_flipped_byte_is_an_error_or_changes_nothing(data: bytes, tmp_path: Path) -> None:
    """Dates and attributes in the zip's directory mean nothing; whatever loads must be the very same program."""
    path = tmp_path / "flipped.pt2"
    survived = 0
    for i, at in enumerate(range(0, len(data), len(data) // 397)):
        damaged = bytearray(data)
        damaged[at] ^= 0xFF if i % 2 else 1 << (i // 2 % 8)
        path.write_bytes(damaged)
        try:
            loaded = load(path)
        except FormatError:
            continue
        assert to_bytes(loaded) == data, f"byte {at} changed the program unnoticed"
        survived += 1
    assert survived < 60


def test_flipped_byte_of_each_member_is_an_error(data: bytes, tmp_path: Path) -> None:
    """The zip's own checksums made right again: only edgekit's is left to notice."""
    path = tmp_path / "altered.pt2"
    members = hostile.members_of(data)
    for name, content in members.items():
        if content and name != "extra/edgekit.json":
            path.write_bytes(hostile.pack({**members, name: content[:-1] + bytes([content[-1] ^ 1])}))
            with pytest.raises(FormatError, match=r"altered after it was written"):
                load(path)


@pytest.mark.parametrize("change", [{"name": "other"}, {"sources": {"stem": "x.py:1"}}, {"unquantized": []}, {"torch": "1.0"}])
def test_altered_facts_are_an_error(data: bytes, tmp_path: Path, change: dict[str, Any]) -> None:
    members = hostile.members_of(data)
    facts = json.loads(members["extra/edgekit.json"]) | change
    (tmp_path / "a.pt2").write_bytes(hostile.pack({**members, "extra/edgekit.json": json.dumps(facts).encode()}))
    with pytest.raises(FormatError, match="altered"):
        load(tmp_path / "a.pt2")


def _sealed(**changes: Any) -> Callable[[dict[str, bytes]], bytes]:
    return lambda members: seal({k: v for k, v in members.items() if not k.startswith("extra/")}, **changes)


def _without(name: str) -> Callable[[dict[str, bytes]], bytes]:
    return lambda members: seal({k: v for k, v in members.items() if k not in (name, "extra/edgekit.json")})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            _sealed(format=FORMAT + 1, edgekit="9.9"),
            rf"format {FORMAT + 1} of edgekit 9\.9.*reads format {FORMAT}; upgrade edgekit",
        ),
        (_sealed(format=0), "format 0"),
        (_sealed(format="x"), r"edgekit\.json is damaged"),
        (_sealed(unquantized=[["only one"]]), r"edgekit\.json is damaged"),
        (_sealed(sources=[1]), r"edgekit\.json is damaged"),
        (_without("models/model.json"), r"no models/model\.json"),
        (_without("data/weights/weight_0"), "cannot read this graph"),
        (_without("data/weights/model_weights_config.json"), "cannot read this graph"),
        (_without("data/sample_inputs/model.pt"), "cannot read this graph"),
        (lambda m: hostile.pack({k: v for k, v in m.items() if not k.startswith("extra/")}), "not a frozen program of edgekit"),
        (lambda m: hostile.pack({**m, "extra/edgekit.json": b"[1]"}), r"edgekit\.json is damaged"),
        (lambda m: hostile.pack({**m, "extra/edgekit.json": b"\xff"}), r"edgekit\.json is damaged"),
        (lambda m: hostile.pack({**m, "models/other.json": m["models/model.json"]}), r"member 'models/other\.json'"),
        (lambda m: hostile.pack({**m, "../x": b""}), r"member 'x'|member '\.\./x'"),
        (lambda m: b"", "truncated or not a .pt2"),
        (lambda m: b"not a zip at all" * 100, "truncated or not a .pt2"),
    ],
)
def test_foreign_files_are_refused_clearly(
    data: bytes, tmp_path: Path, make: Callable[[dict[str, bytes]], bytes], message: str
) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(make(hostile.members_of(data)))
    with pytest.raises(FormatError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no such file"):
        load(tmp_path / "nothing.pt2")
    with pytest.raises(FormatError, match=r"frozen\.pt2: no such file"):
        load(tmp_path)


def test_a_deeply_nested_graph_is_refused(data: bytes, tmp_path: Path) -> None:
    members = hostile.members_of(data)
    del members["extra/edgekit.json"]
    (tmp_path / "deep.pt2").write_bytes(seal({**members, "models/model.json": b"[" * 100_000 + b"]" * 100_000}))
    with pytest.raises(FormatError, match="damaged"):
        load(tmp_path / "deep.pt2")


@pytest.mark.parametrize("case", sorted(hostile.CASES))
def test_hostile_file_is_not_executed(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "payload_module.py").write_text(f"open('{hostile.MARK}', 'w')\n")
    members = hostile.harmless()
    hostile.CASES[case][1](members)
    for name, content, reader in (
        ("plain.pt2", hostile.pack(members), read_exported),
        ("sealed.pt2", seal(members), load),
    ):
        Path(name).write_bytes(content)
        if case == "sample inputs":  # dropped, the rest is a good program
            loaded = reader(Path(name))
            exported = loaded.exported if isinstance(loaded, FrozenProgram) else loaded
            x = torch.randn(2, 3)
            torch.testing.assert_close(exported.module()(x, torch.zeros(1)), x * 2 + torch.tensor([1.0, 2.0, 3.0]))
        else:
            with pytest.raises(FormatError, match=name):
                reader(Path(name))
        assert not Path(hostile.MARK).exists()


@pytest.mark.slow
def test_the_payloads_are_real(tmp_path: Path) -> None:
    """Plain ``torch.export.load`` runs them, in a process of its own."""
    (tmp_path / "payload_module.py").write_text(f"open('{hostile.MARK}', 'w')\n")
    for case, (_, plant) in hostile.CASES.items():
        members = hostile.harmless()
        plant(members)
        (tmp_path / f"{case}.pt2").write_bytes(hostile.pack(members))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", HERE / "hostile.py", "."], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    executed = set(done.stdout.split("\n")) - {""}
    assert executed == {case for case, (runs, _) in hostile.CASES.items() if runs}


def test_guards_are_dropped(tmp_path: Path) -> None:
    members = hostile.harmless()
    graph = json.loads(members[hostile.GRAPH])
    graph["guards_code"] = [f"open('{hostile.MARK}', 'w')"]
    members[hostile.GRAPH] = json.dumps(graph).encode()
    (tmp_path / "g.pt2").write_bytes(hostile.pack(members))
    assert read_exported(tmp_path / "g.pt2")._guards_code == []


def test_read_exported_reads_ordinary_float_models(tmp_path: Path) -> None:
    """Parameters, module names, dynamic sizes, dicts in and out, no_grad regions."""

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleDict({"conv-1": torch.nn.Conv2d(3, 4, 3), "bn": torch.nn.BatchNorm2d(4)})

        def forward(self, x: torch.Tensor, more: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            with torch.no_grad():
                y = x * 2 + x.shape[0] // 2
            y = self.layers["bn"](self.layers["conv-1"](y))
            return {"mean": y.mean((2, 3)), "sum": torch.nn.functional.gelu(y, approximate="tanh").sum() + more["bias"]}

    net = Net().eval()
    args = (torch.randn(5, 3, 8, 8), {"bias": torch.ones(1)})
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(net, args, dynamic_shapes=({0: batch}, {"bias": None}))
    torch.export.save(exported, tmp_path / "float.pt2")
    loaded = read_exported(tmp_path / "float.pt2").module()
    other = (torch.randn(9, 3, 8, 8), {"bias": torch.ones(1)})
    for key, value in net(*other).items():
        torch.testing.assert_close(loaded(*other)[key], value)


def test_unusual_module_names_can_be_saved(tmp_path: Path) -> None:
    from nets import conv

    net = torch.nn.ModuleDict({"first-layer": conv(3, 4, 3, (0.1, 0), (0.1, 0)), "2": conv(4, 4, 1, (0.1, 0), (0.1, 0))})
    net.forward = lambda x: net["2"](net["first-layer"](x))
    program = freeze_module(net, (torch.zeros(1, 3, 4, 4, dtype=torch.int8),))
    save(program, tmp_path / "n.pt2")
    assert [layer.name for layer in load(tmp_path / "n.pt2").layers] == [layer.name for layer in program.layers]
