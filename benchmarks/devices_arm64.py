"""The four MLPerf Tiny networks on this machine and on the emulated arm64 Linux: the same integers?

    edgekit setup-sim arm64
    python benchmarks/devices_arm64.py [--samples 20] [--cpu cortex-a76] [--models resnet8 dscnn mobilenet autoencoder]

Each network is compressed by its example's recipe and exported; every file is run on both,.
A difference is in steps of the output. tflite-runtime has other kernels (they round twice); the rest must be identical.
Instructions are those of one call of the runtime in the emulator; they are no time.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import subjects
import torch
from numpy.typing import NDArray
from subjects import ROOT, log

from edgekit import recipe, source
from edgekit.compress.steps import apply
from edgekit.devices import arm64_root, connect
from edgekit.frozen import FrozenProgram
from edgekit.profile import Settings
from edgekit.stage_table import output_lsb
from edgekit.targets import get

MODELS = ("resnet8", "dscnn", "mobilenet", "autoencoder")
FILES = {"ai-edge-litert": "tflite", "tflite-runtime": "tflite", "executorch": "executorch", "onnxruntime": "onnx"}
BOUNDS = {"ai-edge-litert": 0, "tflite-runtime": 3, "executorch": 0, "onnxruntime": 0}
"""Steps that the outputs may differ by: builtin kernels round twice, which is up to three at the end of a network."""


def program_of(name: str, samples: int) -> tuple[FrozenProgram, NDArray[Any]]:
    """The frozen program of an example's recipe, and evaluation samples (N, ...)."""
    settings = recipe.load(ROOT / "examples" / "mlperf_tiny" / f"{name}.yaml")
    data = source.load_data(settings.data)
    made = apply(source.load_model(settings.model), settings.compress, data, name=name)
    return made.program, data.evaluation[0][:samples].numpy()


def rows_of(name: str, samples: int, cpu: str, runtimes: Sequence[str], work: Path) -> list[dict[str, Any]]:
    program, x = program_of(name, samples)
    (step,) = output_lsb(program)
    rows = []
    for runtime in runtimes:
        target = FILES[runtime]
        module, path = get(target), work / f"{name}{get(target).SUFFIX}"
        if not path.exists():
            module.lower(program, path)
        device = connect(f"qemu-aarch64:cpu={cpu}&runtime={runtime}&time_limit=3600")
        (here,), (there,) = module.run(path, [x]), device.run(path, target, [x])
        difference = np.abs(here.astype(np.float64) - there) / (step or 1.0)
        counted = device.profile(path, target, program, Settings(num_runs=5), [x[:1]])
        rows.append({
            "model": name, "variant": f"{runtime} {arm64_root.WHEELS[runtime].version} as {cpu}", "target": target,
            "device": device.name,
            "samples": len(x), "values": int(difference.size), "max_lsb": round(float(difference.max()), 3),
            "max_lsb_bound": BOUNDS[runtime], "differing_values": int((difference > 1e-3).sum()),
            "same_class_percent": 100 * float((here.reshape(len(x), -1).argmax(1) == there.reshape(len(x), -1).argmax(1)).mean()),
            "instructions": int(counted.total), "macs": counted.macs,
            "instructions_per_mac": round(counted.total / counted.macs, 4),
        })  # fmt: skip
        log(str(rows[-1]))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--runtimes", nargs="+", choices=list(FILES), default=list(FILES))
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--cpu", default="cortex-a76")
    given = parser.parse_args()
    torch.set_num_threads(1)
    for name in given.models:
        with tempfile.TemporaryDirectory(prefix="edgekit-") as work:
            rows = rows_of(name, given.samples, given.cpu, given.runtimes, Path(work))
        subjects.write("devices_arm64", rows, ["the same files on both; figures of an emulator are no time"], keep=True)


if __name__ == "__main__":
    main()
