"""A transformer encoder (spoken digits) at several widths: accuracy and size of the files, processor time and memory.

    python benchmarks/ptq_transformer.py [--variants "W8A8" "8da4w, gptq"] [--targets executorch tflite]

Calibration is the example recipe's; accuracy is of its evaluation samples, of the frozen program and of the files. A variant is
made in a process of its own. The task saturates, so the signal to quantization noise of the outputs (against the float model's,
on the evaluation samples) and the loss on them stand beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from typing import Any

import subjects
import torch
from subjects import log
from torch.nn import functional as F

from edgekit import recipe, source, targets
from edgekit.compress.ptq.settings import PTQ, Reconstruct
from edgekit.compress.steps import apply
from edgekit.recipe import Block

RECIPE = subjects.ROOT / "examples" / "fsdd_transformer" / "recipe.yaml"
W4A4: dict[str, Any] = {"activations": "int4", "weights": "int4", "weight_scale": "mse"}
W2A4: dict[str, Any] = {**W4A4, "weights": "int2"}
ADAROUND: dict[str, Any] = {"method": "adaround", "reconstruct": Reconstruct(steps=300, drop=0.0, learn_scales=False)}
BRECQ: dict[str, Any] = {"method": "brecq", "reconstruct": Reconstruct(steps=300)}
VARIANTS: dict[str, dict[str, Any]] = {
    "W8A8": {},
    "W8A8, smooth": {"smooth": 0.5},
    "W4A8, nearest": {"weights": "int4", "weight_scale": "mse"},
    "W4A8, gptq": {"weights": "int4", "weight_scale": "mse", "method": "gptq"},
    "W4A8, brecq": {"weights": "int4", "weight_scale": "mse", "method": "brecq", "reconstruct": Reconstruct(steps=300, drop=0.0)},
    "W4A4, nearest": W4A4,
    "W4A4, gptq": {**W4A4, "method": "gptq"},
    "W4A4, adaround": {**W4A4, **ADAROUND},
    "W4A4, brecq": {**W4A4, **BRECQ, "reconstruct": Reconstruct(steps=300, drop=0.0)},
    "W4A4, brecq, qdrop": {**W4A4, **BRECQ},
    "W4A4, brecq, qdrop, pd": {**W4A4, **BRECQ, "reconstruct": Reconstruct(steps=300, prediction=1.0)},
    "W2A4, nearest": W2A4,
    "W2A4, gptq": {**W2A4, "method": "gptq"},
    "W2A4, adaround": {**W2A4, **ADAROUND},
    "W2A4, brecq, qdrop": {**W2A4, **BRECQ},
    "W2A2, nearest": {**W2A4, "activations": "int2"},
    "W2A2, brecq, qdrop": {**W2A4, **BRECQ, "activations": "int2"},
    "8da8w": {"activations": "dynamic"},
    "8da4w, nearest": {"activations": "dynamic", "weights": "int4"},
    "8da4w, gptq": {"activations": "dynamic", "weights": "int4", "method": "gptq"},
    "8da4w, groups of 32, gptq": {"activations": "dynamic", "weights": "int4", "method": "gptq", "group_size": 32},
    "8da2w, gptq": {"activations": "dynamic", "weights": "int2", "method": "gptq"},
    "weight only int4, gptq": {"activations": "float", "weights": "int4", "method": "gptq"},
}
SKIPPED = {("tflite", "8da4w, groups of 32, gptq"), ("executorch", "weight only int4, gptq")}
"""What the target refuses."""


def made(variant: str, files: list[str]) -> list[dict[str, Any]]:
    """Rows of one variant: the frozen program and its files."""
    torch.set_num_threads(1)
    settings = recipe.load(RECIPE)
    data = source.load_data(settings.data)
    x, y = data.evaluation
    start = time.process_time()
    block = Block("ptq", PTQ(**{"samples": 512, **VARIANTS[variant]}))
    model = source.load_model(settings.model)
    program = apply(model, [block], data, name="fsdd").program
    known: dict[str, Any] = {
        "model": "fsdd_transformer", "variant": variant, "device": "host", "seed": 0,
        "processor_s": round(time.process_time() - start, 1),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }  # fmt: skip

    def right(found: torch.Tensor) -> float:
        return round(100 * float((found.reshape(len(y), -1).argmax(1) == y).float().mean()), 4)

    found = torch.cat([program.run(x[i : i + 1])[0].float() for i in range(len(x))])
    with torch.no_grad():
        wanted = model(x)
    noise = float((found - wanted).square().sum() / wanted.square().sum())
    quality = {"output_db": round(-10 * math.log10(noise), 2), "loss": round(float(F.cross_entropy(found, y)), 4)}
    known["float_loss"] = round(float(F.cross_entropy(wanted, y)), 4)
    rows = [{**known, "target": "frozen", "accuracy": right(found), "bytes": program.weight_bytes, **quality}]
    for target in files:
        if (target, variant) in SKIPPED:
            continue
        module = targets.get(target)
        path = subjects.WORK / f"fsdd-{target}{module.SUFFIX}"
        path.parent.mkdir(parents=True, exist_ok=True)
        few = block.settings.activations in ("int4", "int2") and target == "tflite"
        module.lower(program, path, module.Options(**({"pack": False} if few else {})))
        accuracy = right(torch.from_numpy(module.run(path, [x.numpy()])[0]))
        rows.append({**known, "target": target, "accuracy": accuracy, "bytes": path.stat().st_size})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--targets", nargs="*", default=["executorch", "tflite"], choices=["executorch", "tflite", "onnx"])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(made(given.child, given.targets)))
        return
    rows: list[dict[str, Any]] = []
    for variant in given.variants:
        command = [sys.executable, __file__, "--child", variant, "--targets", *given.targets]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.strip().splitlines()[-1])
        for row in found:
            log(f"{variant}, {row['target']}: {row['accuracy']} %, {row['bytes']:,} bytes, {row['processor_s']} s")
        rows += found
        subjects.write("ptq_transformer", rows, NOTES, keep=True)


NOTES = [
    "First and last linear layer have 8-bit weights and inputs. Attention's products, softmax and LayerNorm stay in float.",
    "With 4-bit activations every other linear layer reads 16 levels: what LayerNorm or attention gives is clamped before it is "
    "quantized, a GELU's scale is such that its least value is the lowest level.",
    "Files of 4-bit and 2-bit activations: executorch, and tflite with `pack: false`, whose kernels are exact.",
    "In dynamic and weight-only files GELU stays in float too.",
]


if __name__ == "__main__":
    main()
