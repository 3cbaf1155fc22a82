"""The targets ``cortex-m0`` to ``cortex-m55``: the members of a target module, for a core."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from edgekit.artifact import Artifact, Coverage, Mismatch, TensorSpec
from edgekit.errors import InputError, ParityError
from edgekit.files import write_whole
from edgekit.firmware_sim import memory, toolchain
from edgekit.firmware_sim.boards import BOARDS, CORES
from edgekit.firmware_sim.kernels import KERNEL_SETS
from edgekit.frozen import Exit, FrozenProgram
from edgekit.frozen.binary_ops import BINARY_OPS
from edgekit.targets.cortex_m import elf, host, readback
from edgekit.targets.cortex_m.graph import Firmware, Spec
from edgekit.targets.cortex_m.kernels import calls
from edgekit.targets.cortex_m.preparation import prepare
from edgekit.targets.cortex_m.project import NAMES, Build, Facts, files, load

__all__ = ["TARGETS", "CortexM", "Options"]

_MERGED = {
    "qpad": "merged into the convolution's padding",
    "fold_steps": "free: the order of the input",
    "repeat_steps": "free: the current is read again in each step",
}
"""Operator to what became of a layer without a step."""

PACKED_NOTE = "unpacked while the layer runs: saves flash, not time"


@dataclass(frozen=True)
class Options:
    """How the firmware is built.

    Attributes:
        board: the board that it is linked for and run on; "" is the core's own.
        kernels: the kernel set; "auto" is the fastest that the core has.
        optimize: the compiler's optimization level.
        stack_bytes: stack; a run reports how much of it was used.
        stream: of a spiking network: one time step a call, the state kept in RAM.
        exit_threshold: of a streaming network: ``model_sure()`` says whether the confidence exceeds it; 0: there is none; left
            out: what ``early_exit`` of the recipe chose, if it did.
        exit_temperature: of that confidence, where a threshold is given.
    """

    board: str = ""
    kernels: Literal["auto", "portable", "dsp", "mve"] = "auto"
    optimize: Literal["O2", "O3", "Os"] = "O2"
    stack_bytes: int = 4096
    stream: bool = False
    exit_threshold: float | None = None
    exit_temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.kernels not in ("auto", *KERNEL_SETS):
            raise InputError(f"kernels {self.kernels!r}: expected auto, {', '.join(KERNEL_SETS)}")
        if self.optimize not in ("O2", "O3", "Os"):
            raise InputError(f"optimize {self.optimize!r}: expected O2, O3 or Os")
        if self.stack_bytes < 512 or self.stack_bytes % 8:
            raise InputError(f"stack_bytes {self.stack_bytes}: expected a multiple of 8, 512 or more")
        if (self.exit_threshold or 0) < 0 or self.exit_temperature <= 0 or (self.exit_threshold and not self.stream):
            raise InputError(
                f"exit_threshold {self.exit_threshold or 0:g}, exit_temperature {self.exit_temperature:g}: "
                "expected positive numbers, and stream: true"
            )


_Options = Options  # inside the class the name is its member


@dataclass(frozen=True)
class CortexM:
    """A core as a target; ``NAME`` is its name in :data:`edgekit.firmware_sim.boards.CORES`."""

    NAME: str
    EXTRA: ClassVar[str] = ""

    @property
    def Options(self) -> type[_Options]:
        """The class of the target's options."""
        return _Options

    @property
    def SUFFIX(self) -> str:
        """The exported file is ``model.c`` in a folder of its own."""
        return f".{self.NAME}/model.c"

    def available(self) -> str | None:
        """None if firmware can be built and run here, else what is missing."""
        return toolchain.available()

    def files(self, path: Path) -> list[Path]:
        """The project's files; what was built in its folder is none of them."""
        return [Path(path).parent / name for name in NAMES]

    def home(self, path: Path) -> str:
        """The emulated board that the firmware of ``path`` was linked for, as a device."""
        return f"qemu:{load(Path(path).parent).build.board}"

    def lower(self, program: FrozenProgram, path: Path, options: _Options | None = None) -> Artifact:
        """Write the C project whose ``model.c`` is ``path``, after it was built elsewhere and every constant read back.

        Raises:
            UnsupportedError: a layer that firmware cannot take, or more memory than the board has.
            ParityError: the built firmware holds other numbers than the program.
            MissingTool: the Arm toolchain is not installed.
        """
        build = self._build(options or _Options(), program)
        firmware = prepare(program, build.kernel_set, build.stream)
        with tempfile.TemporaryDirectory(prefix="edgekit-") as name:
            trial = Path(name)
            for file, text in files(firmware, build).items():
                write_whole(trial / file, text)
            wrong = self.readback(trial / "model.c", program)
            if wrong:
                more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
                raise ParityError(f"the compiler changed the program: {wrong[0]}{more}")
            artifact = self.inspect(trial / "model.c", program)
            for file in sorted(files(firmware, build), reverse=True):  # runtime first, model.c after what it needs
                write_whole(Path(path).parent / file, (trial / file).read_bytes())
        return replace(artifact, path=Path(path))

    def inspect(self, path: Path, program: FrozenProgram) -> Artifact:
        """Sizes of the built firmware, and how each layer runs.

        ``memory`` is in bytes: "flash_code", "flash_weights", "flash" (all), "arena", "arena_bound" (what
        lifetimes allow if no output lies over its input),
        "static_ram" (without arena and stack), "stack_reserved", "ram" (all) and, from a boot with zeros, "stack_used".
        """
        facts, firmware = host.built(Path(path).parent)
        found = memory.measure(firmware)
        zeros = bytes(sum(spec.size for spec in facts.inputs))
        _, result = host.boot(Path(path).parent, zeros, 1)
        sizes = {
            "flash_code": found.flash_code, "flash_weights": found.flash_weights, "flash": found.flash, "arena": found.arena,
            "arena_bound": facts.bound, "static_ram": found.static_ram, "stack_reserved": found.stack,
            "stack_used": result.stack_bytes, "ram": found.ram,
        }  # fmt: skip
        return Artifact(
            path=Path(path),
            target=self.NAME,
            inputs=tuple(_spec(s) for s in facts.inputs),
            outputs=tuple(_spec(s) for s in facts.outputs),
            coverage=_coverage(program, prepare(program, facts.build.kernel_set, facts.build.stream)),
            bytes=found.flash,
            notes=_notes(facts, program),
            memory=sizes,
        )

    def readback(self, path: Path, program: FrozenProgram) -> list[Mismatch]:
        """Constants of the built firmware, and scales of ``model.json``, that are not the program's."""
        facts, built = host.built(Path(path).parent)
        firmware = prepare(program, facts.build.kernel_set, facts.build.stream)
        expected = Facts.of(firmware, facts.build)
        wrong = [
            Mismatch(ours.name, "input or output", str(theirs), str(ours))
            for kind in ("inputs", "outputs")
            for ours, theirs in _pairs(getattr(expected, kind), getattr(facts, kind))
            if ours != theirs
        ]
        for ours, theirs in _pairs(expected.steps, facts.steps):
            if ours != theirs:
                wrong.append(Mismatch(ours[1] if ours else theirs[1], "step", str(theirs), str(ours)))
        return wrong + readback.compare(elf.read(built.elf), firmware)

    def run(
        self,
        path: Path,
        inputs: Sequence[NDArray[Any]],
        threads: int = 1,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[NDArray[np.float32]]:
        """The firmware's outputs for a batch, from the emulated board; ``inputs`` in the program's layout.

        Raises:
            InputError: inputs that do not fit. FirmwareFault: the firmware ended by a fault.
        """
        return host.outputs(Path(path).parent, inputs, progress)

    def taps(self, path: Path, program: FrozenProgram, sample: Sequence[NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Each layer's output as the emulated board computed it for one sample; merged layers are left out."""
        return host.tapped(Path(path).parent, program, sample)

    def _build(self, options: _Options, program: FrozenProgram) -> Build:
        board = options.board or CORES[self.NAME].board
        if board not in BOARDS or BOARDS[board].core != self.NAME:
            allowed = ", ".join(b.name for b in BOARDS.values() if b.core == self.NAME)
            raise InputError(f"board {board!r} is no {self.NAME} board; choose one of: {allowed}")
        kernels = "" if options.kernels == "auto" else options.kernels
        if kernels and KERNEL_SETS.index(kernels) > KERNEL_SETS.index(CORES[self.NAME].kernel_set):
            raise InputError(f"{self.NAME} cannot run the {kernels} kernels; use kernels: auto")
        rule = Exit(options.exit_temperature, options.exit_threshold or 0.0)
        if options.exit_threshold is None and options.stream and program.exit is not None:
            rule = program.exit
        return Build(
            self.NAME, board, kernels, options.optimize, options.stack_bytes, options.stream, float(rule.threshold),
            float(rule.temperature),
        )  # fmt: skip


def _pairs(ours: Sequence[Any], theirs: Sequence[Any]) -> list[tuple[Any, Any]]:
    length = max(len(ours), len(theirs))
    return [*zip([*ours, *[None] * (length - len(ours))], [*theirs, *[None] * (length - len(theirs))], strict=True)]


def _spec(spec: Spec) -> TensorSpec:
    return TensorSpec(spec.name, spec.stored, "int8", spec.scale, spec.zero_point)


def _coverage(program: FrozenProgram, firmware: Firmware) -> tuple[Coverage, ...]:
    """One row a step, and one for each layer that needs none."""
    rows = []
    for layer in program.layers:
        if layer.op in ("quantize", "dequantize") and not any(s.layer == layer.name for s in firmware.steps):
            continue
        steps = [s for s in firmware.steps if s.layer == layer.name]
        if not steps:
            merged = _MERGED.get(layer.op, "merged into the order of the weights")
            note = "free: the same bytes" if layer.name in firmware.taps else merged
            rows.append(Coverage(layer.name, "none", "int8", note=note))
        for step in steps:
            function = calls(step)[0].function
            storage = f"int{step.bits}" if "weight" in step.arrays else ""
            runs, note = ("binary" if layer.op in BINARY_OPS else "int8"), (PACKED_NOTE if 1 < step.bits < 8 else "")
            rows.append(Coverage(layer.name, function, runs, step.macs, storage, note))
    known = {layer.name for layer in program.layers}
    returned = [s for s in firmware.steps if s.layer not in known]
    rows += [
        Coverage(s.layer, calls(s)[0].function, "int8", note="float in the program, returned in steps of 1/256") for s in returned
    ]
    return tuple(rows)


def _notes(facts: Facts, program: FrozenProgram) -> tuple[str, ...]:
    build = facts.build
    notes = [
        f"board {build.board}, {build.kernel_set} kernels, -{build.optimize}; inputs and outputs are int8, quantized by the host"
    ]
    if build.exit_threshold:
        notes.append(f"early exit at confidence {build.exit_threshold:g}, temperature {build.exit_temperature:g} (model_sure)")
    if any(kind == "softmax" for _, _, kind, _ in facts.steps):
        notes.append("softmax is computed from int8 to int8 by a table of exponentials")
    packed = sum(1 for layer in program.layers if layer.weight_bits is not None and 1 < layer.weight_bits < 8)
    signs = sum(1 for layer in program.layers if layer.weight_bits == 1)
    if signs:
        notes.append(f"{signs} layers multiply signs by signs, 1 bit a weight in flash")
    if packed:
        notes.append(f"{packed} layers have packed weights, {PACKED_NOTE}")
    return tuple(notes)


TARGETS: dict[str, CortexM] = {name: CortexM(name) for name in CORES}
"""Core name to target."""
