"""What a firmware fits on, against the linker: the margin is what it says to the byte."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from nets import residual_net

from edgekit.errors import UnsupportedError
from edgekit.firmware_sim.boards import BOARDS, CORES
from edgekit.firmware_sim.parts import PARTS
from edgekit.firmware_sim.toolchain import build
from edgekit.targets import cortex_m
from edgekit.targets.cortex_m import host
from edgekit.targets.cortex_m.fits import fits, needs
from edgekit.targets.cortex_m.project import Build

pytestmark = pytest.mark.skipif(cortex_m.M4.available() is not None, reason="needs arm-none-eabi-gcc and qemu-system-arm")


def test_margins_are_those_of_the_linker(tmp_path: Path) -> None:
    """The firmware links into exactly what is said to be needed, and into no word less."""
    program = residual_net(4)
    cortex_m.M4.lower(program, tmp_path / "model.c")
    facts, own = host.built(tmp_path)
    rows = {row["name"]: row for row in fits(program, facts.build, own)}
    assert list(rows) == [*BOARDS, *(p.name for p in PARTS)]
    for name in ("netduinoplus2", "STM32L476RG"):
        row = rows[name]
        flash, ram = (row[f"{place}_bytes"] - row[f"{place}_margin_bytes"] for place in ("flash", "ram"))
        assert row["fits"] and row["kernel_set"] == "dsp" and flash > 8000 and ram > 5000
        exact = replace(own.project.board, flash_bytes=flash, ram_bytes=ram)
        build(replace(own.project, board=exact), tmp_path / name)
        for short in (replace(exact, flash_bytes=flash - 4), replace(exact, ram_bytes=ram - 4)):
            with pytest.raises(UnsupportedError, match="need 4 bytes more"):
                build(replace(own.project, board=short), tmp_path / name)


@pytest.mark.slow
def test_other_cores_are_built_with_their_own_kernels(tmp_path: Path) -> None:
    program = residual_net()
    made = Build("cortex-m4", "mps2-an386", "", "O2", 4096)
    taken = needs(program, made, list(CORES))
    assert {core: kernels for core, (kernels, *_) in taken.items()} == {name: core.kernel_set for name, core in CORES.items()}
    for core in ("cortex-m0", "cortex-m55"):
        folder = tmp_path / core
        memory = cortex_m.TARGETS[core].lower(program, folder / "model.c").memory
        assert abs(taken[core][1] - memory["flash"]) < 32 and abs(taken[core][2] - memory["ram"]) < 32  # alignment
    portable = needs(program, replace(made, kernels="portable"), ["cortex-m55"])
    assert portable["cortex-m55"][0] == "portable"


def test_what_is_too_large_is_said_in_bytes(tmp_path: Path) -> None:
    program = residual_net()
    cortex_m.M3.lower(program, tmp_path / "model.c", cortex_m.Options(stack_bytes=6144))
    facts, own = host.built(tmp_path)
    rows = {row["name"]: row for row in fits(program, facts.build, own)}
    row = rows["stm32vldiscovery"]
    assert not row["fits"] and row["ram_margin_bytes"] < 0 < row["flash_margin_bytes"] and rows["mps2-an385"]["fits"]
    with pytest.raises(UnsupportedError, match=f"need {-row['ram_margin_bytes']} bytes more"):
        host.built(tmp_path, on="stm32vldiscovery")


def test_parts_are_whole() -> None:
    assert len(PARTS) >= 12 and len({p.name for p in PARTS} | set(BOARDS)) == len(PARTS) + len(BOARDS)
    for part in PARTS:
        assert part.core in CORES and ("data sheet" in part.source or "Specification" in part.source)
        assert part.flash_bytes % 1024 == part.ram_bytes % 1024 == 0 and part.flash_bytes >= part.ram_bytes > 0
