"""The runtime's files and what its kernels need: sources, compiler flags and scratch sizes.

The C interface is ``runtime/edgekit.h``; this module says in Python what a host that plans memory has to know of it.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

__all__ = ["HEADERS", "KERNEL_SETS", "RUNTIME", "SEMIHOST", "SOURCES", "conv2d_scratch", "depthwise_scratch", "linear_scratch"]

KERNEL_SETS = ("portable", "dsp", "mve")
"""In the order of ``EK_SET``: plain C, SMLAD (Armv7E-M, Armv8-M with DSP), and MVE (Armv8.1-M)."""

RUNTIME = Path(str(files("edgekit.firmware_sim") / "runtime"))
"""The folder of the C files."""

HEADERS = ("edgekit.h", "internal.h")
SOURCES = (
    "startup.c",
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
