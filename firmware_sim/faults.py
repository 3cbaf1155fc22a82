"""How a firmware run can end, in sentences: one exit code each, the same numbers as in ``runtime/edgekit.h``."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["FAULTS", "HANG", "sentence"]

HANG = -1
"""The code of a run that the host's time limit ended."""

FAULTS: dict[int, str] = {
    HANG: "did not end within the time limit of {limit:g} s: it hangs, or the limit is too short",
    0x60: "arena exhausted: the model needs {arena_need} bytes (aligned to 16) and was given {arena_have}",
    0x61: "the weights in flash are damaged: the CRC of segment {segment} differs from what was built",
    0x62: "the input ends in the middle of a sample: {input_missing} bytes are missing",
    0x63: "the host's input or output file could not be opened, read or written",
    0x64: "stack overflow at pc {pc:#x}: raise stack_bytes (now {stack_size})",
    0x65: "the watchdog was not fed in time",
    0x66: "wrote into flash at {address:#x}, from pc {pc:#x}",
    0x71: "took an interrupt that nothing handles",
    0x73: "HardFault at pc {pc:#x}",
    0x74: "MemManage fault: access to {address:#x} from pc {pc:#x} is not allowed",
    0x75: "BusFault: no memory answers at {address:#x}, from pc {pc:#x}",
    0x76: "UsageFault at pc {pc:#x}: {usage}",
    0x77: "SecureFault at pc {pc:#x}",
}
"""Exit code to sentence; the names in braces are numbers of the firmware's log."""

USAGE = {16: "undefined instruction", 17: "branch to an address without the Thumb bit", 18: "broken exception return",
         19: "no coprocessor", 20: "stack overflow", 24: "unaligned access", 25: "division by zero"}  # fmt: skip
"""Bits of the Configurable Fault Status Register (Armv7-M ARM, B3.2.15)."""


class _Log(dict[str, object]):
    def __missing__(self, key: str) -> object:
        return -1 if key in ("pc", "address") else "?"


def sentence(code: int, log: Mapping[str, int], limit: float) -> str | None:
    """What an exit code means, with the numbers the firmware logged; None for 0."""
    if code == 0:
        return None
    usage = next((text for bit, text in USAGE.items() if log.get("cfsr", 0) >> bit & 1), "cause unknown")
    text = FAULTS.get(code, f"ended with code {code}, which is none of the runtime's")
    return text.format_map(_Log(log, limit=limit, usage=usage)).replace("-0x1", "an unknown address")
