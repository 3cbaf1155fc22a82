"""How many instructions a firmware executes: exact and the same on every run; an emulator knows no time, so none is given.

The first way is a plugin of the emulator, built when it is needed, that counts each address. Where it cannot be built the total
comes from the timer of a board under ``-icount`` (one instruction takes 64 ns there), and :attr:`Counts.note` says so.
"""

from __future__ import annotations

import bisect
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from edgekit.errors import EdgekitError, MissingTool
from edgekit.firmware_sim.memory import symbols
from edgekit.firmware_sim.qemu import Result, run
from edgekit.firmware_sim.toolchain import Firmware, build, find

__all__ = ["Counts", "count", "plugin_library"]

SOURCE = Path(__file__).resolve().parent / "plugin.c"
OUTSIDE = ("ek_main", "ek_input", "ek_output", "ek_exit")
"""Functions that end a mark's span: what follows their entry belongs to no layer."""

COMPILER_LIBRARY = (
    "__aeabi_",
    "__gnu_",
    "__udiv",
    "__div",
    "__mod",
    "__umod",
    "__mul",
    "__add",
    "__sub",
    "__clz",
    "__fix",
    "__float",
)
C_LIBRARY = ("memcpy", "memset", "memmove", "memcmp", "strlen")
_LIBRARIES = (*COMPILER_LIBRARY, *C_LIBRARY)
SHIFT = 6
"""``-icount shift=6``: 2^6 ns of virtual time an instruction."""


@dataclass(frozen=True)
class Counts:
    """Instructions executed from reset to the end of one boot."""

    total: int
    method: str
    """"plugin" or "icount"."""
    note: str | None
    """Why there are no counts by function, if there are none."""
    result: Result
    functions: dict[str, int] = field(default_factory=dict)
    """By function; callees are not included."""
    marks: dict[str, int] = field(default_factory=dict)
    """By marked function: everything from an entry to the entry of the next mark, callees included, over all inferences."""
    marks_library: dict[str, int] = field(default_factory=dict)
    """Those of ``marks`` that libgcc and the C library took."""
    entries: dict[str, int] = field(default_factory=dict)
    """How often each marked function was entered (a jump back to its very first instruction would count too)."""

    @property
    def library(self) -> int:
        """Instructions in libgcc and the C library."""
        return sum(n for name, n in self.functions.items() if name.startswith(_LIBRARIES))


def count(firmware: Firmware, data: bytes = b"", marks: Sequence[str] = (), limit: float = 300.0, plugin: bool = True) -> Counts:
    """Runs the firmware once and counts.

    Args:
        firmware: what :func:`~edgekit.firmware_sim.toolchain.build` gave.
        data: its input.
        marks: functions whose entries divide the run, such as one for each layer; they must not be inlined.
        limit: time limit of the run in seconds.
        plugin: False asks for the timer at once.

    Raises:
        EdgekitError: a mark is no function of the firmware.
        FirmwareFault: the run ended by a fault.
    """
    if plugin:
        try:
            return _by_plugin(firmware, data, marks, limit)
        except MissingTool as missing:
            note = f"the counting plugin cannot be built ({missing}); total by icount, nothing by function"
    else:
        note = "total by icount, nothing by function"
    return _by_timer(firmware, data, limit, note)


def plugin_library(folder: Path) -> Path:
    """The counting plugin, compiled into ``folder``; ``plugin.c`` has its options. qemu-aarch64 takes it too.

    Raises:
        MissingTool: no C compiler of this machine, or it fails.
    """
    library = folder / "libcount.so"
    command = [find("gcc"), "-O2", "-shared", "-fPIC", "-fvisibility=hidden", str(SOURCE), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise MissingTool(f"gcc failed: {done.stderr.strip().splitlines()[0] if done.stderr else 'no message'}")
    return library


def _by_plugin(firmware: Firmware, data: bytes, marks: Sequence[str], limit: float) -> Counts:
    table = symbols(firmware)
    addresses = {name: address for address, _, name in table}
    unknown = [name for name in marks if name not in addresses]
    if unknown:
        raise EdgekitError(f"the firmware has no function {unknown[0]!r} to count: it is not linked, or was inlined")
    names = [*marks, *(name for name in OUTSIDE if name in addresses and name not in marks)] if marks else []
    with tempfile.TemporaryDirectory(prefix="edgekit-") as folder:
        library, out = plugin_library(Path(folder)), Path(folder) / "counts"
        apart = [f"apart={start:x}-{start + size:x}" for start, size, name in table if name.startswith(_LIBRARIES)]
        option = ",".join([str(library), f"out={out}", *(f"mark={addresses[name]:x}" for name in names), *apart])
        result = run(firmware, data, limit, ["-plugin", option]).checked()
        if not out.exists():
            raise MissingTool("this emulator takes no plugins")
        lines = out.read_text().splitlines()
    functions = _by_function(lines, table)
    spans, apart_spans, entries = _by_mark(lines, names)
    total = sum(int(line.split()[2]) for line in lines if line.startswith("i "))
    wanted = set(marks)
    return Counts(
        total=total,
        method="plugin",
        note=None,
        result=result,
        functions=functions,
        marks={name: n for name, n in spans.items() if name in wanted},
        marks_library={name: n for name, n in apart_spans.items() if name in wanted},
        entries={name: n for name, n in entries.items() if name in wanted},
    )


def _by_function(lines: Sequence[str], table: Sequence[tuple[int, int, str]]) -> dict[str, int]:
    starts = [address for address, _, _ in table]
    found: Counter[str] = Counter()
    for line in lines:
        if line.startswith("i "):
            _, text, n = line.split()
            address = int(text, 16)
            start, size, name = table[max(bisect.bisect_right(starts, address) - 1, 0)]
            found[name if start <= address < start + size else "?"] += int(n)
    return dict(sorted(found.items()))


def _by_mark(lines: Sequence[str], names: Sequence[str]) -> tuple[dict[str, int], dict[str, int], dict[str, int]]:
    """Instructions of each mark's spans, those of them in libraries, and how often each was entered."""
    spans, apart, entries = (Counter(dict.fromkeys(names, 0)) for _ in range(3))
    before: tuple[str, int, int] | None = None
    for line in lines:
        kind, *fields = line.split()
        if kind not in "mt":
            continue
        total, library = int(fields[-2]), int(fields[-1])
        if before is not None:
            spans[before[0]] += total - before[1]
            apart[before[0]] += library - before[2]
        if kind == "m":
            before = (names[int(fields[0])], total, library)
            entries[before[0]] += 1
    return dict(spans), dict(apart), dict(entries)


def _by_timer(firmware: Firmware, data: bytes, limit: float, note: str) -> Counts:
    """Builds the firmware once more with the timer running, and reads its ticks."""
    project = replace(firmware.project, defines=(*firmware.project.defines, "-DEK_TICKS"))
    with tempfile.TemporaryDirectory(prefix="edgekit-") as folder:
        timed = build(project, Path(folder))
        result = run(timed, data, limit, ["-icount", f"shift={SHIFT}"]).checked()
    seconds = (result.log["ticks_high"] * (1 << 24) + result.log["ticks_low"]) / firmware.board.timer_hz
    return Counts(total=round(seconds * 1e9 / (1 << SHIFT)), method="icount", note=note, result=result)
