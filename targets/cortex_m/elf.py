"""Reads 32-bit little-endian ELF files: where each symbol lies and which bytes are stored for it.

Only what read-back and the size report need: section headers, the symbol table, the bytes of named objects
(System V ABI, chapter 4).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgekit.errors import FormatError

__all__ = ["Elf", "Section", "Symbol", "read"]

_ALLOCATED, _NO_BITS = 2, 8


@dataclass(frozen=True)
class Section:
    """A section: its address, size, place in the file, whether it is loaded, and whether the file holds its bytes."""

    name: str
    address: int
    offset: int
    size: int
    allocated: bool
    stored: bool


@dataclass(frozen=True)
class Symbol:
    """A named address; ``section`` is its section's index."""

    name: str
    address: int
    size: int
    section: int


@dataclass(frozen=True)
class Elf:
    """A parsed file."""

    content: bytes
    sections: tuple[Section, ...]
    symbols: Mapping[str, Symbol]

    def bytes_of(self, name: str) -> bytes | None:
        """What the file stores for a symbol; None if there is none, or it has no bytes in the file."""
        symbol = self.symbols.get(name)
        if symbol is None or not 0 < symbol.section < len(self.sections):
            return None
        section = self.sections[symbol.section]
        start = section.offset + symbol.address - section.address
        if not section.stored or start < section.offset or start + symbol.size > section.offset + section.size:
            return None
        return self.content[start : start + symbol.size]


def read(path: Path) -> Elf:
    """Parse a file.

    Raises:
        FormatError: not a 32-bit little-endian ELF file, or truncated.
    """
    content = Path(path).read_bytes()
    if content[:6] != b"\x7fELF\x01\x01":
        raise FormatError(f"{Path(path).name}: not a 32-bit little-endian ELF file; build the firmware again")
    try:
        return _parse(content)
    except (struct.error, IndexError, ValueError) as error:
        raise FormatError(f"{Path(path).name}: a damaged ELF file ({error}); build the firmware again") from None


def _parse(content: bytes) -> Elf:
    (table,) = struct.unpack_from("<I", content, 32)
    each, count, names_index = struct.unpack_from("<HHH", content, 46)
    headers = [struct.unpack_from("<10I", content, table + i * each) for i in range(count)]
    names = headers[names_index]
    sections = tuple(
        Section(_text(content, names[4] + h[0]), h[3], h[4], h[5], bool(h[2] & _ALLOCATED), h[1] != _NO_BITS) for h in headers
    )
    symbols: dict[str, Symbol] = {}
    for header in headers:
        if header[1] != 2:  # SHT_SYMTAB
            continue
        strings = headers[header[6]][4]
        for i in range(header[5] // 16):
            name, address, size, _, _, section = struct.unpack_from("<IIIBBH", content, header[4] + i * 16)
            text = _text(content, strings + name)
            if text:
                symbols[text] = Symbol(text, address, size, section)
    return Elf(content, sections, symbols)


def _text(content: bytes, start: int) -> str:
    return content[start : content.index(b"\0", start)].decode("ascii", "replace")
