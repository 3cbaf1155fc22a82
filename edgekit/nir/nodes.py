"""NIR's nodes without state, in float64 numpy: x is (N, ...), N samples (or steps of samples)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from edgekit.nir.semantics import kind, rule

__all__ = ["paddings", "pair", "stateless"]

Array = np.ndarray
_CHUNK = 1 << 25
"""Numbers of a convolution's patches held at once."""


def pair(value: Any, count: int = 2) -> tuple[int, ...]:
    """A size that NIR writes as a number, a tuple or an array, as ``count`` integers."""
    values = [int(v) for v in np.atleast_1d(value)]
    return tuple(values * count if len(values) == 1 else values)


def paddings(value: Any, kernel: Sequence[int], dilation: Sequence[int]) -> list[tuple[int, int]]:
    """(before, after) for each spatial dimension; "same" puts the odd one after, as PyTorch does."""
    if isinstance(value, bytes):
        value = value.decode()
    if isinstance(value, str):
        if value == "valid":
            return [(0, 0)] * len(kernel)
        spans = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return [(span // 2, span - span // 2) for span in spans]
    return [(p, p) for p in pair(value, len(kernel))]


def stateless(name: str, node: Any, x: Array) -> Array:
    """The value of a node.

    Raises:
        ValueError: x does not fit it.
    """
    return _NODES[kind(node)](name, node, x)


def _pass(name: str, node: Any, x: Array) -> Array:
    return x


def _affine(name: str, node: Any, x: Array) -> Array:
    weight = np.asarray(node.weight, np.float64)
    y = x @ weight.T if weight.ndim == 2 else np.einsum("...oi,n...i->n...o", weight, x)
    return y + np.asarray(node.bias, np.float64) if kind(node) == "Affine" else y


def _scale(name: str, node: Any, x: Array) -> Array:
    return _same_shape(x * np.asarray(node.scale, np.float64), x)


def _threshold(name: str, node: Any, x: Array) -> Array:
    level = np.asarray(node.threshold, np.float64)
    above = x >= level if rule(name, node).tie == "ge" else x > level
    return _same_shape(above.astype(np.float64), x)


def _same_shape(y: Array, x: Array) -> Array:
    if y.shape != x.shape:
        raise ValueError(f"its values have shape {y.shape[1:]}")
    return y


def _flatten(name: str, node: Any, x: Array) -> Array:
    rank = x.ndim - 1
    start, end = int(node.start_dim) % max(rank, 1), int(node.end_dim) % max(rank, 1)
    shape = x.shape[1:]
    return x.reshape(len(x), *shape[:start], -1, *shape[end + 1 :])


def _conv(name: str, node: Any, x: Array) -> Array:
    weight = np.asarray(node.weight, np.float64)
    spatial = weight.ndim - 2
    if x.ndim != spatial + 2 or x.shape[1] != weight.shape[1] * int(node.groups):
        raise ValueError(f"it takes {weight.shape[1] * int(node.groups)} channels and {spatial} dimensions more")
    stride, dilation = pair(node.stride, spatial), pair(node.dilation, spatial)
    pads = paddings(node.padding, weight.shape[2:], dilation)
    per_sample = max(1, x[0].size * int(np.prod(weight.shape[2:])))
    size = max(1, _CHUNK // per_sample)
    bias = np.asarray(node.bias, np.float64).reshape(-1, *[1] * spatial)
    parts = [
        _convolve(np.pad(x[i : i + size], [(0, 0), (0, 0), *pads]), weight, stride, dilation, int(node.groups))
        for i in range(0, len(x), size)
    ]
    return np.concatenate(parts) + bias


def _convolve(x: Array, weight: Array, stride: Sequence[int], dilation: Sequence[int], groups: int) -> Array:
    spatial = weight.ndim - 2
    spans = tuple(d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:], strict=True))
    if any(size < span for size, span in zip(x.shape[2:], spans, strict=True)):
        raise ValueError("its kernel is larger than the image")
    windows = sliding_window_view(x, spans, tuple(range(2, x.ndim)))
    steps: Any = (..., *(slice(None, None, s) for s in stride), *(slice(None, None, d) for d in dilation))
    windows = windows[steps]
    inputs, outputs = weight.shape[1], weight.shape[0] // groups
    axes = [1, *range(2 + spatial, 2 + 2 * spatial)]  # channels and kernel
    parts = [
        np.tensordot(
            windows[:, g * inputs : (g + 1) * inputs],
            weight[g * outputs : (g + 1) * outputs],
            (axes, [1, *range(2, weight.ndim)]),
        )
        for g in range(groups)
    ]
    return np.moveaxis(np.concatenate(parts, -1), -1, 1)


def _pool(name: str, node: Any, x: Array) -> Array:
    kernel = pair(node.kernel_size)
    stride = pair(node.stride)
    if x.ndim != 4:
        raise ValueError("it takes (channels, height, width)")
    padded = np.pad(x, [(0, 0), (0, 0), *paddings(node.padding, kernel, (1, 1))])
    windows = sliding_window_view(padded, kernel, (2, 3))[:, :, :: stride[0], :: stride[1]]
    total: Array = windows.sum((-2, -1))
    return total / (kernel[0] * kernel[1]) if kind(node) == "AvgPool2d" else total


_NODES: dict[str, Callable[[str, Any, Array], Array]] = {
    "Input": _pass,
    "Output": _pass,
    "Affine": _affine,
    "Linear": _affine,
    "Scale": _scale,
    "Conv1d": _conv,
    "Conv2d": _conv,
    "SumPool2d": _pool,
    "AvgPool2d": _pool,
    "Flatten": _flatten,
    "Threshold": _threshold,
}
