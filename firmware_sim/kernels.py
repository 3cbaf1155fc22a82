"""The runtime's files and what its kernels need: sources, compiler flags and scratch sizes.

The C interface is ``runtime/edgekit.h``; this module says in Python what a host that plans memory has to know of it.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

__all__ = [
    "HEADERS",
    "KERNEL_SETS",
    "RUNTIME",
    "SEMIHOST",
    "SOURCES",
    "binary_band",
    "binary_matmul_scratch",
    "binary_planes_scratch",
    "binary_rows_scratch",
    "binary_vectors_scratch",
    "conv2d_scratch",
    "depthwise_scratch",
    "linear_scratch",
    "spiking_scratch",
]

KERNEL_SETS = ("portable", "dsp", "mve")
"""In the order of ``EK_SET``: plain C, SMLAD (Armv7E-M, Armv8-M with DSP), and MVE (Armv8.1-M)."""

RUNTIME = Path(str(files("edgekit.firmware_sim") / "runtime"))
"""The folder of the C files."""

HEADERS = ("edgekit.h", "internal.h", "bits.h")
SOURCES = (
    "startup.c",
    "binarize.c",
    "binary_matmul.c",
    "binary_planes.c",
    "binary_rows.c",
    "binary_vectors.c",
    "bits.c",
    "check.c",
    "conv2d.c",
    "depthwise.c",
    "elementwise.c",
    "float_io.c",
    "linear.c",
    "move.c",
    "pool.c",
    "rows.c",
    "rows_dsp.c",
    "rows_mve.c",
    "softmax.c",
    "spiking.c",
)
"""Every C file of an application but its own and the host link; what it does not call is not linked."""

SEMIHOST = "semihost.c"
"""Input, output and exit for QEMU; a real board has its own."""


def _up(n: int, step: int) -> int:
    return -(-n // step) * step


def _packed_rows(kernel_set: str, k: int, bits: int) -> int:
    return 0 if bits == 8 or kernel_set == "mve" else 4 * _up(k, 16)


def conv2d_scratch(
    kernel_set: str, in_c: int, groups: int, kernel: tuple[int, int], weight_bits: int = 8, pointwise: bool = False
) -> int:
    """Bytes of scratch that ``ek_conv2d_s8`` needs. ``pointwise``: 1x1, groups 1 and no padding on any side."""
    k = kernel[0] * kernel[1] * in_c // groups
    column = 0 if pointwise else _up(k, 16)
    pairs = 8 * _up(k, 4) if kernel_set == "dsp" else 0
    return column + pairs + _packed_rows(kernel_set, k, weight_bits)


def linear_scratch(kernel_set: str, in_n: int, weight_bits: int = 8) -> int:
    """Bytes of scratch that ``ek_linear_s8`` needs."""
    return (2 * _up(in_n, 4) if kernel_set == "dsp" else 0) + _packed_rows(kernel_set, in_n, weight_bits)


def depthwise_scratch(kernel_set: str, channels: int, kernel: tuple[int, int], weight_bits: int = 8) -> int:
    """Bytes of scratch that ``ek_depthwise_s8`` needs; the same in every kernel set."""
    taps = kernel[0] * kernel[1]
    return _up(4 * taps + 4, 16) + _up(channels, 16) + (0 if weight_bits == 8 else taps * channels)


def binary_rows_scratch(in_c: int, groups: int, kernel: tuple[int, int]) -> int:
    """Bytes of scratch that ``ek_binary_rows`` needs; the same in every kernel set."""
    return 4 * kernel[0] * kernel[1] * (_up(in_c // groups, 32) // 32)


def binary_vectors_scratch(kernel_set: str, in_c: int, out_c: int) -> int:
    """Bytes of scratch that ``ek_binary_vectors`` needs."""
    lanes = 4 if kernel_set == "mve" else 1
    return 4 * (_up(_up(out_c, 32) // 32, 4) + (in_c // 16 + 8) * lanes + in_c // 2 + 8)


def binary_matmul_scratch(kernel_set: str, n: int, k: int, planes: int) -> int:
    """Bytes of scratch that ``ek_binary_matmul_s8`` needs."""
    if kernel_set == "mve":
        return 4 * (_up(k, 32) // 32) * (n + 1) + 16
    words = _up(n, 32) // 32
    return 4 * (words + k // 8 + 4 + k + 8 + k * words + planes * words)


BAND_BYTES = 16384
"""``EK_BAND_BYTES``: what the inputs of the positions at hand may take of scratch, if 32 positions do not take more."""


def binary_band(kernel_set: str, taps: int, in_c: int, positions: int) -> int:
    """Words of 32 positions that ``ek_binary_planes`` works on at a time."""
    lanes = 4 if kernel_set == "mve" else 1
    most = max(BAND_BYTES // (4 * taps * in_c * lanes), 1) * lanes
    whole = _up(_up(positions, 32) // 32, lanes)
    return _up(-(-whole // -(-whole // most)), lanes)


def binary_planes_scratch(
    kernel_set: str, in_c: int, groups: int, kernel: tuple[int, int], out: tuple[int, int], planes: int
) -> int:
    """Bytes of scratch that ``ek_binary_planes`` needs; ``out``: height and width."""
    lanes, taps = 4 if kernel_set == "mve" else 1, kernel[0] * kernel[1]
    band, k = binary_band(kernel_set, taps, in_c, out[0] * out[1]), taps * in_c // groups
    kinds = [min(n, (size + 1) * (size + 2) // 2) for n, size in zip(out, kernel, strict=True)]
    words = taps * in_c * band + band + planes * band + 32 * band + (k // 8 + 8) * lanes + k + 24
    most = min(32 * band, kinds[0] * kinds[1])
    words += 2 * (kernel[0] + 1) * (kernel[1] + 1)
    return 4 * (words + 2 * 32 * band + 6 * most + 2 * (band + most))


def spiking_scratch(kernel: tuple[int, int], in_c: int, groups: int) -> int:
    """Bytes of scratch that ``ek_spiking_s16`` needs."""
    return 4 * kernel[0] * kernel[1] * in_c // groups + 16
