"""Few-bit quantization after training: accuracy, processor time and memory of each method at each width.

    python benchmarks/ptq_front.py [--models resnet8] [--widths W4A4] [--methods brecq] [--targets tflite onnx]

Every row is made in a process of its own, so its peak memory is its own. Calibration is the example recipe's (1024 of the 4000
CIFAR-10 training images; 200 of the 1000 keywords) for seed 0, as many others for other seeds; accuracy is of the 1000 test
samples. "frozen" is the frozen program itself; files are translations of it, run in their own runtimes, firmware on an emulated
board. Activations of 4 and 2
bits are levels of int8 in all of them: neither smaller nor faster.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from typing import Any

import numpy as np
import subjects
import torch
from subjects import Subject, log

from edgekit import targets
from edgekit.compress.ptq.settings import PTQ, Reconstruct
from edgekit.compress.steps import apply
from edgekit.data import Data
from edgekit.devices import connect
from edgekit.firmware_sim.boards import CORES
from edgekit.frozen import FrozenProgram
from edgekit.profile import Settings
from edgekit.recipe import Block
from edgekit.targets.cortex_m.preparation import prepare, simulate

WIDTHS = {
    "W4A8": {"weights": "int4", "activations": "int8"},
    "W4A4": {"weights": "int4", "activations": "int4"},
    "W2A4": {"weights": "int2", "activations": "int4"},
    "W2A2": {"weights": "int2", "activations": "int2"},
}
BRECQ = {"method": "brecq", "weight_scale": "mse"}
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "nearest": ({"weight_scale": "mse"}, {}),
    "gptq": ({"method": "gptq", "weight_scale": "mse"}, {}),
    "adaround": ({"method": "adaround", "weight_scale": "mse"}, {"drop": 0.0, "learn_scales": False}),
    "brecq": (BRECQ, {"drop": 0.0}),
    "brecq, qdrop": (BRECQ, {}),
    "brecq, qdrop, pd": (BRECQ, {"prediction": 1.0}),
    "brecq, qdrop, pd, dc": (BRECQ, {"prediction": 1.0, "correction_steps": 50}),
    "brecq, qdrop, flip": (BRECQ, {"augment": "flip"}),
    "brecq, qdrop, cutmix": (BRECQ, {"augment": "cutmix"}),
    "brecq, qdrop, metaaug": (BRECQ, {"augment": "meta"}),
}
BOUNDS = {
    ("resnet20", "W4A8"): 91.9, ("resnet8", "W4A8"): 87.1, ("dscnn", "W4A8"): 91.5,
    ("resnet20", "W4A4"): 89.5, ("resnet8", "W4A4"): 84.0, ("dscnn", "W4A4"): 75.0,
}  # fmt: skip
TARGETS = ("executorch", "tflite", "onnx", "cortex-m4", "cortex-m55")
LEARN = ("adaround", "brecq")
MAIN = "brecq, qdrop"
STEPS = 500
"""Of each block, unless a row says otherwise."""


def made(name: str, width: str, method: str, seed: int, steps: int, files: list[str]) -> list[dict[str, Any]]:
    """Rows of one network, width and method: the frozen program and the files asked for."""
    torch.set_num_threads(1)
    net = subjects.subject(name, seed)
    settings, how = METHODS[method]
    learned = {"reconstruct": Reconstruct(steps=steps, **how)} if settings.get("method") in LEARN else {}
    ptq = PTQ(**WIDTHS[width], **settings, **learned, samples=len(net.calibration), seed=seed)
    start, wall = time.process_time(), time.perf_counter()
    compressed = apply(net.model, [Block("ptq", ptq)], Data(net.calibration), name=name)
    known: dict[str, Any] = {
        "model": name, "variant": method if steps == STEPS else f"{method}, {steps:,} steps", "device": "host", "seed": seed,
        "steps": steps if settings.get("method") in LEARN else 0,
        "weight_bits": int(width[1]), "activation_bits": int(width[3]), "calibration": len(net.calibration),
        "processor_s": round(time.process_time() - start, 1), "wall_s": round(time.perf_counter() - wall, 1),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }  # fmt: skip
    if method == MAIN and (name, width) in BOUNDS:
        known["accuracy_bound"] = BOUNDS[name, width]
    with torch.no_grad():
        found = torch.cat([compressed.program.run(part)[0].float() for part in net.x.split(100)]).numpy()
    weights = sum(layer.weight_bytes for layer in compressed.program.layers)
    rows = [{**known, "target": "frozen", "accuracy": net.accuracy(found), "bytes": weights}]
    if len(net.calibration) < len(net.x) and name == "dscnn":  # it is calibrated on the first of those it is judged on
        rest = slice(len(net.calibration), None)
        rows[0]["accuracy_of_others"] = round(100 * float((found[rest].argmax(1) == net.y[rest].numpy()).mean()), 4)
    for target, options in [(t, o) for t in files for o in ({}, {"pack": False}) if not o or (t == "tflite" and width[3] < "8")]:
        if target.startswith("cortex-m"):
            rows.append({**known, "target": target, **firmware(net, compressed.program, target, found)})
            continue
        module = targets.get(target)
        path = subjects.WORK / f"front-{name}-{width}-{seed}{'-int8' if options else ''}{module.SUFFIX}"
        path.parent.mkdir(parents=True, exist_ok=True)
        module.lower(compressed.program, path, module.Options(**options))
        accuracy = net.accuracy(module.run(path, [net.x.numpy()])[0])
        label = ", ".join([target, *(f"{k}: {str(v).lower()}" for k, v in options.items())])
        rows.append({**known, "target": label, "accuracy": accuracy, "bytes": path.stat().st_size})
    return rows


BOOTED = 8
"""Samples that the emulated board runs; the numpy reference, equal to it on them in every bit, runs all of them."""


def firmware(net: Subject, program: FrozenProgram, core: str, frozen: np.ndarray) -> dict[str, Any]:
    """Accuracy by the firmware's reference, which the board must equal; bytes of flash, instructions of an inference.

    Raises:
        SystemExit: the board differs from the reference.
    """
    module, board = targets.get(core), connect(f"qemu:{core}")
    path = subjects.WORK / f"front-{net.name}{module.SUFFIX}"
    path.parent.mkdir(parents=True, exist_ok=True)
    artifact = module.lower(program, path, module.Options())
    (booted,) = module.run(path, [net.x[:BOOTED].numpy()])
    prepared = prepare(program, CORES[core].kernel_set)
    outputs = np.concatenate([simulate(prepared, [x[None].numpy()])[1][0] for x in net.x])
    if not np.array_equal(booted, outputs[:BOOTED]):
        raise SystemExit(f"{net.name} on {core} differs from its reference")
    counted = board.profile(path, core, program, Settings(num_runs=1, per_layer=False), [net.x[:1].numpy()])
    return {
        "accuracy": net.accuracy(outputs), "bytes": artifact.memory["flash"], "ram": artifact.memory["ram"],
        "instructions": counted.total, "samples_on_board": BOOTED,
        "same_class_as_frozen": round(100 * float((outputs.argmax(1) == frozen.argmax(1)).mean()), 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(subjects.RECIPES), choices=list(subjects.RECIPES))
    parser.add_argument("--widths", nargs="+", default=["W4A8", "W4A4"], choices=list(WIDTHS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--targets", nargs="*", default=[], choices=list(TARGETS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--keep", type=int, default=1, help="1: earlier rows of other models, methods, widths and seeds stay")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        name, width, method, seed = given.child
        print(json.dumps(made(name, width, method, int(seed), given.steps, given.targets)))
        return
    rows: list[dict[str, Any]] = []
    for name in given.models:
        for seed in given.seeds:
            for width in given.widths:
                for method in given.methods:
                    command = [sys.executable, __file__, "--child", name, width, method, str(seed), "--steps", str(given.steps)]
                    done = subprocess.run([*command, "--targets", *given.targets], stdout=subprocess.PIPE, text=True, check=True)
                    found = json.loads(done.stdout.strip().splitlines()[-1])
                    for row in found:
                        log(f"{name} {width} {method}, seed {seed}, {row['target']}: {row['accuracy']} %, {row['processor_s']} s")
                    rows += found
                    subjects.write("ptq_front", rows, NOTES, keep=bool(given.keep) or len(rows) > len(found))


NOTES = [
    "First and last layer have 8-bit weights, the model's input and the last layer's input 8-bit activations; a convolution "
    "before a residual addition gives int8 to the addition. All else has the bits of its row.",
    f"Firmware: the emulated board ran {BOOTED} samples and equalled the numpy reference of its kernels in every bit; the "
    "accuracy is that reference's on all samples. Bytes are flash, code included. Firmware rounds layers of few levels once, as "
    "the frozen program does, and its other layers twice.",
    "TFLite's packed 4-bit kernels round twice, the first time to a fraction of an output step that few-bit sums make "
    "coarse: with 4-bit activations 1 to 15 % of a layer's values are off by one of 16 levels. `pack: false` stores int8 "
    "weights, runs in XNNPACK and is exact.",
]


if __name__ == "__main__":
    main()
