"""What a program's firmware fits on: it is built for every core with that core's kernels, and laid beside boards and parts.

Linked, not estimated: sizes are those of an ELF file for the core, gaps for alignment included, stack as reserved. A vendor's
startup code, drivers and the rest of an application come on top.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgekit.files import sha256, write_whole
from edgekit.firmware_sim import memory
from edgekit.firmware_sim.boards import BOARDS, CORES, Board
from edgekit.firmware_sim.kernels import KERNEL_SETS
from edgekit.firmware_sim.parts import PARTS
from edgekit.firmware_sim.toolchain import Firmware, Project, build
from edgekit.frozen import FrozenProgram
from edgekit.targets.cortex_m.emit import model_c, model_h
from edgekit.targets.cortex_m.preparation import prepare
from edgekit.targets.cortex_m.project import Build
from edgekit.targets.cortex_m.texts import main_c

__all__ = ["NOTE", "Fit", "fits", "needs"]

NOTE = (
    "fits on: built and linked for each core with its own kernels, stack as reserved; startup code, drivers and the rest of an "
    "application come on top"
)
_ROOM = 256 << 20


@dataclass(frozen=True)
class Fit:
    """A board or part beside what the firmware takes there, in bytes; a negative margin is what is missing."""

    name: str
    core: str
    kernel_set: str
    fits: bool
    flash_bytes: int
    ram_bytes: int
    flash_margin_bytes: int
    ram_margin_bytes: int
    source: str


def fits(program: FrozenProgram, made: Build, own: Firmware) -> list[dict[str, Any]]:
    """Every board of :data:`~edgekit.firmware_sim.boards.BOARDS` and part of :data:`~edgekit.firmware_sim.parts.PARTS`.

    Args:
        made: how the firmware was built: optimization and stack are the same on every core.
        own: the firmware itself, whose sizes count for its own core.

    Returns:
        one :class:`Fit` each, as plain values.

    Raises:
        MissingTool: the Arm toolchain is not installed.
    """
    measured = memory.measure(own)
    taken = needs(program, made, [core for core in CORES if core != own.board.core])
    taken[own.board.core] = (made.kernel_set, measured.flash_span, measured.ram_span)
    places = [(b.name, b.core, b.flash_bytes, b.ram_bytes, f"emulated board, {b.title}") for b in BOARDS.values()]
    places += [(p.name, p.core, p.flash_bytes, p.ram_bytes, f"{p.source}{f' ({p.note})' if p.note else ''}") for p in PARTS]
    found = []
    for name, core, flash, ram, source in places:
        kernel_set, need_flash, need_ram = taken[core]
        left = flash - need_flash, ram - need_ram
        found.append(asdict(Fit(name, core, kernel_set, min(left) >= 0, flash, ram, *left, source)))
    return found


def needs(program: FrozenProgram, made: Build, cores: Sequence[str]) -> dict[str, tuple[str, int, int]]:
    """For each core: its kernel set, and the bytes of flash and RAM that the firmware takes."""
    with tempfile.TemporaryDirectory(prefix="edgekit-") as name:
        jobs = [(core, _kernels(core, made)) for core in cores]
        for _, kernels in jobs:
            _write(program, kernels, Path(name) / kernels, made.stream)
        with ThreadPoolExecutor(min(os.cpu_count() or 1, 4)) as pool:
            sizes = list(pool.map(lambda job: _linked(job[0], job[1], made, Path(name)), jobs))
    return {core: (kernels, *size) for (core, kernels), size in zip(jobs, sizes, strict=True)}


def _kernels(core: str, made: Build) -> str:
    """The core's own set, or the simpler one that was asked for."""
    own = CORES[core].kernel_set
    return min(own, made.kernels or own, key=KERNEL_SETS.index)


def _write(program: FrozenProgram, kernels: str, folder: Path, stream: bool) -> None:
    firmware = prepare(program, kernels, stream)
    write_whole(folder / "model.c", model_c(firmware))
    write_whole(folder / "model.h", model_h(firmware))
    write_whole(folder / "main.c", main_c(len(firmware.inputs), len(firmware.outputs), firmware.stream))


_known: dict[tuple[str, ...], tuple[int, int]] = {}
"""What was linked before in this process, by everything that decides it."""


def _linked(core: str, kernels: str, made: Build, folder: Path) -> tuple[int, int]:
    """Bytes of flash and RAM, from a link for a board of that core with room for anything."""
    key = (sha256(folder / kernels / "model.c"), core, kernels, made.optimize, str(made.stack_bytes))
    if key not in _known:
        _known[key] = _spans(core, kernels, made, folder)
    return _known[key]


def _spans(core: str, kernels: str, made: Build, folder: Path) -> tuple[int, int]:
    roomy = Board(core, core, core, 0, _ROOM, 0x20000000, _ROOM, 1)
    source = folder / kernels
    project = Project(
        board=roomy,
        sources=(source / "model.c", source / "main.c"),
        include=(source,),
        defines=(f"-DEK_SET={KERNEL_SETS.index(kernels)}",),
        stack_bytes=made.stack_bytes,
        optimize=f"-{made.optimize}",
    )
    found = memory.measure(build(project, folder / core))
    return found.flash_span, found.ram_span
