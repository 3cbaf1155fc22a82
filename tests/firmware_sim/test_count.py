"""Instruction counts: right, the same on every run, and still there without the plugin."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from edgekit.errors import EdgekitError, MissingTool
from edgekit.firmware_sim import count as counting
from edgekit.firmware_sim.boards import BOARDS
from edgekit.firmware_sim.count import count
from edgekit.firmware_sim.memory import measure, symbols
from edgekit.firmware_sim.toolchain import Firmware, Project, build

pytestmark = pytest.mark.slow

SOURCE = Path(__file__).with_name("count.c")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Firmware]:
    return {
        name: build(Project(board, (SOURCE,)), tmp_path_factory.mktemp(name)) for name, board in BOARDS.items() if name in USED
    }


USED = ("mps2-an386", "mps3-an547", "mps2-an385")
INPUT = struct.pack("<3I", 1000, 10, 500_000)


def test_functions_and_marks_are_counted_exactly(built: dict[str, Firmware]) -> None:
    counts = count(built["mps2-an386"], INPUT, ["loop", "caller"])
    turns = 1000 + 10 + 500_000
    assert counts.method == "plugin" and counts.note is None
    assert 3 * 2 * turns <= counts.functions["loop"] <= 3 * (2 * turns + 4 * 3)
    assert counts.entries == {"loop": 9, "caller": 3}
    assert counts.marks["loop"] + counts.marks["caller"] == pytest.approx(6 * turns, abs=200)
    assert sum(counts.functions.values()) == counts.total
    assert counts.functions.get("?", 0) == 0
    assert 50 < counts.library < 2000  # the 64-bit division


@pytest.mark.parametrize("board", USED[:2])
def test_three_runs_give_the_same_counts(board: str, built: dict[str, Firmware]) -> None:
    runs = [count(built[board], INPUT, ["loop"]) for _ in range(3)]
    assert len({(one.total, *one.functions.items(), *one.marks.items()) for one in runs}) == 1


@pytest.mark.parametrize("board", BOARDS)
def test_the_timer_agrees_with_the_plugin(board: str, built: dict[str, Firmware], tmp_path: Path) -> None:
    firmware = built.get(board) or build(Project(BOARDS[board], (SOURCE,)), tmp_path)
    data = struct.pack("<I", 20_000_000)  # more ticks than the timer's 24 bits hold
    by_timer = count(firmware, data, plugin=False)
    assert by_timer.method == "icount" and by_timer.note and "nothing by function" in by_timer.note
    assert by_timer.functions == {}
    assert by_timer.total == pytest.approx(120_000_000, rel=2e-4)


def test_without_a_host_compiler_the_timer_counts_and_says_so(
    built: dict[str, Firmware], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(program: str) -> str:
        raise MissingTool(f"{program} is not installed")

    monkeypatch.setattr(counting, "find", missing)
    counts = count(built["mps2-an386"], INPUT)
    assert counts.method == "icount" and counts.note
    assert "gcc is not installed" in counts.note and "icount" in counts.note


def test_a_mark_that_is_no_function_is_named(built: dict[str, Firmware]) -> None:
    with pytest.raises(EdgekitError, match="no function 'layer_9'"):
        count(built["mps2-an386"], INPUT, ["layer_9"])


def test_memory_is_what_the_sections_hold(tmp_path: Path) -> None:
    source = tmp_path / "app.c"
    source.write_text(
        '#include "edgekit.h"\nstatic const int8_t w[1000] EK_WEIGHTS = {1, 2};\nstatic uint8_t arena[5000] EK_ARENA;\n'
        "static uint32_t counter[10], start = 7;\n"
        "int ek_main(void) { while (ek_input(arena, 4)) ek_output(w, counter[arena[0] & 7]++ + start++); return 0; }\n"
    )
    memory = measure(build(Project(BOARDS["mps2-an386"], (source,), stack_bytes=3000), tmp_path / "out"))
    assert (memory.flash_weights, memory.arena, memory.stack) == (1000, 5000, 3000)
    assert memory.bss == 40 and 4 <= memory.data <= 16
    assert memory.ram == memory.data + 40 + 5000 + 3000
    assert 800 < memory.flash_code < 2000


def test_functions_have_addresses_and_sizes(built: dict[str, Firmware]) -> None:
    table = symbols(built["mps2-an386"])
    assert table == sorted(table)
    assert {"ek_main", "loop", "caller", "Reset_Handler", "start"} <= {name for _, _, name in table}
    assert all(size > 0 for _, size, _ in table[:-1])
