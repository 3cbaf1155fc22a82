"""Every constant of a built firmware against the frozen program: weights, folded biases, multipliers, tables, parameter structs.

The ELF file is read, not the C text: what the compiler and linker made of it is what runs.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.artifact import Mismatch
from edgekit.targets.cortex_m.binary import stored_signs
from edgekit.targets.cortex_m.elf import Elf
from edgekit.targets.cortex_m.emit import array_name, stored_bytes, struct_name
from edgekit.targets.cortex_m.graph import Firmware, Step
from edgekit.targets.cortex_m.kernels import KERNELS, Constant, Struct

__all__ = ["compare", "unpacked"]

_FORMATS = {"int16_t": "h", "int8_t": "b", "uint8_t": "B", "uint16_t": "H", "int32_t": "i", "uint32_t": "I", "*": "I"}


def compare(elf: Elf, firmware: Firmware) -> list[Mismatch]:
    """Facts of the ELF file that are not those of the firmware made from the program, in execution order."""
    return [m for index, step in enumerate(firmware.steps) for m in _step(elf, index, step)]


def _step(elf: Elf, index: int, step: Step) -> Iterator[Mismatch]:
    for constant in KERNELS[step.kind].constants(step):
        found = elf.bytes_of(array_name(index, constant.role))
        expected = stored_bytes(constant)
        if found is None or len(found) < len(expected):
            yield Mismatch(step.layer, constant.role, "missing", f"{len(expected)} bytes")
        elif found[: len(expected)] != expected:
            yield _array(step, constant, found)
    for number, call in enumerate(KERNELS[step.kind].calls(step)):
        if call.struct is not None:
            yield from _struct(elf, index, step, struct_name(index, number), call.struct)


def _array(step: Step, constant: Constant, found: bytes) -> Mismatch:
    """The first value that differs."""
    expected = constant.values.reshape(-1)
    stored = np.frombuffer(found[: expected.nbytes], expected.dtype)
    if constant.role == "weights" and step.bits == 1:
        expected, stored = stored_signs(step, expected), stored_signs(step, stored)
    elif constant.role == "weights" and step.bits < 8:
        expected, stored = unpacked(expected, step.bits), unpacked(stored, step.bits)
    wrong = np.flatnonzero(expected != stored)
    if not len(wrong):
        return Mismatch(step.layer, constant.role, "padded with other bytes", "padded with zeros")
    first, more = int(wrong[0]), f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return Mismatch(step.layer, f"{constant.role}[{first}]{more}", str(stored[first]), str(expected[first]))


def unpacked(stored: NDArray[Any], bits: int) -> NDArray[np.int8]:
    """Signed values of 4 or 2 bits from groups of four bytes (:func:`~edgekit.targets.cortex_m.kernels.packed`)."""
    places = (np.arange(8 // bits) * bits)[:, None]
    values = (stored.reshape(-1, 1, 4).astype(np.int64) >> places) & ((1 << bits) - 1)
    result: NDArray[np.int8] = np.where(values >= 1 << (bits - 1), values - (1 << bits), values).astype(np.int8).reshape(-1)
    return result


def _struct(elf: Elf, index: int, step: Step, name: str, expected: Struct) -> Iterator[Mismatch]:
    """Member by member, each at its natural alignment (AAPCS, 5.3)."""
    content = elf.bytes_of(name)
    if content is None:
        yield Mismatch(step.layer, name, "missing", expected.type)
        return
    place = 0
    for member in expected.fields:
        kind, _, count = member.type.rstrip("]").partition("[")
        form = _FORMATS[kind]
        size = struct.calcsize(form)
        place = -(-place // size) * size
        wanted = member.value if isinstance(member.value, tuple) else (member.value,)
        if member.type == "*":
            symbol = None if member.value is None else elf.symbols.get(array_name(index, member.value))
            wanted = (0 if symbol is None else symbol.address,)
        end = place + size * int(count or 1)
        if end > len(content):
            yield Mismatch(step.layer, f"{expected.type}.{member.name}", "missing", str(member.value))
            return
        found = struct.unpack_from(f"<{int(count or 1)}{form}", content, place)
        if found != tuple(wanted):
            shown = (found, tuple(wanted)) if count else (found[0], wanted[0])
            yield Mismatch(step.layer, f"{expected.type}.{member.name}", str(shown[0]), str(shown[1]))
        place = end
