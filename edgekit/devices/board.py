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

        Every sample is run on a board of its own that boots anew, the first one twice: ``settings`` of repeated runs and threads
        mean nothing here.

        Raises:
            UnsupportedError: the firmware needs more flash or RAM than the board has.
            FirmwareFault: it ended by a fault.
        """
        facts, firmware = host.built(Path(path).parent, on=self.board.name)
        marks = [function for function, *_ in facts.steps]
        batches = [_bytes(facts, inputs, i) for i in range(len(inputs[0]))]
        counts = []
        for i, data in enumerate([batches[0], *batches]):
            counts.append(count(firmware, data, marks))
            if progress:
                progress(i + 1, len(batches) + 1)
            if counts[-1].method != "plugin":
                return self._by_timer(program, facts, firmware, target, data, counts[-1])
        if (counts[0].total, counts[0].functions) != (counts[1].total, counts[1].functions):
            raise EdgekitError(
                f"{self.name}: two runs with the same sample executed {counts[0].total} and {counts[1].total} instructions"
            )
        totals = [sum(one.marks.values()) for one in counts[1:]]
        first = counts[1]
        figures = {
            "boot_instructions": first.total - totals[0],
            "library_instructions": sum(first.marks_library.values()),
            **({"least_instructions": min(totals), "most_instructions": max(totals)} if len(set(totals)) > 1 else {}),
        }
        varies = (
            f"; it depends on the data: {min(totals):,} to {max(totals):,} over {len(totals)} samples"
            if len(set(totals)) > 1
            else ""
        )
        method = (
            "instructions counted in the emulator by address, from the first layer's entry to the last one's end, twice with the "
            f"same result{varies}; an emulator has no cycles and no time"
        )
        layers = _layers(program, facts, first, totals[0])
        return self._profile(program, facts, firmware, target, totals[0], layers, figures, first, method)

    def _by_timer(
        self, program: FrozenProgram, facts: Facts, firmware: Firmware, target: str, data: bytes, one: Counts
    ) -> Profile:
        """Without the plugin: two inferences less one, so that the boot falls out; no layers."""
        two = count(firmware, data + data, plugin=False)
        total = two.total - one.total
        method = (
            f"{one.note}; a boot with two inferences less a boot with one, input and output included, exact to two instructions"
        )
        return self._profile(program, facts, firmware, target, total, (), {"boot_instructions": one.total - total}, one, method)

    def _profile(
        self,
        program: FrozenProgram,
        facts: Facts,
        firmware: Firmware,
        target: str,
        total: int,
        layers: tuple[LayerCost, ...],
        figures: Mapping[str, float],
        counts: Counts,
        method: str,
    ) -> Profile:
        sizes = memory.measure(firmware)
        bytes_ = {
            "flash_bytes": sizes.flash,
            "flash_code_bytes": sizes.flash_code,
            "flash_weights_bytes": sizes.flash_weights,
            "ram_bytes": sizes.ram,
            "arena_bytes": sizes.arena,
            "arena_bound_bytes": facts.bound,
            "static_ram_bytes": sizes.static_ram,
            "stack_bytes": counts.result.stack_bytes,
            "stack_reserved_bytes": sizes.stack,
        }
        build = facts.build
        notes = (f"{self.board.title}, {build.target}, {build.kernel_set} kernels, -{build.optimize}", NOTE)
        return Profile(
            device=self.name, target=target, file="", sha256="", unit="instructions", total=total, macs=facts.macs, layers=layers,
            figures={**figures, **bytes_}, method=method, notes=notes,
            fits=tuple(fits(program, build, firmware)),
        )  # fmt: skip

    def close(self) -> None:
        """Nothing is held."""


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
