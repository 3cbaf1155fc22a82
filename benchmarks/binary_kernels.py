"""Instructions of single 1-bit layers on the emulated boards, beside our int8 kernel of the same layer on the same core.

    python benchmarks/binary_kernels.py [board ...]

Each output is compared with numpy first. ``binary_firmware.py`` records the same rows.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import cortex_m_kernels
import firmware_reference as reference
import numpy as np

from edgekit.firmware_sim.boards import BOARDS, CORES
from edgekit.firmware_sim.count import count
from edgekit.firmware_sim.kernels import (
    KERNEL_SETS,
    binary_matmul_scratch,
    binary_planes_scratch,
    binary_rows_scratch,
    binary_vectors_scratch,
)
from edgekit.firmware_sim.toolchain import Project, build
from edgekit.targets.cortex_m import binary_layout as layout

TIMES = {
    ("fc 256x256", "cortex-m4"): 8.0,
    ("fc 256x256", "cortex-m7"): 8.0,
    ("fc 256x256", "cortex-m55"): 2.2,
    ("conv 3x3 16x16x32->32", "cortex-m4"): 5.0,
    ("conv 3x3 16x16x32->32", "cortex-m7"): 5.0,
    ("conv 3x3 16x16x32->32", "cortex-m55"): 1.7,
}
"""How many times fewer instructions than int8 the packed layer should take at least."""


@dataclass(frozen=True)
class Layer:
    """A convolution of ``size`` x ``size`` (padding keeps the size), or a fully connected layer of size 0."""

    name: str
    size: int
    in_c: int
    out_c: int
    kernel: int = 1


LAYERS = (
    Layer("fc 256x256", 0, 256, 256),
    Layer("fc 512x512", 0, 512, 512),
    Layer("conv 3x3 16x16x32->32", 16, 32, 32, 3),
    Layer("conv 3x3 8x8x64->64", 8, 64, 64, 3),
    Layer("conv 3x3 4x4x128->128", 4, 128, 128, 3),
    Layer("conv 1x1 16x16x64->64", 16, 64, 64),
)


def program(layer: Layer, kernel_set: str, output: str, kind: str) -> tuple[str, bytes, np.ndarray]:
    """C source of one call, its input and the expected output. kind: "vectors", "planes" or "rows"."""
    rng = np.random.default_rng(0)
    k, side, in_c, out_c = layer.kernel, max(layer.size, 1), layer.in_c, layer.out_c
    n, pad = k * k * in_c, k // 2
    x, weight = rng.random((side, side, in_c)) < 0.5, rng.random((out_c, k, k, in_c)) < 0.5
    signs = 2 * weight.astype(np.int64) - 1
    zeros = np.zeros(out_c, np.int64)
    acc = reference.conv2d(2 * x.astype(np.int64) - 1, signs, zeros, (1, 1), (1, 1), (pad, pad), (side, side), 1, 0)
    sums, planes = signs.reshape(out_c, -1).sum(1), layout.n_planes(n)
    transposed = kind == "vectors"
    stored = layout.transposed(weight) if transposed else layout.rows(weight.reshape(out_c, -1, in_c))
    declare = cortex_m_kernels.constant
    parts = [declare("w", "uint32_t", stored.reshape(-1))]
    if output == "packed":
        threshold = rng.integers(-8, 9, out_c)
        table = layout.threshold_planes(threshold, sums, n) if transposed else threshold.astype(np.int32)
        parts.append(declare("t", "uint32_t" if transposed else "int32_t", table.reshape(-1)))
        pointers, expected = "w, t, 0, 0, 0", layout.packed_words(acc >= threshold)
    else:
        bias, multiplier = rng.integers(-20, 20, out_c), rng.integers(1 << 30, 1 << 31, out_c)
        shift = np.full(out_c, -1)
        base = np.concatenate([bias - sums - 2 * n, bias + sums + 2 * n]) if transposed else bias
        parts += [declare("b", "int32_t", base), declare("m", "int32_t", multiplier), declare("s", "int8_t", shift)]
        pointers, expected = "w, 0, b, m, s", reference.finish(acc + bias, multiplier, shift, 3, -128, 127)
    scratch = {
        "vectors": binary_vectors_scratch(kernel_set, in_c, out_c),
        "planes": binary_planes_scratch(kernel_set, in_c, 1, (k, k), (side, side), planes),
        "rows": binary_rows_scratch(in_c, 1, (k, k)),
    }[kind]
    sizes = (side, side, in_c, side, side, out_c, k, k, 1, 1, 1, 1, pad, pad, 1, planes, 3, -128, 127)
    packed = layout.packed_words(x)
    body = f"""#include "edgekit.h"
{chr(10).join(parts)}
static const ek_binary p = {{{pointers}, {", ".join(map(str, sizes))}}};
static uint8_t x[{packed.nbytes}] EK_ARENA, y[{expected.nbytes}] EK_ARENA, scratch[{max(scratch, 1)}] EK_ARENA;
__attribute__((noinline)) void layer(void) {{ ek_binary_{kind}(&p, x, y, scratch); }}
int ek_main(void) {{
    ek_input(x, sizeof x);
    layer();
    ek_output(y, sizeof y);
    return 0;
}}
"""
    return body, packed.tobytes(), expected


@dataclass(frozen=True)
class Product:
    """``rows`` vectors of k signs with as many others: one head of attention, Q K' (unsigned: A V)."""

    name: str
    rows: int
    k: int
    unsigned: bool = False


PRODUCTS = (Product("Q K' 64 tokens, 64 a head", 64, 64), Product("Q K' 32 tokens, 32 a head", 32, 32),
            Product("A V 64 tokens, 64 a head", 64, 64, True))  # fmt: skip


def product_program(product: Product, kernel_set: str) -> tuple[str, bytes, np.ndarray]:
    """C source of one product, its operands and the expected output."""
    rng, n, k = np.random.default_rng(0), product.rows, product.k
    a, b = rng.random((n, k)) < (0.25 if product.unsigned else 0.5), rng.random((n, k)) < 0.5
    left = a.astype(np.int64) if product.unsigned else 2 * a.astype(np.int64) - 1
    results = np.clip(np.rint(np.arange(-k, k + 1) * 1.7), -128, 127).astype(np.int8)
    planes = layout.product_planes(k, product.unsigned)
    table = layout.product_table(results, product.unsigned)
    packed = np.stack([layout.packed_words(a), layout.packed_words(b)])
    body = f"""#include "edgekit.h"
{cortex_m_kernels.constant("t", "int8_t", table)}
static const ek_binary_matmul p = {{t, 1, {n}, {n}, {k}, {planes}, {int(product.unsigned)}}};
static uint8_t x[{packed.nbytes}] EK_ARENA, scratch[{binary_matmul_scratch(kernel_set, n, k, planes)}] EK_ARENA;
static int8_t y[{n * n}] EK_ARENA;
__attribute__((noinline)) void layer(void) {{ ek_binary_matmul_s8(&p, x, x + {packed.nbytes // 2}, y, scratch); }}
int ek_main(void) {{
    ek_input(x, sizeof x);
    layer();
    ek_output(y, sizeof y);
    return 0;
}}
"""
    return body, packed.tobytes(), results[left @ (2 * b.astype(np.int64) - 1).T + k]


def product_rows(product: Product, board: str) -> Iterator[dict[str, object]]:
    """A row for each kernel set, beside our int8 linear layer with as many rows, which multiplies as often."""
    core = BOARDS[board].core
    own = CORES[core].kernel_set
    int8 = cortex_m_kernels.Layer(product.name, 0, product.k, product.rows, rows=product.rows)
    baseline = cortex_m_kernels.measure(int8, board, own)["instructions"]
    assert isinstance(baseline, int)
    for kernel_set in dict.fromkeys((own, "portable")):
        instructions = counted(product.name, product_program(product, kernel_set), board, kernel_set)
        yield {
            "layer": product.name, "board": board, "core": core, "kernel": "matmul", "kernel_set": kernel_set, "output": "int8",
            "instructions": instructions, "int8": baseline, "times": round(baseline / instructions, 2), "times_bound": None,
        }  # fmt: skip


def measure(layer: Layer, board: str, kernel_set: str, output: str, kind: str) -> int:
    """Instructions of the layer, whose output equals numpy's."""
    return counted(f"{layer.name} ({kind}, {output})", program(layer, kernel_set, output, kind), board, kernel_set)


def counted(name_of_it: str, made: tuple[str, bytes, np.ndarray], board: str, kernel_set: str) -> int:
    """Instructions of the function ``layer`` of a program, whose output equals numpy's."""
    body, data, expected = made
    with tempfile.TemporaryDirectory() as name:
        source = Path(name) / "app.c"
        source.write_text(body)
        defines = (f"-DEK_SET={KERNEL_SETS.index(kernel_set)}",)
        counts = count(build(Project(BOARDS[board], (source,), defines=defines), Path(name)), data, ["layer"])
    if counts.result.output != expected.tobytes():
        raise SystemExit(f"{name_of_it} on {board} ({kernel_set}) differs from numpy")
    return counts.marks["layer"]


def rows(layer: Layer, board: str) -> Iterator[dict[str, object]]:
    """A row for each kernel and output, beside int8 by the core's own kernels."""
    core = BOARDS[board].core
    own, fast = CORES[core].kernel_set, "planes" if layer.size else "vectors"
    int8 = cortex_m_kernels.Layer(layer.name, layer.size, layer.in_c, layer.out_c, layer.kernel)
    baseline = cortex_m_kernels.measure(int8, board, own)["instructions"]
    assert isinstance(baseline, int)
    for output in ("packed", "int8"):
        for kind, kernel_set in dict.fromkeys(((fast, own), (fast, "portable"), ("rows", own))):
            instructions = measure(layer, board, kernel_set, output, kind)
            best = kind == fast and kernel_set == own and output == "packed"
            yield {
                "layer": layer.name, "board": board, "core": core, "kernel": kind, "kernel_set": kernel_set, "output": output,
                "instructions": instructions, "int8": baseline, "times": round(baseline / instructions, 2),
                "times_bound": TIMES.get((layer.name, core)) if best else None,
            }  # fmt: skip


def show(row: dict[str, object]) -> None:
    """A line of the table."""
    least = f"  at least {row['times_bound']}" if row["times_bound"] else ""
    print(
        f"{row['layer']:27} {row['board']:12} {row['kernel']:7} {row['kernel_set']:9} {row['output']:7} "
        f"{row['instructions']:>11,}  int8 {row['int8']:>11,}  {row['times']:6.2f}x{least}",
        flush=True,
    )


def main(boards: Sequence[str]) -> None:
    for layer in LAYERS:
        for board in boards:
            for row in rows(layer, board):
                show(row)
    for product in PRODUCTS:
        for board in boards:
            for row in product_rows(product, board):
                show(row)


if __name__ == "__main__":
    main(sys.argv[1:] or ["mps2-an386", "mps2-an500", "mps3-an547"])
