"""A machine with Linux and Python: :mod:`edgekit.devices.runner` does the work there, whatever way leads to it.

A *way* is an object with ``close()`` and ``execute(folder, results, limit, told)``, which runs ``runner.py request.json`` on the
files of a local folder, leaves the files named ``results`` in it and returns how the process ended. :class:`Here` is the way to
this machine, or to an emulator on it; :mod:`edgekit.devices.ssh` has another. Files are sent under names of our own, inputs in
the file's own types (``encode`` of the target), so a device needs nothing but the runner.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.devices import kernels, runner, timing
from edgekit.errors import DeviceError, EdgekitError, FormatError, InputError, MissingTool, UnsupportedError
from edgekit.files import sha256
from edgekit.frozen import FrozenProgram
from edgekit.profile import Profile, Settings
from edgekit.targets import get
from edgekit.targets.cuts import cuts

__all__ = ["Ended", "File", "Here", "Linux", "Options", "connected", "follow", "options"]

Arrays = Sequence[NDArray[Any]]
Progress = Callable[[int, int], None]
GRACE = 15.0
"""Seconds that a runner gets beyond its own time limit."""


@dataclass(frozen=True)
class Options:
    """What can stand behind a device's name, as ``key=value`` joined by ``&``.

    Attributes:
        python: the interpreter there, such as /home/pi/venv/bin/python; "" for the device's usual one.
        runtime: the package to run files with where there is a choice (ai-edge-litert, tflite-runtime).
        time_limit: seconds that one request may take.
    """

    python: str = ""
    runtime: str = ""
    time_limit: float = 600.0


@dataclass(frozen=True)
class Ended:
    """How the runner's process ended: its exit code (negative: the signal) and what it wrote to standard error."""

    code: int
    stderr: str


@dataclass(frozen=True)
class File:
    """What is sent: a file, or bytes in its place; its target; its inputs (N, ...) in its own types; tensors to read as well."""

    source: Path | bytes
    target: str
    inputs: Arrays
    tensors: tuple[int, ...] = ()


def options(text: str, name: str) -> Options:
    """Options from ``key=value&key=value``; "" gives the defaults.

    Raises:
        InputError: an unknown key, or a value that cannot be used.
    """
    found = Options()
    for part in filter(None, text.split("&")):
        key, _, value = part.partition("=")
        if key not in ("python", "runtime", "time_limit") or not value:
            raise InputError(f"device {name!r}: {part!r} is no option; known are python=, runtime=, time_limit=")
        if key == "time_limit":
            try:
                found = replace(found, time_limit=float(value))
            except ValueError:
                raise InputError(f"device {name!r}: time_limit={value} is no number of seconds") from None
            if not 0 < found.time_limit < 1e6:
                raise InputError(f"device {name!r}: time_limit={value} must be between 0 and 1,000,000 seconds")
        else:
            found = replace(found, python=value) if key == "python" else replace(found, runtime=value)
    return found


class Here:
    """The runner as a process of this machine.

    Args:
        python: the command of the interpreter, in an emulator if need be.
    """

    def __init__(self, python: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        self.python, self.environment = list(python), environment

    def execute(self, folder: Path, results: Sequence[str], limit: float, told: Callable[[str], None]) -> Ended:
        """Run the request of ``folder`` in place; it ends when this process does."""
        shutil.copyfile(runner.__file__, folder / "runner.py")
        command = [*self.python, str(folder / "runner.py"), str(folder / "request.json"), "--watch"]
        with (folder / "stderr").open("w+b") as errors:
            try:
                process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, cwd=folder,
                    env=None if self.environment is None else dict(self.environment),
                )  # fmt: skip
            except OSError as error:
                raise MissingTool(f"{self.python[0]} cannot be started ({error.strerror}); give another with python=") from error
            ended = follow(process, limit, told)
            errors.seek(0)
            return Ended(ended, errors.read().decode(errors="replace"))

    def close(self) -> None:
        """Nothing is held."""


def follow(process: subprocess.Popen[bytes], limit: float, told: Callable[[str], None]) -> int:
    """Wait for a process, handing on its lines; it is killed when out of time, or when this is interrupted."""
    timer = threading.Timer(limit + GRACE, process.kill)
    timer.daemon = True
    timer.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            told(line.decode(errors="replace"))
        return process.wait()
    finally:
        timer.cancel()
        if process.poll() is None:
            process.kill()
            process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


@dataclass(frozen=True)
class Linux:
    """A machine with the members of a device; see :mod:`edgekit.devices`.

    Attributes:
        name: the device as on the command line.
        way: how the runner is reached.
        options: what stood behind the name.
        machine: what the runner's ``describe`` told, such as "machine", "packages".
    """

    name: str
    way: Any
    options: Options
    machine: Mapping[str, Any]

    @property
    def targets(self) -> tuple[str, ...]:
        """Targets whose runtime is installed there."""
        there = self.machine.get("packages", {})
        return tuple(t for t, packages in runner.RUNTIMES.items() if any(p in there for p in packages))

    def run(self, path: Path, target: str, inputs: Arrays, progress: Progress | None = None) -> list[NDArray[np.float32]]:
        """Outputs for a batch, one float32 array (N, ...) each."""
        module = get(target)
        _, ((outputs, _),) = self.ask("run", [File(Path(path), target, module.encode(path, inputs))], progress=progress)
        decoded: list[NDArray[np.float32]] = module.decode(path, outputs)
        return decoded

    def taps(self, path: Path, target: str, program: FrozenProgram, sample: Arrays) -> dict[str, NDArray[np.int8]]:
        """Each layer's int8 output for one sample."""
        return self.taps_each(path, target, program, [x[:1] for x in sample])[0]

    def taps_each(
        self, path: Path, target: str, program: FrozenProgram, samples: Arrays, progress: Progress | None = None
    ) -> list[dict[str, NDArray[np.int8]]]:
        """As :meth:`taps` for every sample of (N, ...), by one start of the runner."""
        module = get(target)
        older = target == "tflite" and self._runtime(target) == "tflite-runtime"
        tap = module.tap_file(path, program, copied=True) if older else module.tap_file(path, program)
        source = Path(path) if tap.data is None else tap.data
        sent = File(source, target, module.encode(path, samples), tap.tensors)
        _, ((outputs, tensors),) = self.ask("run", [sent], progress=progress)
        results = [*outputs, *tensors]
        return [tap.layers([y[i : i + 1] for y in results]) for i in range(len(samples[0]))]

    def _runtime(self, target: str) -> str:
        """The package that the runner takes there."""
        there = [p for p in runner.RUNTIMES[target] if p in self.machine.get("packages", {})]
        return self.options.runtime if self.options.runtime in runner.RUNTIMES[target] else next(iter(there), "")

    def profile(
        self,
        path: Path,
        target: str,
        program: FrozenProgram,
        settings: Settings,
        inputs: Arrays,
        progress: Progress | None = None,
    ) -> Profile:
        """Times of one inference, memory, and the machine before and after."""
        sent = File(Path(path), target, get(target).encode(path, [x[:1] for x in inputs]))
        result, (times,) = self.ask("profile", [sent], settings, progress)
        found = timing.profile(self.name, target, program.macs, settings, result, times[0])
        return self._layered(found, Path(path), target, program, settings) if settings.per_layer else found

    def _layered(self, found: Profile, path: Path, target: str, program: FrozenProgram, settings: Settings) -> Profile:
        """The profile with its layers, each timed alone, in turn with the others."""
        parts = cuts(path, target, program)
        if not parts:
            why = "this target's files cannot be cut into layers" if program.layers else "it has no integer layers to cut at"
            return replace(found, notes=(*found.notes, f"No times of layers: the runtime tells none, and {why}."))
        sent = [File(part.data, target, part.samples()) for part in parts]
        try:
            _, times = self.ask("profile", sent, replace(settings, seconds=None))
        except EdgekitError as error:
            return replace(found, notes=(*found.notes, f"No times of layers: timed alone, one of them failed ({error})."))
        return timing.with_layers(found, parts, [t[0][0] for t in times], {x.name: x.macs for x in program.layers})

    def ask(
        self, action: str, files: Sequence[File], settings: Settings | None = None, progress: Progress | None = None
    ) -> tuple[dict[str, Any], list[tuple[list[NDArray[Any]], list[NDArray[Any]]]]]:
        """One request: the runner's result, and for each file (outputs, tensors); for "profile" ([nanoseconds], []).

        Raises:
            EdgekitError: what the runner refused, or how it ended; the message names the device.
        """
        with tempfile.TemporaryDirectory(prefix="edgekit-") as work:
            return self._asked(Path(work), action, files, settings, progress)

    def _asked(
        self, work: Path, action: str, files: Sequence[File], settings: Settings | None, progress: Progress | None
    ) -> tuple[dict[str, Any], list[tuple[list[NDArray[Any]], list[NDArray[Any]]]]]:
        settings = settings or Settings()
        limit = self.options.time_limit + (settings.seconds or 0.0)
        entries = [_placed(work, i, file, self.options.runtime) for i, file in enumerate(files)]
        if library := kernels.library(self.name, self.machine, [work / e["file"] for e in entries]):
            shutil.copyfile(library, work / library.name)
        request = {
            "protocol": runner.PROTOCOL, "action": action, "files": entries, "times": "times.npz", "time_limit": limit,
            "settings": {k: getattr(settings, k) for k in ("num_threads", "num_runs", "warmup_runs", "seconds")},
        }  # fmt: skip
        (work / "request.json").write_text(json.dumps(request))
        names = ["times.npz"] if action == "profile" else [e["outputs"] for e in entries]
        ended = self.way.execute(work, ["result.json", *names], limit, _teller(progress))
        result = self._result(work / "result.json", ended, limit)
        if action == "profile":
            return result, [([t], []) for t in _arrays(work / "times.npz", "file")]
        return result, [(_arrays(work / name, "output"), _arrays(work / name, "tensor")) for name in names]

    def _result(self, path: Path, ended: Ended, limit: float) -> dict[str, Any]:
        try:
            result: dict[str, Any] = json.loads(path.read_text())
        except FileNotFoundError:
            raise _ended_badly(self.name, ended, limit) from None
        except ValueError as error:
            raise DeviceError(f"{self.name}: the runner's answer is damaged ({error}); try again") from error
        if not result["ok"]:
            raise _refused(self.name, **result["error"])
        return result

    def close(self) -> None:
        """Let go of the way."""
        self.way.close()


def connected(name: str, way: Any, given: Options) -> Linux:
    """A device at the end of a way, after it told what it is; the way is closed if that fails.

    Raises:
        MissingTool: it has no runtime of any target.
        UnsupportedError: its system has 32 bits.
        DeviceError: it cannot be reached.
    """
    try:
        result, _ = Linux(name, way, given, {}).ask("describe", [])
        device = Linux(name, way, given, result["machine"])
        if device.machine["bits"] != 64:
            raise UnsupportedError(
                f"{name}: its system has 32 bits ({device.machine['machine']}), for which the runtimes have no packages; "
                "install a 64-bit system"
            )
        if not device.targets:
            wanted = ", ".join(p for packages in runner.RUNTIMES.values() for p in packages)
            raise MissingTool(f"{name}: its Python {device.machine['python']} has none of {wanted}; install one there")
        return device
    except BaseException:
        way.close()
        raise


def _placed(work: Path, number: int, file: File, runtime: str) -> dict[str, Any]:
    """The file and its inputs in the folder, and its entry in the request."""
    name = f"file{number}{get(file.target).SUFFIX}"
    if isinstance(file.source, bytes):
        (work / name).write_bytes(file.source)
    else:
        shutil.copyfile(file.source, work / name)
    with (work / f"inputs{number}.npz").open("wb") as target:
        arrays: dict[str, Any] = {f"input{i}": x for i, x in enumerate(file.inputs)}
        np.savez(target, allow_pickle=False, **arrays)
    chosen = {"runtime": runtime} if runtime in runner.RUNTIMES[file.target] else {}
    return {
        "file": name, "target": file.target, "sha256": sha256(work / name), "inputs": f"inputs{number}.npz",
        "outputs": f"outputs{number}.npz", "tensors": list(file.tensors), **chosen,
    }  # fmt: skip


def _arrays(path: Path, kind: str) -> list[NDArray[Any]]:
    """Arrays ``kind0``, ``kind1``, ... of a file."""
    with np.load(path, allow_pickle=False) as archive:
        return [archive[f"{kind}{i}"] for i in range(sum(name.startswith(kind) for name in archive.files))]


def _teller(progress: Progress | None) -> Callable[[str], None]:
    def told(line: str) -> None:
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a runtime may print there too
            value = json.loads(line)
            if progress is not None:
                progress(int(value["done"]), int(value["total"]))

    return told


_KINDS: Mapping[str, type[EdgekitError]] = {
    "missing": MissingTool, "sha256": FormatError, "load": FormatError, "input": InputError, "protocol": DeviceError,
}  # fmt: skip


def _refused(name: str, kind: str, message: str) -> EdgekitError:
    return _KINDS.get(kind, DeviceError)(f"{name}: {message}")


def _ended_badly(name: str, ended: Ended, limit: float) -> EdgekitError:
    """One sentence for a runner that left no result."""
    number = -ended.code if ended.code < 0 else ended.code - 128 if ended.code > 128 else 0
    last = next((line.strip() for line in reversed(ended.stderr.splitlines()) if line.strip()), "it said nothing")[:300]
    if number == signal.SIGALRM:
        return DeviceError(f"{name}: not done within {limit:g} s and stopped; give more with time_limit=SECONDS")
    if number == signal.SIGKILL:
        return DeviceError(
            f"{name}: the runner was killed (signal 9), usually for want of memory; use fewer samples or close programs"
        )
    if number:
        return DeviceError(f"{name}: the runner crashed (signal {number}) in the runtime; its last line was: {last}")
    if ended.code == 127:
        return MissingTool(f"{name}: no Python there ({last}); give another with python=PATH")
    return DeviceError(f"{name}: the runner ended with exit code {ended.code}; its last line was: {last}")
