"""Single bits of a flashed image turned over: where the constants of a network lie in its ELF file, and what a boot then does."""

from __future__ import annotations

import random
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from edgekit.firmware_sim.faults import HANG
from edgekit.firmware_sim.qemu import run
from edgekit.firmware_sim.toolchain import Firmware
from edgekit.targets.cortex_m import elf

DAMAGED = 0x61


@dataclass(frozen=True)
class Flip:
    """One bit that was turned over, and how the boot ended.

    Attributes:
        segment: which constant the bit is in; ``named``: which one the firmware said is damaged (None: none).
        code: exit code; ``output``: bytes that were computed before it ended.
    """

    segment: int
    bit: int
    code: int
    named: int | None
    output: int

    @property
    def caught(self) -> bool:
        """Ended by the check, with the right constant named, before anything was computed."""
        return self.code == DAMAGED and self.named == self.segment and self.output == 0


def segments(image: elf.Elf) -> list[tuple[int, int]]:
    """Place in the file and size of each constant that the firmware checks, from its own table ``segments``."""
    table = image.bytes_of("segments")
    assert table is not None
    found = []
    for address, size, _ in struct.iter_unpack("<3I", table):
        section = next(s for s in image.sections if s.allocated and s.stored and s.address <= address < s.address + s.size)
        found.append((section.offset + address - section.address, size))
    return found


def flips(firmware: Firmware, data: bytes, n: int, folder: Path, seed: int = 0, limit: float = 20.0) -> Iterator[Flip]:
    """Boot ``n`` images, each with one random bit of its constants turned over (every bit is equally likely)."""
    chance, image = random.Random(seed), elf.read(firmware.elf)
    places = segments(image)
    ends = [sum(size for _, size in places[: i + 1]) for i in range(len(places))]
    for number in range(n):
        bit = chance.randrange(8 * ends[-1])
        segment = next(i for i, end in enumerate(ends) if bit // 8 < end)
        offset = places[segment][0] + bit // 8 - (ends[segment] - places[segment][1])
        content = bytearray(image.content)
        content[offset] ^= 1 << bit % 8
        path = folder / f"flipped{number % 2}.elf"
        path.write_bytes(content)
        result = run(replace(firmware, elf=path), data, limit)
        yield Flip(segment, bit, result.code, result.log.get("segment"), len(result.output))


def summary(found: list[Flip]) -> dict[str, int]:
    """How many were caught, hung the emulator, ended otherwise, or went on to compute."""
    kinds = Counter("caught" if f.caught else "hung" if f.code == HANG else "computed" if f.output else "other" for f in found)
    return {"flips": len(found), **{kind: kinds.get(kind, 0) for kind in ("caught", "hung", "computed", "other")}}
