"""A softmax between integers as firmware: against TFLM, the frozen program and the emulated boards; and when it is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekit import verify
from edgekit.compress.ptq import PTQ, quantize_model
from edgekit.data import Data
from edgekit.errors import UnsupportedError
from edgekit.frozen import FrozenProgram
from edgekit.recipe import Verify
from edgekit.stages import Evaluation
from edgekit.targets import cortex_m, get
from edgekit.targets.cortex_m.graph import Step
from edgekit.targets.cortex_m.preparation import prepare, simulate
from edgekit.targets.cortex_m.reference import step as computed

needs_tools = pytest.mark.skipif(cortex_m.M4.available() is not None, reason="needs arm-none-eabi-gcc and qemu-system-arm")


class Gated(nn.Module):
    """A softmax between two linear layers and one at the end."""

    def __init__(self, inner: Callable[[Tensor], Tensor] = lambda x: F.softmax(x, dim=-1)) -> None:
        super().__init__()
        self.first, self.last, self.inner = nn.Linear(8, 12), nn.Linear(12, 5), inner
        self.first.weight.data *= 4
        self.last.weight.data *= 4

    def forward(self, x: Tensor) -> Tensor:
        return F.softmax(self.last(self.inner(self.first(x))), dim=-1)


def frozen(model: nn.Module, *shape: int) -> FrozenProgram:
    """The model, calibrated on normal numbers."""
    x = torch.randn(128, *shape, generator=torch.Generator().manual_seed(0))
    return quantize_model(model.eval(), Data(x), PTQ(observer="minmax"))


@pytest.fixture(scope="module")
def program() -> FrozenProgram:
    torch.manual_seed(0)
    return frozen(nn.Sequential(nn.Linear(8, 8), Gated()), 6, 8)


def samples(n: int) -> Tensor:
    return torch.randn(n, 6, 8, generator=torch.Generator().manual_seed(1))


def test_it_is_within_one_step_of_the_frozen_program(program: FrozenProgram) -> None:
    firmware = prepare(program, "portable")
    assert [s.kind for s in firmware.steps if "softmax" in s.kind] == ["softmax", "softmax"]
    distinct: set[int] = set()
    for x in samples(20).split(1):
        taps, (output,) = simulate(firmware, [x.numpy()])
        forced, (following,) = program.forced_outputs({k: torch.from_numpy(v) for k, v in taps.items()}, x)
        inner = next(name for name in taps if name.endswith("softmax_quantize") or "softmax" in name)
        assert np.abs(forced[inner].numpy().astype(int) - taps[inner]).max() <= 1
        assert np.abs(output - following.numpy()).max() <= 1 / 256
        distinct |= set(np.unique(taps[inner]).tolist())
    assert len(distinct) > 50


@needs_tools
@pytest.mark.parametrize("core", ["cortex-m0", "cortex-m4", "cortex-m55"])
def test_boards_compute_the_reference_bit_by_bit(core: str, program: FrozenProgram, tmp_path: Path) -> None:
    target, x = get(core), samples(4)
    artifact = target.lower(program, tmp_path / "model.c")
    (found,) = target.run(artifact.path, [x.numpy()])
    firmware = prepare(program, {"cortex-m0": "portable", "cortex-m4": "dsp", "cortex-m55": "mve"}[core])
    assert all(np.array_equal(found[i : i + 1], simulate(firmware, [x[i : i + 1].numpy()])[1][0]) for i in range(4))
    assert any(c.op == "ek_softmax_s8" and "1/256" in c.note for c in artifact.coverage)
    assert any("table of exponentials" in note for note in artifact.notes)
    if core == "cortex-m4":
        parity = verify.verify_artifact(
            program, core, artifact.path, Evaluation((x,), None, "accuracy", "x"), settings=Verify(max_accuracy_drop=None)
        )
        assert parity.ok and parity.untapped == ()


@pytest.mark.parametrize("scale", [0.003, 0.04, 0.2])
def test_it_is_within_one_step_of_tflm(scale: float) -> None:
    tflm = pytest.importorskip("tflm", reason="tflite-micro is not installed")
    chance = np.random.default_rng(0)
    x = chance.integers(-128, 128, (40, 10)).astype(np.int8)
    table = np.round(2.0**22 * np.exp(-np.arange(256) * scale)).astype(np.uint32)
    values = {"rows": 40, "n": 10, "multiplier": 1 << 30, "shift": -11, "out_zp": -128}
    ours = computed(Step("x", "softmax", (0,), 1, values, {"table": table}), [x.reshape(-1)]).reshape(40, 10)
    theirs = tflm.run_one(
        "SOFTMAX", {"SoftmaxOptions": {"beta": 1.0}}, [tflm.T((40, 10), scale, 7)], tflm.T((40, 10), 1 / 256, -128), [x]
    )
    assert np.abs(ours.astype(int) - theirs).max() <= 1 and len(np.unique(ours)) > 15


REFUSED = {
    "another axis": (lambda x: F.softmax(x, dim=1), "softmax.*along the last axis"),
    "more in float": (lambda x: F.softmax(x, dim=-1).exp(), "stay in float"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_softmax_of_integers_is_refused(case: str) -> None:
    inner, message = REFUSED[case]
    with pytest.raises(UnsupportedError, match=message):
        prepare(frozen(Gated(inner), 6, 8), "portable")


def test_rows_that_are_too_long_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="at most 1023"):
        prepare(frozen(nn.Sequential(nn.Linear(2, 1024), nn.Softmax(-1)), 2), "portable")
