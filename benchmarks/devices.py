"""What measuring costs, and the three runtimes side by side on the same frozen programs.

    python benchmarks/devices.py [--models resnet8] [--parts overhead agreement runtimes upload leaks]
        [--device ssh://pi@raspberrypi.local]

* overhead: the median that a profile reports over that of a bare loop on the same runtime, in turn in one process.
* agreement: the median of ``edgekit profile`` over that of ``litert-benchmark`` (ai-edge-litert's own program) on the same file,
  processes in turn, pinned to the same processor. The networks are two of MLPerf Tiny made so large that a call takes over a
  millisecond, with random weights: litert-benchmark rounds to hundredths of one.
* runtimes: ExecuTorch, TFLite and ONNX files of one frozen program (float32, int8, and int4 where the file really stores int4),
  one thread, in turn in one process of the device. ``--device`` measures a Pi in the same form.
* upload: a 100 MB file to a device over ssh on this machine, against scp over the same server; connecting included in both.
* leaks: what 100 profiles in a row, local and over ssh, leave behind.

upload and leaks start an sshd of their own and need openssh-server. Rows of parts that are not run stay as they were recorded.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import subjects
import torch
from subjects import Subject, log
from torch import nn

from edgekit import devices, recipe, targets
from edgekit.compress.steps import apply
from edgekit.data import Data
from edgekit.devices import runner
from edgekit.devices.linux import File
from edgekit.devices.ssh import address, opened
from edgekit.frozen import FrozenProgram
from edgekit.profile import Settings

FORMATS = ("executorch", "tflite", "onnx")
PARTS = ("overhead", "agreement", "runtimes", "upload", "leaks")
MLPERF = ("resnet8", "dscnn", "mobilenet", "autoencoder")
MEGABYTES = 100


def program_of(net: Subject, bits: int) -> FrozenProgram:
    """The example's program; 32 bits: nothing is quantized (a step that is kept from every layer)."""
    if bits < 32:
        return subjects.compressed(net, bits)
    text = "model: a.b:c\ndata: a.b:c\ncompress:\n  - lowrank: {exclude: ['.*']}\n"
    blocks = recipe.parse(text, files=False).compress
    return apply(net.model, blocks, Data(calibration=net.calibration), name=net.name).program


def files(net: Subject, bits: int) -> dict[str, Path]:
    """A file of each format; for 4 bits only where it stores some weights in four."""
    program, made = program_of(net, bits), {}
    subjects.WORK.mkdir(parents=True, exist_ok=True)
    for target in FORMATS:
        path = subjects.WORK / f"devices-{net.name}-w{bits}{targets.get(target).SUFFIX}"
        artifact = targets.get(target).lower(program, path)
        if bits == 4 and not any(c.storage == "int4" for c in artifact.coverage):
            log(f"  {net.name} {target}: stores no weight in four bits; left out")
            continue
        made[target] = path
    return made


def bare(path: Path, target: str, sample: list[Any]) -> Callable[[], Any]:
    """The call a user would time, by the runtime's own interface; nothing of edgekit."""
    if target == "tflite":
        from ai_edge_litert.interpreter import Interpreter

        interpreter = Interpreter(str(path), num_threads=1)
        interpreter.allocate_tensors()
        for detail, x in zip(interpreter.get_input_details(), sample, strict=True):
            interpreter.set_tensor(detail["index"], x)
        return interpreter.invoke
    if target == "onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        session = onnxruntime.InferenceSession(str(path), options)
        feed = dict(zip([i.name for i in session.get_inputs()], sample, strict=True))
        return lambda: session.run(None, feed)
    from executorch.extension.pybindings import portable_lib

    module = portable_lib._load_for_executorch(str(path))
    portable_lib._unsafe_reset_threadpool(1)
    tensors = [torch.from_numpy(x) for x in sample]
    return lambda: module.forward(tensors)


def overhead(net: Subject, rounds: int) -> Iterator[dict[str, Any]]:
    """A profile's median over a bare loop's: blocks of calls in turn; the bare loop is timed as a whole."""
    for target, path in files(net, 8).items():
        sample = [np.ascontiguousarray(x) for x in targets.get(target).encode(path, [net.x[:1].numpy()])]
        program = runner.open_program(str(path), target)
        program.feed(sample)
        call = bare(path, target, sample)
        for _ in range(20):
            call(), program.call()
        start = time.perf_counter_ns()
        call()
        block = max(20, int(2e7 / (time.perf_counter_ns() - start)))
        ours, theirs = [], []
        for _ in range(rounds):
            start = time.perf_counter_ns()
            for _ in range(block):
                call()
            theirs.append((time.perf_counter_ns() - start) / block)
            (times,), _ = runner.measure([program], block, 0)
            ours.append(sum(times) / block)
        ratio = median(a / b for a, b in zip(ours, theirs, strict=True))
        yield {
            "part": "overhead", "model": net.name, "variant": "edgekit profile", "target": target, "device": "local",
            "weight_bits": 8, "latency_us": round(median(ours) / 1e3, 3), "bare_loop_us": round(median(theirs) / 1e3, 3),
            "overhead_ratio": round(ratio, 4), "overhead_ratio_bound": 1.03, "rounds": rounds, "calls_a_round": block,
        }  # fmt: skip


def large(name: str) -> Subject:
    """ResNet-8 of eight times its channels (775 M multiply-accumulates) or MobileNetV1 of width 1 on 224 x 224 pixels (569 M)."""
    sys.path.insert(0, str(subjects.ROOT / "examples" / "mlperf_tiny"))
    from networks import Classifier, Conv, Residual, Separable

    torch.manual_seed(0)
    if name == "resnet8":
        blocks: list[nn.Module] = [Residual(128, 128, 1), Residual(128, 256, 2), Residual(256, 512, 2)]
        model, size = Classifier(Conv(3, 128), blocks, 512, 10), 32
    else:
        plan = [(32, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2), *[(512, 512, 1)] * 5]
        plan += [(512, 1024, 2), (1024, 1024, 1)]
        model, size = Classifier(Conv(3, 32, stride=2), [Separable(*p) for p in plan], 1024, 1000), 224
    x = torch.rand(8, 3, size, size)
    return Subject(name, model.eval(), x, x, torch.zeros(len(x)))


def agreement(rounds: int) -> Iterator[dict[str, Any]]:
    """Our median over litert-benchmark's, round by round; each round is a process of ours and then one of theirs."""
    theirs = str(Path(sys.executable).with_name("litert-benchmark"))
    for name in ("resnet8", "mobilenet"):
        net = large(name)
        for bits in (8, 32):
            path = subjects.WORK / f"devices-large-{name}-w{bits}.tflite"
            program = program_of(net, bits)
            targets.get("tflite").lower(program, path)
            found: list[tuple[float, float]] = []
            with contextlib.closing(devices.connect("local")) as device:
                for _ in range(rounds):
                    plain = Settings(num_runs=100, warmup_runs=10, per_layer=False)
                    ours = device.profile(path, "tflite", program, plain, [net.x[:1].numpy()])
                    found.append((ours.total / 1e3, litert_benchmark(theirs, path, ours.fingerprint["pinned"])))
            ratios = [a / b for a, b in found]
            yield {
                "part": "agreement", "model": name, "variant": "float32" if bits == 32 else f"int{bits}", "target": "tflite",
                "device": "local",
                "latency_ms": round(median(a for a, _ in found), 3), "litert_benchmark_ms": round(median(b for _, b in found), 3),
                "agreement_ratio": round(median(ratios), 4), "agreement_ratio_bounds": [0.95, 1.05],
                "agreement_ratio_quartiles": [round(float(np.percentile(ratios, q)), 4) for q in (25, 75)], "rounds": rounds,
            }  # fmt: skip


def litert_benchmark(program: str, path: Path, pinned: list[int] | None) -> float:
    """The median that it prints, in milliseconds."""
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "told.json"
        command = [program, f"--model={path}", "--num_runs=100", "--warmup_runs=10", "--num_threads=1", f"--result_json={told}"]
        if pinned and shutil.which("taskset"):
            command = ["taskset", "-c", ",".join(map(str, pinned)), *command]
        subprocess.run(command, check=True, capture_output=True)
        return float(json.loads(told.read_text())["latency"]["median_ms"])


def runtimes(net: Subject, spec: str, rounds: int) -> Iterator[dict[str, Any]]:
    """The files of one program in turn in one process of the device."""
    with contextlib.closing(devices.connect(spec)) as device:
        for bits in (32, 8, 4):
            made = {t: p for t, p in files(net, bits).items() if t in device.targets}
            if len(made) < 2:
                continue
            x = net.x[:1].numpy()
            sent = [File(path, target, targets.get(target).encode(path, [x])) for target, path in made.items()]
            result, times = device.ask("profile", sent, Settings(num_runs=rounds * 20, warmup_runs=20))
            arrays = [t[0][0] / 1e3 for t in times]
            middles = [float(np.median(a)) for a in arrays]
            for i, target in enumerate(made):
                facts, fastest = result["files"][i], arrays[int(np.argmin(middles))]
                yield {
                    "part": "runtimes", "model": net.name, "variant": "float32" if bits == 32 else f"int{bits}",
                    "target": target, "device": device.name, "weight_bits": bits, "latency_us": round(middles[i], 2),
                    "p90_us": round(float(np.percentile(arrays[i], 90)), 2), "least_us": round(float(arrays[i].min()), 2),
                    "over_fastest": round(float(np.median(arrays[i] / fastest)), 3), "bytes": made[target].stat().st_size,
                    "load_ms": round(facts["load_microseconds"] / 1e3, 2), "runtime": f"{facts['runtime']} {facts['version']}",
                    "processor": result["machine"]["processor"], "runs": len(arrays[i]),
                    "other_load": round(result.get("other_load") or 0.0, 3),
                }  # fmt: skip


@contextlib.contextmanager
def server() -> Iterator[Any]:
    """A throw-away sshd (tests/sshd.py) with its client first on the PATH."""
    sys.path.insert(0, str(subjects.ROOT / "tests"))
    from sshd import serving

    before = os.environ["PATH"]
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as found:
        os.environ["PATH"] = f"{folder}/bin{os.pathsep}{before}"
        try:
            yield found
        finally:
            os.environ["PATH"] = before


def upload(rounds: int) -> Iterator[dict[str, Any]]:
    """100 MB, ours and scp's, in turn."""
    with server() as found, tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.bin"
        file.write_bytes(np.random.default_rng(0).bytes(MEGABYTES * 1_000_000))
        ours, theirs = [], []
        for _ in range(rounds):
            start = time.perf_counter()
            link = opened(found.spec, address(found.spec)[0])
            link.put({"weights.bin": file})
            link.close()
            ours.append(time.perf_counter() - start)
            start = time.perf_counter()
            login = found.spec.removeprefix("ssh://").rpartition(":")[0]
            where = f"{login}:{found.home}/weights.bin"
            subprocess.run(["scp", "-q", "-P", str(found.port), str(file), where], check=True)
            theirs.append(time.perf_counter() - start)
            (found.home / "weights.bin").unlink()
        yield {
            "part": "upload", "model": "", "variant": "edgekit", "target": "", "device": "ssh on this machine",
            "megabytes": MEGABYTES,
            "upload_s": round(median(ours), 3), "scp_s": round(median(theirs), 3), "rounds": rounds,
            "upload_ratio": round(median(a / b for a, b in zip(ours, theirs, strict=True)), 3), "upload_ratio_bound": 1.3,
        }  # fmt: skip


def leaks(net: Subject, calls: int) -> Iterator[dict[str, Any]]:
    """Processes, descriptors and files before and after many profiles in a row, a connection each."""
    (path,) = (p for t, p in files(net, 8).items() if t == "tflite")
    program, x = program_of(net, 8), [net.x[:1].numpy()]
    with server() as found, tempfile.TemporaryDirectory() as folder:
        from sshd import descendants

        old, tempfile.tempdir = tempfile.tempdir, folder
        try:
            for spec in ("local", found.spec):
                before = len(os.listdir("/proc/self/fd")), len(descendants(os.getpid()))
                for _ in range(calls):
                    with contextlib.closing(devices.connect(spec)) as device:
                        device.profile(path, "tflite", program, Settings(num_runs=5, warmup_runs=1), x)
                remote = found.settled()
                after = len(os.listdir("/proc/self/fd")), len(descendants(os.getpid()))
                yield {
                    "part": "leaks", "model": net.name, "variant": "edgekit profile", "target": "tflite",
                    "device": "local" if spec == "local" else "ssh on this machine", "calls": calls,
                    "left_descriptors": after[0] - before[0], "left_processes": after[1] - before[1],
                    "left_files": len(os.listdir(folder)) + len(remote), "left_connections": found.sessions(),
                }  # fmt: skip
        finally:
            tempfile.tempdir = old


def main() -> None:
    given = subjects.arguments(__doc__ or "", MLPERF, rounds=50, calls=100, parts=list(PARTS), device="local")
    nets = [subjects.subject(name, samples=8) for name in given.models]
    makers: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
        "overhead": lambda: (r for net in nets for r in overhead(net, given.rounds)),
        "agreement": lambda: agreement(max(3, given.rounds // 4)),
        "runtimes": lambda: (r for net in nets for r in runtimes(net, given.device, given.rounds)),
        "upload": lambda: upload(max(3, given.rounds // 8)),
        "leaks": lambda: leaks(nets[0], given.calls),
    }
    rows: list[dict[str, Any]] = []
    for part in given.parts:
        for row in makers[part]():
            rows.append(row)
            log("  " + ", ".join(f"{k} {v}" for k, v in row.items()))
    whole = tuple(given.parts) == PARTS and tuple(given.models) == MLPERF and given.device == "local"
    subjects.write("devices", rows, keep=not whole, key=("part", "model", "variant", "target", "device"))


if __name__ == "__main__":
    main()
