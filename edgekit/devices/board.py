"""``qemu:<board>``: firmware on an emulated microcontroller board. It has instructions, not time.

``<board>`` is one of :data:`edgekit.firmware_sim.boards.BOARDS`, or a core's name for that core's own board. Firmware exported
for another board of the same core is linked again for this one; nothing else changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import EdgekitError, InputError, MissingTool
from edgekit.firmware_sim import memory, toolchain
from edgekit.firmware_sim.boards import BOARDS, CORES, Board
from edgekit.firmware_sim.boards import board as board_of
from edgekit.firmware_sim.count import Counts, count
from edgekit.firmware_sim.toolchain import Firmware
from edgekit.frozen import FrozenProgram
from edgekit.profile import LayerCost, Profile, Settings
from edgekit.targets.cortex_m import host
from edgekit.targets.cortex_m.fits import NOTE, fits
from edgekit.targets.cortex_m.preparation import prepare, simulate, to_stored
from edgekit.targets.cortex_m.project import Facts, load

__all__ = ["EmulatedBoard", "connect"]

Arrays = Sequence[NDArray[Any]]


def connect(spec: str) -> EmulatedBoard:
    """The board of ``qemu:<board>`` or ``qemu:<core>``.

    Raises:
        InputError: there is no such board.
        MissingTool: the Arm toolchain or the emulator is not installed.
    """
    name = spec.partition(":")[2]
    if name not in BOARDS and name not in CORES:
        raise InputError(f"device {spec!r}: no such board; choose one of: {', '.join(f'qemu:{b}' for b in BOARDS)}")
    if missing := toolchain.available():
        raise MissingTool(f"device {spec!r}: {missing}")
    found = board_of(name)
    return EmulatedBoard(f"qemu:{found.name}", found)


@dataclass(frozen=True)
class EmulatedBoard:
    """A board of QEMU with the members of a device; see :mod:`edgekit.devices`."""

    name: str
    board: Board

    @property
    def targets(self) -> tuple[str, ...]:
        """The firmware target of its core."""
        return (self.board.core,)

    def run(
        self, path: Path, target: str, inputs: Arrays, progress: Callable[[int, int], None] | None = None
    ) -> list[NDArray[np.float32]]:
        """The firmware's outputs for a batch, (N, ...) each."""
        return host.outputs(Path(path).parent, inputs, progress, self.board.name)

    def taps(self, path: Path, target: str, program: FrozenProgram, sample: Arrays) -> dict[str, NDArray[np.int8]]:
        """Each layer's int8 output for one sample, from the same project with ``-DMODEL_TAPS``."""
        return host.tapped(Path(path).parent, program, sample, self.board.name)

    def reference(
        self, path: Path, target: str, program: FrozenProgram, sample: Arrays
    ) -> tuple[dict[str, NDArray[np.int8]], list[NDArray[np.float32]]]:
        """What the firmware must compute for one sample to the last bit, by numpy from the frozen program alone."""
        return simulate(prepare(program, load(Path(path).parent).build.kernel_set), sample)

    def profile(
        self,
        path: Path,
        target: str,
        program: FrozenProgram,
        settings: Settings,
        inputs: Arrays,
        progress: Callable[[int, int], None] | None = None,
    ) -> Profile:
        """Instructions of one inference and of each layer, and memory.

        Every sample is run on a board of its own that boots anew, the first one twice; threads, numbers of runs and seconds of
        ``settings`` mean nothing here, and a note says so where they were given.

        Raises:
            UnsupportedError: the firmware needs more flash or RAM than the board has.
            FirmwareFault: it ended by a fault.
        """
        facts, firmware = host.built(Path(path).parent, on=self.board.name)
        cost = _counted(facts, firmware, program, [_bytes(facts, inputs, i) for i in range(len(inputs[0]))], progress)
        build = facts.build
        what = f"{self.board.title}, {build.target}, {build.kernel_set} kernels, -{build.optimize}"
        return Profile(
            device=self.name,
            target=target,
            file="",
            sha256="",
            unit="instructions",
            total=cost.total,
            macs=facts.macs,
            layers=cost.layers if settings.per_layer else (),
            figures={**cost.figures, **_memory(facts, firmware)},
            fits=tuple(fits(program, build, firmware)),
            method=cost.method,
            notes=(what, NOTE, *_unused(settings)),
        )

    def close(self) -> None:
        """Nothing is held."""


@dataclass(frozen=True)
class _Cost:
    """What boots of a firmware took; ``total`` and ``layers`` are of one inference."""

    total: int
    layers: tuple[LayerCost, ...]
    figures: Mapping[str, int]
    method: str


def _counted(
    facts: Facts,
    firmware: Firmware,
    program: FrozenProgram,
    samples: Sequence[bytes],
    progress: Callable[[int, int], None] | None,
) -> _Cost:
    """Each sample on a board that boots anew, the first one twice, which must give the same."""
    marks = [function for function, *_ in facts.steps]
    counts = []
    for i, data in enumerate([samples[0], *samples]):
        counts.append(count(firmware, data, marks))
        if counts[-1].method != "plugin":
            return _timed(firmware, data, counts[-1])
        if progress:
            progress(i + 1, len(samples) + 1)
    again, first = counts[:2]
    if (again.total, again.functions) != (first.total, first.functions):
        raise EdgekitError(
            f"{firmware.board.name}: two runs with the same sample executed {again.total} and {first.total} instructions"
        )
    totals = [sum(one.marks.values()) for one in counts[1:]]
    figures = {
        "boot_instructions": first.total - totals[0],
        "library_instructions": sum(first.marks_library.values()),
        "stack_bytes": max(one.result.stack_bytes for one in counts),
    }
    varies = ""
    if len(set(totals)) > 1:
        figures |= {"least_instructions": min(totals), "most_instructions": max(totals)}
        varies = f"; it depends on the data: {min(totals):,} to {max(totals):,} over {len(totals)} samples"
    method = (
        "instructions counted in the emulator by address, from the first layer's entry to the last one's end, twice with the "
        f"same result{varies}; an emulator has no cycles and no time"
    )
    return _Cost(totals[0], _layers(program, facts, first, totals[0]), figures, method)


def _timed(firmware: Firmware, data: bytes, one: Counts) -> _Cost:
    """Without the plugin: a boot with two inferences less ``one`` with one, so that the boot falls out; no layers."""
    two = count(firmware, data + data, plugin=False)
    total = two.total - one.total
    method = f"{one.note}; a boot with two inferences less a boot with one, input and output included, exact to two instructions"
    return _Cost(total, (), {"boot_instructions": one.total - total, "stack_bytes": one.result.stack_bytes}, method)


def _memory(facts: Facts, firmware: Firmware) -> dict[str, int]:
    sizes = memory.measure(firmware)
    return {
        "flash_bytes": sizes.flash,
        "flash_code_bytes": sizes.flash_code,
        "flash_weights_bytes": sizes.flash_weights,
        "ram_bytes": sizes.ram,
        "arena_bytes": sizes.arena,
        "arena_bound_bytes": facts.bound,
        "static_ram_bytes": sizes.static_ram,
        "stack_reserved_bytes": sizes.stack,
    }


def _unused(settings: Settings) -> list[str]:
    """A note on settings that were given and mean nothing to an emulator that counts."""
    usual, flags = Settings(), {"num_threads": "", "num_runs": "", "warmup_runs": "", "seconds": "min_secs"}
    given = [flag or name for name, flag in flags.items() if getattr(settings, name) != getattr(usual, name)]
    return [f"{', '.join(given)}: not used, every run on an emulated board takes the same instructions"] if given else []


def _bytes(facts: Facts, inputs: Arrays, index: int) -> bytes:
    return b"".join(x.tobytes() for x in to_stored(facts.inputs, [v[index : index + 1] for v in inputs]))


def _layers(program: FrozenProgram, facts: Facts, counts: Counts, total: int) -> tuple[LayerCost, ...]:
    """One row a frozen layer that has steps, in the order of their first ones."""
    steps: dict[str, list[tuple[str, str]]] = {}
    for function, layer, kernel, _ in facts.steps:
        steps.setdefault(layer, []).append((function, kernel))
    macs = {layer.name: layer.macs for layer in program.layers}
    rows = []
    for layer, own in steps.items():
        taken = sum(counts.marks[function] for function, _ in own)
        library = sum(counts.marks_library[function] for function, _ in own)
        kernels = " + ".join(dict.fromkeys(kernel for _, kernel in own))
        share = taken / total if total else 0.0
        rows.append(LayerCost(layer, kernels, macs.get(layer, 0), taken, share=share, library_instructions=library))
    return tuple(rows)
