"""Instructions of single 1-bit layers on aarch64 (NEON), beside int8 kernels of the same layers, under qemu-aarch64.

    python benchmarks/binary_aarch64.py

Ours is the C library by which the 1-bit layers of a .pte run, whole: ``ekb_linear`` and ``ekb_conv2d``, a whole call, packed
signs in and out, borders included. int8 (``aarch64/layers.c``) is the bare kernel, int8 in and out, of an image that is padded
already: "simple" takes 4 outputs at a time, by SMULL/SMLAL2/SADALP (Armv8.0) or SDOT (Armv8.2); "blocked" 16 outputs of up to 4
places at a time, by SDOT, with weights laid out for it. Each output is compared with numpy first.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import numpy as np
import subjects
from binary_kernels import Layer
from numpy.typing import NDArray

from edgekit.firmware_sim.binary_library import BINARY, FLAGS, SOURCES, c_compiler, compiler
from edgekit.firmware_sim.count import plugin_library
from edgekit.firmware_sim.toolchain import find

SOURCE = Path(__file__).parent / "aarch64" / "layers.c"
KERNELS = {"binary": "armv8-a", "simple_v80": "armv8-a", "simple_dot": "armv8.2-a+dotprod", "blocked_dot": "armv8.2-a+dotprod"}
"""Kernel to the processor that it is compiled for."""

TIMES = {
    ("fc 256x256", "simple_v80"): 8.0,
    ("fc 256x256", "simple_dot"): 5.0,
    ("conv 3x3 16x16x32->32", "simple_dot"): 5.0,
}
"""How many times fewer instructions than that int8 kernel the 1-bit layer should take at least."""


LAYERS = (
    Layer("fc 256x256", 0, 256, 256),
    Layer("fc 1024x1024", 0, 1024, 1024),
    Layer("conv 3x3 16x16x32->32", 16, 32, 32, 3),
    Layer("conv 3x3 8x8x64->64", 8, 64, 64, 3),
    Layer("conv 3x3 8x8x128->128", 8, 128, 128, 3),
    Layer("conv 1x1 16x16x64->64", 16, 64, 64),
)


def sums(x: NDArray[np.int64], weight: NDArray[np.int64]) -> NDArray[np.int64]:
    """Convolution by numpy. x: (H, W, I), padded by zeros; weight: (O, k, k, I). Gives (h, w, O)."""
    k = weight.shape[1]
    windows = np.lib.stride_tricks.sliding_window_view(x, (k, k), axis=(0, 1))
    return np.einsum("hwikl,okli->hwo", windows, weight, optimize=True)


def case(layer: Layer, kernel: str) -> tuple[bytes, bytes]:
    """What the program reads, and what it shall write."""
    rng = np.random.default_rng(0)
    side, k, pad = max(layer.size, 1), layer.kernel, layer.kernel // 2
    padding = ((pad, pad), (pad, pad), (0, 0))
    if kernel == "binary":
        x, weight = rng.random((side, side, layer.in_c)) < 0.5, rng.random((layer.out_c, k, k, layer.in_c)) < 0.5
        acc = sums(np.pad(2 * x.astype(np.int64) - 1, padding), 2 * weight.astype(np.int64) - 1)
        threshold = rng.integers(-8, 9, layer.out_c).astype(np.int32)
        arrays = [np.packbits(a, axis=-1, bitorder="little") for a in (x, weight)] + [threshold, np.empty(0, np.float32)]
        expected = np.packbits(acc >= threshold, axis=-1, bitorder="little")
        given_side, zero_point = layer.size, 0
    else:
        real = rng.integers(-128, 128, (side, side, layer.in_c)).astype(np.int8)
        values = rng.integers(-127, 128, (layer.out_c, k, k, layer.in_c)).astype(np.int8)
        padded, zero_point = np.pad(real, padding), -3
        bias = rng.integers(-1000, 1000, layer.out_c).astype(np.int32)
        scale = rng.uniform(1e-4, 4e-4, layer.out_c).astype(np.float32)
        acc = sums(padded.astype(np.int64), values.astype(np.int64)) + bias
        expected = np.clip(np.rint(acc.astype(np.float32) * scale) + zero_point, -128, 127).astype(np.int8)
        if kernel == "blocked_dot":
            values = values.reshape(layer.out_c // 16, 16, -1, 4).transpose(0, 2, 1, 3)
        arrays, given_side = [padded, values, bias, scale], layer.size and layer.size + 2 * pad
    sizes = [a.nbytes for a in (*arrays, expected)]
    header = np.array([given_side, layer.in_c, layer.out_c, k, *sizes, zero_point], np.int32)
    return b"".join([header.tobytes(), *(np.ascontiguousarray(a).tobytes() for a in arrays)]), expected.tobytes()


def program(kernel: str, folder: Path) -> tuple[Path, list[str]]:
    """The program that has a kernel, and the addresses between which it is counted."""
    cc = c_compiler(compiler("aarch64"))
    out = folder / KERNELS[kernel]
    if not out.exists():
        sources = [SOURCE, *(BINARY / s for s in SOURCES)]
        march = [f"-march={KERNELS[kernel]}", "-static", f"-I{BINARY}"]
        subprocess.run([*cc, *FLAGS, *march, *map(str, sources), "-lm", "-o", str(out)], check=True)
    table = subprocess.run([find("nm"), str(out)], capture_output=True, text=True, check=True).stdout
    found = {line.split()[2]: line.split()[0] for line in table.splitlines() if len(line.split()) == 3}
    return out, [found["counted"], found["finished"]]


def measure(layer: Layer, kernel: str, folder: Path) -> int:
    """Instructions of one call, whose output equals numpy's."""
    path, marks = program(kernel, folder)
    data, expected = case(layer, kernel)
    counts = folder / "counts"
    options = ",".join([str(plugin_library(folder)), f"out={counts}", *(f"mark={m}" for m in marks)])
    command = [find("qemu-aarch64"), "-cpu", "max", "-plugin", options, str(path), kernel]
    found = subprocess.run(command, input=data, capture_output=True, check=True).stdout
    if found != expected:
        raise SystemExit(f"{layer.name} by {kernel} differs from numpy")
    start, end = (int(line.split()[2]) for line in counts.read_text().splitlines() if line.startswith("m "))
    return end - start


def rows(layer: Layer, folder: Path) -> list[dict[str, object]]:
    """A row for each int8 kernel, beside ours."""
    ours = measure(layer, "binary", folder)
    found: list[dict[str, object]] = []
    for kernel in ("simple_v80", "simple_dot", "blocked_dot"):
        int8 = measure(layer, kernel, folder)
        bound = {"times_bound": TIMES[layer.name, kernel]} if (layer.name, kernel) in TIMES else {}
        found.append({"layer": layer.name, "instructions": ours, "int8_kernel": kernel, "int8": int8,
                      "times": round(int8 / ours, 2), **bound})  # fmt: skip
        subjects.log(str(found[-1]))
    return found


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="edgekit-") as folder:
        found = [row for layer in LAYERS for row in rows(layer, Path(folder))]
    subjects.write("binary_aarch64", found)


if __name__ == "__main__":
    main()
