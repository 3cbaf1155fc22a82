"""1-bit layers for targets without 1-bit kernels: the int8 form gives the same bits, in torch, onnxruntime and LiteRT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from binary_nets import ChainNet, PlainNet, ResidualNet, binary_net
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from edgekit import targets
from edgekit.errors import UnsupportedError
from edgekit.frozen import FrozenOp, freeze_module
from edgekit.frozen.binary_ops import BINARY_OPS, pack_signs
from edgekit.shortfalls import shortfalls
from edgekit.targets import preflight
from edgekit.targets.binary_int8 import int8_form, packed

NETS = [ChainNet, ResidualNet, PlainNet]


class Random(nn.Module):
    """An int8 image to signs along ``dim``, one or two binary layers, integers; every number drawn."""

    def __init__(self, rng: np.random.Generator, channels: int, outputs: int, end: str, linear: bool) -> None:
        super().__init__()
        size, zp = 3 * channels, int(rng.integers(-128, 128))
        self.quantize = FrozenOp("quantize", 1, {}, scale=float(rng.uniform(0.01, 0.2)), zero_point=zp, bits=8)
        threshold = rng.choice([*range(-130, 131), -(2**15), 2**15 - 1], channels).astype(np.int16)
        self.sign = FrozenOp("binarize", 1, {"threshold": torch.from_numpy(threshold)}, dim=-1 if linear else 1)
        many = 3 if not linear else 1
        weight = torch.from_numpy(
            rng.integers(0, 2, (outputs, 3, 3, channels) if not linear else (outputs, channels)).astype(bool)
        )
        limits = rng.integers(-size * many, size * many + 1, outputs).astype(np.int32)
        limits[rng.integers(0, outputs)] = rng.choice([2**31 - 1, -(2**31), size * many, -size * many])
        more: dict[str, Any] = {"features": channels}
        if not linear:
            pad = [int(v) for v in rng.integers(0, 3, 2)]
            stride = [int(v) for v in rng.integers(1, 3, 2)]
            more = {"channels": channels, "stride": stride, "padding": pad, "dilation": [1, 1], "groups": 1}
        buffers = {"weight": pack_signs(weight), "threshold": torch.from_numpy(limits)}
        kind = "linear" if linear else "conv2d"
        self.first = FrozenOp(f"binary_{kind}", 1, buffers, **more)
        last = pack_signs(torch.from_numpy(rng.integers(0, 2, (5, 1, 1, outputs) if not linear else (5, outputs)).astype(bool)))
        scale = torch.from_numpy(rng.uniform(0.1, 1.0, 5).astype(np.float32))
        bias = torch.from_numpy(rng.integers(-9, 10, 5).astype(np.int32))
        ends = {"out_scale": 0.3, "out_zp": 4, "activation": end, "out_bits": 8}
        more |= {"features": outputs} if linear else {"channels": outputs, "stride": [1, 1], "padding": [0, 0]}
        self.last = FrozenOp(f"binary_q{kind}", 1, {"weight": last, "weight_scale": scale, "bias": bias}, **ends, **more)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.first(self.sign(self.quantize(x))))
        return result


@settings(max_examples=12)
@given(
    st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 9), st.sampled_from(["none", "relu", "relu6"]), st.booleans()
)
def test_the_int8_form_equals_the_program(seed: int, channels: int, outputs: int, end: str, linear: bool) -> None:
    rng = np.random.default_rng(seed)
    shape = [(channels,), (4, channels), (2, 3, channels)][int(rng.integers(3))] if linear else (channels, 5, 4)
    x = torch.from_numpy((rng.standard_normal((2, *shape)) * 3).astype(np.float32))
    program = freeze_module(Random(rng, channels, outputs, end, linear), (x,))
    form = int8_form(program)
    assert not {layer.op for layer in form.layers} & BINARY_OPS
    assert torch.equal(form.run(x)[0], program.run(x)[0])
    found = packed(program, {k: v.numpy() for k, v in form.trace(x[:1]).items()})
    wanted = program.trace(x[:1])
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value.numpy(), name)


@pytest.mark.parametrize("target", ["onnx", pytest.param("tflite", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", NETS, ids=lambda n: n.__name__)
def test_files_equal_the_program_in_every_1_bit_layer(kind: type[nn.Module], target: str, tmp_path: Path) -> None:
    program, x = binary_net(kind)
    module, path = targets.get(target), tmp_path / f"model{targets.get(target).SUFFIX}"
    artifact = module.lower(program, path)
    assert module.readback(path, program) == []
    taps = module.taps(path, program, [x[:1].numpy()])
    forced = program.forced({k: torch.from_numpy(np.array(v)) for k, v in taps.items()}, x[:1])
    binary = {layer.name: layer for layer in program.layers if layer.op in BINARY_OPS}
    assert binary.keys() <= taps.keys()
    for name in binary:
        np.testing.assert_array_equal(taps[name], forced[name].numpy(), name)
    if kind is not ResidualNet:  # its mean is rounded twice by LiteRT
        np.testing.assert_array_equal(module.run(path, [x.numpy()])[0], program.run(x)[0].numpy())
    table = {row.layer: row for row in artifact.coverage}
    assert {row.layer for row in artifact.coverage if row.layer in binary} == binary.keys()
    for name, layer in binary.items():
        assert "no 1-bit kernels here" in table[name].note and table[name].macs == layer.macs
        if layer.weight_bits == 1:
            assert table[name].storage in ("int4", "int8")


@pytest.mark.parametrize("shape", [(13,), (3, 13), pytest.param((2, 3, 13), marks=pytest.mark.slow)])
def test_signs_of_a_vector_are_read_from_a_tflite_file(shape: tuple[int, ...], tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    x = torch.from_numpy((rng.standard_normal((4, *shape)) * 3).astype(np.float32))
    net = nn.Sequential(Random(rng, 13, 6, "none", True), FrozenOp("dequantize", 1, {}, scale=0.3, zero_point=4))
    program = freeze_module(net, (x,))
    module, path = targets.get("tflite"), tmp_path / "model.tflite"
    module.lower(program, path)
    for i in range(len(x)):
        taps = module.taps(path, program, [x[i : i + 1].numpy()])
        wanted = program.trace(x[i : i + 1])
        assert {"0.sign", "0.first", "0.last"} <= taps.keys()
        for name, value in taps.items():
            np.testing.assert_array_equal(value, wanted[name].numpy(), name)


def test_signs_along_the_middle_of_a_sequence() -> None:
    class Middle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.quantize = FrozenOp("quantize", 1, {}, scale=0.05, zero_point=3, bits=8)
            self.sign = FrozenOp("binarize", 1, {"threshold": torch.arange(-2, 3, dtype=torch.int16)}, dim=1)
            weight = torch.tensor([[True, False, True, True, False], [False, False, True, False, True]])
            ends = {"out_scale": 0.1, "out_zp": 0, "activation": "none", "out_bits": 8}
            buffers = {
                "weight": pack_signs(weight),
                "weight_scale": torch.ones(2) / 10,
                "bias": torch.zeros(2, dtype=torch.int32),
            }
            self.last = FrozenOp("binary_qlinear", 1, buffers, features=5, **ends)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.last(self.sign(self.quantize(x)))
            return result

    x = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(0))
    program = freeze_module(Middle(), (x,))
    form = int8_form(program)
    assert torch.equal(form.run(x)[0], program.run(x)[0])
    taps = {k: v.numpy() for k, v in form.trace(x).items()}
    np.testing.assert_array_equal(packed(program, taps)["sign"], program.trace(x)["sign"].numpy())


def test_what_it_is_stored_as_is_said(tmp_path: Path) -> None:
    import json
    from dataclasses import asdict

    import edgekit

    program, _ = binary_net(ChainNet)
    edgekit.save(program, tmp_path / "frozen.pt2")
    artifact = targets.get("onnx").lower(program, tmp_path / "model.onnx")
    facts = {"target": "onnx", "coverage": [asdict(row) for row in artifact.coverage]}
    (tmp_path / "export_onnx.json").write_text(json.dumps(facts))
    said = shortfalls(tmp_path)
    assert "onnx: weights below 8 bits of 4 layers are stored as int4: conv1, conv2, conv3 and 1 more" in said


def test_an_altered_threshold_is_named_by_its_layer(tmp_path: Path) -> None:
    import onnx

    program, x = binary_net(ChainNet)
    path = tmp_path / "model.onnx"
    module = targets.get("onnx")
    module.lower(program, path)
    model = onnx.load(path)
    (bias,) = (t for t in model.graph.initializer if t.name == "conv2.sum.bias")
    values = onnx.numpy_helper.to_array(bias).copy()
    values[7] += 40
    bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
    onnx.save(model, path)
    assert [m.layer for m in module.readback(path, program)] == ["conv2"]
    taps = module.taps(path, program, [x[:1].numpy()])
    forced = program.forced({k: torch.from_numpy(np.array(v)) for k, v in taps.items()}, x[:1])
    assert [k for k in taps if (taps[k] != forced[k].numpy()).any()] == ["conv2"]


def test_signs_that_leave_the_1_bit_part_are_refused() -> None:
    class Leaves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.sign = FrozenOp("binarize", 1, {"threshold": torch.zeros(1)}, dim=1)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.sign(x)
            return result

    program = freeze_module(Leaves(), (torch.zeros(1, 3),))
    with pytest.raises(UnsupportedError, match="layer sign: its packed signs go to output"):
        preflight.check_program(program, "onnx")
