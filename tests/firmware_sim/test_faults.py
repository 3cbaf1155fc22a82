"""Each way a firmware can fail is provoked on a board and must be told apart, in a sentence."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest

from edgekit.errors import FirmwareFault, UnsupportedError
from edgekit.firmware_sim.boards import BOARDS
from edgekit.firmware_sim.faults import FAULTS, sentence
from edgekit.firmware_sim.qemu import Result, run
from edgekit.firmware_sim.toolchain import Firmware, Project, build

SOURCE = Path(__file__).with_name("faults.c")
CRC = zlib.crc32(bytes(range(1, 17)) + bytes(48))
V7 = ("mps2-an385", "mps2-an386", "mps2-an500", "netduinoplus2", "stm32vldiscovery")
V8 = ("mps2-an505", "mps3-an547")
NOWHERE = {
    **dict.fromkeys(V7, (0x1FF00000, 0x74)),  # the guard below RAM
    **dict.fromkeys(V8, (0x0FF00000, 0x75)),
    "microbit": (0x1FF00000, 0x73),
}
"""An address where nothing is, and the fault it must give."""


def project(board: str, arena: int = 1024, crc: int = CRC, stack: int = 2048) -> Project:
    defines = (f"-DARENA={arena}", f"-DWEIGHTS_CRC={crc:#x}u", f"-DNOWHERE={NOWHERE[board][0]:#x}u")
    return Project(BOARDS[board], (SOURCE,), defines=defines, stack_bytes=stack)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Firmware]:
    return {board: build(project(board), tmp_path_factory.mktemp(board)) for board in BOARDS}


def provoke(firmware: Firmware, mode: str, limit: float = 20) -> Result:
    return run(firmware, mode.encode(), limit)


@pytest.mark.parametrize("board", BOARDS)
def test_a_good_run_ends_without_a_sentence(board: str, built: dict[str, Firmware]) -> None:
    result = provoke(built[board], "n").checked()
    assert result.code == 0 and result.fault is None
    assert 32 <= result.stack_bytes <= 512


@pytest.mark.parametrize("board", BOARDS)
@pytest.mark.parametrize("mode", ["a", "A"])
def test_arena_exhausted_at_run_time(board: str, mode: str, built: dict[str, Firmware]) -> None:
    result = provoke(built[board], mode)
    assert result.code == 0x60 and "arena exhausted" in str(result.fault)
    assert "1025" in str(result.fault) or mode == "A"
    with pytest.raises(FirmwareFault, match=f"{board}: arena exhausted"):
        result.checked()


@pytest.mark.parametrize(("board", "arena"), [("microbit", 16 * 1024), ("mps2-an386", 5 << 20)])
def test_arena_exhausted_at_link_time(board: str, arena: int, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=rf"{board}: stack, data and arena need \d+ bytes more than its \d+ bytes of RAM"):
        build(project(board, arena=arena), tmp_path)


def test_flash_exhausted_at_link_time(tmp_path: Path) -> None:
    source = tmp_path / "big.c"
    source.write_text(
        '#include "edgekit.h"\nstatic const uint8_t w[300000] EK_WEIGHTS = {1};\n'
        "int ek_main(void) { return w[ek_crc32(w, 9)]; }\n"
    )
    with pytest.raises(UnsupportedError, match="microbit: code and weights need"):
        build(Project(BOARDS["microbit"], (source,)), tmp_path / "out")


@pytest.mark.parametrize("board", ["microbit", "mps2-an386", "mps3-an547"])
def test_damaged_weights(board: str, tmp_path: Path) -> None:
    result = provoke(build(project(board, crc=CRC ^ 1), tmp_path), "n")
    assert (
        result.code == 0x61
        and result.fault == "the weights in flash are damaged: the CRC of segment 0 differs from what was built"
    )


@pytest.mark.parametrize("board", BOARDS)
def test_undefined_instruction(board: str, built: dict[str, Firmware]) -> None:
    result = provoke(built[board], "u")
    assert result.code == (0x73 if board == "microbit" else 0x76)  # Armv6-M has only the HardFault
    assert "pc 0x" in str(result.fault)


@pytest.mark.parametrize("board", V7 + V8)
def test_division_by_zero_is_a_usage_fault(board: str, built: dict[str, Firmware]) -> None:
    result = provoke(built[board], "d")
    assert result.code == 0x76 and "division by zero" in str(result.fault)


@pytest.mark.parametrize("board", V7 + V8)
def test_branch_to_data_without_the_thumb_bit(board: str, built: dict[str, Firmware]) -> None:
    result = provoke(built[board], "j")
    assert result.code == 0x76 and "Thumb bit" in str(result.fault)


@pytest.mark.parametrize("board", BOARDS)
def test_access_to_nothing(board: str, built: dict[str, Firmware]) -> None:
    address, code = NOWHERE[board]
    result = provoke(built[board], "m")
    assert result.code == code
    assert board == "microbit" or f"{address:#x}" in str(result.fault)


@pytest.mark.parametrize("board", BOARDS)
def test_writing_into_flash(board: str, built: dict[str, Firmware]) -> None:
    result = provoke(built[board], "f")
    assert result.code == (0x73 if board == "microbit" else 0x66)  # no MPU on Armv6-M: the flash itself refuses
    assert board == "microbit" or "wrote into flash at 0x" in str(result.fault)


@pytest.mark.parametrize("board", BOARDS)
def test_stack_overflow(board: str, built: dict[str, Firmware]) -> None:
    result = provoke(built[board], "s")
    assert result.code == 0x64, result.fault
    assert "stack overflow" in str(result.fault) and "2048" in str(result.fault)


@pytest.mark.parametrize("board", [name for name, board in BOARDS.items() if board.watchdog_base])
def test_watchdog(board: str, built: dict[str, Firmware]) -> None:
    assert provoke(built[board], "w").code == 0x65
    assert provoke(built[board], "W").fault is None


@pytest.mark.parametrize("board", ["microbit", "mps2-an386", "mps3-an547"])
def test_a_hang_ends_at_the_time_limit(board: str, built: dict[str, Firmware]) -> None:
    result = provoke(built[board], "l", limit=1)
    assert result.code == -1 and "did not end within the time limit of 1 s" in str(result.fault)


@pytest.mark.parametrize("board", ["microbit", "mps2-an386", "mps3-an547"])
def test_input_that_ends_in_a_sample(board: str, built: dict[str, Firmware]) -> None:
    result = run(built[board], b"i12")
    assert result.code == 0x62 and "2 bytes are missing" in str(result.fault)


def test_a_code_of_the_application_is_no_fault_of_ours(built: dict[str, Firmware]) -> None:
    assert "ended with code 42" in str(provoke(built["mps2-an386"], "c").fault)


def test_every_fault_has_a_sentence_without_numbers_too() -> None:
    for code in FAULTS:
        text = sentence(code, {}, 3)
        assert text and "{" not in text
    header = (Path(SOURCE).parents[2] / "firmware_sim" / "runtime" / "edgekit.h").read_text()
    assert all(f"= 0x{code:02x}" in header for code in FAULTS if code > 0)
