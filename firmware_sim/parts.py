"""Common microcontrollers as a table: core, flash and RAM as their data sheets have them.

``ram_bytes`` is the largest region without a gap that data may lie in, since an arena cannot be divided; where a part has more in
other places, ``note`` says so. A part without flash of its own stands with that of a board named in ``note``.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PARTS", "Part"]

KIB = 1024


@dataclass(frozen=True)
class Part:
    """A microcontroller; sizes in bytes. ``source`` is the title of its data sheet."""

    name: str
    core: str
    flash_bytes: int
    ram_bytes: int
    source: str
    note: str = ""


PARTS: tuple[Part, ...] = (
    Part("STM32F072RB", "cortex-m0", 128 * KIB, 16 * KIB, "STM32F072x8 STM32F072xB data sheet, ST"),
    Part("ATSAMD21G18A", "cortex-m0", 256 * KIB, 32 * KIB, "SAM D21/DA1 Family data sheet, Microchip", "Cortex-M0+"),
    Part("RP2040", "cortex-m0", 2048 * KIB, 264 * KIB, "RP2040 and Raspberry Pi Pico data sheets", "Cortex-M0+; flash of a Pico"),
    Part("STM32L476RG", "cortex-m4", 1024 * KIB, 96 * KIB, "STM32L476xx data sheet, ST", "SRAM1; 32 KiB more in SRAM2"),
    Part("STM32F411CE", "cortex-m4", 512 * KIB, 128 * KIB, "STM32F411xC STM32F411xE data sheet, ST"),
    Part("nRF52840", "cortex-m4", 1024 * KIB, 256 * KIB, "nRF52840 Product Specification, Nordic"),
    Part("ATSAMD51J20A", "cortex-m4", 1024 * KIB, 256 * KIB, "SAM D5x/E5x Family data sheet, Microchip"),
    Part("STM32F746NG", "cortex-m7", 1024 * KIB, 320 * KIB, "STM32F745xx STM32F746xx data sheet, ST"),
    Part("STM32H743ZI", "cortex-m7", 2048 * KIB, 512 * KIB, "STM32H743xI data sheet, ST", "AXI SRAM; more beside"),
    Part("i.MX RT1064", "cortex-m7", 4096 * KIB, 512 * KIB, "i.MX RT1064 data sheet, NXP", "OCRAM; 512 KiB FlexRAM beside"),
    Part("nRF5340", "cortex-m33", 1024 * KIB, 512 * KIB, "nRF5340 Product Specification, Nordic", "application core"),
    Part("RP2350", "cortex-m33", 4096 * KIB, 520 * KIB, "RP2350 and Raspberry Pi Pico 2 data sheets", "flash of a Pico 2"),
    Part("STM32U575ZI", "cortex-m33", 2048 * KIB, 768 * KIB, "STM32U575xx data sheet, ST", "SRAM1 to SRAM3"),
)  # fmt: skip
"""By core and RAM. A Cortex-M0+ runs what a Cortex-M0 does."""
