"""Each 1-bit operator against torch's float convolution or product of numbers -1 and +1, and its packing against numpy's."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import edgekit
from edgekit.frozen import FrozenOp, FrozenProgram, freeze_module
from edgekit.frozen.binary_ops import BINARY_OPS, pack_signs, packed_size, unpack_signs
from edgekit.frozen.describe import describe
from edgekit.frozen.ops import OPS
from edgekit.targets import preflight

SEEDS = st.integers(0, 2**32 - 1)
CHANNELS = st.sampled_from([1, 3, 7, 8, 9, 16, 21, 33, 64])


def signs(rng: np.random.Generator, *shape: int) -> Tensor:
    """Random float32 numbers -1 and +1."""
    return torch.from_numpy(rng.choice([-1.0, 1.0], shape)).float()


def call(name: str, *args: Any) -> Tensor:
    """Run the operator, and its fake kernel on meta tensors: both must agree in shape and dtype."""
    op = getattr(OPS, name).default
    result: Tensor = op(*args)
    fake = op(*(a.to("meta") if isinstance(a, Tensor) else a for a in args))
    assert (fake.shape, fake.dtype) == (result.shape, result.dtype)
    assert result.is_contiguous()
    return result


def requantized(acc: np.ndarray, factor: np.ndarray, out_zp: int, low: int = -128) -> np.ndarray:
    return np.clip(np.rint(acc.astype(np.float32) * factor.astype(np.float32)).astype(np.float64) + out_zp, low, 127)


@given(SEEDS, st.integers(1, 40))
def test_packing_equals_numpys_little_endian(seed: int, count: int) -> None:
    bits = np.random.default_rng(seed).integers(0, 2, (3, 2, count)).astype(bool)
    packed = pack_signs(torch.from_numpy(bits))
    np.testing.assert_array_equal(packed.numpy(), np.packbits(bits, axis=-1, bitorder="little"))
    assert packed.shape[-1] == packed_size(count)
    np.testing.assert_array_equal(unpack_signs(packed, count).numpy(), np.where(bits, 1, -1))


@given(SEEDS, CHANNELS, st.booleans())
def test_binarize_compares_with_the_channels_threshold(seed: int, channels: int, each: bool) -> None:
    rng = np.random.default_rng(seed)
    x = rng.integers(-128, 128, (2, channels, 3, 2)).astype(np.int8)
    x[0, 0, 0] = [-128, 127]
    threshold = rng.integers(-128, 129, channels if each else 1).astype(np.int16)
    wanted = (x.astype(int) >= threshold.reshape(1, -1, 1, 1)).transpose(0, 2, 3, 1)
    found = call("binarize", torch.from_numpy(x), torch.from_numpy(threshold), 1)
    np.testing.assert_array_equal(found.numpy(), np.packbits(wanted, axis=-1, bitorder="little"))
    found = call("binarize", torch.from_numpy(x), torch.from_numpy(threshold[:1]), -2)
    wanted = (x.astype(int) >= threshold[0]).transpose(0, 1, 3, 2)
    np.testing.assert_array_equal(found.numpy(), np.packbits(wanted, axis=-1, bitorder="little"))


def test_zero_is_positive_and_thresholds_reach_always_and_never() -> None:
    x = torch.tensor([[-128, -1, 0, 127]], dtype=torch.int8)
    assert call("binarize", x, torch.tensor([0], dtype=torch.int16), -1).tolist() == [[0b1100]]
    assert call("binarize", x, torch.tensor([-128], dtype=torch.int16), -1).tolist() == [[0b1111]]
    assert call("binarize", x, torch.tensor([128], dtype=torch.int16), -1).tolist() == [[0]]
    assert call("binarize", torch.tensor([[-0.0, 0.0, -1e-30, 1.0]]), torch.zeros(1), -1).tolist() == [[0b1011]]


@given(SEEDS, st.data())
def test_binary_convolutions_equal_torchs_of_signs(seed: int, data: st.DataObject) -> None:
    rng, draw = np.random.default_rng(seed), data.draw
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    each, outs = draw(CHANNELS), groups * draw(st.sampled_from([1, 4, 5, 9]))
    channels, kernel = groups * each, [draw(st.integers(1, 3)) for _ in range(2)]
    stride, dilation, pad = ([draw(st.integers(low, 2)) for _ in range(2)] for low in (1, 1, 0))
    size = [draw(st.integers(2, 6)) for _ in range(2)]
    assume(all(size[d] + 2 * pad[d] - dilation[d] * (kernel[d] - 1) > 0 for d in range(2)))
    x, w = signs(rng, 2, channels, *size), signs(rng, outs, each, *kernel)
    acc = F.conv2d(x, w, None, stride, pad, dilation, groups)  # small integers: float32 is exact
    assert torch.equal(acc, acc.round())

    geometry = (stride, pad, dilation, groups)
    packed, weight = pack_signs(x.movedim(1, -1) > 0), pack_signs(w.movedim(1, -1) > 0)
    threshold = torch.from_numpy(rng.integers(-each * 9 - 2, each * 9 + 2, outs).astype(np.int32) // 3)
    found = call("binary_conv2d", packed, weight, channels, threshold, *geometry)
    wanted = (acc >= threshold.view(1, -1, 1, 1)).movedim(1, -1)
    np.testing.assert_array_equal(found.numpy(), np.packbits(wanted.numpy(), axis=-1, bitorder="little"))

    scale, bias = torch.rand(outs) + 1e-3, torch.from_numpy(rng.integers(-50, 50, outs).astype(np.int32))
    out_scale, out_zp, relu = float(np.float32(rng.uniform(0.05, 2.0))), int(rng.integers(-128, 128)), bool(rng.integers(2))
    found = call(
        "binary_qconv2d", packed, weight, channels, scale, bias, out_scale, out_zp, "relu" if relu else "none", *geometry, 8
    )
    factor = (scale.numpy() / np.float32(out_scale)).reshape(1, -1, 1, 1)
    exact = acc.numpy() + bias.numpy().reshape(1, -1, 1, 1)
    np.testing.assert_array_equal(found.numpy(), requantized(exact, factor, out_zp, out_zp if relu else -128))


@given(SEEDS, st.sampled_from([1, 7, 8, 31, 64, 100]), st.sampled_from([1, 5, 8, 19]), st.sampled_from([(1,), (2, 3)]))
def test_binary_linears_equal_torchs_of_signs(seed: int, features: int, outs: int, rows: tuple[int, ...]) -> None:
    rng = np.random.default_rng(seed)
    x, w = signs(rng, *rows, features), signs(rng, outs, features)
    acc = F.linear(x, w)
    packed, weight = pack_signs(x > 0), pack_signs(w > 0)
    threshold = torch.from_numpy(rng.integers(-features - 1, features + 2, outs).astype(np.int32))
    found = call("binary_linear", packed, weight, features, threshold)
    np.testing.assert_array_equal(found.numpy(), np.packbits((acc >= threshold).numpy(), axis=-1, bitorder="little"))
    scale, bias = torch.rand(outs) + 1e-3, torch.from_numpy(rng.integers(-50, 50, outs).astype(np.int32))
    found = call("binary_qlinear", packed, weight, features, scale, bias, 0.25, -3, "none", 8)
    np.testing.assert_array_equal(found.numpy(), requantized(acc.numpy() + bias.numpy(), scale.numpy() / np.float32(0.25), -3))


@given(SEEDS, st.sampled_from([1, 7, 16, 61]), st.booleans())
def test_binary_qmatmul_equals_torchs(seed: int, features: int, unsigned: bool) -> None:
    rng = np.random.default_rng(seed)
    a, b = signs(rng, 2, 3, 4, features), signs(rng, 2, 3, 5, features)
    acc = ((a > 0).float() if unsigned else a) @ b.mT
    found = call("binary_qmatmul", pack_signs(a > 0), pack_signs(b > 0), features, unsigned, 0.3, 0.7, 5, 8)
    factor = np.float32(0.3) / np.float32(0.7)
    np.testing.assert_array_equal(found.numpy(), requantized(acc.numpy(), factor, 5))


def test_requantization_rounds_once_half_to_even() -> None:
    x, w = torch.tensor([[0b1]], dtype=torch.uint8), torch.ones(4, 1, dtype=torch.uint8)
    bias = torch.tensor([0, 2, 4, -8], dtype=torch.int32)  # sums 1, 3, 5, -7 at a scale of 2
    found = call("binary_qlinear", x, w, 1, torch.ones(4), bias, 2.0, 0, "none", 8)
    assert found.tolist() == [[round(Fraction(v, 2)) for v in (1, 3, 5, -7)]] == [[0, 2, 2, -4]]


class _Net(nn.Module):
    """int8 image -> signs -> 3x3 to signs -> 1x1 to int8: 12 channels, 20, 5."""

    def __init__(self) -> None:
        super().__init__()
        rng = np.random.default_rng(0)
        geometry = {"stride": [1, 1], "dilation": [1, 1], "groups": 1}
        self.quantize = FrozenOp("quantize", 1, {}, scale=0.1, zero_point=0, bits=8)
        self.sign = FrozenOp("binarize", 1, {"threshold": torch.zeros(1, dtype=torch.int16)}, dim=1)
        self.first, self.second = signs(rng, 20, 12, 3, 3), signs(rng, 5, 20, 1, 1)
        weight = pack_signs(self.first.movedim(1, -1) > 0)
        threshold = torch.arange(20, dtype=torch.int32) - 10
        self.conv = FrozenOp(
            "binary_conv2d", 1, {"weight": weight, "threshold": threshold}, channels=12, padding=[1, 1], **geometry
        )
        buffers = {
            "weight": pack_signs(self.second.movedim(1, -1) > 0), "weight_scale": torch.ones(5),
            "bias": torch.zeros(5, dtype=torch.int32),
        }  # fmt: skip
        rest = {"out_scale": 1.0, "out_zp": 0, "activation": "none", "out_bits": 8, "padding": [0, 0]}
        self.last = FrozenOp("binary_qconv2d", 1, buffers, channels=20, **rest, **geometry)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.conv(self.sign(self.quantize(x))))
        return result


@pytest.fixture(scope="module")
def program() -> FrozenProgram:
    return freeze_module(_Net(), (torch.zeros(1, 12, 4, 4),), name="binary")


def test_a_chain_equals_the_float_net(program: FrozenProgram, tmp_path: Path) -> None:
    net, x = _Net(), torch.randn(3, 12, 4, 4, generator=torch.Generator().manual_seed(0))
    hidden = F.conv2d(torch.where(torch.round(x / 0.1) >= 0, 1.0, -1.0), net.first, padding=1)
    hidden = torch.where(hidden >= (torch.arange(20) - 10).view(1, -1, 1, 1), 1.0, -1.0)
    wanted = F.conv2d(hidden, net.second)
    assert torch.equal(program.run(x)[0].float(), wanted)
    edgekit.save(program, tmp_path / "a.pt2")
    assert torch.equal(edgekit.load(tmp_path / "a.pt2").run(x)[0].float(), wanted)


def test_a_weight_takes_one_bit(program: FrozenProgram, tmp_path: Path) -> None:
    conv, last = program.layer("conv"), program.layer("last")
    assert conv.weight_bits == last.weight_bits == 1
    assert conv.args["weight"].shape == (20, 3, 3, 2) and conv.args["weight"].dtype == torch.uint8
    assert conv.weight_bytes == 20 * 9 * 2 + 20 * 4  # 12 channels take two bytes
    assert last.weight_bytes == 5 * 3 + 5 * 4 + 5 * 4
    assert conv.parameters == 20 * 12 * 9 + 20 and last.parameters == 5 * 20 + 5
    assert conv.macs == 16 * 20 * 12 * 9 and last.macs == 16 * 5 * 20
    assert (conv.packed, last.packed, conv.activation_bits, last.activation_bits) == (True, False, 1, 8)
    found = describe(program)
    assert found.macs_by_bits == {"w1a1": conv.macs + last.macs}
    assert found.bytes == conv.weight_bytes + last.weight_bytes + 2  # and the threshold of the sign
    edgekit.save(program, tmp_path / "a.pt2")
    assert conv.args["weight"].numpy().tobytes() in (tmp_path / "a.pt2").read_bytes()


@pytest.mark.parametrize("target", ["executorch", "tflite", "cortex-m4"])
def test_targets_take_the_operators(program: FrozenProgram, target: str) -> None:
    preflight.check_program(program, target)


def test_every_operator_is_checked_by_torch() -> None:
    rng = np.random.default_rng(0)
    image, row = pack_signs(signs(rng, 1, 4, 4, 12) > 0), pack_signs(signs(rng, 3, 12) > 0)
    kernel, ws, b = pack_signs(signs(rng, 2, 3, 3, 12) > 0), torch.rand(2) + 0.1, torch.arange(2, dtype=torch.int32)
    geometry = ([1, 2], [1, 0], [1, 1], 1)
    samples: dict[str, tuple[Any, ...]] = {
        "binarize": (torch.randint(-128, 128, (1, 12, 4, 4), dtype=torch.int8), torch.zeros(12, dtype=torch.int16), 1),
        "binary_conv2d": (image, kernel, 12, b, *geometry),
        "binary_qconv2d": (image, kernel, 12, ws, b, 0.5, 1, "relu", *geometry, 8),
        "binary_linear": (row, row[:2].clone(), 12, b),
        "binary_qlinear": (row, row[:2].clone(), 12, ws, b, 0.5, 1, "none", 8),
        "binary_qmatmul": (row, row[:2].clone(), 12, False, 0.3, 0.5, 1, 8),
    }
    assert set(samples) == BINARY_OPS
    for name, args in samples.items():
        torch.library.opcheck(getattr(OPS, name).default, args)
