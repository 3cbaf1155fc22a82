"""ONNX files: what is in them, what onnxruntime makes of them, and whether a planted fault is found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from nets import conv, images, linear, residual_net
from onnx import numpy_helper
from torch import Tensor, nn

from edgekit.errors import FormatError, InputError, ParityError, UnsupportedError
from edgekit.frozen import FrozenOp, FrozenProgram, freeze_module
from edgekit.frozen.ops import lut_table
from edgekit.targets import get
from edgekit.targets import onnx as target


class MixedNet(nn.Module):
    """Integer linears of three dimensions around a float softmax and layer norm, with gelu, slice, permute and unequal concat."""

    def __init__(self) -> None:
        super().__init__()
        i, a, b, c = (0.03, -3), (0.05, 7), (0.04, -20), (0.1, 3)
        self.quantize = FrozenOp("quantize", 1, {}, scale=i[0], zero_point=i[1], bits=8)
        self.up = linear(8, 16, i, a)
        self.gelu = FrozenOp(
            "qlut", 1, {"table": lut_table("gelu", *a, *b)}, function="gelu",
            in_scale=a[0], in_zp=a[1], out_scale=b[0], out_zp=b[1],
        )  # fmt: skip
        self.first = FrozenOp("qslice", 1, {}, dim=-1, start=0, end=8, step=1, scale=b[0], zero_point=b[1])
        self.cat = FrozenOp(
            "qconcat", 0, {}, scales=[b[0], i[0]], zero_points=[b[1], i[1]], out_scale=b[0], out_zp=b[1], dim=-1
        )  # fmt: skip
        self.turn = FrozenOp("qpermute", 1, {}, dims=[0, 2, 1], scale=b[0], zero_point=b[1])
        self.dequantize = FrozenOp("dequantize", 1, {}, scale=b[0], zero_point=b[1])
        self.norm = nn.LayerNorm(6)
        self.again = FrozenOp("quantize", 1, {}, scale=i[0], zero_point=i[1], bits=8)
        self.head = linear(6, 4, i, c)
        self.out = FrozenOp("dequantize", 1, {}, scale=c[0], zero_point=c[1])

    def forward(self, x: Tensor) -> Tensor:
        q = self.quantize(x)
        y = self.turn(self.cat(self.first(self.gelu(self.up(q))), q))
        real = self.norm(torch.softmax(self.dequantize(y), -1))
        return self.out(self.head(self.again(real)))


def mixed_net() -> FrozenProgram:
    """MixedNet, input (1, 6, 8)."""
    torch.manual_seed(3)
    return freeze_module(MixedNet().eval(), (torch.zeros(1, 6, 8),), name="mixed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("onnx")


@pytest.fixture(scope="module", params=[8, 4, 2])
def lowered(request: pytest.FixtureRequest, folder: Path) -> tuple[FrozenProgram, Path, Any]:
    program = residual_net(request.param)
    path = folder / f"residual{request.param}.onnx"
    return program, path, target.lower(program, path)


def worst_lsb(program: FrozenProgram, path: Path, samples: Tensor) -> dict[str, int]:
    """Largest difference of each layer, fed the target's own inputs, in steps of its output."""
    worst: dict[str, int] = {}
    for x in samples.split(1):
        taps = {k: torch.from_numpy(v) for k, v in target.taps(path, program, [x.numpy()]).items()}
        expected = program.forced(taps, x)
        for name, found in taps.items():
            assert found.dtype == torch.int8 and found.shape == expected[name].shape
            worst[name] = max(worst.get(name, 0), int((found.int() - expected[name].int()).abs().max()))
    return worst


def test_every_layer_is_an_integer_kernel(lowered: tuple[FrozenProgram, Path, Any]) -> None:
    program, path, artifact = lowered
    assert artifact.share_of_macs == {"int8": 1.0}
    assert {c.layer for c in artifact.coverage if c.runs != "int8"} == set()
    assert [c.layer for c in artifact.coverage] == [layer.name for layer in program.layers]
    assert {c.op for c in artifact.coverage if c.macs} == {"QLinearConv", "QGemm"}
    assert artifact.inputs[0].shape == (1, 3, 16, 16) and artifact.inputs[0].dtype == "float32"
    assert artifact.bytes == path.stat().st_size


def test_weights_are_stored_in_their_bits(lowered: tuple[FrozenProgram, Path, Any]) -> None:
    program, path, artifact = lowered
    storage = {c.layer: c.storage for c in artifact.coverage}
    constants = {t.name: t for t in onnx.load(path).graph.initializer}
    for layer in program.layers:
        if layer.weight_bits is not None:
            assert storage[layer.name] == f"int{layer.weight_bits}"
            assert len(constants[f"{layer.name}.weight"].raw_data) == -(-layer.args["weight"].numel() * layer.weight_bits // 8)


def test_each_layer_is_within_one_step(lowered: tuple[FrozenProgram, Path, Any]) -> None:
    program, path, _ = lowered
    worst = worst_lsb(program, path, images(4))
    assert set(worst) == {layer.name for layer in program.layers} - {"dequantize"}
    weighted = [layer.name for layer in program.layers if layer.weight_bits is not None]
    assert max(worst.values()) <= 1 and all(worst[name] == 0 for name in weighted)


def test_result_is_the_programs(lowered: tuple[FrozenProgram, Path, Any]) -> None:
    program, path, _ = lowered
    x = images(12)
    seen: list[int] = []
    (found,) = target.run(path, [x.numpy()], progress=lambda done, total: seen.append(done))
    (expected,) = program.run(x)
    assert found.dtype == np.float32 and seen == list(range(1, 13))
    assert np.abs(found - expected.numpy()).max() <= 2 * 0.25 + 1e-6


def test_taps_do_not_change_the_result(lowered: tuple[FrozenProgram, Path, Any]) -> None:
    program, path, _ = lowered
    x = images(1)
    head = target.taps(path, program, [x.numpy()])["head"]
    (found,) = target.run(path, [x.numpy()])
    np.testing.assert_array_equal(found, (head.astype(np.float32) - 3) * 0.25)


def test_unpacked_weights_give_the_same_result(folder: Path) -> None:
    program = residual_net(4)
    packed = target.lower(program, folder / "packed.onnx")
    plain = target.lower(program, folder / "plain.onnx", target.Options(pack=False))
    assert {c.storage for c in plain.coverage} == {"", "int8"} and packed.bytes < plain.bytes
    x = [images(6).numpy()]
    np.testing.assert_array_equal(target.run(packed.path, x)[0], target.run(plain.path, x)[0])


def test_processors_without_vnni_give_the_same_result(lowered: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    _, path, _ = lowered
    x = [images(4).numpy()]
    monkeypatch.setattr(target, "_vnni", lambda: True)
    signed = target.run(path, x)[0]
    monkeypatch.setattr(target, "_vnni", lambda: False)
    np.testing.assert_array_equal(target.run(path, x)[0], signed)


def test_float_operators_and_three_dimensions(folder: Path) -> None:
    program, path = mixed_net(), folder / "mixed.onnx"
    artifact = target.lower(program, path)
    runs = {c.layer: c for c in artifact.coverage}
    assert runs["up"].op == runs["head"].op == "QGemm" and runs["cat"].op == "QLinearConcat"
    assert runs["gelu"].runs == "float" and "Gelu" in runs["gelu"].op and "gelu" in artifact.notes[1]
    assert {c.op for c in artifact.coverage if c.note.endswith("times, float32")} == {"Softmax", "LayerNormalization"}
    assert [c.layer for c in artifact.coverage if c.note.startswith("left in float")] == ["norm"], "the one with numbers"
    x = torch.randn(5, 6, 8, generator=torch.Generator().manual_seed(0))
    worst = worst_lsb(program, path, x)
    assert max(worst.values()) <= 1 and worst["up"] == worst["head"] == worst["first"] == worst["turn"] == 0
    assert np.abs(target.run(path, [x.numpy()])[0] - program.run(x)[0].numpy()).max() <= 2 * 0.1 + 1e-6


def test_tables_are_exact(folder: Path) -> None:
    program, path = mixed_net(), folder / "tables.onnx"
    artifact = target.lower(program, path, target.Options(tables=True))
    assert {c.layer: (c.op, c.runs) for c in artifact.coverage}["gelu"] == ("Gather", "int8")
    x = torch.randn(5, 6, 8, generator=torch.Generator().manual_seed(0)) * 4
    assert worst_lsb(program, path, x)["gelu"] == 0


@pytest.mark.slow
def test_same_program_gives_same_bytes_without_paths(folder: Path, tmp_path: Path) -> None:
    for make in (residual_net, mixed_net):
        a, b = target.lower(make(), folder / "a.onnx").path, target.lower(make(), tmp_path / "b.onnx").path
        assert a.read_bytes() == b.read_bytes()
        data = a.read_bytes()
        assert not any(word in data for word in (b"site-packages", b".py", str(Path.cwd()).encode(), str(tmp_path).encode()))
        graph = onnx.load(a).graph
        everything = [graph, *graph.node, *graph.initializer, *graph.input, *graph.output]
        assert not any(m.doc_string or m.metadata_props for m in everything) and not graph.value_info


def test_a_file_is_little_more_than_its_numbers(folder: Path) -> None:
    torch.manual_seed(0)
    q = (0.03, 0)

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quantize = FrozenOp("quantize", 1, {}, scale=q[0], zero_point=q[1], bits=8)
            self.body = nn.Sequential(conv(3, 64, 3, q, q), conv(64, 64, 3, q, q), conv(64, 64, 3, q, q))
            self.dequantize = FrozenOp("dequantize", 1, {}, scale=q[0], zero_point=q[1])

        def forward(self, x: Tensor) -> Tensor:
            return self.dequantize(self.body(self.quantize(x)))

    program = freeze_module(Wide(), (torch.zeros(1, 3, 8, 8),))
    artifact = target.lower(program, folder / "wide.onnx")
    assert artifact.bytes < 1.06 * sum(layer.weight_bytes for layer in program.layers)


def _change(path: Path, out: Path, name: str, edit: Callable[[np.ndarray], np.ndarray]) -> Path:
    model = onnx.load(path)
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(edit(numpy_helper.to_array(tensor).copy()), name))
    onnx.save(model, out)
    return out


def _bump(step: float) -> Callable[[np.ndarray], np.ndarray]:
    def edit(values: np.ndarray) -> np.ndarray:
        values.reshape(-1)[values.size // 2] += np.array(step).astype(values.dtype)
        return values

    return edit


@pytest.mark.parametrize(
    ("tensor", "step", "layer", "field"),
    [
        ("down.weight", 1, "down", "weight"),
        ("block.dw.weight", 50, "block.dw", "weight"),
        ("head.weight_scale", 1e-4, "head", "weight scale"),
        ("stem.weight_zero_point", 1, "stem", "weight zero point"),
        ("block.pw.bias", 1, "block.pw", "bias"),
        ("block.pw.bias_scale", 1e-6, "block.pw", "bias scale"),
        ("add.scale", 1e-4, "add", "output scale"),
        ("uint8.133", 1, "block.pw", "output zero point"),
        ("down/high", 1, "down", "activation range"),
    ],
)
def test_planted_faults_are_named(folder: Path, tmp_path: Path, tensor: str, step: float, layer: str, field: str) -> None:
    program, path = residual_net(), folder / "faults.onnx"
    if not path.exists():
        target.lower(program, path)
    if tensor == "down/high":  # a shared constant that only the clamp of relu6 uses
        clip = next(n for n in onnx.load(path).graph.node if n.op_type == "Clip")
        tensor = clip.input[2]
    found = target.readback(_change(path, tmp_path / "fault.onnx", tensor, _bump(step)), program)
    assert (found[0].layer, found[0].field) == (layer, field), [str(m) for m in found]


def test_a_planted_weight_shows_in_its_own_layer(folder: Path, tmp_path: Path) -> None:
    program, path = residual_net(), folder / "weight.onnx"
    target.lower(program, path)
    bad = _change(path, tmp_path / "bad.onnx", "block.dw.weight", _bump(-90))
    worst = worst_lsb(program, bad, images(3))
    assert [name for name, lsb in worst.items() if lsb > 1] == ["block.dw"]


def test_a_missing_layer_is_named(folder: Path, tmp_path: Path) -> None:
    program, path = residual_net(), folder / "missing.onnx"
    target.lower(program, path)
    model = onnx.load(path)
    next(n for n in model.graph.node if n.name == "block.pw").name = "other"
    onnx.save(model, tmp_path / "m.onnx")
    (found,) = target.readback(tmp_path / "m.onnx", program)
    assert str(found) == "layer block.pw: operator is missing in the file, qconv2d in the frozen program"


def test_lower_refuses_a_file_that_differs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = residual_net()
    layers = program.layers
    changed = [replace(n, args={**n.args, "out_zp": n.args["out_zp"] + 1}) if n.name == "mean" else n for n in layers]
    other = FrozenProgram(program.exported, program.name)
    other.__dict__["layers"] = tuple(changed)
    path = folder / "other.onnx"
    target.lower(program, path)
    assert [m.layer for m in target.readback(path, other)] == ["mean"]
    honest = target.readback
    monkeypatch.setattr(target, "readback", lambda path, _: honest(path, other))
    with pytest.raises(ParityError, match="layer mean: output zero point is 0 in the file, 1 in the frozen program"):
        target.lower(program, path)


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "zip", "missing"])
def test_damaged_files(folder: Path, tmp_path: Path, damage: str) -> None:
    program, good, bad = residual_net(), folder / "good.onnx", tmp_path / "bad.onnx"
    if not good.exists():
        target.lower(program, good)
    data = good.read_bytes()
    content = {"truncated": data[: len(data) // 2], "empty": b"", "text": b"hello", "zip": b"PK\x03\x04" + data[:200]}
    if damage in content:
        bad.write_bytes(content[damage])
    for call in (
        lambda: target.inspect(bad, program),
        lambda: target.readback(bad, program),
        lambda: target.run(bad, [images(1).numpy()]),
        lambda: target.taps(bad, program, [images(1).numpy()]),
    ):
        with pytest.raises(FormatError, match=r"bad\.onnx"):
            call()


def test_wrong_inputs_and_sixteen_bits(folder: Path, tmp_path: Path) -> None:
    program, path = residual_net(), folder / "inputs.onnx"
    target.lower(program, path)
    with pytest.raises(InputError, match=r"shape \(1, 3, 8, 8\) given, \(1, 3, 16, 16\) expected"):
        target.run(path, [np.zeros((2, 3, 8, 8), np.float32)])
    with pytest.raises(InputError, match="2 inputs given, the file takes 1"):
        target.run(path, [images(1).numpy()] * 2)
    sixteen = nn.Sequential(
        FrozenOp("quantize", 1, {}, scale=0.1, zero_point=0, bits=16), FrozenOp("dequantize", 1, {}, scale=0.1, zero_point=0)
    )
    with pytest.raises(UnsupportedError, match="16 bits, onnx takes 8"):
        target.lower(freeze_module(sixteen, (torch.zeros(1, 4),)), tmp_path / "x.onnx")
    assert not (tmp_path / "x.onnx").exists()


def test_the_table_of_targets() -> None:
    assert get("onnx") is target and target.available() is None and target.SUFFIX == ".onnx"
    with pytest.raises(InputError, match="choose one of: executorch, tflite, onnx"):
        get("caffe")
