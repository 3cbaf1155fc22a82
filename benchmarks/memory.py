"""Peak memory of calibrating resnet20 with 64 and with 1024 samples, each in a process of its own.

    python benchmarks/memory.py

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
OBSERVERS = ("mse", "minmax", "percentile", "entropy")


def child(samples: int, observer: str) -> None:
    """Calibrate, then print the peak resident size in MB."""
    from edgekit.compress.ptq import PTQ, quantize_model
    from edgekit.data import Data

    torch.set_num_threads(1)
    net = subjects.subject("resnet20")
    images = net.calibration.to(torch.float32)

    def stream() -> Iterator[torch.Tensor]:
        for start in range(0, len(images), 32):
            yield images[start : start + 32].clone()

    quantize_model(net.model, Data(stream), PTQ(samples=samples, observer=observer, batch_size=32))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def peak(samples: int, observer: str) -> float:
    found = subprocess.run(
        [sys.executable, __file__, "--child", str(samples), observer], check=True, capture_output=True, text=True
    )
    return float(found.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--child", nargs=2, metavar=("SAMPLES", "OBSERVER"))
    given = parser.parse_args()
    if given.child:
        child(int(given.child[0]), given.child[1])
        return
    rows: list[dict[str, Any]] = []
    for observer in OBSERVERS:
        few, many = (peak(count, observer) for count in COUNTS)
        rows.append({
            "model": "resnet20", "variant": f"edgekit, observer {observer}", "target": "calibration", "device": "host",
            "peak_memory_mb_64": round(few, 1), "peak_memory_mb_1024": round(many, 1),
            "memory_ratio": round(many / few, 3), "memory_ratio_bound": GOAL,
        })  # fmt: skip
        log("  " + ", ".join(f"{k} {v}" for k, v in rows[-1].items()))
    subjects.write("memory", rows)


if __name__ == "__main__":
    main()
