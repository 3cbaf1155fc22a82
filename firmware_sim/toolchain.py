"""Finding the Arm toolchain and building a firmware with it."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from edgekit.errors import EdgekitError, MissingTool, UnsupportedError
from edgekit.firmware_sim.boards import CORES, Board
from edgekit.firmware_sim.kernels import HEADERS, RUNTIME, SEMIHOST, SOURCES

__all__ = ["COMPILE_FLAGS", "LINK_FLAGS", "PACKAGES", "Firmware", "Project", "available", "build", "find"]

PACKAGES = {
    "arm-none-eabi-gcc": "gcc-arm-none-eabi libnewlib-arm-none-eabi",
    "arm-none-eabi-nm": "gcc-arm-none-eabi libnewlib-arm-none-eabi",
    "arm-none-eabi-size": "gcc-arm-none-eabi libnewlib-arm-none-eabi",
    "qemu-system-arm": "qemu-system-arm",
    "gcc": "gcc",
}
"""Program to the Debian packages that bring it."""

COMPILE_FLAGS = (
    "-mthumb",
    "-std=gnu11",
    "-fno-tree-loop-distribute-patterns",  # loops stay loops: memcpy of newlib-nano goes byte by byte
    "-ffp-contract=off",  # a fused multiply-add would round otherwise than the host
    "-ffunction-sections",
    "-fdata-sections",
    "-fno-common",
    "-Wall",
)
"""Compiler flags of every file, beside the core's and the optimization level."""

LINK_FLAGS = ("-nostartfiles", "--specs=nano.specs", "-nodefaultlibs", "-Wl,--gc-sections")
LIBRARIES = ("-Wl,--start-group", "-lc", "-lgcc", "-Wl,--end-group")


@dataclass(frozen=True)
class Project:
    """What a firmware is built from; the runtime's files are added to ``sources``."""

    board: Board
    sources: tuple[Path, ...]
    include: tuple[Path, ...] = ()
    defines: tuple[str, ...] = ()
    """Whole flags, such as ``"-DEK_SET=0"``."""
    stack_bytes: int = 4096
    optimize: str = "-O2"
    runtime: Path = RUNTIME
    """Folder of the runtime's files: the package's, or the copy inside an emitted project."""


@dataclass(frozen=True)
class Firmware:
    """A linked program and what it was built from."""

    project: Project
    elf: Path

    @property
    def board(self) -> Board:
        """The board it was linked for."""
        return self.project.board


def find(program: str) -> str:
    """Path of a program.

    Raises:
        MissingTool: it is not installed; names the Debian packages that bring it.
    """
    path = shutil.which(program)
    if path is None:
        packages = PACKAGES.get(program, program)
        raise MissingTool(f"{program} is not installed; on Debian and Ubuntu run: apt-get install {packages}")
    return path


def available() -> str | None:
    """None if firmware can be built and run, else what is missing and how to get it."""
    missing = [name for name in PACKAGES if name != "gcc" and shutil.which(name) is None]
    if not missing:
        return None
    packages = sorted({package for name in missing for package in PACKAGES[name].split()})
    return f"{', '.join(missing)} not installed; on Debian and Ubuntu run: apt-get install {' '.join(packages)}"


def build(project: Project, folder: Path) -> Firmware:
    """Compiles and links into ``folder`` (made if missing): ``firmware.elf``, ``firmware.map``, ``link.ld``.

    Raises:
        MissingTool: the toolchain is not installed.
        UnsupportedError: code, weights, stack and arena are more than the board has; says by how many bytes.
        EdgekitError: the sources do not compile; gives the compiler's first error.
    """
    compiler = find("arm-none-eabi-gcc")
    folder.mkdir(parents=True, exist_ok=True)
    board = project.board
    script = folder / "link.ld"
    memory = {
        "FLASH_BASE": board.flash_base,
        "FLASH_SIZE": board.flash_bytes,
        "RAM_BASE": board.ram_base,
        "RAM_SIZE": board.ram_bytes,
    }
    defines = [f"-D{name}={value:#x}" for name, value in memory.items()] + [f"-DSTACK_SIZE={project.stack_bytes}"]
    template = project.runtime / "link.ld.S"
    _call([compiler, "-E", "-P", "-undef", "-x", "c", *defines, str(template), "-o", str(script)], board)
    elf = folder / "firmware.elf"
    flags = (*CORES[board.core].flags, *COMPILE_FLAGS, project.optimize, *board.defines, *project.defines)
    command = [compiler, *flags, *(f"-I{path}" for path in (project.runtime, *project.include))]
    command += [*LINK_FLAGS, "-T", str(script), f"-Wl,-Map={folder / 'firmware.map'}"]
    command += [str(path) for path in (*project.sources, *_runtime(project, flags))]
    _call([*command, *LIBRARIES, "-o", str(elf)], board)
    return Firmware(project, elf)


_compiled: dict[str, list[Path]] = {}
_folder: list[tempfile.TemporaryDirectory[str]] = []


def _runtime(project: Project, flags: Sequence[str]) -> list[Path]:
    """Objects of the runtime's files, compiled once a process for the same flags and the same text."""
    names = [*SOURCES, SEMIHOST]
    digest = hashlib.sha256("\n".join(flags).encode())
    for name in (*HEADERS, *names):
        digest.update((project.runtime / name).read_bytes())
    key = digest.hexdigest()
    if key not in _compiled:
        if not _folder:
            _folder.append(tempfile.TemporaryDirectory(prefix="edgekit-"))
        folder = Path(_folder[0].name) / key
        folder.mkdir(exist_ok=True)
        objects = [folder / f"{Path(name).stem}.o" for name in names]
        begin = [find("arm-none-eabi-gcc"), *flags, "-c"]
        commands = [[*begin, str(project.runtime / name), "-o", str(made)] for name, made in zip(names, objects, strict=True)]
        with ThreadPoolExecutor(min(os.cpu_count() or 1, 4)) as pool:
            list(pool.map(lambda command: _call(command, project.board), commands))
        _compiled[key] = objects
    return _compiled[key]


def _call(command: Sequence[str], board: Board) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return
    overflow = re.search(r"region `(FLASH|RAM)' overflowed by (\d+) bytes", done.stderr)
    if overflow:
        place, size = overflow[1], board.flash_bytes if overflow[1] == "FLASH" else board.ram_bytes
        what = "code and weights" if place == "FLASH" else "stack, data and arena"
        raise UnsupportedError(
            f"{board.name}: {what} need {overflow[2]} bytes more than its {size} bytes of {place}; "
            f"use a smaller model or another board"
        )
    first = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[-300:])
    raise EdgekitError(f"{board.name}: the firmware does not build: {first}")
