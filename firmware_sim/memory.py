"""What a firmware takes of a board's memory, read from the linked file."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass

from edgekit.firmware_sim.toolchain import Firmware, find

__all__ = ["Memory", "measure", "symbols"]


_FLASH = (".text", ".ARM.exidx", ".weights")
_RAM = (".stack", ".data", ".bss", ".arena")


@dataclass(frozen=True)
class Memory:
    """Bytes, by what they are for."""

    flash_code: int
    """Instructions and constants outside the weights: ``.text``, ``.rodata`` and unwinding tables."""
    flash_weights: int
    """Weights, biases, multipliers and tables: all that is ``EK_WEIGHTS``."""
    data: int
    """Initialized variables: they take flash and RAM."""
    bss: int
    arena: int
    stack: int
    """Reserved; what a run used is :attr:`~edgekit.firmware_sim.qemu.Result.stack_bytes`."""
    flash_span: int
    """From the first to the last byte of flash, gaps for alignment included: what a part must have."""
    ram_span: int
    """The same of RAM."""

    @property
    def flash(self) -> int:
        """All of flash."""
        return self.flash_code + self.flash_weights + self.data

    @property
    def static_ram(self) -> int:
        """RAM without arena and stack."""
        return self.data + self.bss

    @property
    def ram(self) -> int:
        """All of RAM."""
        return self.static_ram + self.arena + self.stack


def measure(firmware: Firmware) -> Memory:
    """Section sizes of the linked file, in bytes."""
    listing = subprocess.run(
        [find("arm-none-eabi-size"), "-A", "-d", firmware.elf], capture_output=True, text=True, check=True
    ).stdout
    sizes: dict[str, int] = {}
    ends = {"flash": firmware.board.flash_base, "ram": firmware.board.ram_base}
    for line in listing.splitlines():
        fields = line.split()
        if len(fields) == 3 and fields[1].isdigit():
            sizes[fields[0]] = int(fields[1])
            place = "ram" if fields[0] in _RAM else "flash" if fields[0] in _FLASH else ""
            if place:
                ends[place] = max(ends[place], int(fields[1]) + int(fields[2]))
    at = sizes.get
    return Memory(
        flash_code=at(".text", 0) + at(".ARM.exidx", 0),
        flash_weights=at(".weights", 0),
        data=at(".data", 0),
        bss=at(".bss", 0),
        arena=at(".arena", 0),
        stack=at(".stack", 0),
        flash_span=ends["flash"] - firmware.board.flash_base + at(".data", 0),  # initial values lie behind the rest
        ram_span=ends["ram"] - firmware.board.ram_base,
    )


def symbols(firmware: Firmware) -> list[tuple[int, int, str]]:
    """Functions of the linked file: (address without the Thumb bit, size in bytes, name), by address.

    Functions written in assembly may have no size; theirs reaches to the next one.
    """
    listing = subprocess.run(
        [find("arm-none-eabi-nm"), "-S", "--defined-only", firmware.elf], capture_output=True, text=True, check=True
    )
    found: dict[int, tuple[int, str]] = {}
    for line in listing.stdout.splitlines():
        fields = line.split()
        if fields[-2] in ("t", "T", "W"):
            size = int(fields[1], 16) if len(fields) == 4 else 0
            address = int(fields[0], 16) & ~1
            if address not in found or found[address][0] == 0:
                found[address] = (size, fields[-1])
    ordered = sorted((address, size, name) for address, (size, name) in found.items())
    ends = [address for address, _, _ in ordered[1:]] + [0]
    return [(address, size or max(end - address, 0), name) for (address, size, name), end in zip(ordered, ends, strict=True)]
