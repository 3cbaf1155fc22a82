"""Instructions of single kernels on the emulated boards, each output compared with numpy first.

    python benchmarks/cortex_m_kernels.py [board ...]

Prints a table; ``firmware.py`` records the same rows: kernel, board, kernel_set, instructions, macs and instructions_per_mac.
The numbers repeat exactly: they are counted, not timed.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import firmware_reference as reference  # noqa: E402

from edgekit.firmware_sim.boards import BOARDS, CORES  # noqa: E402
from edgekit.firmware_sim.count import count  # noqa: E402
from edgekit.firmware_sim.kernels import KERNEL_SETS, conv2d_scratch, depthwise_scratch, linear_scratch  # noqa: E402
from edgekit.firmware_sim.toolchain import Project, build  # noqa: E402

BOUNDS = {
    ("fc 256x256", "mps2-an386"): 96_200,
    ("fc 256x256", "mps3-an547"): 13_300,
    ("conv 3x3 16x16x32->32", "mps2-an386"): 3_030_000,
    ("conv 3x3 16x16x32->32", "mps3-an547"): 506_000,
}
"""Instructions not to be exceeded by the board's own kernel set."""

IN_ZP, OUT_ZP = -7, 3


@dataclass(frozen=True)
class Layer:
    """A convolution of ``size`` x ``size`` (padding keeps the size), or of size 0 a fully connected layer of ``rows`` inputs."""

    name: str
    size: int
    in_c: int
    out_c: int
    kernel: int = 1
    depthwise: bool = False
    bits: int = 8
    rows: int = 1


LAYERS = (
    Layer("fc 256x256", 0, 256, 256),
    Layer("fc 256x256 int4", 0, 256, 256, bits=4),
    Layer("conv 3x3 16x16x32->32", 16, 32, 32, 3),
    Layer("conv 3x3 16x16x32->32 int4", 16, 32, 32, 3, bits=4),
    Layer("conv 3x3 16x16x32->32 int2", 16, 32, 32, 3, bits=2),
    Layer("conv 3x3 32x32x3->16", 32, 3, 16, 3),
    Layer("conv 3x3 32x32x16->16", 32, 16, 16, 3),
    Layer("conv 3x3 8x8x64->64", 8, 64, 64, 3),
    Layer("conv 1x1 16x16x64->64", 16, 64, 64),
    Layer("depthwise 3x3 16x16x64", 16, 64, 64, 3, True),
)


def constant(name: str, kind: str, values: np.ndarray) -> str:
    return f"static const {kind} {name}[{values.size}] EK_WEIGHTS = {{{','.join(map(str, values.ravel().tolist()))}}};"


def program(layer: Layer, kernel_set: str) -> tuple[str, bytes, np.ndarray, int]:
    """C source of one call, its input, the expected output and the number of multiplications."""
    rng = np.random.default_rng(0)
    low = -(1 << (layer.bits - 1))
    k = layer.kernel
    per = 1 if layer.depthwise else layer.in_c
    weight = rng.integers(low + 1, -low, (layer.out_c, k, k, per))
    bias, multiplier = rng.integers(-5000, 5000, layer.out_c), rng.integers(1 << 30, 1 << 31, layer.out_c)
    shift = np.full(layer.out_c, -round(float(np.log2(k * k * per) / 2 + layer.bits)))
    side, high = max(layer.size, 1), layer.size or layer.rows
    x = rng.integers(-128, 128, (high, side, layer.in_c)).astype(np.int8)
    groups, pad = (layer.in_c if layer.depthwise else 1), k // 2
    acc = reference.conv2d(x, weight, bias, (1, 1), (1, 1), (pad, pad), (high, side), groups, IN_ZP)
    expected = reference.finish(acc, multiplier, shift, OUT_ZP, -128, 127)
    folded = bias - IN_ZP * weight.reshape(layer.out_c, -1).sum(1)
    stored = weight[..., 0].transpose(1, 2, 0).reshape(-1, layer.in_c) if layer.depthwise else weight.reshape(layer.out_c, -1)
    arrays = [constant("w", "uint8_t", reference.pack(stored, layer.bits)), constant("b", "int32_t", folded),
              constant("m", "int32_t", multiplier), constant("s", "int8_t", shift)]  # fmt: skip
    if layer.size == 0:
        scratch = linear_scratch(kernel_set, layer.in_c, layer.bits)
        sizes_of = f"{layer.rows}, {layer.in_c}, {layer.out_c}, {layer.bits}"
        struct = f"static const ek_linear p = {{w, b, m, s, {sizes_of}, {OUT_ZP}, -128, 127}};"
        call = "ek_linear_s8"
    else:
        scratch = conv2d_scratch(kernel_set, layer.in_c, groups, (k, k), layer.bits, k == 1)
        if layer.depthwise:
            scratch = depthwise_scratch(kernel_set, layer.in_c, (k, k), layer.bits)
        sizes = (side, side, layer.in_c, side, side, layer.out_c, k, k, 1, 1, 1, 1, pad, pad, groups, layer.bits, IN_ZP, OUT_ZP)
        struct = f"static const ek_conv2d p = {{w, b, m, s, {', '.join(map(str, sizes))}, -128, 127}};"
        call = "ek_depthwise_s8" if layer.depthwise else "ek_conv2d_s8"
    body = f"""#include "edgekit.h"
{chr(10).join(arrays)}
{struct}
static int8_t x[{x.size}] EK_ARENA, y[{expected.size}] EK_ARENA;
static uint8_t scratch[{max(scratch, 1)}] EK_ARENA;
__attribute__((noinline)) void layer(void) {{ {call}(&p, x, y, scratch); }}
int ek_main(void) {{
    ek_input(x, sizeof x);
    layer();
    ek_output(y, sizeof y);
    return 0;
}}
"""
    return body, x.tobytes(), expected, int(expected.size * k * k * per)


def measure(layer: Layer, board: str, kernel_set: str) -> dict[str, object]:
    body, data, expected, macs = program(layer, kernel_set)
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "app.c"
        source.write_text(body)
        defines = (f"-DEK_SET={KERNEL_SETS.index(kernel_set)}",)
        counts = count(build(Project(BOARDS[board], (source,), defines=defines), Path(name)), data, ["layer"])
    if counts.result.output != expected.tobytes():
        raise SystemExit(f"{layer.name} on {board} ({kernel_set}) differs from numpy")
    instructions = counts.marks["layer"]
    return {
        "kernel": layer.name,
        "board": board,
        "kernel_set": kernel_set,
        "instructions": instructions,
        "macs": macs,
        "instructions_per_mac": round(instructions / macs, 4),
        "instructions_bound": None if kernel_set == "portable" else BOUNDS.get((layer.name, board)),
    }


def main(boards: Sequence[str]) -> None:
    for layer in LAYERS:
        for board in boards:
            own = CORES[BOARDS[board].core].kernel_set
            for kernel_set in dict.fromkeys(("portable", own)):
                row = measure(layer, board, kernel_set)
                bound = f"   at most {row['instructions_bound']:,}" if row["instructions_bound"] else ""
                figures = f"{row['instructions']:>10,} {row['instructions_per_mac']:8.3f}/MAC"
                print(f"{layer.name:24} {board:12} {kernel_set:9} {figures}{bound}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:] or ["mps2-an386", "mps3-an547"])
