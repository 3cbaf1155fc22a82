"""The TFLite target: exact numbers in the file, int8 everywhere, runs and taps on LiteRT, planted faults, damaged files."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nets import _op, conv, images, linear, residual_net
from torch import Tensor, nn

from edgekit.artifact import Artifact
from edgekit.errors import FormatError, InputError, ParityError, UnsupportedError
from edgekit.frozen import FrozenOp, FrozenProgram, freeze_module
from edgekit.frozen.ops import lut_table
from edgekit.targets import tflite, tflite_convert, tflite_finish
from edgekit.targets.tflite_file import pack, parse, serialize, unpack

pytest.importorskip("litert_torch")
IN, A, B, C = (0.03, -3), (0.05, -128), (0.07, -10), (0.09, 7)


def quantize(q: tuple[float, int], bits: int = 8) -> FrozenOp:
    return FrozenOp("quantize", 1, {}, scale=q[0], zero_point=q[1], bits=bits)


def dequantize(q: tuple[float, int]) -> FrozenOp:
    return FrozenOp("dequantize", 1, {}, scale=q[0], zero_point=q[1])


def view(op: str, q: tuple[float, int], **values: Any) -> FrozenOp:
    return FrozenOp(op, 1, {}, scale=q[0], zero_point=q[1], **values)


def lut(function: str, i: tuple[float, int], o: tuple[float, int]) -> FrozenOp:
    return FrozenOp(
        "qlut", 1, {"table": lut_table(function, *i, *o)}, function=function,
        in_scale=i[0], in_zp=i[1], out_scale=o[0], out_zp=o[1],
    )  # fmt: skip


class OptionA(nn.Module):
    """The CIFAR ResNet's shortcut without weights: every second row and column, channels padded on both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.quantize, self.stem = quantize(IN), conv(3, 8, 3, IN, A)
        self.rows = view("qslice", A, dim=2, start=0, end=1 << 30, step=2)
        self.columns = view("qslice", A, dim=3, start=0, end=1 << 30, step=2)
        self.channels = view("qpad", A, pad=[0, 0, 0, 0, 4, 4])
        self.conv = conv(8, 16, 3, A, B, "none", stride=2)
        self.add = _op("qadd", 2, a=B, b=A, out=C, activation="relu", out_bits=8)
        self.mean = _op("qmean", 1, out=C, **{"in": C}, out_bits=8)
        self.flatten = view("qreshape", C, shape=[1, 16])
        self.head, self.dequantize = linear(16, 10, C, (0.2, 3)), dequantize((0.2, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(self.quantize(x))
        x = self.add(self.conv(x), self.channels(self.columns(self.rows(x))))
        return self.dequantize(self.head(self.flatten(self.mean(x))))


class Mixed(nn.Module):
    """Grouped, multiplied depthwise and dilated convolutions; concat and pool that rescale; permute; a table; two outputs."""

    def __init__(self) -> None:
        super().__init__()
        s, p = (0.02, -120), (0.015, -120)
        self.quantize, self.stem = quantize(IN), conv(3, 8, 3, IN, A, stride=2)
        self.grouped = conv(8, 8, 3, A, B, "none", groups=2)
        self.multiplied = conv(8, 16, 3, A, C, "relu6", groups=8)
        self.dilated = conv(8, 8, 3, A, B, "none")
        self.dilated.attributes |= {"dilation": [2, 2], "padding": [2, 2]}
        self.cat = _op("qconcat", 0, out=C, scales=[B[0], C[0], B[0]], zero_points=[B[1], C[1], B[1]], dim=1)
        self.silu = lut("silu", C, s)
        kernel = {"kernel": [2, 2], "stride": [2, 2], "padding": [0, 0]}
        self.pool = _op("qavg_pool2d", 1, out=p, **{"in": s}, **kernel, ceil_mode=False, count_include_pad=True)
        self.permute = view("qpermute", p, dims=[0, 2, 3, 1])
        self.flatten = view("qreshape", p, shape=[1, 512])
        self.head, self.dequantize, self.early = linear(512, 10, p, (0.2, 3)), dequantize((0.2, 3)), dequantize(A)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = stem = self.stem(self.quantize(x))
        x = self.silu(self.cat(self.grouped(x), self.multiplied(x), self.dilated(x)))
        return self.dequantize(self.head(self.flatten(self.permute(self.pool(x))))), self.early(stem)


class Square(nn.Module):
    """8 channels of 8 x 8, where shapes do not tell the layout, flattened channel-first; low-bit weights throughout."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.quantize, self.stem = quantize(IN), conv(8, 8, 3, IN, A, bits=bits)
        self.dw = conv(8, 8, 3, A, A, groups=8, bits=bits)
        self.flatten = view("qreshape", A, shape=[1, 512])
        self.hidden, self.head = linear(512, 15, A, B, "relu", bits=bits), linear(15, 10, B, (0.2, 3), bits=bits)
        self.dequantize = dequantize((0.2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.dequantize(self.head(self.hidden(self.flatten(self.dw(self.stem(self.quantize(x)))))))


class Encoder(nn.Module):
    """A transformer block with int8 linears; LayerNorm, attention and GELU stay in float."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm, self.q0, self.qkv, self.d0 = nn.LayerNorm(width), quantize(IN), linear(width, 3 * width, IN, A), dequantize(A)
        self.q1, self.proj, self.d1 = quantize(IN), linear(width, width, IN, B), dequantize(B)
        self.q2, self.up, self.d2 = quantize(IN), linear(width, 2 * width, IN, (0.05, -10)), dequantize((0.05, -10))
        self.q3, self.down, self.d3 = quantize(IN), linear(2 * width, width, IN, B), dequantize(B)
        self.q4, self.head, self.d4 = quantize(IN), linear(width, 10, IN, (0.2, 3)), dequantize((0.2, 3))

    def forward(self, x: Tensor) -> Tensor:
        n, t, w = x.shape
        q, k, v = (y.reshape(n, t, 2, w // 2).transpose(1, 2) for y in self.d0(self.qkv(self.q0(self.norm(x)))).chunk(3, -1))
        mixed = torch.softmax(q @ k.transpose(-1, -2) / 3, -1) @ v
        x = x + self.d1(self.proj(self.q1(mixed.transpose(1, 2).reshape(n, t, w))))
        x = x + self.d3(self.down(self.q3(nn.functional.gelu(self.d2(self.up(self.q2(x)))))))
        return self.d4(self.head(self.q4(x.mean(1))))


def program(module: Callable[[], nn.Module], *shape: int) -> FrozenProgram:
    torch.manual_seed(0)
    built = module().eval()
    return freeze_module(built, (torch.zeros(1, *shape),), name=type(built).__name__)


def noise(n: int, *shape: int) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(1))


def tap_errors(frozen: FrozenProgram, path: Path, x: Tensor) -> dict[str, int]:
    """Largest difference in LSB of each tapped layer from the frozen layer fed the file's own inputs."""
    worst: dict[str, int] = {}
    for i in range(len(x)):
        taps = {k: torch.from_numpy(v) for k, v in tflite.taps(path, frozen, [x[i : i + 1].numpy()]).items()}
        wanted = frozen.forced(taps, x[i : i + 1])
        for name, found in taps.items():
            worst[name] = max(worst.get(name, 0), int((wanted[name].int() - found.int()).abs().max()))
    return worst


def check(frozen: FrozenProgram, path: Path, x: Tensor, options: tflite.Options | None = None, lsb: int = 1) -> Artifact:
    """Lower, read back, and compare layer by layer (1 LSB) and end to end (``lsb`` of each output)."""
    artifact = tflite.lower(frozen, path, options)
    assert tflite.readback(path, frozen) == []
    assert max(tap_errors(frozen, path, x[:2]).values()) <= 1
    outputs = [node for node in frozen.module.graph.nodes][-1].args[0]
    for found, wanted, node in zip(tflite.run(path, [x.numpy()]), frozen.run(x), outputs, strict=True):
        assert found.dtype == np.float32 and found.shape == tuple(wanted.shape)
        assert np.abs(found - wanted.numpy()).max() <= lsb * node.args[1] * 1.001
    return artifact


@pytest.fixture(scope="module")
def residual(tmp_path_factory: pytest.TempPathFactory) -> tuple[FrozenProgram, Artifact]:
    torch.set_num_threads(1)
    frozen = residual_net()
    return frozen, check(frozen, tmp_path_factory.mktemp("tflite") / "residual.tflite", images(4))


def test_every_layer_is_int8_and_weighted_layers_are_exact(residual: tuple[FrozenProgram, Artifact]) -> None:
    frozen, artifact = residual
    rows = {row.layer: row for row in artifact.coverage}
    assert list(rows) == [layer.name for layer in frozen.layers]  # nothing that the program does not have
    assert all(row.runs in ("delegated", "int8") for row in rows.values())
    assert artifact.share_of_macs == {"delegated": pytest.approx(1.0)}
    assert artifact.notes == ()  # no transposes
    assert (rows["pad"].op, rows["pad"].note) == ("", "merged into its neighbour")
    assert {row.storage for row in rows.values()} == {"", "int8"}
    errors = tap_errors(frozen, artifact.path, images(2))
    assert set(errors) == set(rows) - {"pad", "flatten", "dequantize"}
    assert all(errors[name] == 0 for name in ("quantize", "stem", "down", "block.dw", "block.pw", "head"))


def test_int8_input_and_output(residual: tuple[FrozenProgram, Artifact]) -> None:
    _, artifact = residual
    (given,), (result,) = artifact.inputs, artifact.outputs
    assert (given.shape, given.dtype, given.scale, given.zero_point) == ((1, 16, 16, 3), "int8", float(np.float32(0.03)), -3)
    assert (result.name, result.shape, result.dtype, result.scale, result.zero_point) == ("head", (1, 10), "int8", 0.25, 3)
    assert artifact.bytes == artifact.path.stat().st_size < 8000
    assert artifact.memory["activation_peak_bytes"] == 16 * 16 * 8 + 8 * 8 * 16  # stem's output while `down` runs


def test_float_input_and_output_channel_first(tmp_path: Path) -> None:
    frozen = residual_net()
    artifact = check(frozen, tmp_path / "m.tflite", images(4), tflite.Options(io="float", channel_last=False))
    assert (artifact.inputs[0].shape, artifact.inputs[0].dtype) == ((1, 3, 16, 16), "float32")
    assert (artifact.outputs[0].dtype, artifact.outputs[0].scale) == ("float32", None)
    ops = {row.layer: row.op for row in artifact.coverage}
    assert ops["dequantize"] == "DEQUANTIZE" and "TRANSPOSE" in artifact.notes[0]


@pytest.mark.slow
def test_same_bytes_twice_and_in_another_process(residual: tuple[FrozenProgram, Artifact], tmp_path: Path) -> None:
    frozen, artifact = residual
    here = artifact.path.read_bytes()
    assert tflite.lower(frozen, tmp_path / "again.tflite").path.read_bytes() == here
    script = (
        "import sys; sys.path.insert(0, sys.argv[2]); from pathlib import Path; from nets import residual_net\n"
        "from edgekit.targets import tflite; tflite.lower(residual_net(), Path(sys.argv[1]))"
    )
    tests = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "other.tflite"), str(tests)], capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")  # silent too
    assert (tmp_path / "other.tflite").read_bytes() == here


@pytest.mark.slow
def test_option_a_shortcut(tmp_path: Path) -> None:
    artifact = check(program(OptionA, 3, 16, 16), tmp_path / "m.tflite", noise(4, 3, 16, 16), lsb=2)
    assert artifact.notes == ()
    assert {row.layer: row.op for row in artifact.coverage}["channels"] == "PAD"


@pytest.mark.slow
class Features(nn.Module):
    """Ends with an average over the image, as a model that gives features does."""

    def __init__(self) -> None:
        super().__init__()
        self.quantize, self.stem = quantize(IN), conv(3, 8, 3, IN, B, "none")
        self.mean = _op("qmean", 1, out=C, **{"in": B}, out_bits=8)
        self.flatten, self.dequantize = view("qreshape", C, shape=[1, 8]), dequantize(C)

    def forward(self, x: Tensor) -> Tensor:
        return self.dequantize(self.flatten(self.mean(self.stem(self.quantize(x)))))  # type: ignore[no-any-return]


@pytest.mark.parametrize("io", ["int8", "float"])
def test_a_last_reshape_that_the_converter_merges(io: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    program, path = freeze_module(Features(), (images(1),), name="features"), tmp_path / "features.tflite"
    tflite.lower(program, path, tflite.Options(io=io))  # type: ignore[arg-type]
    assert tflite.readback(path, program) == []
    (found,), (wanted,) = tflite.run(path, [images(3).numpy()]), program.run(images(3))
    assert found.shape == (3, 8) and np.abs(found - wanted.numpy()).max() <= C[0] + 1e-6
    taps = tflite.taps(path, program, [images(1).numpy()])
    forced = program.forced({name: torch.from_numpy(value) for name, value in taps.items()}, images(1))
    assert np.abs(taps["mean"].astype(int) - forced["mean"].numpy().astype(int)).max() <= 1


def test_rescaling_concat_and_pool_groups_and_tables(tmp_path: Path) -> None:
    frozen = program(Mixed, 3, 16, 16)
    artifact = check(frozen, tmp_path / "m.tflite", noise(4, 3, 16, 16), lsb=2)
    ops = {row.layer: row.op for row in artifact.coverage}
    assert (ops["silu"], ops["pool"], ops["cat"]) == ("MUL", "DEPTHWISE_CONV_2D", "CONCATENATION")
    assert all(row.runs != "float" for row in artifact.coverage)


@pytest.mark.parametrize(
    ("function", "out", "op", "lsb"),
    [
        ("sigmoid", (1 / 256, -128), "LOGISTIC", 0),
        ("sigmoid", (0.0041, -128), "GATHER", 0),
        ("hardswish", (0.03, -100), "GATHER", 0),
        ("silu", (0.03, -118), "MUL", 1),
        ("silu", (0.0015, 60), "GATHER", 0),  # so fine a scale shows the gate's own rounding
        ("leaky_relu", (0.03, -100), "LEAKY_RELU", 1),
    ],
)
def test_all_256_entries_of_a_table(function: str, out: tuple[float, int], op: str, lsb: int, tmp_path: Path) -> None:
    i = (0.06, 17)
    frozen = program(lambda: nn.Sequential(quantize(i), lut(function, i, out), dequantize(out)), 256)
    x = (torch.arange(-128, 128)[None] - 17) * 0.06
    artifact = tflite.lower(frozen, tmp_path / "m.tflite")
    assert artifact.coverage[1].op == op
    assert tap_errors(frozen, artifact.path, x)["1"] <= lsb


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 2])
def test_packed_weights(bits: int, tmp_path: Path) -> None:
    frozen = program(lambda: Square(bits), 8, 8, 8)
    packed = check(frozen, tmp_path / "packed.tflite", noise(4, 8, 8, 8), lsb=2)
    rows = {row.layer: row for row in packed.coverage if row.storage}
    convolution = "int4" if bits == 4 else "int8"
    assert [rows[name].storage for name in ("stem", "dw", "hidden", "head")] == [convolution] * 2 + [f"int{bits}"] * 2
    assert ("builtin kernels" if bits == 4 else "stored as int8") in rows["stem"].note
    plain = check(frozen, tmp_path / "plain.tflite", noise(4, 8, 8, 8), tflite.Options(pack=False))
    assert {row.storage for row in plain.coverage} == {"", "int8"}
    assert plain.bytes - packed.bytes > 512 * 15 * (8 - bits) // 8 - 100


def test_packing_is_low_bits_first() -> None:
    assert pack(np.array([1, -8, 7]), 4).tolist() == [0x81, 0x07]
    assert pack(np.array([1, -2, 0, -1, 1]), 2).tolist() == [0b11_00_10_01, 0b01]
    values = np.random.default_rng(0).integers(-8, 8, 101)
    assert unpack(pack(values, 4), 4, 101).tolist() == values.tolist()


def test_float_parts_stay_float(tmp_path: Path) -> None:
    frozen = program(Encoder, 6, 16)
    artifact = check(frozen, tmp_path / "m.tflite", noise(4, 6, 16))
    assert artifact.inputs[0].dtype == "float32" and artifact.outputs[0].dtype == "int8"
    assert artifact.notes == ()
    file = parse(artifact.path.read_bytes(), "m")
    kinds = {op.kind: op for op in file.ops}
    assert "FLOOR" not in kinds, "barriers are taken out again"
    for kind in ("GELU", "SOFTMAX", "MEAN", "BATCH_MATMUL"):
        assert {t.dtype for t in file.activations(kinds[kind])} == {"FLOAT32"}, kind
    rows = {row.layer: row for row in artifact.coverage}
    assert rows["softmax"].runs == "float" and all(rows[n].runs == "delegated" for n in ("qkv", "proj", "up", "down", "head"))
    assert 0.8 < artifact.share_of_macs["delegated"] < 1.0


class Floored(nn.Module):
    """A floor of the model's own, and a transposed convolution in float between integer layers."""

    def __init__(self) -> None:
        super().__init__()
        self.quantize, self.stem, self.d0 = quantize(IN), conv(3, 8, 3, IN, A), dequantize(A)
        self.up, self.q1 = nn.ConvTranspose2d(8, 8, 2, 2), quantize(C)
        self.head, self.d1 = conv(8, 4, 3, C, (0.2, 3), "none"), dequantize((0.2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.d1(self.head(self.q1(torch.floor(self.up(self.d0(self.stem(self.quantize(x)))) * 20) / 20)))


def test_a_floor_of_the_model_stays_and_a_transposed_convolution_is_float(tmp_path: Path) -> None:
    frozen = program(Floored, 3, 8, 8)
    artifact = check(frozen, tmp_path / "m.tflite", noise(4, 3, 8, 8))
    file = parse(artifact.path.read_bytes(), "m")
    assert [op.kind for op in file.ops].count("FLOOR") == 1
    (up,) = (op for op in file.ops if op.kind == "TRANSPOSE_CONV")
    assert {t.dtype for t in file.activations(up)} == {"FLOAT32"}


def test_a_float_operator_that_the_converter_makes_integer_is_a_parity_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tflite_convert._Tracer, "barrier", lambda self, value, name: value)
    with pytest.raises(ParityError, match="INT8 in GELU in the file, FLOAT32 in the frozen program"):
        tflite.lower(program(Encoder, 6, 16), tmp_path / "m.tflite")
    assert not (tmp_path / "m.tflite").exists()


FAULTS = {
    "weight": ("block.pw", "weight at"),
    "scale": ("block.pw", "weight scale"),
    "weight zero point": ("block.dw", "weight zero point"),
    "bias": ("down", "bias"),
    "output scale": ("add", "output scale"),
    "output zero point": ("mean", "output zero point"),
    "packed weight": ("down", "weight at"),
    "activation": ("down", "activation"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_names_the_layer(fault: str, residual: tuple[FrozenProgram, Artifact], tmp_path: Path) -> None:
    frozen, artifact = residual
    content = artifact.path.read_bytes()
    if fault == "packed weight":
        frozen = residual_net(4)
        content = tflite.lower(frozen, tmp_path / "four.tflite").path.read_bytes()
    layer, field = FAULTS[fault]
    model = parse(content, "model").model
    tensors = {t.name.decode(): t for t in model.subgraphs[0].tensors}

    def constant(role: str) -> np.ndarray[Any, Any]:
        buffer = model.buffers[tensors[f"{layer}/{role}"].buffer]
        buffer.data = np.array(buffer.data)
        return buffer.data

    if fault in ("weight", "packed weight"):
        constant("weight")[5] ^= 1
    elif fault == "bias":
        constant("bias")[4] ^= 1
    elif fault == "activation":
        model.subgraphs[0].operators[1].builtinOptions.fusedActivationFunction = 0
    else:
        tensor = tensors[layer if fault.startswith("output") else f"{layer}/weight"]
        key = "scale" if fault.endswith("scale") else "zeroPoint"
        values = np.array(getattr(tensor.quantization, key))
        values[-1] = values[-1] * np.float32(1.001) if key == "scale" else values[-1] + 1
        setattr(tensor.quantization, key, values)
    path = tmp_path / "fault.tflite"
    path.write_bytes(serialize(model))
    (mismatch,) = tflite.readback(path, frozen)
    assert mismatch.layer == layer and mismatch.field.startswith(field)
    assert mismatch.found != mismatch.expected


def test_a_converter_that_changes_a_number_is_a_parity_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def wrong(file: Any, index: int, layer: Any) -> None:
        if layer.name == "block.pw":
            tensor = file.model.subgraphs[0].tensors[index]
            tflite_finish._replace_buffer(file.model, tensor, np.zeros(len(file.tensors[index].data), np.uint8))

    monkeypatch.setattr(tflite_finish, "_exact_bias", wrong)
    (tmp_path / "m.tflite").write_bytes(b"before")
    with pytest.raises(ParityError, match=r"layer block\.pw: bias at"):
        tflite.lower(residual_net(), tmp_path / "m.tflite")
    assert (tmp_path / "m.tflite").read_bytes() == b"before"


def test_biases_beyond_float32_are_exact(tmp_path: Path) -> None:
    def module() -> nn.Module:
        layer = linear(16, 8, IN, (40.0, 0))
        layer.bias.copy_(torch.tensor([2**26 + 1, -(2**26) - 3, 2**24 + 1, 2**25 + 1, 1, -1, 2**30 + 7, 0]))
        return nn.Sequential(quantize(IN), layer, dequantize((40.0, 0)))

    frozen = program(module, 16)
    tflite.lower(frozen, tmp_path / "m.tflite")
    assert tflite.readback(tmp_path / "m.tflite", frozen) == []


def test_damaged_files(residual: tuple[FrozenProgram, Artifact], tmp_path: Path) -> None:
    frozen, artifact = residual
    content, path = artifact.path.read_bytes(), tmp_path / "bad.tflite"
    rng = np.random.default_rng(0)
    for size in (0, 3, 40, len(content) // 2, len(content) - 100):
        path.write_bytes(content[:size])
        for use in (tflite.readback, tflite.inspect):
            with pytest.raises(
                FormatError, match=r"bad\.tflite.*; make it again with `edgekit export RUN --target tflite`"
            ) as found:
                use(path, frozen)
            assert "unpack" not in str(found.value) and "offset" not in str(found.value)  # not in the reader's own words
    for _ in range(20):  # altered bytes: an error of ours, a mismatch, or no effect; never anything else
        altered = bytearray(content)
        for place in rng.integers(0, len(content), 4):
            altered[place] = rng.integers(0, 256)
        path.write_bytes(bytes(altered))
        try:
            tflite.inspect(path, frozen)
            tflite.readback(path, frozen)
        except FormatError:
            pass
    with pytest.raises(InputError, match=r"no\.tflite"):
        tflite.readback(tmp_path / "no.tflite", frozen)


def test_wrong_inputs(residual: tuple[FrozenProgram, Artifact]) -> None:
    _, artifact = residual
    with pytest.raises(InputError, match=r"samples of shape \(3, 16, 16\), found \(16, 16, 3\)"):
        tflite.run(artifact.path, [np.zeros((1, 16, 16, 3), np.float32)])
    with pytest.raises(InputError, match="1 inputs, 2 were given"):
        tflite.run(artifact.path, [np.zeros((1, 3, 16, 16))] * 2)
    with pytest.raises(InputError, match="expected int8 or float"):
        tflite.Options(io="uint8")  # type: ignore[arg-type]


def test_progress_is_reported(residual: tuple[FrozenProgram, Artifact]) -> None:
    seen: list[tuple[int, int]] = []
    tflite.run(residual[1].path, [images(3).numpy()], progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_refused_before_conversion(tmp_path: Path) -> None:
    wide = program(lambda: nn.Sequential(quantize(IN, 16), dequantize(IN)), 8)
    named = FrozenProgram(wide.exported, "wide", (), {"0": "model.py:7"})
    with pytest.raises(UnsupportedError, match=r"layer 0 \(model.py:7\) does not have 16 bits with zero point 0"):
        tflite.lower(named, tmp_path / "m.tflite")

    class Spectrum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.rfft(x).abs()

    with pytest.raises(UnsupportedError, match="complex"):
        tflite.lower(program(Spectrum, 8), tmp_path / "m.tflite")
    assert not (tmp_path / "m.tflite").exists()


def test_available() -> None:
    assert tflite.available() is None and (tflite.SUFFIX, tflite.EXTRA) == (".tflite", "tflite")
