"""Every kernel on every instruction set against numpy: whole boots of random cases."""

from __future__ import annotations

import firmware_cases as cases
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from edgekit.firmware_sim.boards import BOARDS
from edgekit.firmware_sim.toolchain import Firmware

CORES = ("microbit", "mps2-an385", "mps2-an386", "mps2-an500", "mps2-an505", "mps3-an547")
# The first example of hypothesis is the simplest one and tests little; a whole batch of cases is one example.
MANY = settings(max_examples=3, phases=(Phase.generate, Phase.shrink), suppress_health_check=list(HealthCheck))
FEW = settings(MANY, max_examples=2)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Firmware]:
    """One test firmware for each board, made when it is first asked for."""
    return {}


def of(built: dict[str, Firmware], board: str, factory: pytest.TempPathFactory, kernel_set: int | None = None) -> Firmware:
    key = f"{board}-{kernel_set}"
    if key not in built:
        memory = min(BOARDS[board].ram_bytes // 4 * 3 - 2048, 200_000)
        built[key] = cases.firmware(board, factory.mktemp(key), memory, kernel_set)
    return built[key]


KINDS = {
    "conv2d": (cases.conv2d(), 60),
    "depthwise": (cases.conv2d(depthwise=True), 40),
    "linear": (cases.linear(), 40),
    "elementwise": (st.one_of(cases.add(), cases.mul(), cases.requant(), cases.simple()), 60),
    "pool": (st.one_of(cases.pool(), cases.mean()), 40),
    "others": (st.one_of(cases.move(), cases.softmax(), cases.scale()), 40),
}


@pytest.mark.parametrize("board", CORES)
@pytest.mark.parametrize("kind", KINDS)
def test_kernel(board: str, kind: str, built: dict[str, Firmware], tmp_path_factory: pytest.TempPathFactory) -> None:
    strategy, n = KINDS[kind]
    elf = of(built, board, tmp_path_factory)

    @MANY
    @given(st.lists(strategy, min_size=n, max_size=n))
    def boot(batch: list[cases.Case]) -> None:
        cases.check(elf, batch)

    boot()


@pytest.mark.parametrize("board", BOARDS)
def test_every_board_runs_a_small_set(board: str, built: dict[str, Firmware], tmp_path_factory: pytest.TempPathFactory) -> None:
    elf = of(built, board, tmp_path_factory)

    @FEW
    @given(cases.everything(size=5))
    def boot(batch: list[cases.Case]) -> None:
        cases.check(elf, batch)

    boot()


@pytest.mark.parametrize(("board", "kernel_set"), [("mps2-an386", 0), ("mps3-an547", 0), ("mps3-an547", 1)])
def test_a_core_runs_the_lesser_sets_too(
    board: str, kernel_set: int, built: dict[str, Firmware], tmp_path_factory: pytest.TempPathFactory
) -> None:
    elf = of(built, board, tmp_path_factory, kernel_set)

    @FEW
    @given(cases.everything())
    def boot(batch: list[cases.Case]) -> None:
        cases.check(elf, batch, ("portable", "dsp", "mve")[kernel_set])

    boot()
