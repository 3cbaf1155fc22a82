"""The boards QEMU emulates and the cores they carry, as tables.

A board names a machine of ``qemu-system-arm``; sizes are those the machine has. ``Core.flags`` are the compiler's.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgekit.errors import InputError

__all__ = ["BOARDS", "CORES", "Board", "Core", "board"]


@dataclass(frozen=True)
class Core:
    """A processor: its compiler flags, its kernel set and the board that stands for it."""

    name: str
    flags: tuple[str, ...]
    kernel_set: str
    """"portable", "dsp" or "mve"; the compiler's flags choose it (``EK_SET`` in ``edgekit.h``)."""
    board: str


@dataclass(frozen=True)
class Board:
    """A machine: where flash and RAM lie, in bytes, and what guards it has."""

    name: str
    core: str
    title: str
    flash_base: int
    flash_bytes: int
    ram_base: int
    ram_bytes: int
    timer_hz: int
    """Frequency of the SysTick timer in the emulator."""
    watchdog_base: int | None = None
    """Address of a CMSDK watchdog, or None: ``ek_watchdog_start()`` then does nothing."""

    @property
    def defines(self) -> tuple[str, ...]:
        """Preprocessor definitions of the runtime for this board."""
        return () if self.watchdog_base is None else (f"-DEK_WATCHDOG_BASE={self.watchdog_base:#x}u",)


CORES: dict[str, Core] = {
    core.name: core
    for core in (
        Core("cortex-m0", ("-mcpu=cortex-m0", "-masm-syntax-unified", "-mfloat-abi=soft"), "portable", "microbit"),
        Core("cortex-m3", ("-mcpu=cortex-m3", "-mfloat-abi=soft"), "portable", "mps2-an385"),
        Core("cortex-m4", ("-mcpu=cortex-m4", "-mfpu=fpv4-sp-d16", "-mfloat-abi=hard"), "dsp", "mps2-an386"),
        Core("cortex-m7", ("-mcpu=cortex-m7", "-mfpu=fpv5-sp-d16", "-mfloat-abi=hard"), "dsp", "mps2-an500"),
        Core("cortex-m33", ("-mcpu=cortex-m33", "-mfpu=fpv5-sp-d16", "-mfloat-abi=hard"), "dsp", "mps2-an505"),
        Core("cortex-m55", ("-mcpu=cortex-m55", "-mfloat-abi=hard"), "mve", "mps3-an547"),
    )
}
"""Core name to core; the names are the firmware targets' names."""

KIB = 1024
BOARDS: dict[str, Board] = {
    board.name: board
    for board in (
        Board("microbit", "cortex-m0", "micro:bit (nRF51822)", 0x00000000, 256 * KIB, 0x20000000, 16 * KIB, 16_000_000),
        Board(
            "mps2-an385", "cortex-m3", "Arm MPS2 AN385", 0x00000000, 4096 * KIB, 0x20000000, 4096 * KIB, 25_000_000, 0x40008000
        ),
        Board(
            "mps2-an386", "cortex-m4", "Arm MPS2 AN386", 0x00000000, 4096 * KIB, 0x20000000, 4096 * KIB, 25_000_000, 0x40008000
        ),
        Board(
            "mps2-an500", "cortex-m7", "Arm MPS2 AN500", 0x00000000, 4096 * KIB, 0x20000000, 4096 * KIB, 25_000_000, 0x40008000
        ),
        Board("mps2-an505", "cortex-m33", "Arm MPS2 AN505", 0x10000000, 4096 * KIB, 0x38000000, 2048 * KIB, 20_000_000),
        Board("mps3-an547", "cortex-m55", "Arm MPS3 AN547", 0x10000000, 512 * KIB, 0x30000000, 512 * KIB, 32_000_000),
        Board(
            "netduinoplus2",
            "cortex-m4",
            "Netduino Plus 2 (STM32F405)",
            0x08000000,
            1024 * KIB,
            0x20000000,
            128 * KIB,
            168_000_000,
        ),
        Board(
            "stm32vldiscovery",
            "cortex-m3",
            "STM32VLDISCOVERY (STM32F100)",
            0x08000000,
            128 * KIB,
            0x20000000,
            8 * KIB,
            24_000_000,
        ),
    )
}
"""Board name, as in ``--device qemu:<board>``, to board."""


def board(name: str) -> Board:
    """The board of a name, or of a core's name (its own board).

    Raises:
        InputError: there is no board of that name.
    """
    found = BOARDS.get(CORES[name].board if name in CORES else name)
    if found is None:
        raise InputError(f"board {name!r} is unknown; choose one of: {', '.join(BOARDS)}")
    return found
