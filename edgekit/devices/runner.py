"""Run or measure exported files: one program, the same on a host, in an emulator and on a board.

    python3 runner.py request.json [--watch]

It is shipped as this one file and needs Python 3.9, numpy and the runtime of the files. Paths in a request are relative to it.

    {"protocol": 1, "action": "run", "result": "result.json", "time_limit": 600,
     "files": [{"file": "model.tflite", "target": "tflite", "sha256": "...", "inputs": "in.npz", "outputs": "out.npz"}],
     "settings": {"num_threads": 1}}

``run`` reads arrays ``input0``, ``input1``, ... (N, ...) in the file's own types and layouts, runs one sample after the other
and writes ``output0``, ... (N, ...); ``tensors`` of a file (numbers, TFLite only) adds ``tensor0``, .... ``profile`` times the
calls on the first sample, several files in turn, and writes ``times`` (npz: one int64 array of nanoseconds for each file).
``describe`` takes no files and tells the machine. The result says what happened ("ok", or "error" with a kind and one sentence),
the machine before and after, load times and memory. Every file is written whole or not at all; arrays are never pickles. With
``--watch`` the runner ends when its standard input closes, so that it does not outlive the connection that started it.

As a module: ``program = open_program("model.tflite"); (logits,) = program([image])``.

It is longer than other files because it has to be one file; its syntax is Python 3.9's (no ``zip(strict=...)``, no ``match``).
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import gc
import glob
import hashlib
import importlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = [
    "PROTOCOL",
    "Program",
    "Refused",
    "Spec",
    "load_runtime",
    "machine",
    "main",
    "measure",
    "open_program",
    "serve",
    "sha256",
    "state",
    "throttled",
    "version",
]

PROTOCOL = 1
TIMES_KEPT = 200_000
KERNELS = "libedgekit_kernels.so"
SUFFIXES = {".pte": "executorch", ".tflite": "tflite", ".onnx": "onnx"}
PACKAGES = ("numpy", "torch", "executorch", "ai-edge-litert", "tflite-runtime", "onnxruntime")
RUNTIMES: dict[str, dict[str, tuple[str, ...]]] = {
    "executorch": {"executorch": ("torch", "executorch.kernels.quantized", "executorch.extension.pybindings._portable_lib")},
    "tflite": {"ai-edge-litert": ("ai_edge_litert.interpreter",), "tflite-runtime": ("tflite_runtime.interpreter",)},
    "onnx": {"onnxruntime": ("onnxruntime",)},
}
"""Target to the packages that can run its files, in order of preference, and what is imported of each."""


class Refused(Exception):
    """What cannot be done: a kind for programs and one sentence for people."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Spec:
    """An input or output of a file; scale and zero point where it is quantized."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    scale: float | None = None
    zero_point: int | None = None

    def quantize(self, x: Any) -> Any:
        """A real array in the type that the file takes."""
        import numpy as np

        x = np.asarray(x)
        if self.scale and x.dtype.kind == "f":
            limits = np.iinfo(self.dtype)
            x = np.clip(np.rint(x.astype(np.float32) * np.float32(1.0 / self.scale)) + self.zero_point, limits.min, limits.max)
        return np.ascontiguousarray(x, dtype=self.dtype)

    def dequantize(self, y: Any) -> Any:
        """A result of the file as float32."""
        import numpy as np

        if self.scale:
            return (y.astype(np.float32) - np.float32(self.zero_point)) * np.float32(self.scale)
        return y.astype(np.float32)


@dataclass(frozen=True)
class Program:
    """A file opened in its runtime: ``feed`` a sample, ``call`` (the timed part), ``fetch`` what came out."""

    runtime: str
    version: str
    feed: Callable[[Sequence[Any]], None]
    call: Callable[[], Any]
    fetch: Callable[[], list[Any]]
    inputs: tuple[Spec, ...] = field(default=())
    outputs: tuple[Spec, ...] = field(default=())

    def __call__(self, sample: Sequence[Any]) -> list[Any]:
        """Outputs of one sample (batch of one), as float32; real inputs are quantized where the file takes integers."""
        if self.inputs and len(sample) != len(self.inputs):
            raise Refused("input", f"the file takes {len(self.inputs)} inputs, {len(sample)} were given")
        self.feed([self.inputs[i].quantize(x) if self.inputs else x for i, x in enumerate(sample)])
        self.call()
        return [self.outputs[i].dequantize(y) if self.outputs else y for i, y in enumerate(self.fetch())]


def open_program(
    path: str, target: str | None = None, threads: int = 1, runtime: str | None = None, tensors: Sequence[int] = ()
) -> Program:
    """Load a file; ``runtime`` is the name of a package where there is a choice.

    Raises:
        Refused: no runtime, or the runtime cannot load the file.
    """
    target = target or SUFFIXES.get(os.path.splitext(path)[1], "")
    name, module = load_runtime(target, runtime)
    try:
        return OPENERS[target](module, name, path, threads, tensors)
    except Refused:
        raise
    except Exception as error:  # each runtime has exceptions of its own
        raise Refused("load", f"{name} {version(name)} refuses {os.path.basename(path)}: {_first_line(error)}") from error


def load_runtime(target: str, wanted: str | None = None) -> tuple[str, Any]:
    """Name and imported module of a runtime for the target.

    Raises:
        Refused: none is installed, or it cannot be imported here.
    """
    known = RUNTIMES.get(target, {})
    if not known or (wanted and wanted not in known):
        raise Refused("request", f"target {target!r} with runtime {wanted or 'any'}: known are {RUNTIMES}")
    problems = []
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # onnxruntime would note its use in the home folder
    for name in [wanted] if wanted else known:
        if version(name) is None:
            continue
        try:
            return name, [importlib.import_module(part) for part in known[name]][-1]
        except (ImportError, OSError) as error:
            problems.append(f"{name} {version(name)} is installed but cannot be loaded ({_first_line(error)})")
    first = wanted or next(iter(known))
    absent = f"{wanted or ' or '.join(known)} is not installed here; run: {sys.executable} -m pip install {first}"
    raise Refused("missing", "; ".join(problems) or absent)


def _tflite(library: Any, name: str, path: str, threads: int, tensors: Sequence[int]) -> Program:
    more = {"experimental_preserve_all_tensors": True} if tensors else {}
    interpreter = library.Interpreter(model_path=path, num_threads=threads, **more)
    interpreter.allocate_tensors()
    inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()

    def spec(d: dict[str, Any]) -> Spec:
        scales, zero_points = d["quantization_parameters"]["scales"], d["quantization_parameters"]["zero_points"]
        one = len(scales) == 1
        kind = d["dtype"].__name__
        return Spec(
            d["name"], tuple(map(int, d["shape"])), kind, float(scales[0]) if one else None, int(zero_points[0]) if one else None
        )

    def feed(sample: Sequence[Any]) -> None:
        for d, x in zip(inputs, sample):
            interpreter.set_tensor(d["index"], x)

    def fetch() -> list[Any]:
        return [interpreter.get_tensor(i) for i in [*(d["index"] for d in outputs), *tensors]]

    specs = tuple(map(spec, inputs)), tuple(map(spec, outputs))
    return Program(name, version(name) or "", feed, interpreter.invoke, fetch, *specs)


def _executorch(library: Any, name: str, path: str, threads: int, tensors: Sequence[int]) -> Program:
    torch = importlib.import_module("torch")
    _load_kernels(library, path)
    module = library._load_for_executorch(path)
    if hasattr(library, "_unsafe_reset_threadpool"):
        library._unsafe_reset_threadpool(threads)
    given: list[Any] = []
    found: list[Any] = []

    def feed(sample: Sequence[Any]) -> None:
        given[:] = [torch.from_numpy(x) for x in sample]

    def call() -> None:
        found[:] = module.forward(given)

    def fetch() -> list[Any]:
        return [y.numpy().copy() for y in found]

    def specs(kind: str) -> tuple[Spec, ...]:
        meta = module.method_meta("forward")
        every = [getattr(meta, f"{kind}_tensor_meta")(i) for i in range(getattr(meta, f"num_{kind}s")())]
        types = {0: "uint8", 1: "int8", 3: "int32", 4: "int64", 6: "float32", 11: "bool"}
        return tuple(Spec(f"{kind}_{i}", tuple(m.sizes()), types.get(int(m.dtype()), "float32")) for i, m in enumerate(every))

    try:
        both = specs("input"), specs("output")
    except (AttributeError, TypeError, RuntimeError):  # older runtimes do not tell
        both = (), ()
    return Program(name, version(name) or "", feed, call, fetch, *both)


def _load_kernels(library: Any, path: str) -> None:
    """edgekit's kernels of 1-bit layers, where a file calls them; a second copy would end the process."""
    with open(path, "rb") as file:
        needed = b"edgekit_kernels::" in file.read()
    if needed and not any(name.startswith("edgekit_kernels::") for name in library._get_operator_names()):
        kernels = os.path.join(os.path.dirname(os.path.abspath(path)), KERNELS)
        if not os.path.exists(kernels):
            raise Refused("missing", f"{os.path.basename(path)} has 1-bit layers, whose kernels ({KERNELS}) are not beside it")
        ctypes.CDLL(kernels)


def _onnx(library: Any, name: str, path: str, threads: int, tensors: Sequence[int]) -> Program:
    options = library.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    if platform.machine().lower() in ("x86_64", "amd64", "i686") and "vnni" not in _read("/proc/cpuinfo"):
        options.add_session_config_entry("session.x64quantprecision", "1")  # else 16-bit sums saturate
    session = library.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    given: dict[str, Any] = {}
    found: list[Any] = []

    def feed(sample: Sequence[Any]) -> None:
        given.update(zip((i.name for i in session.get_inputs()), sample))

    def call() -> None:
        found[:] = session.run(None, given)

    def spec(value: Any) -> Spec:
        kind = value.type[7:-1]  # tensor(float)
        return Spec(value.name, tuple(d if isinstance(d, int) else 1 for d in value.shape), {"float": "float32"}.get(kind, kind))

    specs = tuple(map(spec, session.get_inputs())), tuple(map(spec, session.get_outputs()))
    return Program(name, version(name) or "", feed, call, lambda: list(found), *specs)


OPENERS = {"executorch": _executorch, "tflite": _tflite, "onnx": _onnx}


def version(package: str) -> str | None:
    """Installed version, None if it is not there; imports nothing of it."""
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """What decides how fast this machine is, and does not change by itself. No host name, user name or path."""
    cpu = _read("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in cpu.splitlines() if line.startswith(("model name", "Model", "Hardware"))]
    governors = {_read(p).strip() for p in glob.glob("/sys/devices/system/cpu/cpu*/cpufreq/scaling_governor")}
    limits = [_number(p) for p in glob.glob("/sys/devices/system/cpu/cpu*/cpufreq/cpuinfo_max_freq")]
    total = [line.split()[1] for line in _read("/proc/meminfo").splitlines() if line.startswith("MemTotal")]
    return {
        "machine": platform.machine(),
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "board": _read("/proc/device-tree/model").strip("\0 \n") or None,
        "virtual": "hypervisor" in cpu,
        "cores": os.cpu_count(),
        "usable_cores": len(_cpus()),
        "governor": ", ".join(sorted(governors)) or None,
        "max_megahertz": max((x // 1000 for x in limits if x), default=None),
        "memory_megabytes": int(total[0]) // 1024 if total else None,
        "system": _os_name(),
        "kernel": platform.release(),
        "bits": 64 if sys.maxsize > 2**32 else 32,
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES for found in [version(name)] if found},
    }


def state() -> dict[str, Any]:
    """What changes by itself: temperature, clock, throttling, load. Absent figures are None."""
    heat = [_number(p) for p in glob.glob("/sys/class/thermal/thermal_zone*/temp")]
    clocks = [_number(p) for p in glob.glob("/sys/devices/system/cpu/cpu*/cpufreq/scaling_cur_freq")]
    return {
        "temperature_celsius": max((x / 1000 for x in heat if x), default=None),
        "megahertz": max((x // 1000 for x in clocks if x), default=None),
        "throttled": throttled(),
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def throttled() -> str | None:
    """The Raspberry Pi firmware's flags in words, "" for none, None where there is no such firmware."""
    text = _read("/sys/devices/platform/soc/soc:firmware/get_throttled").strip()
    program = shutil.which("vcgencmd")
    if not text and program:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            done = subprocess.run([program, "get_throttled"], capture_output=True, text=True, timeout=5)
            text = done.stdout.strip().partition("=")[2]
    try:
        flags = int(text, 16)
    except ValueError:
        return None
    words = ["under-voltage", "frequency capped", "throttled", "soft temperature limit"]
    now = [w for i, w in enumerate(words) if flags >> i & 1]
    return ", ".join(now + [f"{w} since boot" for i, w in enumerate(words) if flags >> (16 + i) & 1])


def _cpus() -> list[int]:
    """Numbers of the processors that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def _pin(threads: int) -> list[int] | None:
    """Stay on the ``threads`` fastest processors (the last of equals); None where that is not allowed or leaves no choice."""
    usable = _cpus()
    if threads >= len(usable):
        return None
    fastest = sorted(usable, key=lambda c: (_number(f"/sys/devices/system/cpu/cpu{c}/cpufreq/cpuinfo_max_freq") or 0, c))
    chosen = sorted(fastest[-threads:])
    try:
        os.sched_setaffinity(0, chosen)
    except (OSError, AttributeError):
        return None
    return chosen


def _memory(key: str) -> int | None:
    """Bytes of this process: "VmRSS" now, "VmHWM" at its peak."""
    for line in _read("/proc/self/status").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return None


def measure(
    programs: Sequence[Program], num_runs: int, warmup_runs: int, seconds: float | None = None
) -> tuple[list[Any], list[dict[str, Any]]]:
    """Nanoseconds of every timed call for each program, the programs in turn; and a row a second of a sustained run."""
    times, clock = [array.array("q") for _ in programs], time.perf_counter_ns
    pairs = [(p.call, t.append) for p, t in zip(programs, times)]
    start = clock()
    for _ in range(warmup_runs):
        for call, _ in pairs:
            call()
    each = max(1, clock() - start) / max(1, warmup_runs)
    # a call of microseconds for minutes: time every k-th, or the list of times would be what fills the memory
    skipped = int((seconds or 0) * 1e9 / each / TIMES_KEPT) if warmup_runs else 0
    rows: list[dict[str, Any]] = []
    begin = mark = clock()
    seen, done, collecting = 0, 0, gc.isenabled()
    gc.disable()
    try:
        while done < num_runs or (seconds is not None and clock() - begin < seconds * 1e9):
            for call, note in pairs:
                for _ in range(skipped):
                    call()
                before = clock()
                call()
                note(clock() - before)
            done += 1
            if seconds is not None and clock() - mark >= 1e9:
                part = sorted(times[0][seen:])
                row = {"seconds": (clock() - begin) / 1e9, "median_microseconds": part[len(part) // 2] / 1e3}
                now = state()
                rows.append({**row, "temperature_celsius": now["temperature_celsius"], "megahertz": now["megahertz"]})
                seen, mark = len(times[0]), clock()
    finally:
        if collecting:
            gc.enable()
    return times, rows


def serve(request: dict[str, Any], folder: str) -> dict[str, Any]:
    """Do what a request asks; its result as plain values."""
    if request.get("protocol") != PROTOCOL:
        raise Refused(
            "protocol", f"the request is of protocol {request.get('protocol')}, this runner speaks {PROTOCOL}; use edgekit's own"
        )
    settings, action = dict(request.get("settings") or {}), request.get("action")
    threads = int(settings.get("num_threads", 1))
    if action == "describe":
        return {"machine": machine(), "before": state()}
    if action not in ("run", "profile"):
        raise Refused("request", f"action {action!r} is none of run, profile, describe")
    where = machine()
    pinned = _pin(threads) if action == "profile" and settings.get("pin", True) else None
    before, began, own, busy = state(), time.monotonic(), time.process_time(), _busy_seconds()
    opened = [_opened(entry, folder, threads) for entry in request["files"]]
    result: dict[str, Any] = {"files": [facts for _, facts, _ in opened], "pinned": pinned, "before": before}
    if action == "run":
        for (program, facts, arrays), entry in zip(opened, request["files"]):
            facts["samples"] = _run(program, arrays, entry, folder)
    else:
        programs = [program for program, _, _ in opened]
        times, result["series"] = measure(
            programs, int(settings.get("num_runs", 50)), int(settings.get("warmup_runs", 5)), settings.get("seconds")
        )
        import numpy as np

        _save_arrays(
            os.path.join(folder, request["times"]), {f"file{i}": np.array(t, dtype=np.int64) for i, t in enumerate(times)}
        )
    wall, others = time.monotonic() - began, _busy_seconds()
    if busy is not None and others is not None and wall > 0.05:
        used = others - busy - (time.process_time() - own)
        result["other_load"] = max(0.0, used / wall / (os.cpu_count() or 1))
    return {**result, "after": state(), "machine": where, "peak_rss_bytes": _memory("VmHWM")}


def _opened(entry: dict[str, Any], folder: str, threads: int) -> tuple[Program, dict[str, Any], list[Any]]:
    """A file whose bytes were checked, opened and run once on its first sample; facts about that; its input arrays."""
    import numpy as np

    path = os.path.join(folder, entry["file"])
    digest = sha256(path)
    if digest != entry.get("sha256"):
        stated = str(entry.get("sha256"))[:12]
        raise Refused(
            "sha256", f"{entry['file']} is not the file of the request (SHA-256 {digest[:12]}, not {stated}); copy it again"
        )
    with np.load(os.path.join(folder, entry["inputs"]), allow_pickle=False) as archive:
        arrays = [archive[f"input{i}"] for i in range(len(archive.files))]
    load_runtime(entry["target"], entry.get("runtime"))  # so that load time and memory are the file's alone
    base, start = _memory("VmRSS"), time.perf_counter_ns()
    program = open_program(path, entry["target"], threads, entry.get("runtime"), entry.get("tensors", ()))
    loaded = time.perf_counter_ns()
    if program.inputs and [s.shape[1:] for s in program.inputs] != [x.shape[1:] for x in arrays]:
        wanted = ", ".join(str(s.shape) for s in program.inputs)
        raise Refused("input", f"{entry['file']} takes {wanted}, the samples are {', '.join(str(x.shape) for x in arrays)}")
    try:
        program.feed([np.ascontiguousarray(x[:1]) for x in arrays])
        program.call()
    except (RuntimeError, ValueError) as error:
        raise Refused("load", f"{program.runtime} {program.version} refuses {entry['file']}: {_first_line(error)}") from error
    facts = {
        "file": entry["file"], "sha256": digest, "runtime": program.runtime, "version": program.version,
        "load_microseconds": (loaded - start) / 1e3, "first_microseconds": (time.perf_counter_ns() - loaded) / 1e3,
        "rss_before_bytes": base, "rss_loaded_bytes": _memory("VmRSS"),
    }  # fmt: skip
    return program, facts, arrays


def _run(program: Program, arrays: Sequence[Any], entry: dict[str, Any], folder: str) -> int:
    import numpy as np

    columns: list[list[Any]] = []
    total, told = len(arrays[0]), 0.0
    for i in range(total):
        program.feed([np.ascontiguousarray(x[i : i + 1]) for x in arrays])
        program.call()
        columns.append([np.array(y) for y in program.fetch()])
        if time.monotonic() - told > 0.5 or i + 1 == total:
            told = time.monotonic()
            print(json.dumps({"file": entry["file"], "done": i + 1, "total": total}), flush=True)
    joined = [np.stack(c) if c[0].ndim == 0 else np.concatenate(c) for c in zip(*columns)]
    count = len(joined) - len(entry.get("tensors", ()))
    names = [f"output{i}" if i < count else f"tensor{i - count}" for i in range(len(joined))]
    _save_arrays(os.path.join(folder, entry["outputs"]), dict(zip(names, joined)))
    return total


def _save_arrays(path: str, arrays: dict[str, Any]) -> None:
    """An npz file, whole or not at all."""
    import numpy as np

    with _whole(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)


@contextlib.contextmanager
def _whole(path: str) -> Iterator[str]:
    """A temporary name that becomes ``path`` if all goes well."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def _busy_seconds() -> float | None:
    """Processor seconds that everything on this machine has used since it started."""
    fields = _read("/proc/stat").partition("\n")[0].split()[1:]
    if len(fields) < 8 or not hasattr(os, "sysconf"):
        return None
    used = [int(x) for x in fields]
    return float(sum(used[:8]) - used[3] - used[4]) / os.sysconf("SC_CLK_TCK")


def _os_name() -> str:
    """Such as "Debian GNU/Linux 12 (bookworm)"."""
    for line in _read("/etc/os-release").splitlines():
        if line.startswith("PRETTY_NAME="):
            return line.partition("=")[2].strip().strip('"')
    return platform.system()


def _read(path: str) -> str:
    """A small text file, "" if it cannot be read."""
    try:
        with open(path, errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def _number(path: str) -> int | None:
    """The number a small file holds."""
    try:
        return int(_read(path))
    except ValueError:
        return None


def sha256(path: str) -> str:
    """Hex SHA-256 of a file."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        for piece in iter(lambda: file.read(1 << 20), b""):
            total.update(piece)
    return total.hexdigest()


def _first_line(error: BaseException) -> str:
    """An error's first line, or its class."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


def _end_with_input() -> None:
    """End this process when standard input closes."""
    while os.read(0, 4096):
        pass
    os._exit(4)


def main(arguments: Sequence[str]) -> int:
    """Exit codes: 0 done, 2 refused (the result says why), 4 the connection closed; killed by SIGALRM when out of time."""
    path = os.path.abspath(arguments[0])
    if "--watch" in arguments:
        threading.Thread(target=_end_with_input, daemon=True).start()
    folder = os.path.dirname(path)
    result_path = os.path.join(folder, "result.json")
    result: dict[str, Any] = {"protocol": PROTOCOL, "ok": False}
    try:
        with open(path) as file:
            request = json.load(file)
        result_path = os.path.join(folder, request.get("result", "result.json"))
        if request.get("time_limit"):
            signal.setitimer(signal.ITIMER_REAL, float(request["time_limit"]))  # the default action ends the process
        result.update(serve(request, folder), ok=True)
    except Refused as error:
        result["error"] = {"kind": error.kind, "message": str(error)}
    except MemoryError:
        result["error"] = {"kind": "memory", "message": "not enough memory on this machine for the file and its samples"}
    except ImportError as error:
        result["error"] = {"kind": "missing", "message": f"{_first_line(error)} ({sys.executable}); install it there"}
    except OSError as error:
        result["error"] = {
            "kind": "file",
            "message": f"{os.path.basename(str(error.filename or 'a file'))}: {error.strerror or error}",
        }
    except (KeyError, TypeError, ValueError) as error:
        result["error"] = {
            "kind": "request",
            "message": f"the request cannot be read ({type(error).__name__}: {_first_line(error)})",
        }
    if not result["ok"]:
        print(f"runner: {result['error']['message']}", file=sys.stderr)
    with _whole(result_path) as temporary, open(temporary, "w") as file:
        json.dump(result, file)
    return 0 if result["ok"] else 2


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: python3 runner.py request.json [--watch]")
    sys.exit(main(sys.argv[1:]))
