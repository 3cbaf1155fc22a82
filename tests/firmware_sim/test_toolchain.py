"""What is said when a tool is missing or sources do not compile; the boards' table against the emulator."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from edgekit.errors import EdgekitError, InputError, MissingTool
from edgekit.firmware_sim import kernels
from edgekit.firmware_sim.boards import BOARDS, CORES, board
from edgekit.firmware_sim.toolchain import PACKAGES, Project, available, build, find


def test_a_missing_tool_names_its_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert available() is None
    monkeypatch.setenv("PATH", str(tmp_path))
    for program, packages in PACKAGES.items():
        with pytest.raises(MissingTool, match=f"{program} is not installed.*apt-get install {packages}"):
            find(program)
    assert "gcc-arm-none-eabi libnewlib-arm-none-eabi qemu-system-arm" in str(available())


def test_sources_that_do_not_compile_give_the_first_error(tmp_path: Path) -> None:
    source = tmp_path / "bad.c"
    source.write_text("int ek_main(void) { return nothing; }\n")
    with pytest.raises(EdgekitError, match=r"does not build: .*bad\.c:1.*nothing"):
        build(Project(BOARDS["microbit"], (source,)), tmp_path / "out")


def test_a_set_the_core_cannot_run_does_not_build(tmp_path: Path) -> None:
    source = tmp_path / "app.c"
    source.write_text('#include "edgekit.h"\nint ek_main(void) { return ek_requantize(1, 2, 3); }\n')
    with pytest.raises(EdgekitError, match="does not build"):
        build(Project(BOARDS["mps2-an385"], (source,), defines=("-DEK_SET=1",)), tmp_path / "out")


def test_boards_are_found_by_name_and_by_core() -> None:
    assert board("cortex-m4").name == "mps2-an386" and board("microbit").core == "cortex-m0"
    with pytest.raises(InputError, match="board 'uno' is unknown; choose one of: microbit, "):
        board("uno")


def test_every_core_has_a_board_of_its_own_and_every_board_a_machine() -> None:
    assert all(BOARDS[core.board].core == core.name for core in CORES.values())
    machines = subprocess.run([find("qemu-system-arm"), "-M", "help"], capture_output=True, text=True, check=True).stdout
    assert {line.split()[0] for line in machines.splitlines()} >= set(BOARDS)


def test_the_runtime_is_complete() -> None:
    on_disk = {path.name for path in kernels.RUNTIME.iterdir()}
    assert on_disk == {*kernels.SOURCES, *kernels.HEADERS, kernels.SEMIHOST, "link.ld.S"}


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("optimize", ["-Os", "-O3"])
def test_the_runtime_compiles_without_a_warning(core: str, optimize: str, tmp_path: Path) -> None:
    sources = [str(kernels.RUNTIME / name) for name in kernels.SOURCES]
    command = [
        find("arm-none-eabi-gcc"),
        *CORES[core].flags,
        "-mthumb",
        "-std=gnu11",
        optimize,
        "-Wall",
        "-Wextra",
        "-Werror",
        "-c",
        *sources,
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:2000]
