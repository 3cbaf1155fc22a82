"""Builds exported projects, boots them in QEMU, and feeds them: the host's side of the firmware."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import FirmwareFault, FormatError, InputError
from edgekit.firmware_sim.boards import board
from edgekit.firmware_sim.qemu import Result, run
from edgekit.firmware_sim.toolchain import Firmware, Project, build
from edgekit.frozen import FrozenProgram
from edgekit.targets.cortex_m.graph import Firmware as Graph
from edgekit.targets.cortex_m.preparation import from_stored, prepare, taps_of, to_stored
from edgekit.targets.cortex_m.project import BUILT, Facts, load
from edgekit.targets.cortex_m.reference import Int8

__all__ = ["boot", "built", "outputs", "tapped"]

_PER_BOOT = 250_000_000
"""Multiply-accumulates a boot: a few seconds of emulation, so that progress can be shown."""

_DAMAGED = 0x61
_UNCHECKED = "-DMODEL_CHECK=0"


def built(folder: Path, *defines: str, on: str = "") -> tuple[Facts, Firmware]:
    """The project of a folder, compiled as its Makefile would; kept until the process ends.

    Args:
        on: another board than the one it was exported for, of the same core.

    Raises:
        FormatError: no project, or files of it are missing.
        MissingTool, UnsupportedError, EdgekitError: as :func:`edgekit.firmware_sim.toolchain.build`.
    """
    folder = Path(folder)
    facts = load(folder)
    if on:
        facts = replace(facts, build=replace(facts.build, board=on))
    total = hashlib.sha256()
    for name in BUILT:
        if not (folder / name).is_file():
            raise FormatError(f"{folder}: {name} is missing; export the program again")
        total.update((folder / name).read_bytes())
    return facts, _build(folder.resolve(), total.hexdigest(), facts, defines)


@lru_cache(maxsize=1)
def _kept() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="edgekit-firmware-")


_elfs: dict[tuple[str, Facts, tuple[str, ...]], Path] = {}
"""What was built, by the contents of the project: the same files elsewhere are not compiled again."""


def _build(source: Path, digest: str, facts: Facts, defines: tuple[str, ...]) -> Firmware:
    key = (digest, facts, defines)
    project = Project(
        board=board(facts.build.board),
        sources=(source / "model.c", source / "main.c"),
        include=(source,),
        defines=(*facts.build.defines, *defines),
        stack_bytes=facts.build.stack_bytes,
        optimize=f"-{facts.build.optimize}",
        runtime=source / "runtime",
    )
    if key not in _elfs:
        _elfs[key] = build(project, Path(tempfile.mkdtemp(prefix=f"{digest[:8]}-", dir=_kept().name))).elf
    return Firmware(project, _elfs[key])  # the sources of this folder: those it was built from may be gone


def boot(folder: Path, data: bytes, samples: int, *defines: str, on: str = "") -> tuple[Facts, Result]:
    """One boot with ``data`` as input.

    A project whose weights were altered fails its CRC; it then runs without the check, so that verification can name the layer.

    Raises:
        FirmwareFault: the firmware ended by a fault.
    """
    facts, firmware = built(folder, *defines, on=on)
    limit = 60.0 + samples * facts.macs * 1e-6
    result = run(firmware, data, limit)
    if result.code == _DAMAGED:
        _, firmware = built(folder, *defines, _UNCHECKED, on=on)
        result = run(firmware, data, limit)
    return facts, result.checked()


def outputs(
    folder: Path, inputs: Sequence[NDArray[Any]], progress: Callable[[int, int], None] | None = None, on: str = ""
) -> list[NDArray[np.float32]]:
    """The program's outputs for a batch, (N, ...) each, as the firmware computes them.

    Raises:
        InputError: inputs that do not fit.
        FirmwareFault: the firmware ended by a fault.
    """
    facts = load(folder)
    if not inputs:
        raise InputError(f"{facts.name} has {len(facts.inputs)} inputs, none was given")
    total, each = len(inputs[0]), max(1, _PER_BOOT // max(facts.macs, 1))
    results: list[list[NDArray[np.float32]]] = [[] for _ in facts.outputs]
    for start in range(0, total, each):
        stop = min(start + each, total)
        data = b"".join(x.tobytes() for i in range(start, stop) for x in to_stored(facts.inputs, [v[i : i + 1] for v in inputs]))
        _, result = boot(folder, data, stop - start, on=on)
        pieces = iter(_split(result.output, [spec.size for spec in facts.outputs] * (stop - start)))
        for _ in range(start, stop):
            for kept, spec in zip(results, facts.outputs, strict=True):
                kept.append(from_stored(spec, next(pieces)))
        if progress is not None:
            progress(stop, total)
    ordered = sorted(zip(facts.outputs, results, strict=True), key=lambda pair: pair[0].source)
    return [np.concatenate(r) if r else np.zeros((0, *spec.shape[1:]), np.float32) for spec, r in ordered]


def tapped(folder: Path, program: FrozenProgram, sample: Sequence[NDArray[Any]], on: str = "") -> dict[str, NDArray[Any]]:
    """Each layer's output as the firmware computed it for one sample (1, ...), in the program's layout.

    The same project is built with ``-DMODEL_TAPS``: each step writes its output to the host after it ran.
    """
    facts = load(folder)
    firmware = prepare(program, facts.build.kernel_set, facts.build.stream)
    stored = to_stored(facts.inputs, sample)
    _, result = boot(folder, b"".join(x.tobytes() for x in stored), 1, "-DMODEL_TAPS", on=on)
    if firmware.stream is not None:
        return _tapped_steps(firmware, facts, stored, result.output)
    sizes = [size for *_, size in facts.steps]
    steps = _split(result.output, [*sizes, *(spec.size for spec in facts.outputs)])[: len(sizes)]
    tensors = {port.tensor: values for port, values in zip(firmware.inputs, stored, strict=True)}
    tensors |= {step.output: values for step, values in zip(firmware.steps, steps, strict=False)}
    return taps_of(firmware, tensors)


def _tapped_steps(firmware: Graph, facts: Facts, stored: Sequence[Int8], written: bytes) -> dict[str, NDArray[Any]]:
    """Each layer's outputs in all time steps as the program has them: (T, ...), or (1, ...) for what is computed once."""
    assert firmware.stream is not None
    stream, sizes = firmware.stream, [size for *_, size in facts.steps]
    ends = [firmware.tensors[p.tensor].size for p in firmware.outputs]
    order = [*sizes[: stream.once], *[*sizes[stream.once :], *(ends if stream.each else [])] * stream.count]
    pieces = iter(_split(written, [*order, *([] if stream.each else ends)]))
    before = {s.output: next(pieces) for s in firmware.steps[: stream.once]}
    found: dict[str, list[NDArray[Any]]] = {}
    for t in range(stream.count):
        tensors = dict(before)
        for port, values in zip(firmware.inputs, stored, strict=True):
            tensors[port.tensor] = np.split(values, stream.count)[t] if stream.sequence else values
        tensors |= {s.output: next(pieces) for s in firmware.steps[stream.once :]}
        if stream.each:
            [next(pieces) for _ in ends]
        for name, value in taps_of(firmware, tensors).items():
            found.setdefault(name, []).append(value)
    still = {s.layer for s in firmware.steps[: stream.once]} | (
        {name for name in found if not stream.sequence and _fed(firmware, name)}
    )
    last = {s.layer for s in firmware.steps if s.kind == "accumulate_step"}
    outputs = {firmware.tensors[p.tensor].name for p in firmware.outputs} if stream.each else set()
    return {
        name: values[-1] if name in still | last else np.concatenate(values, 1 if name in outputs else 0)
        for name, values in found.items()
    }


def _fed(firmware: Graph, name: str) -> bool:
    return firmware.root(firmware.taps[name]) in {p.tensor for p in firmware.inputs}


def _split(content: bytes, sizes: Sequence[int]) -> list[Int8]:
    if len(content) != sum(sizes):
        raise FirmwareFault(f"the firmware wrote {len(content)} bytes, {sum(sizes)} expected; export the program again")
    return np.split(np.frombuffer(content, np.int8), np.cumsum(sizes)[:-1]) if sizes else []
