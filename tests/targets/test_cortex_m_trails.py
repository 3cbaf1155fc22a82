"""An output may lie over the input that is still being read, but not one byte further: against loops over every byte read."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgekit.targets.cortex_m import trails
from edgekit.targets.cortex_m.graph import Step

AXIS = st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(1, 3), st.integers(0, 2), st.integers(1, 2))


def windows(values: dict[str, Any]) -> list[set[int]]:
    """The bytes of the input that each output position reads."""
    height, width, channels = values["in"]
    found = []
    for oy in range(values["out"][0]):
        for ox in range(values["out"][1]):
            read: set[int] = set()
            for i in range(values["kernel"][0]):
                for j in range(values["kernel"][1]):
                    y = oy * values["stride"][0] - values["pad"][0] + i * values["dilation"][0]
                    x = ox * values["stride"][1] - values["pad"][1] + j * values["dilation"][1]
                    if 0 <= y < height and 0 <= x < width:
                        read |= set(range((y * width + x) * channels, (y * width + x + 1) * channels))
            found.append(read)
    return found


def harmful(values: dict[str, Any], distance: int, blocks: int, own: bool) -> bool:
    """Whether some byte is written before it is read for the last time; the output starts ``distance`` below the input."""
    reads, each = windows(values), values["out"][2]
    written: set[int] = set()
    at = 0
    while at < len(reads):
        step = blocks if len(reads) - at >= blocks else 1
        block = reads[at : at + step]
        if any(read & written for read in block):
            return True
        for position in range(at, at + step):
            new = set(range(position * each - distance, (position + 1) * each - distance))
            if own and reads[position] & new:
                return True
            written |= new
        at += step
    return False


@settings(deadline=None, max_examples=150)
@given(AXIS, AXIS, st.integers(1, 5), st.integers(1, 6), st.sampled_from(("dsp", "mve", "depthwise")))
def test_distances_are_safe_and_no_larger_than_needed(
    a: tuple[int, ...], b: tuple[int, ...], channels: int, outputs: int, kind: str
) -> None:
    size, kernel, stride, pad, dilation = zip(a, b, strict=True)
    pad = tuple(min(p, k - 1) for p, k in zip(pad, kernel, strict=True))
    out = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in zip(size, kernel, stride, pad, dilation, strict=True)]
    if min(out) < 1:
        return
    outputs = channels if kind == "depthwise" else outputs
    values = {
        "in": (*size, channels),
        "out": (*out, outputs),
        "kernel": kernel,
        "stride": stride,
        "pad": pad,
        "dilation": dilation,
    }
    step = Step("x", "conv2d", (0,), 1, {**values, "groups": 1})
    if kind == "depthwise":
        distance, blocks, own = trails.window(step, "dsp"), 1, True
    else:
        found = trails.conv2d(step, kind)
        assert found is not None
        distance, blocks, own = found, 4 if kind == "dsp" else 1, kind != "dsp" and trails.pointwise(step)
    everywhere = distance < -(1 << 20)
    assert not harmful(values, 0 if everywhere else distance, blocks, own)
    if not everywhere and dilation == (1, 1) and pad == (0, 0):
        assert harmful(values, distance - 1, blocks, own)


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 30, 12), (5, 8, 8), (5, 8, 11), (5, 12, 7)])
@pytest.mark.parametrize("kernel_set", ["portable", "dsp"])
def test_rows_of_a_linear_layer(rows: int, inputs: int, outputs: int, kernel_set: str) -> None:
    step = Step("x", "linear", (0,), 1, {"rows": rows, "inputs": inputs, "outputs": outputs})
    distance = trails.linear(step, kernel_set)
    values = {
        "in": (1, rows, inputs),
        "out": (1, rows, outputs),
        "kernel": (1, 1),
        "stride": (1, 1),
        "pad": (0, 0),
        "dilation": (1, 1),
    }
    own = kernel_set != "dsp"
    if rows == 1 and not own:
        assert distance is not None and distance < -(1 << 20)
    else:
        assert distance is not None and not harmful(values, distance, 1, own) and harmful(values, distance - 1, 1, own)


def test_a_grouped_convolution_must_not_overlap() -> None:
    assert trails.conv2d(Step("x", "conv2d", (0,), 1, {"groups": 2}), "portable") is None
