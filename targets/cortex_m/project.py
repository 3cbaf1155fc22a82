"""The folder that is exported: model, main program, runtime and build files; edgekit is not needed to build it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgekit.errors import FormatError
from edgekit.firmware_sim.boards import BOARDS, CORES, Board
from edgekit.firmware_sim.kernels import HEADERS, RUNTIME, SEMIHOST, SOURCES
from edgekit.firmware_sim.toolchain import COMPILE_FLAGS, LIBRARIES, LINK_FLAGS
from edgekit.targets.cortex_m import texts
from edgekit.targets.cortex_m.confidence import rule_of
from edgekit.targets.cortex_m.emit import model_c, model_h, step_name
from edgekit.targets.cortex_m.graph import Firmware, Spec
from edgekit.targets.cortex_m.preparation import specs

__all__ = ["BUILT", "FORMAT", "NAMES", "Build", "Facts", "files", "load"]

FORMAT = 1
"""Version of ``model.json``."""

BUILT = ("model.c", "model.h", "main.c", "model.json", *(f"runtime/{n}" for n in (*HEADERS, *SOURCES, SEMIHOST, "link.ld.S")))
"""Files of a project that edgekit builds it from."""
NAMES = (*BUILT, "Makefile", "CMakeLists.txt", "README.md")
"""Every file of a project."""


@dataclass(frozen=True)
class Build:
    """How a project is compiled: for which board, with which kernel set ("" for the core's own), optimization and stack.

    ``stream``: one time step of a spiking network a call. ``exit_threshold`` 0: there is no early exit.
    """

    target: str
    board: str
    kernels: str
    optimize: str
    stack_bytes: int
    stream: bool = False
    exit_threshold: float = 0.0
    exit_temperature: float = 1.0

    @property
    def defines(self) -> tuple[str, ...]:
        """Compiler flags that choose the kernel set."""
        sets = {"portable": 0, "dsp": 1, "mve": 2}
        return (f"-DEK_SET={sets[self.kernels]}",) if self.kernels else ()

    @property
    def kernel_set(self) -> str:
        """The kernel set that is compiled."""
        return self.kernels or CORES[BOARDS[self.board].core].kernel_set


@dataclass(frozen=True)
class Facts:
    """``model.json``: what a host has to know to feed the firmware and to read what comes out.

    ``steps`` are (function, layer, kernel, bytes of its output) in order: with ``-DMODEL_TAPS`` these outputs are written one
    after the other before the outputs themselves. ``count``: time steps of a sample, one a call; the first ``once``
    of ``steps`` run once, the others in each. 0: an inference a call.
    """

    name: str
    build: Build
    inputs: tuple[Spec, ...]
    outputs: tuple[Spec, ...]
    steps: tuple[tuple[str, str, str, int], ...]
    macs: int
    arena: int
    bound: int
    count: int = 0
    once: int = 0

    @staticmethod
    def of(firmware: Firmware, build: Build) -> Facts:
        """Those of a planned firmware."""
        stream = firmware.stream
        return Facts(
            name=firmware.name,
            build=build,
            inputs=stream.inputs if stream else specs(firmware, firmware.inputs),
            outputs=stream.outputs if stream else specs(firmware, firmware.outputs),
            steps=tuple(
                (step_name(i, s), s.layer, s.kind, firmware.tensors[s.output].size) for i, s in enumerate(firmware.steps)
            ),
            macs=stream.macs if stream else firmware.macs,
            arena=firmware.arena,
            bound=firmware.bound,
            count=stream.count if stream else 0,
            once=stream.once if stream else 0,
        )


def files(firmware: Firmware, build: Build) -> dict[str, str]:
    """Every file of the project: path in the folder to its text."""
    facts, board = Facts.of(firmware, build), BOARDS[build.board]
    values = _values(firmware, build, board)
    rule = rule_of(firmware, build.exit_temperature, build.exit_threshold) if build.exit_threshold else None
    found = {
        "model.c": model_c(firmware, rule),
        "model.h": model_h(firmware, rule is not None),
        "model.json": json.dumps({"format": FORMAT, **asdict(facts)}, indent=1) + "\n",
        "main.c": texts.main_c(len(firmware.inputs), len(firmware.outputs), firmware.stream, rule is not None),
        "Makefile": texts.filled(texts.MAKEFILE, values),
        "CMakeLists.txt": texts.filled(texts.CMAKE, values),
        "README.md": texts.filled(texts.README, values),
    }
    for name in (*HEADERS, *SOURCES, SEMIHOST, "link.ld.S"):
        found[f"runtime/{name}"] = (RUNTIME / name).read_text()
    return found


def load(folder: Path) -> Facts:
    """The facts of an exported project.

    Raises:
        FormatError: no project, damaged, or from a newer edgekit.
    """
    path = Path(folder) / "model.json"
    try:
        value: dict[str, Any] = json.loads(path.read_text())
        if int(value.pop("format")) > FORMAT:
            raise FormatError(f"{path}: from a newer edgekit; upgrade edgekit")
        value["build"] = Build(**value["build"])
        for key in ("inputs", "outputs"):
            value[key] = tuple(Spec(**{**v, "shape": tuple(v["shape"])}) for v in value[key])
        value["steps"] = tuple((str(f), str(name), str(k), int(n)) for f, name, k, n in value["steps"])
        return Facts(**value)
    except FileNotFoundError:
        raise FormatError(f"{folder}: no exported firmware (no model.json); export the program again") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{path}: damaged ({error}); export the program again") from None


def _calls(firmware: Firmware, exits: bool) -> str:
    if firmware.stream is None:
        return texts.CALLS
    found = texts.CALLS_SEQUENCE if firmware.stream.sequence else texts.CALLS_CONSTANT
    stop = "\n        if (model_sure()) break;         /* Dynamic Confidence: the sum is sure enough */"
    return found.replace("@sure@", stop if exits else "")


def _values(firmware: Firmware, build: Build, board: Board) -> Mapping[str, str]:
    sources = [*(f"runtime/{name}" for name in SOURCES)]
    flags = [*COMPILE_FLAGS, f"-{build.optimize}"]
    memory = [
        f"-DFLASH_BASE={board.flash_base:#x}", f"-DFLASH_SIZE={board.flash_bytes:#x}", f"-DRAM_BASE={board.ram_base:#x}",
        f"-DRAM_SIZE={board.ram_bytes:#x}", f"-DSTACK_SIZE={build.stack_bytes:#x}",
    ]  # fmt: skip
    inputs, outputs = specs(firmware, firmware.inputs), specs(firmware, firmware.outputs)
    return {
        "name": firmware.name,
        "target": build.target,
        "board": board.name,
        "title": board.title,
        "kernel_set": build.kernel_set,
        "core": " ".join(CORES[board.core].flags),
        "flags": " ".join(flags),
        "defines": " ".join((*board.defines, *build.defines)),
        "memory": " ".join(memory),
        "sources": " ".join(sources),
        "host": f"runtime/{SEMIHOST}",
        "link": " ".join(LINK_FLAGS),
        "libraries": " ".join(LIBRARIES),
        "macs": f"{firmware.macs:,}",
        "arena": f"{firmware.arena:,}",
        "bound": f"{firmware.bound:,}",
        "stack": f"{build.stack_bytes:,}",
        "inputs": texts.ports("input", inputs),
        "outputs": texts.ports("output", outputs),
        "calls": _calls(firmware, build.exit_threshold > 0),
        "packed": texts.PACKED if any(1 < s.bits < 8 for s in firmware.steps) else "",
    }
