"""1-bit layers in firmware: their kernels, whole networks on every core, the bits in flash, and what is refused."""

from __future__ import annotations

from pathlib import Path

import binary_cases
import firmware_cases as cases
import numpy as np
import pytest
import torch
from binary_firmware_nets import attention_net, binarize, binary_conv, binary_net
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from edgekit.compress.binary.baked import baked
from edgekit.compress.binary.bipft import BinaryEncoder
from edgekit.compress.binary.encoder import Encoder, EncoderConfig
from edgekit.compress.ptq.settings import PTQ
from edgekit.compress.steps import apply
from edgekit.data import Data
from edgekit.errors import UnsupportedError
from edgekit.firmware_sim import kernels
from edgekit.firmware_sim.boards import BOARDS
from edgekit.frozen import FrozenOp, FrozenProgram, freeze_module
from edgekit.recipe import Block
from edgekit.targets import cortex_m, get
from edgekit.targets.cortex_m import binary_layout, elf, host
from edgekit.targets.cortex_m.binary import stored_signs
from edgekit.targets.cortex_m.emit import array_name
from edgekit.targets.cortex_m.preparation import prepare, simulate

pytestmark = pytest.mark.slow

needs_tools = pytest.mark.skipif(cortex_m.M4.available() is not None, reason="needs arm-none-eabi-gcc and qemu-system-arm")
CORES = {
    "cortex-m0": "portable",
    "cortex-m3": "portable",
    "cortex-m4": "dsp",
    "cortex-m7": "dsp",
    "cortex-m33": "dsp",
    "cortex-m55": "mve",
}
QUICK = ("microbit", "mps2-an386", "mps3-an547")
BOARD_SETS = [
    *((b, None) for b in QUICK),
    *(pytest.param(b, k, marks=pytest.mark.slow) for b, k in (("mps2-an385", None), ("mps2-an500", None), ("mps2-an505", None))),
    pytest.param("mps3-an547", 0, marks=pytest.mark.slow),
]
BAND = 2048
"""Bytes of a band in the test firmware: larger layers then take several bands."""


@needs_tools
@pytest.mark.parametrize(("board", "kernel_set"), BOARD_SETS)
def test_kernels_equal_sums_of_signs(board: str, kernel_set: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BAND_BYTES", BAND)
    small = board == "microbit"
    memory = min(BOARDS[board].ram_bytes // 4 * 3 - 2048, 300_000)
    built = cases.firmware(board, tmp_path, memory, kernel_set, f"-DEK_BAND_BYTES={BAND}")
    sizes = {"size": 2, "most": 12} if small else {}
    kinds = [binary_cases.binary(k, **sizes) for k in ("vectors", "planes", "rows")]
    strategy = st.one_of(binary_cases.binarize(), *kinds, binary_cases.matmul(64 if small else 300))

    @settings(max_examples=2, phases=(Phase.generate, Phase.shrink), suppress_health_check=list(HealthCheck), deadline=None)
    @given(st.lists(strategy, min_size=50, max_size=50))
    def boot(batch: list[cases.Case]) -> None:
        cases.check(built, batch, None if kernel_set is None else ("portable", "dsp", "mve")[kernel_set])

    boot()


def inputs(n: int) -> np.ndarray:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(0)).numpy()


def test_the_reference_gives_the_programs_signs_and_stays_within_a_step() -> None:
    program = binary_net()
    firmware = prepare(program, "portable")
    kinds = {s.layer: s.kind for s in firmware.steps}
    assert kinds["first"] == "binary_planes" and {kinds[k] for k in ("point", "hidden")} == {"binary_vectors"}
    assert {kinds[k] for k in ("grouped", "chain", "shortcut", "small")} == {"binary_rows"}
    for x in inputs(5):
        sample = torch.from_numpy(x[None])
        taps, _ = simulate(firmware, [x[None]])
        forced = program.forced({k: torch.from_numpy(v) for k, v in taps.items()}, sample)
        for layer in program.layers:
            if layer.name in taps:
                gap = np.abs(forced[layer.name].numpy().astype(int) - taps[layer.name]).max()
                assert gap <= (0 if layer.packed else 1), layer.name


def test_packed_signs_take_a_word_for_32_channels() -> None:
    firmware = prepare(binary_net(), "portable")
    sizes = {t.name: t.size for t in firmware.tensors}
    assert sizes["signs"] == 8 * 8 * 4 and sizes["first"] == 8 * 8 * 8 and sizes["hidden"] == 12


@needs_tools
@pytest.mark.parametrize("core", [c if c[8:] in ("m0", "m4", "m55") else pytest.param(c, marks=pytest.mark.slow) for c in CORES])
def test_a_network_runs_on_every_core_as_its_reference_says(core: str, tmp_path: Path) -> None:
    program, target, x = binary_net(), get(core), inputs(2)
    artifact = target.lower(program, tmp_path / f"model{target.SUFFIX}")
    (outputs,) = target.run(artifact.path, [x])
    firmware = prepare(program, CORES[core])
    for i in range(len(x)):
        layers, (expected,) = simulate(firmware, [x[i : i + 1]])
        assert np.array_equal(outputs[i : i + 1], expected)
    taps = target.taps(artifact.path, program, [x[i : i + 1]])
    assert taps.keys() == layers.keys()
    assert [name for name in layers if not np.array_equal(layers[name], taps[name])] == []
    storage = {c.layer: c.storage for c in artifact.coverage}
    assert storage["first"] == storage["small"] == "int1" and storage["head"] == "int8"
    runs = {c.layer: c.runs for c in artifact.coverage}
    assert runs["first"] == runs["small"] == "binary" and runs["head"] == "int8"


@needs_tools
@pytest.mark.parametrize("core", ["cortex-m4", "cortex-m55"])
def test_attention_of_signs_runs_and_its_products_are_the_programs(core: str, tmp_path: Path) -> None:
    program, x = attention_net()
    target, samples = get(core), x.numpy()
    kinds = [layer.op for layer in program.layers]
    assert kinds.count("binary_qmatmul") == 2 and {layer.args.get("dim") for layer in program.layers} >= {-1, -2}
    path = target.lower(program, tmp_path / f"model{target.SUFFIX}").path
    (outputs,) = target.run(path, [samples[:2]])
    for i in range(2):
        layers, (expected,) = simulate(prepare(program, CORES[core]), [samples[i : i + 1]])
        assert np.array_equal(outputs[i : i + 1], expected)
    taps = target.taps(path, program, [samples[1:2]])
    assert [name for name in layers if not np.array_equal(layers[name], taps[name])] == []
    forced = program.forced({k: torch.from_numpy(v) for k, v in taps.items()}, x[1:2])
    for layer in program.layers:
        if layer.op == "binary_qmatmul" or layer.packed:  # the frozen program's own rounding: results are looked up
            assert np.array_equal(forced[layer.name].numpy(), taps[layer.name]), layer.name


@needs_tools
def test_flash_holds_one_bit_a_weight_and_altered_ones_are_named(tmp_path: Path) -> None:
    program, target = binary_net(), get("cortex-m4")
    path = target.lower(program, tmp_path / "model.c").path
    firmware = prepare(program, "dsp")
    _, built = host.built(tmp_path)
    content = elf.read(built.elf)
    for index, step in enumerate(firmware.steps):
        if step.bits != 1:
            continue
        stored = content.bytes_of(array_name(index, "weights"))
        weight = step.arrays["weight"]
        along, across = (len(weight), weight[0].size) if step.kind == "binary_vectors" else (weight.shape[3], weight[..., 0].size)
        assert (
            stored is not None and len(stored) - 12 * (step.kind == "binary_vectors") == 4 * binary_layout.words(along) * across
        )
        layer = program.layer(step.layer)
        count = int(layer.args.get("channels", layer.args.get("features", 0))) // int(layer.args.get("groups", 1))
        bits = binary_layout.unpacked_bytes(layer.args["weight"].numpy(), count)
        assert np.array_equal(stored_signs(step, np.frombuffer(stored, np.uint32)), 2 * bits.reshape(-1).astype(np.int8) - 1)
    assert target.readback(path, program) == []
    source = path.read_text()
    index = next(i for i, s in enumerate(firmware.steps) if s.layer == "first")
    start = source.index("{", source.index(f"{array_name(index, 'weights')}[")) + 1
    end = source.index(",", start)
    path.write_text(source[:start] + str(int(source[start:end]) ^ 4) + source[end:])
    (wrong,) = target.readback(path, program)
    assert (wrong.layer, wrong.field) == ("first", "weights[2]")


class Returned(nn.Module):
    """Returns the packed signs of a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.quantize = FrozenOp("quantize", 1, {}, scale=0.1, zero_point=0, bits=8)
        self.signs, self.conv = binarize(8), binary_conv(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.signs(self.quantize(x)))


class Real(nn.Module):
    """Takes signs of float numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.signs = FrozenOp("binarize", 1, {"threshold": torch.zeros(1)}, dim=1)
        self.conv = binary_conv(8, 8, 3, (0.1, 0))
        self.dequantize = FrozenOp("dequantize", 1, {}, scale=0.1, zero_point=0)

    def forward(self, x: Tensor) -> Tensor:
        return self.dequantize(self.conv(self.signs(x)))


def test_an_encoder_is_refused_by_the_names_of_what_stays_in_float() -> None:
    torch.manual_seed(0)
    config = EncoderConfig(layers=1, width=24, heads=2, hidden=32, positions=9, features=10, classes=4, pool="mean")
    made, x = BinaryEncoder(Encoder(config), rank=1), torch.randn(8, 9, 10)
    made(x)
    program = apply(baked(made), [Block("ptq", PTQ())], Data(calibration=x)).program
    assert [layer.op for layer in program.layers].count("binary_qmatmul") == 2
    with pytest.raises(
        UnsupportedError, match=r"embeddings.norm .*: layer_norm\).* more stay in float.*use batch normalization"
    ) as found:
        prepare(program, "dsp")
    assert "getitem" not in str(found.value)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Returned, r"layer conv returns packed signs.*return integers"),
        (Real, r"layer signs takes signs of float.*quantize its input"),
    ],
)
def test_what_has_no_form_is_refused_with_the_remedy(module: type[nn.Module], message: str) -> None:
    torch.manual_seed(0)
    program: FrozenProgram = freeze_module(module(), (torch.zeros(1, 8, 5, 5),))
    with pytest.raises(UnsupportedError, match=message):
        prepare(program, "portable")
