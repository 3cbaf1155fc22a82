"""Peak memory of calibrating ResNet-20, and of learning ResNet-8 block by block, with 64 and with 1024 samples.

    python benchmarks/memory.py [--parts calibration reconstruction]

Each in a process of its own. Reconstruction keeps inputs and outputs of blocks for all samples: 16 MB of them in memory, the rest
in mapped files; two optimizer steps a block, since what steps take does not depend on the number of samples.

The samples are made batch by batch by a generator, as a loader that reads files would, so that what grows is edgekit's.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import subjects
import torch
from subjects import log

GOAL = 1.2
COUNTS = (64, 1024)
PARTS = {"calibration": ("mse", "minmax", "percentile", "entropy"), "reconstruction": ("brecq",)}
MODELS = {**dict.fromkeys(PARTS["calibration"], "resnet20"), "brecq": "resnet8"}


SPILLED = 16
"""MB of samples that reconstruction may keep in memory."""


def child(samples: int, what: str) -> None:
    """Quantize, then print the peak resident size in MB."""
    from edgekit.compress.ptq import PTQ, quantize_model
    from edgekit.compress.ptq.settings import Reconstruct
    from edgekit.data import Data

    torch.set_num_threads(1)
    net = subjects.subject(MODELS[what])
    how: dict[str, Any] = {"observer": what}
    if what == "brecq":
        how = {"method": what, "observer": "minmax", "weights": "int4", "reconstruct": Reconstruct(steps=2, memory_mb=SPILLED)}
    images = net.calibration.to(torch.float32)

    def stream() -> Iterator[torch.Tensor]:
        for start in range(0, len(images), 32):
            yield images[start : start + 32].clone()

    quantize_model(net.model, Data(stream), PTQ(samples=samples, batch_size=32, **how))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def peak(samples: int, what: str) -> float:
    found = subprocess.run([sys.executable, __file__, "--child", str(samples), what], check=True, capture_output=True, text=True)
    return float(found.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", nargs=2, metavar=("SAMPLES", "WHAT"))
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    given = parser.parse_args()
    if given.child:
        child(int(given.child[0]), given.child[1])
        return
    rows: list[dict[str, Any]] = []
    for part, what in ((p, w) for p in given.parts for w in PARTS[p]):
        few, many = (peak(count, what) for count in COUNTS)
        variant = f"observer {what}" if part == "calibration" else f"{what}, {SPILLED} MB of samples in memory, the rest in files"
        rows.append({
            "model": MODELS[what], "variant": f"edgekit, {variant}", "target": part, "device": "host",
            "peak_memory_mb_64": round(few, 1), "peak_memory_mb_1024": round(many, 1),
            "memory_ratio": round(many / few, 3), "memory_ratio_bound": GOAL,
        })  # fmt: skip
        log("  " + ", ".join(f"{k} {v}" for k, v in rows[-1].items()))
        subjects.write("memory", rows, keep=True)


if __name__ == "__main__":
    main()
