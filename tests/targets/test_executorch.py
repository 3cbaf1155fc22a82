"""The ExecuTorch target against the frozen program: run, taps, readback of the bytes, planted faults, damaged files."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from nets import images, residual_net
from pte_nets import Dense, Encoder, Functions, IntegerLinear, OptionA, Shapes, program
from torch import Tensor, nn

import edgekit
from edgekit.artifact import Artifact
from edgekit.errors import FormatError, InputError, UnsupportedError
from edgekit.frozen import FrozenOp, FrozenProgram, freeze_module
from edgekit.frozen.ops import lut_table
from edgekit.targets import executorch
from edgekit.targets.pte_file import PteFile, read_pte
from edgekit.targets.pte_layers import place

pytestmark = pytest.mark.slow

if executorch.available() is not None:
    pytest.skip("executorch is not installed", allow_module_level=True)

WEIGHTED = ("qconv2d", "qlinear")


@pytest.fixture(scope="module")
def residual() -> FrozenProgram:
    return residual_net()


@pytest.fixture(scope="module")
def artifact(residual: FrozenProgram, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return executorch.lower(residual, tmp_path_factory.mktemp("pte") / "model.pte")


def largest_tap_difference(frozen: FrozenProgram, path: Path, x: torch.Tensor) -> dict[str, int]:
    """LSBs by layer when each frozen layer gets the file's own inputs."""
    taps = executorch.taps(path, frozen, [x.numpy()])
    forced = frozen.forced({k: torch.from_numpy(v) for k, v in taps.items()}, x)
    return {k: int((forced[k].int() - torch.from_numpy(v).int()).abs().max()) for k, v in taps.items()}


def check_taps(frozen: FrozenProgram, path: Path, x: torch.Tensor) -> None:
    """Every layer with an integer output has a tap; weighted layers agree exactly, all others within 1 LSB."""
    found = largest_tap_difference(frozen, path, x)
    assert set(found) == {la.name for la in frozen.layers if la.op != "dequantize"}
    for layer in frozen.layers:
        if layer.name in found:
            assert found[layer.name] <= (0 if layer.op in WEIGHTED else 1), layer.name


def test_runs_within_one_step_of_the_frozen_program(residual: FrozenProgram, artifact: Artifact) -> None:
    x = images(16)
    seen: list[tuple[int, int]] = []
    (found,) = executorch.run(artifact.path, [x.numpy()], progress=lambda i, n: seen.append((i, n)))
    assert found.dtype == np.float32 and found.shape == (16, 10)
    assert np.abs(found - residual.run(x)[0].numpy()).max() <= 0.25 * 1.001
    assert seen[-1] == (16, 16)


def test_taps_agree_layer_by_layer(residual: FrozenProgram, artifact: Artifact) -> None:
    for x in images(3).split(1):
        check_taps(residual, artifact.path, x)


def test_inspect_reads_interfaces_memory_and_coverage(residual: FrozenProgram, artifact: Artifact) -> None:
    assert executorch.inspect(artifact.path, residual) == artifact
    assert artifact.bytes == artifact.path.stat().st_size
    assert [(t.shape, t.dtype) for t in (*artifact.inputs, *artifact.outputs)] == [
        ((1, 3, 16, 16), "float32"),
        ((1, 10), "float32"),
    ]
    assert artifact.memory["arena_bytes"] >= 4 * (3 * 16 * 16 + 10)
    assert artifact.share_of_macs == {"delegated": 1.0}
    assert {c.storage for c in artifact.coverage if c.macs} == {"int8"}
    assert len(read_pte(artifact.path).delegates) == 1
    assert not [op for op in read_pte(artifact.path).ops if op.delegate < 0]


def test_same_bytes_again(residual: FrozenProgram, artifact: Artifact, tmp_path: Path) -> None:
    executorch.lower(residual, tmp_path / "again.pte")
    assert (tmp_path / "again.pte").read_bytes() == artifact.path.read_bytes()


@pytest.mark.slow
def test_same_bytes_in_another_process(artifact: Artifact, tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})\n"
        "from pathlib import Path; from nets import residual_net; from edgekit.targets import executorch\n"
        f"executorch.lower(residual_net(), Path({str(tmp_path / 'other.pte')!r}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "other.pte").read_bytes() == artifact.path.read_bytes()


def test_portable_kernels_store_int8_and_compute_in_float(residual: FrozenProgram, tmp_path: Path) -> None:
    found = executorch.lower(residual, tmp_path / "portable.pte", executorch.Options(backend="portable"))
    assert found.share_of_macs == {"float": 1.0}
    assert {c.storage for c in found.coverage if c.macs} == {"int8"}
    x = images(4)
    assert np.abs(executorch.run(found.path, [x.numpy()])[0] - residual.run(x)[0].numpy()).max() <= 0.25 * 1.001
    check_taps(residual, found.path, x[:1])
    assert executorch.readback(found.path, residual) == []


def test_option_a_shortcut_stays_in_one_delegate(tmp_path: Path) -> None:
    frozen = program(OptionA, 3, 16, 16)
    found = executorch.lower(frozen, tmp_path / "option_a.pte")
    assert len(read_pte(found.path).delegates) == 1 and {c.runs for c in found.coverage} == {"delegated"}
    x = images(1)
    differences = largest_tap_difference(frozen, found.path, x)
    assert {k: differences[k] for k in ("rows", "columns", "pad")} == {"rows": 0, "columns": 0, "pad": 0}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["xnnpack", "portable"])
def test_shapes_groups_pools_and_slices(backend: executorch.Backend, tmp_path: Path) -> None:
    frozen = program(Shapes, 4, 8, 8)
    found = executorch.lower(frozen, tmp_path / "shapes.pte", executorch.Options(backend=backend))
    check_taps(frozen, found.path, torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)))
    if backend == "xnnpack":
        assert len(read_pte(found.path).delegates) == 1 and {c.runs for c in found.coverage} == {"delegated", "float"}
        assert {c.layer for c in found.coverage if c.runs == "float"} == {"pool_padded", "pool", "cat"}  # XNNPACK's are float
        assert next(c for c in found.coverage if c.layer == "fc").storage == "int4"


@pytest.mark.slow
def test_table_functions_stay_in_one_delegate(tmp_path: Path) -> None:
    frozen = program(Functions, 3, 8, 8)
    found = executorch.lower(frozen, tmp_path / "functions.pte")
    assert len(read_pte(found.path).delegates) == 1 and {c.runs for c in found.coverage} == {"delegated", "float"}
    # no int8 form, or one that rounds by itself
    assert {c.layer for c in found.coverage if c.runs == "float"} == {"hardsigmoid", "elu", "leaky_relu"}
    assert "float32" in next(c.note for c in found.coverage if c.layer == "elu")
    check_taps(frozen, found.path, torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize(
    ("function", "out", "runs", "lsb"),
    [
        ("silu", (0.03, -118), "delegated", 1),
        ("silu", (0.0015, 60), "float", 0),  # so fine a scale shows the gate's own rounding
        ("sigmoid", (0.0041, -128), "delegated", 0),
        ("tanh", (0.006, 3), "delegated", 0),
        ("gelu", (0.03, -118), "delegated", 0),
        ("leaky_relu", (0.03, -100), "float", 0),
    ],
)
def test_all_256_entries_of_a_table(function: str, out: tuple[float, int], runs: str, lsb: int, tmp_path: Path) -> None:
    (scale, zero_point), table = (0.06, 17), lut_table(function, 0.06, 17, *out)
    ends = {"in_scale": scale, "in_zp": zero_point, "out_scale": out[0], "out_zp": out[1]}
    net = nn.Sequential(
        FrozenOp("quantize", 1, {}, scale=scale, zero_point=zero_point, bits=8),
        FrozenOp("qlut", 1, {"table": table}, function=function, **ends),
        FrozenOp("dequantize", 1, {}, scale=out[0], zero_point=out[1]),
    )
    x = (torch.arange(-128, 128)[None] - zero_point) * scale
    frozen = freeze_module(net, (x,))
    found = executorch.lower(frozen, tmp_path / "f.pte")
    assert found.coverage[1].runs == runs
    value = executorch.taps(found.path, frozen, [x.numpy()])["1"]
    assert np.abs(value.astype(int) - table.numpy().astype(int)).max() <= lsb


def test_a_sigmoid_beside_a_silu_of_the_same_tensor(tmp_path: Path) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            y: Tensor = self.c(torch.sigmoid(x)) + self.b(nn.functional.silu(x))
            return y

    torch.manual_seed(0)
    x = torch.randn(16, 3, 8, 8)
    frozen = edgekit.compress_model(Both().eval(), x).program
    found = executorch.lower(frozen, tmp_path / "both.pte")
    assert {c.runs for c in found.coverage} == {"delegated"}
    check_taps(frozen, found.path, x[:1])


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[FrozenProgram, Artifact]:
    frozen = program(Dense, 640)
    return frozen, executorch.lower(frozen, tmp_path_factory.mktemp("dense") / "dense.pte")


def test_four_bit_linear_layers_are_stored_as_nibbles(dense: tuple[FrozenProgram, Artifact]) -> None:
    frozen, found = dense
    storage = {c.layer: c.storage for c in found.coverage if c.macs}
    # with an odd number of inputs XNNPACK would read the nibbles wrongly, so that layer stays int8
    assert storage == {"even": "int4", "narrow": "int4", "odd": "int8", "last": "int8"}
    weights = 640 * 128 // 2 + 128 * 31 // 2 + 31 * 64 + 64 * 10
    assert weights < found.bytes < weights + 12_000
    packed = frozen.layer("even").args["weight"].numpy().astype(np.int16) + 8
    assert (packed[:, ::2] | packed[:, 1::2] << 4).astype(np.uint8).tobytes() in found.path.read_bytes()
    x = torch.randn(8, 640, generator=torch.Generator().manual_seed(1))
    assert np.array_equal(executorch.run(found.path, [x.numpy()])[0], frozen.run(x)[0].numpy())
    check_taps(frozen, found.path, x[:1])


def test_altered_nibble_is_found(dense: tuple[FrozenProgram, Artifact], tmp_path: Path) -> None:
    frozen, found = dense
    copy = altered(found.path, tmp_path, weight_offset(read_pte(found.path), frozen, "narrow") + 7, "B", lambda b: b ^ 0x10)
    (mismatch,) = executorch.readback(copy, frozen)
    assert (mismatch.layer, mismatch.field) == ("narrow", "weight[0, 15]")


@pytest.mark.slow
def test_transformer_with_float_attention_is_one_delegate(tmp_path: Path) -> None:
    frozen = program(Encoder, 8, 8)
    found = executorch.lower(frozen, tmp_path / "encoder.pte")
    assert len(read_pte(found.path).delegates) == 1
    products = 2 * 2 * 4 * (8 * 8 * 8)  # blocks, QK^T and AV, heads, tokens x tokens x width
    assert {k: sum(c.macs for c in found.coverage if c.runs == k) for k in ("delegated", "float")} == {
        "delegated": sum(la.macs for la in frozen.layers),
        "float": products,
    }
    assert {c.storage for c in found.coverage if c.layer in {la.name for la in frozen.layers if la.macs}} == {"int8"}
    check_taps(frozen, found.path, torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(1)))


def altered(path: Path, folder: Path, at: int, code: str, change: Callable[[float], float]) -> Path:
    """A copy of a file with one number at byte ``at`` changed."""
    data = bytearray(path.read_bytes())
    struct.pack_into("<" + code, data, at, change(struct.unpack_from("<" + code, data, at)[0]))
    copy = folder / "altered.pte"
    copy.write_bytes(bytes(data))
    return copy


def weight_offset(file: PteFile, frozen: FrozenProgram, layer: str, which: str = "weight", what: str = "data") -> int:
    """Byte offset of a weighted layer's weights, bias or their scales."""
    op = place(file, frozen)[layer].ops[0]
    return file.tensors[op.inputs[1 if which == "weight" else 2]].at[what]


@pytest.mark.parametrize("layer", ["stem", "down", "block.dw", "block.pw", "head"])
@pytest.mark.parametrize(
    ("which", "what", "code", "change", "field"),
    [
        ("weight", "data", "b", lambda v: v ^ 1, "weight["),
        ("weight", "scales", "f", lambda v: v * 1.0001, "weight scale[0]"),
        ("bias", "data", "i", lambda v: v + 1, "bias[0]"),
        ("bias", "scales", "f", lambda v: v * 1.0001, "bias scale[0]"),
    ],
)
def test_altered_constant_is_found_in_its_layer(
    residual: FrozenProgram, artifact: Artifact, tmp_path: Path,
    layer: str, which: str, what: str, code: str, change: Callable[[float], float], field: str,
) -> None:  # fmt: skip
    at = weight_offset(read_pte(artifact.path), residual, layer, which, what)
    copy = altered(artifact.path, tmp_path, at, code, change)
    (mismatch,) = executorch.readback(copy, residual)
    assert mismatch.layer == layer and mismatch.field.startswith(field)


@pytest.mark.parametrize("layer", ["quantize", "stem", "pad", "down", "add", "maxpool", "cat", "gate", "mul", "mean", "head"])
@pytest.mark.parametrize(("what", "code"), [("scale", "f"), ("zero_point", "i")])
def test_altered_activation_parameter_is_found_in_its_layer(
    residual: FrozenProgram, artifact: Artifact, tmp_path: Path, layer: str, what: str, code: str
) -> None:
    file = read_pte(artifact.path)
    at = file.tensors[place(file, residual)[layer].values[0]].at[what]
    copy = altered(artifact.path, tmp_path, at, code, lambda v: v * 1.5 if code == "f" else v + 1)
    found = executorch.readback(copy, residual)
    assert {m.layer for m in found} == {layer}
    assert found[0].field == ("output scale" if code == "f" else "output zero point")


def test_altered_weight_shows_in_the_taps_of_its_layer_only(residual: FrozenProgram, artifact: Artifact, tmp_path: Path) -> None:
    at = weight_offset(read_pte(artifact.path), residual, "block.pw")
    copy = altered(artifact.path, tmp_path, at, "b", lambda v: v + 50 if v < 77 else v - 50)
    found = largest_tap_difference(residual, copy, images(1))
    assert found["block.pw"] > 1
    assert all(v <= 1 for k, v in found.items() if k != "block.pw")


def test_float_weights_are_found_although_delegated(
    residual: FrozenProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A converter that folds the weights' dequantize gives a fully delegated file with float weights."""
    style = executorch.xnnpack_style()
    rules = dict(style.rules)

    def linear(x, w, ws, b, i_s, i_z, o_s, o_z, activation, weight_bits, out_bits):  # type: ignore[no-untyped-def]
        real = torch.ops.aten.linear.default(style.dequantize(x, i_s, i_z), w.float() * ws[:, None], b.float() * (ws * i_s))
        return style.quantize(real, o_s, o_z)

    monkeypatch.setattr(executorch, "xnnpack_style", lambda gated: replace(style, rules={**rules, "qlinear": linear}))
    path = tmp_path / "float.pte"
    with pytest.raises(executorch.ParityError, match="layer head: weight type is float32"):
        executorch.lower(residual, path)
    row = next(c for c in executorch.inspect(path, residual).coverage if c.layer == "head")
    assert (row.runs, row.storage) == ("float", "float32")


def test_bias_beyond_float32_is_not_a_mismatch_and_smaller_ones_are_exact(tmp_path: Path) -> None:
    """A nearly dead channel has a tiny scale and so a huge integer bias."""
    torch.manual_seed(0)
    net = IntegerLinear(8, 6, (0.03, 0), (0.05, 0))
    net.linear.bias = torch.tensor([(1 << 22) - 1, 1 - (1 << 22), 12_345_679, -123_456_789, 7, -8], dtype=torch.int32)
    net.linear.weight_scale = torch.full((6,), 1e-7)
    frozen = freeze_module(net, (torch.zeros(1, 8),))
    found = executorch.lower(frozen, tmp_path / "bias.pte")
    file = read_pte(found.path)
    stored = file.tensors[place(file, frozen)["linear"].ops[0].inputs[2]].data
    assert stored is not None and np.array_equal(stored[[0, 1, 4, 5]], net.linear.bias.numpy()[[0, 1, 4, 5]])
    check_taps(frozen, found.path, torch.randn(1, 8, generator=torch.Generator().manual_seed(1)))


def test_another_program_does_not_match(artifact: Artifact) -> None:
    found = executorch.readback(artifact.path, residual_net(seed=1))
    assert {"stem", "down", "block.dw", "block.pw", "head"} <= {m.layer for m in found}


def test_sixteen_bit_activations_are_refused_by_name(tmp_path: Path) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.entry = FrozenOp("quantize", 1, {}, scale=0.01, zero_point=0, bits=16)
            self.exit = FrozenOp("dequantize", 1, {}, scale=0.01, zero_point=0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.exit(self.entry(x))

    frozen = freeze_module(Net(), (torch.zeros(1, 4),), sources={"entry": "model.py:7"})
    with pytest.raises(UnsupportedError, match=r"layer entry \(model.py:7\): its activations have 16 bits"):
        executorch.lower(frozen, tmp_path / "model.pte")
    assert not (tmp_path / "model.pte").exists()


@pytest.mark.parametrize("size", [0, 40, 100, 1000, -1, -2000])
def test_truncated_file_is_a_format_error(residual: FrozenProgram, artifact: Artifact, tmp_path: Path, size: int) -> None:
    short = tmp_path / "short.pte"
    short.write_bytes(artifact.path.read_bytes()[:size])
    for use in (executorch.inspect, executorch.readback):
        with pytest.raises(FormatError, match=r"short\.pte: "):
            use(short, residual)
    with pytest.raises(FormatError):
        executorch.run(short, [images(1).numpy()])


def test_damaged_header_bytes_never_give_another_error(residual: FrozenProgram, artifact: Artifact, tmp_path: Path) -> None:
    data = artifact.path.read_bytes()
    choose = np.random.default_rng(0)
    for _ in range(300):
        damaged = bytearray(data)
        for at in choose.integers(0, 4000, 4):
            damaged[at] = int(choose.integers(256))
        path = tmp_path / "damaged.pte"
        path.write_bytes(bytes(damaged))
        try:
            executorch.readback(path, residual)
        except FormatError as error:
            assert str(path) in str(error)


def test_wrong_inputs_are_refused(artifact: Artifact) -> None:
    with pytest.raises(InputError, match=r"shape \(2, 3, 8, 8\) given, \(N >= 1, 3, 16, 16\) expected"):
        executorch.run(artifact.path, [np.zeros((2, 3, 8, 8), np.float32)])
    with pytest.raises(InputError, match="2 inputs given, it takes 1"):
        executorch.run(artifact.path, [images(1).numpy()] * 2)
    with pytest.raises(InputError, match="choose one of: xnnpack, portable"):
        executorch.Options(backend="vulkan")  # type: ignore[arg-type]
