"""How far below its input a kernel's output must start, so that it may be written over an input that is still being read.

Kernels compute the positions of an image (or the rows of a sequence) in order, all channels of one after the other. When a
position is written, everything that later positions read must lie above it. How many positions are read before the first of them
is written depends on the kernel: four at a time where SMLAD is used; and one that reads a window while it writes that window's
position must not write over it either (``firmware_sim/runtime``).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgekit.targets.cortex_m.graph import Step

__all__ = ["conv2d", "linear", "pointwise", "window"]


def pointwise(step: Step) -> bool:
    """A convolution whose columns are runs of the input itself (``ek_conv2d_s8`` decides by the same rule)."""
    v = step.values
    inside = all((v["out"][i] - 1) * v["stride"][i] + 1 <= v["in"][i] for i in range(2))
    return bool(v["kernel"] == (1, 1) and v["groups"] == 1 and v["pad"] == (0, 0) and inside)


def conv2d(step: Step, kernel_set: str) -> int | None:
    """Windows are copied before their position is written, four at once with SMLAD; a pointwise one may be read in place."""
    if step.values["groups"] != 1:
        return None  # group after group, each over the whole image
    if kernel_set == "dsp":
        return _distance(step, blocks=4, own=False)
    return _distance(step, blocks=1, own=pointwise(step))


def window(step: Step, kernel_set: str) -> int | None:
    """Depthwise convolutions and pools read a window while they write its position."""
    return _distance(step, blocks=1, own=True)


def linear(step: Step, kernel_set: str) -> int | None:
    """A vector is copied before its outputs are written with SMLAD, and read in place otherwise."""
    rows = np.arange(step.values["rows"], dtype=np.int64)
    written, read = (rows + 1) * step.values["outputs"], rows * step.values["inputs"]
    if kernel_set == "dsp":
        written, read = written[:-1], read[1:]
    return _largest(written, read, step)


def _distance(step: Step, blocks: int, own: bool) -> int:
    """Largest lead of the writing over the reading that is still to come, in bytes.

    Args:
        blocks: positions that are read before the first of them is written (the last few one by one).
        own: a position may be read while it is written.
    """
    lowest = _lowest(step)
    ahead = np.minimum.accumulate(lowest[::-1])[::-1]  # what positions from here on read at least
    whole = len(lowest) // blocks * blocks
    ends = np.array([*range(blocks, whole + 1, blocks), *range(whole + 1, len(lowest) + 1)], np.int64)
    written = ends * step.values["out"][2]
    if own:
        return _largest(written, ahead[ends - 1], step)
    return _largest(written[:-1], ahead[ends[:-1]], step)


def _largest(written: NDArray[np.int64], read: NDArray[np.int64], step: Step) -> int:
    """At best the output may lie anywhere: all is read before anything is written."""
    nowhere = -(1 << 24)
    return int((written - read).max(initial=nowhere))


def _lowest(step: Step) -> NDArray[np.int64]:
    """First byte of the input that each output position may read, in order."""
    v = step.values
    height, width, channels = v["in"]
    first = []
    for axis, size in enumerate((height, width)):
        start = np.arange(v["out"][axis], dtype=np.int64) * v["stride"][axis] - v["pad"][axis]
        first.append(np.clip(start, 0, size - 1))
    found: NDArray[np.int64] = ((first[0][:, None] * width + first[1]) * channels).reshape(-1)
    return found
