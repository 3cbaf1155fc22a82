"""Every variant of the C library of 1-bit layers against the frozen operators, to the last bit, on shapes of hypothesis's choice.

The layers run in a process of their own that reads cases from a pipe: one for each variant that this processor has, built with
the address and undefined-behaviour sanitizers, and one under qemu-aarch64 for NEON.
"""

from __future__ import annotations

import os
import platform
import shutil
import struct
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.errors import EdgekitError, MissingTool
from edgekit.firmware_sim import binary_library
from edgekit.firmware_sim.binary_library import BINARY, SOURCES, VARIANTS
from edgekit.frozen.ops import OPS, activation_bounds

HERE = Path(__file__).parent
CHANNELS = st.one_of(st.integers(1, 24), st.sampled_from([32, 40, 56, 60, 64, 100, 120, 128, 192, 256]))
OUTPUTS = st.one_of(st.integers(1, 24), st.sampled_from([63, 64, 72, 128, 130]))
NAMES = [(machine, name) for machine, names in VARIANTS.items() for name in names if machine == "x86_64" or name == "neon"]
ALIKE = [n for n in NAMES if n[0] == platform.machine()] + [n for n in NAMES if n[0] != platform.machine()]


class Variant:
    """A process that runs layers by one variant."""

    def __init__(self, command: Sequence[str], name: str) -> None:
        environment = {**os.environ, "EDGEKIT_BINARY_ISA": name, "ASAN_OPTIONS": "detect_leaks=1"}
        self.process = subprocess.Popen([*command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)

    def ask(self, what: int, shape: Sequence[int], arrays: Sequence[np.ndarray], size: int) -> bytes:
        """Bytes of the result; arrays are x, weight, threshold, scale, bias, out_scale."""
        sent = [np.ascontiguousarray(a).tobytes() for a in arrays] + [b""] * (6 - len(arrays))
        header = struct.pack("<24i", what, *shape, *[0] * (16 - len(shape)), *map(len, sent), size)
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(header + b"".join(sent))
        self.process.stdin.flush()
        answer = self.process.stdout.read(size)
        assert len(answer) == size, "the process ended; its last words are on standard error"
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait() == 0, "leaks, or an error at the end"


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Machine to the command of its test program."""
    made = {}
    for machine in VARIANTS:
        out = tmp_path_factory.mktemp(machine) / "binary"
        own = machine == platform.machine()
        how = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"] if own else ["-static"]
        sources = [str(HERE / "binary.c"), *(str(BINARY / s) for s in SOURCES)]
        try:
            compiler = binary_library.compiler(machine)
        except MissingTool as error:
            pytest.fail(str(error))
        command = [
            *binary_library.c_compiler(compiler),
            "-O2",
            "-Wall",
            "-Wextra",
            "-Werror",
            *how,
            f"-I{BINARY}",
            *sources,
            "-lm",
            "-o",
            str(out),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:2000]
        made[machine] = [str(out)] if own else [f"qemu-{machine}-static", str(out)]
    return made


@pytest.fixture(scope="module", params=ALIKE, ids=lambda n: n[1])
def variant(request: pytest.FixtureRequest, programs: dict[str, list[str]]) -> Iterator[Variant]:
    machine, name = request.param
    found = Variant(programs[machine], name)
    if found.ask(9, [], [], 16).rstrip(b"\0").decode() != name:
        pytest.skip(f"this processor has no {name}")
    yield found
    found.close()


def packed(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Random packed signs; the last of ``shape`` counts signs."""
    bits = rng.integers(0, 2, shape, dtype=np.uint8)
    return np.packbits(bits, axis=-1, bitorder="little")


def tensor(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x)


def ends(rng: np.random.Generator, outputs: int, sums: int, wide: bool) -> dict[str, Any]:
    """Thresholds (some never and some always reached) and a requantization."""
    threshold = rng.integers(-sums - 2, sums + 3, outputs).astype(np.int32)
    threshold[rng.integers(0, outputs)] = rng.choice([np.iinfo(np.int32).max, np.iinfo(np.int32).min])
    bias = rng.integers(-2 * sums, 2 * sums + 1, outputs).astype(np.int32)
    if wide:
        bias[0] = np.iinfo(np.int32).max
    scale = rng.uniform(0.001, 0.1, outputs).astype(np.float32)
    return {"threshold": threshold, "bias": bias, "scale": scale, "out_scale": float(rng.uniform(0.01, 0.2)),
            "out_zp": int(rng.integers(-128, 128)), "activation": str(rng.choice(["none", "relu", "relu6"]))}  # fmt: skip


def tail(end: dict[str, Any]) -> list[int]:
    """Zero point and clamp as the C side takes them."""
    return [end["out_zp"], *activation_bounds(end["activation"], end["out_scale"], end["out_zp"])]


def requantized(end: dict[str, Any]) -> list[np.ndarray]:
    return [np.empty(0, np.int32), end["scale"], end["bias"], np.float32([end["out_scale"]])]


@settings(max_examples=150)
@given(st.integers(0, 2**32 - 1), st.data())
def test_convolutions(variant: Variant, seed: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    groups = data.draw(st.sampled_from([1, 1, 1, 2, 3]))
    channels, outputs = groups * data.draw(CHANNELS), groups * data.draw(OUTPUTS)
    kernel, stride, padding, dilation = (
        [data.draw(st.integers(low, high)) for _ in "hw"] for low, high in ((1, 4), (1, 3), (0, 4), (1, 2))
    )
    size = [
        data.draw(st.integers(max(1, d * (k - 1) + 1 - 2 * p), 11)) for k, p, d in zip(kernel, padding, dilation, strict=True)
    ]
    x = packed(rng, data.draw(st.integers(1, 2)), *size, channels)
    weight = packed(rng, outputs, *kernel, channels // groups)
    end = ends(rng, outputs, weight.shape[1] * weight.shape[2] * channels // groups, data.draw(st.booleans()))
    convolve(variant, x, weight, channels, end, (stride, padding, dilation, groups))


@pytest.mark.parametrize(
    ("channels", "outputs", "kernel", "size", "stride", "groups"),
    [
        (32, 32, 3, 12, 1, 1),  # 4 words and 4 bytes
        (32, 20, 3, 9, 2, 1),
        (64, 48, 3, 8, 1, 2),  # the same in each group
        (64, 64, 3, 8, 1, 1),  # 3 words in 3 rows
        (64, 24, 1, 9, 1, 1),  # 1, 2 and 4 words
        (128, 8, 1, 7, 2, 1),
        (256, 72, 1, 5, 1, 1),
        (512, 16, 3, 4, 1, 1),  # more words than a sum in bytes holds
    ],
)
def test_convolutions_with_kernels_of_their_own(
    variant: Variant, channels: int, outputs: int, kernel: int, size: int, stride: int, groups: int
) -> None:
    rng = np.random.default_rng(channels + outputs + kernel)
    x, weight = packed(rng, 2, size, size, channels), packed(rng, outputs, kernel, kernel, channels // groups)
    end = ends(rng, outputs, min(kernel * kernel * channels // groups, 40), False)
    pad = kernel // 2
    convolve(variant, x, weight, channels, end, ([stride, stride], [pad, pad], [1, 1], groups))


def convolve(
    variant: Variant, x: np.ndarray, weight: np.ndarray, channels: int, end: dict[str, Any],
    geometry: tuple[list[int], list[int], list[int], int],
) -> None:  # fmt: skip
    """Both results of a convolution beside the operators'."""
    (batch, *size, _), (outputs, *kernel, _) = x.shape, weight.shape
    stride, padding, dilation, groups = geometry
    bits = OPS.binary_conv2d(tensor(x), tensor(weight), channels, tensor(end["threshold"]), *geometry).numpy()
    integers = OPS.binary_qconv2d(
        tensor(x), tensor(weight), channels, tensor(end["scale"]), tensor(end["bias"]), end["out_scale"], end["out_zp"],
        end["activation"], *geometry, 8,
    ).numpy()  # fmt: skip
    pairs = [a | b << 4 for a, b in (stride, padding, dilation)]
    shape = [batch, *size, channels, outputs, *kernel, *pairs, groups, *integers.shape[2:], *tail(end)]
    found = variant.ask(0, shape, [x, weight, end["threshold"]], bits.size)
    np.testing.assert_array_equal(np.frombuffer(found, np.uint8).reshape(bits.shape), bits)
    found = variant.ask(0, shape, [x, weight, *requantized(end)], integers.size)
    np.testing.assert_array_equal(np.frombuffer(found, np.int8).reshape(integers.shape), integers)


@given(
    st.integers(0, 2**32 - 1), st.integers(1, 40), st.one_of(st.integers(1, 300), st.sampled_from([512, 1024, 33000])), OUTPUTS
)
def test_linear_layers(variant: Variant, seed: int, rows: int, features: int, outputs: int) -> None:
    rng = np.random.default_rng(seed)
    x, weight = packed(rng, rows, features), packed(rng, outputs, features)
    end = ends(rng, outputs, features, False)
    bits = OPS.binary_linear(tensor(x), tensor(weight), features, tensor(end["threshold"])).numpy()
    integers = OPS.binary_qlinear(
        tensor(x), tensor(weight), features, tensor(end["scale"]), tensor(end["bias"]), end["out_scale"], end["out_zp"],
        end["activation"], 8,
    ).numpy()  # fmt: skip
    shape = [rows, features, outputs, *[0] * 10, *tail(end)]
    found = variant.ask(1, shape, [x, weight, end["threshold"]], bits.size)
    np.testing.assert_array_equal(np.frombuffer(found, np.uint8).reshape(bits.shape), bits)
    found = variant.ask(1, shape, [x, weight, *requantized(end)], integers.size)
    np.testing.assert_array_equal(np.frombuffer(found, np.int8).reshape(integers.shape), integers)


@pytest.mark.parametrize("features", [64, 256, 448, 512, 1984, 2048, 2304])
@pytest.mark.parametrize("rows", [1, 3])
def test_sums_that_are_as_large_as_they_get(variant: Variant, features: int, rows: int) -> None:
    """Every sign differs, or none, and thresholds are at the very sums."""
    x = np.full((rows, features // 8), 255, np.uint8)
    weight = np.repeat(np.array([0, 255], np.uint8), 8 * features // 8).reshape(16, -1)
    threshold = np.array([-features, -features + 1] * 4 + [features, features + 1] * 4, np.int32)
    found = variant.ask(1, [rows, features, 16, *[0] * 10, 0, 0, 0], [x, weight, threshold], 2 * rows)
    assert found == b"\x55\x55" * rows


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 20), st.integers(1, 150), st.integers(1, 150), st.booleans())
def test_matrix_products(variant: Variant, seed: int, batch: int, m: int, n: int, features: int, unsigned: bool) -> None:
    rng = np.random.default_rng(seed)
    a, b = packed(rng, batch, m, features), packed(rng, batch, n, features)
    scale, out_scale, out_zp = float(rng.uniform(0.01, 0.1)), float(rng.uniform(0.01, 0.2)), int(rng.integers(-128, 128))
    wanted = OPS.binary_qmatmul(tensor(a), tensor(b), features, unsigned, scale, out_scale, out_zp, 8).numpy()
    shape = [batch, m, n, features, int(unsigned), *[0] * 8, out_zp, -128, 127]
    arrays = [a, b, np.empty(0, np.int32), np.float32([scale]), np.empty(0, np.int32), np.float32([out_scale])]
    found = variant.ask(2, shape, arrays, wanted.size)
    np.testing.assert_array_equal(np.frombuffer(found, np.int8).reshape(wanted.shape), wanted)


@given(st.integers(0, 2**32 - 1), st.integers(1, 2), CHANNELS, st.sampled_from([1, 5, 64, 81]), st.booleans(), st.booleans())
def test_signs(variant: Variant, seed: int, outer: int, channels: int, inner: int, each: bool, real: bool) -> None:
    rng = np.random.default_rng(seed)
    count = channels if each else 1
    if real:
        x = rng.standard_normal((outer, channels, inner)).astype(np.float32).round(1)
        threshold = rng.standard_normal(count).astype(np.float32).round(1)
    else:
        x = rng.integers(-128, 128, (outer, channels, inner)).astype(np.int8)
        threshold = rng.choice([*range(-4, 5), -128, 127, 128, -32768, 32767], count).astype(np.int16)
    wanted = OPS.binarize(tensor(x), tensor(threshold), 1).numpy()
    found = variant.ask(4 if real else 3, [outer, channels, inner, count], [x, threshold], wanted.size)
    np.testing.assert_array_equal(np.frombuffer(found, np.uint8).reshape(wanted.shape), wanted)


def test_a_missing_compiler_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path))
    with pytest.raises(MissingTool, match=r"no-such-compiler is not installed.*apt-get install") as caught:
        binary_library.library("libx", platform.machine())
    assert caught.value.exit_code == 3


def test_the_library_is_compiled_once_and_again_when_something_differs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGEKIT_CACHE", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    first = binary_library.library("libx", platform.machine())
    stamp = first.stat().st_mtime_ns
    assert binary_library.library("libx", platform.machine()) == first and first.stat().st_mtime_ns == stamp
    assert binary_library.library("libx", platform.machine(), about="other headers") != first
    broken = tmp_path / "broken.cpp"
    broken.write_text("int f( {")
    with pytest.raises(EdgekitError, match="does not compile"):
        binary_library.library("libx", platform.machine(), [broken])
    assert shutil.which("g++") and not list(tmp_path.rglob("*.tmp"))
