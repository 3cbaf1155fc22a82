"""``qemu-aarch64``: an emulated arm64 Linux with the wheels that a Raspberry Pi takes. It has instructions, not time.

``qemu-aarch64:cpu=CPU&runtime=RUNTIME``, both may be left out: CPU is one of :data:`edgekit.devices.arm64_cpu.CPUS` (cortex-a76),
RUNTIME a package of :data:`edgekit.devices.arm64_root.RUNTIMES` where several run a target. The Linux comes from ``edgekit
setup-sim arm64``; each of its processes is one ``qemu-aarch64`` in user mode, which needs no rights. Programs of one's own run
there too:

    python -m edgekit.devices.emulated_linux [--cpu CPU] SCRIPT [ARGUMENT ...]
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from edgekit.devices import arm64_root, instruction_clock
from edgekit.devices.arm64_cpu import CPUS
from edgekit.devices.linux import Arrays, File, Here, Linux, Options, Progress, options
from edgekit.errors import EdgekitError, InputError, MissingTool, UnsupportedError
from edgekit.firmware_sim import clock
from edgekit.frozen import FrozenProgram
from edgekit.profile import Profile, Settings
from edgekit.targets import get

__all__ = ["NAME", "EmulatedLinux", "command", "connect", "environment", "main"]

NAME = "qemu-aarch64"
_CPU = "cortex-a76"
_EMULATORS = {"qemu-aarch64-static": "qemu-user-static", "qemu-aarch64": "qemu-user"}
"""Program to Debian package; the second one is for plugins, which a static program cannot load."""


def connect(spec: str) -> EmulatedLinux:
    """The device of ``qemu-aarch64[:cpu=CPU&runtime=RUNTIME&time_limit=SECONDS]``.

    Raises:
        InputError: no such option, CPU or runtime.
        MissingTool: the emulator, the arm64 Linux or the runtime is not installed.
    """
    cpu, given = _options(spec)
    _emulator("qemu-aarch64-static")
    there = arm64_root.installed()
    if not there or not arm64_root.python(cpu).exists():
        raise MissingTool(f"device {spec!r}: there is no arm64 Linux yet; run: edgekit setup-sim arm64")
    if given.runtime and given.runtime not in there:
        raise MissingTool(
            f"device {spec!r}: {given.runtime} is not in the arm64 Linux; run: edgekit setup-sim arm64 --runtime {given.runtime}"
        )
    kept = [*([f"cpu={cpu}"] if cpu != _CPU else []), *([f"runtime={given.runtime}"] if given.runtime else [])]
    name = ":".join(filter(None, (NAME, "&".join(kept))))
    wheels = {w: arm64_root.WHEELS[w].version for n in there for w in arm64_root.RUNTIMES[n]}
    machine = {"machine": "aarch64", "bits": 64, "python": "3.11", "packages": wheels, "processor": cpu}
    return EmulatedLinux(name, Here(command(cpu), environment()), given, machine, cpu)


@dataclass(frozen=True)
class EmulatedLinux(Linux):
    """A Linux device whose profile is a count of instructions; ``cpu`` is what the emulator takes itself for."""

    cpu: str = _CPU

    @property
    def targets(self) -> tuple[str, ...]:
        """Targets whose runtime is installed and runs on this processor."""
        return tuple(t for t in super().targets if t != "executorch" or _has_atomics(self.cpu))

    def profile(
        self,
        path: Path,
        target: str,
        program: FrozenProgram,
        settings: Settings,
        inputs: Arrays,
        progress: Progress | None = None,
    ) -> Profile:
        """Instructions of one call of the runtime for the first sample on one thread, and of loading the file.

        Raises:
            MissingTool: the emulator that takes plugins, or gcc for the plugin, is not installed.
        """
        runs = max(3, min(settings.num_runs, 9))  # enough to see that they agree
        wanted = Settings(num_threads=1, num_runs=runs, warmup_runs=max(3, min(settings.warmup_runs, 5)))
        sent = File(Path(path), target, get(target).encode(path, [x[:1] for x in inputs]))
        with tempfile.TemporaryDirectory(prefix="edgekit-") as folder:
            way, overhead = _counting(self.cpu, Path(folder))
            result, (((counts,), _),) = replace(self, way=way).ask("profile", [sent], wanted, progress)
            own = int(overhead.read_text())
        counts, facts = counts - own, result["files"][0]
        figures = {
            "least_instructions": counts.min(), "most_instructions": counts.max(),
            "load_instructions": 1e3 * facts["load_microseconds"], "first_instructions": 1e3 * facts["first_microseconds"],
        }  # fmt: skip
        method = (
            f"instructions of one call of {facts['runtime']} {facts['version']} as {self.cpu} on one thread, median of {runs} "
            f"calls, counted by a plugin of the emulator; {own} that an empty measurement takes are taken off"
        )
        return Profile(
            device=self.name, target=target, file="", sha256=facts["sha256"], unit="instructions", total=float(np.median(counts)),
            macs=sum(layer.macs for layer in program.layers), figures={k: float(v) for k, v in figures.items()}, method=method,
            notes=(
                "an emulator has no clock: instructions are not time, and no latency is given",
                "not by layer: the kernels have no names in the runtimes' wheels",
                *(["one thread instead of the threads asked for"] if settings.num_threads != 1 else []),
                *(["a sustained run shows heat and throttling, which an emulator has not; left out"] if settings.seconds else []),
            ),
        )  # fmt: skip


def command(cpu: str = _CPU, *plugin: str) -> list[str]:
    """What runs the arm64 Linux's Python as that CPU; its arguments are to follow."""
    emulator = _emulator("qemu-aarch64" if plugin else "qemu-aarch64-static")
    loaded = [word for one in plugin for word in ("-plugin", one)]
    return [emulator, "-cpu", cpu, "-L", str(arm64_root.root(cpu)), *loaded, str(arm64_root.python(cpu))]


def environment() -> dict[str, str]:
    """Variables of such a process: nothing of this machine's, so that no package of it is found there.

    Compiled modules are kept beside the parts: compiling torch's again takes the emulator half a minute.
    """
    return {
        "PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "LANG": "C.UTF-8", "EDGEKIT_EMULATED": "1", "OMP_NUM_THREADS": "1",
        "PYTHONPYCACHEPREFIX": str(arm64_root.bytecode()), "PYTHONNOUSERSITE": "1", "PYTHONHASHSEED": "0",
        "PYTHONPATH": arm64_root.python_path(),
    }  # fmt: skip


def _counting(cpu: str, folder: Path) -> tuple[Here, Path]:
    """A way on which the runner's nanoseconds are instructions, and the file that will say what measuring costs."""
    counter, overhead = folder / "counter", folder / "overhead"
    counter.write_bytes(bytes(8))
    run = command(cpu, f"{clock.build(folder)},out={counter}")
    return Here([*run, str(instruction_clock.__file__), str(counter), str(overhead)], environment()), overhead


def _options(spec: str) -> tuple[str, Options]:
    cpu, rest = _CPU, []
    for word in filter(None, spec.partition(":")[2].split("&")):
        if not word.startswith("cpu="):
            rest.append(word)
            continue
        cpu = word.removeprefix("cpu=")
        if cpu not in CPUS:
            raise InputError(f"device {spec!r}: {cpu!r} is no CPU; choose one of: {', '.join(CPUS)}")
    given = options("&".join(rest), spec)
    if given.python:
        raise InputError(f"device {spec!r}: the arm64 Linux has one Python; leave python= out")
    if given.runtime and given.runtime not in arm64_root.RUNTIMES:
        raise InputError(f"device {spec!r}: {given.runtime!r} is no runtime; choose one of: {', '.join(arm64_root.RUNTIMES)}")
    if given.runtime == "executorch" and not _has_atomics(cpu):
        raise UnsupportedError(
            f"device {spec!r}: torch's aarch64 wheels begin with atomic instructions of Armv8.1, which a {cpu} "
            f"({CPUS[cpu].boards}) does not have; use a .tflite or .onnx file there"
        )
    return cpu, given


def _has_atomics(cpu: str) -> bool:
    """Whether torch 2.10.0 can be imported: its wheel has LDADDAL in code that runs at once, and ends by SIGILL elsewhere."""
    return "atomics" in CPUS[cpu].features.split()


def _emulator(program: str) -> str:
    path = shutil.which(program)
    if path is None:
        raise MissingTool(f"{program} is not installed; on Debian and Ubuntu run: apt-get install {_EMULATORS[program]}")
    return path


def main(arguments: Sequence[str]) -> int:
    """Run a script in the arm64 Linux and give its exit code."""
    words: list[Any] = list(arguments)
    cpu = words[1] if words[:1] == ["--cpu"] and len(words) > 1 else _CPU
    words = words[2:] if words[:1] == ["--cpu"] else words
    if not words:
        print(f"usage: python -m edgekit.devices.emulated_linux [--cpu {'|'.join(CPUS)}] SCRIPT [ARGUMENT ...]", file=sys.stderr)
        return 2
    try:
        device = connect(f"{NAME}:cpu={cpu}")
        return subprocess.run([*command(device.cpu), *words], env=environment()).returncode
    except EdgekitError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
