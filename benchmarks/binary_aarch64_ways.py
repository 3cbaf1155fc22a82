"""Four ways to count a 1-bit layer on aarch64, bare kernels, in instructions under qemu-aarch64.

    python benchmarks/binary_aarch64_ways.py

"count" is the library's: CNT, sums in bytes. "carry_save" adds three words by full adders before CNT, "dot" sums by UDOT,
"sliced" visits the rarer sign's inputs of transposed weights, counts 256 outputs at once in bit planes. A 3x3 convolution of 32
channels is 256 places of 320 inputs (288 of them in use, as 64-bit words have it); sliced, it is 32 outputs of as many weights,
256 places at once. Whatever gathers or turns inputs is not counted, nor what surrounds a kernel: these are least numbers. Each
result is compared with numpy. Beside them the int8 kernel with SDOT of ``binary_aarch64.py`` that keeps 16 outputs of 4 places.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import binary_aarch64
import numpy as np
import subjects
import torch
from binary_kernels import Layer

from edgekit.firmware_sim.binary_library import FLAGS, c_compiler, compiler
from edgekit.firmware_sim.count import plugin_library
from edgekit.firmware_sim.toolchain import find
from edgekit.targets.executorch_binary import pack

SOURCE = Path(__file__).parent / "aarch64" / "ways.c"
WAYS = {"count": "armv8-a", "carry_save": "armv8-a", "dot": "armv8.2-a+dotprod", "sliced": "armv8-a"}
"""Way to the processor that it is compiled for."""

CASES = (
    (Layer("fc 256x256", 0, 256, 256), (1, 256, 256), (1, 256, 256)),
    (Layer("fc 256x1024", 0, 256, 1024), (1, 256, 1024), (1, 256, 1024)),
    (Layer("conv 3x3 16x16x32->32", 16, 32, 32, 3), (256, 320, 32), (32, 320, 256)),
)
"""Layer, and its places, inputs and outputs; the last ones for "sliced"."""


def case(way: str, places: int, inputs: int, outputs: int) -> tuple[bytes, bytes]:
    """What the program reads, and what it shall write."""
    rng = np.random.default_rng(0)
    x, weight = rng.random((places, inputs)) < 0.5, rng.random((outputs, inputs)) < 0.5
    threshold = rng.integers(-8, 9, outputs).astype(np.int32)
    acc = (2 * x.astype(np.int64) - 1) @ (2 * weight.astype(np.int64) - 1).T
    packed, expected = (np.packbits(bits, axis=-1, bitorder="little") for bits in (x, acc >= threshold))
    if way == "sliced":
        stored = np.packbits(np.ascontiguousarray(weight.T), axis=-1, bitorder="little")
    else:
        stored = pack(torch.from_numpy(np.packbits(weight, axis=-1, bitorder="little"))).numpy()
    header = np.array([places, inputs, outputs, packed.nbytes, stored.nbytes, expected.nbytes], np.int32)
    return b"".join(a.tobytes() for a in (header, packed, stored, threshold)), expected.tobytes()


def measure(way: str, sizes: tuple[int, int, int], folder: Path) -> int:
    """Instructions of one call, whose result equals numpy's."""
    out = folder / f"way-{WAYS[way]}"
    if not out.exists():
        march = [f"-march={WAYS[way]}", "-static"]
        subprocess.run([*c_compiler(compiler("aarch64")), *FLAGS, *march, str(SOURCE), "-o", str(out)], check=True)
    table = subprocess.run([find("nm"), str(out)], capture_output=True, text=True, check=True).stdout
    found = {line.split()[2]: line.split()[0] for line in table.splitlines() if len(line.split()) == 3}
    data, expected = case(way, *sizes)
    counts = folder / "way-counts"
    marks = [f"mark={found[m]}" for m in ("counted", "finished")]
    options = ",".join([str(plugin_library(folder)), f"out={counts}", *marks])
    command = [find("qemu-aarch64"), "-cpu", "max", "-plugin", options, str(out), way]
    if subprocess.run(command, input=data, capture_output=True, check=True).stdout != expected:
        raise SystemExit(f"{way} of {sizes} differs from numpy")
    start, end = (int(line.split()[2]) for line in counts.read_text().splitlines() if line.startswith("m "))
    return end - start


def rows(folder: Path) -> Iterator[dict[str, object]]:
    """A row for each layer and way."""
    for layer, usual, turned in CASES:
        int8 = binary_aarch64.measure(layer, "blocked_dot", folder)
        for way in WAYS:
            found = measure(way, turned if way == "sliced" else usual, folder)
            row = {"layer": layer.name, "way": way, "instructions": found, "int8": int8, "times": round(int8 / found, 2)}
            subjects.log(str(row))
            yield row


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="edgekit-") as folder:
        found = list(rows(Path(folder)))
    subjects.write("binary_aarch64_ways", found)


if __name__ == "__main__":
    main()
