"""What the operators on packed signs become in firmware: rows of the table of rules."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgekit.frozen import Layer
from edgekit.frozen.ops import activation_bounds, requantize
from edgekit.targets.cortex_m import binary_layout
from edgekit.targets.cortex_m.binary import LONGEST, kind_of
from edgekit.targets.cortex_m.fixedpoint import quantize_multiplier
from edgekit.targets.cortex_m.lowering import Builder, constants

__all__ = ["RULES"]

_LARGEST = 1 << 30  # the kernels' contract: |sum| << shift stays below it


def _packed(build: Builder, layer: Layer, channels: int) -> int:
    """The tensor of a layer's packed output."""
    index = build.tensor(layer, layer.shape, False, (1.0, 0), channels=channels)
    build.of[layer.name] = index
    return index


def _binarize(build: Builder, layer: Layer) -> None:
    source = layer.inputs[0]
    if layer.args["threshold"].is_floating_point():
        raise build.refuse(layer, "takes signs of float activations", "quantize its input (activations: int8)")
    rank = len(layer.shape)
    dim = int(layer.args["dim"]) % rank
    image = rank == 4 and dim == 1
    found = build.read(source, last=image)
    shape = build.tensors[found].shape
    channels = shape[dim]
    if not image and dim != rank - 1:  # what is packed comes last: attention's values, along the tokens
        order = [i for i in range(rank) if i != dim] + [dim]
        tensor = build.tensors[found]
        turned = build.tensor(f"{layer.name}.turned", [shape[i] for i in order], False, (tensor.scale, tensor.zero_point))
        build.transpose(layer, found, turned, order)
        found = turned
    threshold: NDArray[Any] = np.clip(layer.args["threshold"].numpy().astype(np.int64).reshape(-1), -129, 128).astype(np.int16)
    values = {"positions": prod(shape) // channels, "channels": channels}
    build.step(layer, "binarize", [found], _packed(build, layer, channels), values=values, arrays={"threshold": threshold})


def _finish(build: Builder, layer: Layer, k: int) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """How sums end: thresholds, or the requantization of ``qconv2d`` with TFLite's multipliers."""
    if layer.packed:
        return {"packed": True, "low": -128, "high": 127, "out_zp": 0}, dict(constants(layer, "threshold"))
    assert layer.out_scale is not None and layer.out_zero_point is not None
    found = dict(constants(layer, "weight_scale", "bias"))
    real = found.pop("weight_scale").astype(np.float64) / float(np.float32(layer.out_scale))
    try:
        fixed = np.array([quantize_multiplier(float(m)) for m in real], np.int64).reshape(-1, 2)
    except ValueError as error:
        raise build.refuse(layer, f"has a scale that makes the {error}", "calibrate it again with other samples") from None
    largest = np.abs(found["bias"].astype(np.int64)) + 5 * k  # the constants of kernels hold up to bias + 3k
    if (largest << np.maximum(fixed[:, 1], 0)).max(initial=0) >= _LARGEST:
        raise build.refuse(layer, "may have sums that pass 30 bits", "give it a larger output range")
    low, high = activation_bounds(layer.args["activation"], layer.out_scale, layer.out_zero_point)
    found |= {"multiplier": fixed[:, 0].astype(np.int32), "shift": fixed[:, 1].astype(np.int8)}
    return {"packed": False, "low": low, "high": high, "out_zp": layer.out_zero_point}, found


def _step(build: Builder, layer: Layer, source: int, weight: NDArray[np.bool_], sizes: dict[str, Any], last: bool) -> None:
    values, arrays = _finish(build, layer, prod(weight.shape[1:]))
    values |= sizes
    output = _packed(build, layer, len(weight)) if layer.packed else build.output(layer, last)
    arrays["weight"] = weight.astype(np.uint8)
    build.step(layer, kind_of(values), [source], output, values=values, arrays=arrays, macs=layer.macs, bits=1)


def _conv2d(build: Builder, layer: Layer) -> None:
    source, channels = build.read(layer.inputs[0]), int(layer.args["channels"])
    groups, stored = int(layer.args["groups"]), layer.args["weight"].numpy()
    weight = binary_layout.unpacked_bytes(stored, channels // groups)
    _, height, width, _ = build.tensors[source].shape
    out_h, out_w = layer.shape[1:3] if layer.packed else layer.shape[2:]
    sizes = {
        "in": (height, width, channels), "out": (out_h, out_w, len(weight)), "kernel": weight.shape[1:3],
        "stride": tuple(layer.args["stride"]), "pad": tuple(layer.args["padding"]), "dilation": tuple(layer.args["dilation"]),
        "groups": groups,
    }  # fmt: skip
    _step(build, layer, source, weight, sizes, last=True)


def _linear(build: Builder, layer: Layer) -> None:
    source, features = build.read(layer.inputs[0]), int(layer.args["features"])
    weight = binary_layout.unpacked_bytes(layer.args["weight"].numpy(), features)[:, None, None]
    rows = prod(layer.shape[:-1])
    sizes = {
        "in": (1, rows, features), "out": (1, rows, len(weight)), "kernel": (1, 1), "stride": (1, 1), "pad": (0, 0),
        "dilation": (1, 1), "groups": 1,
    }  # fmt: skip
    _step(build, layer, source, weight, sizes, last=False)


def _matmul(build: Builder, layer: Layer) -> None:
    assert layer.out_scale is not None and layer.out_zero_point is not None
    a, b = (build.read(name, last=False) for name in layer.inputs)
    k, unsigned = int(layer.args["features"]), bool(layer.args["a_unsigned"])
    if k >= LONGEST:
        raise build.refuse(layer, f"sums {k} products", f"keep them below {LONGEST}")
    *leading, m, _ = build.tensors[a].shape
    factor = torch.tensor(layer.args["scale"], dtype=torch.float32) / torch.tensor(layer.out_scale, dtype=torch.float32)
    bounds = activation_bounds("none", layer.out_scale, layer.out_zero_point)
    results = requantize(torch.arange(-k, k + 1, dtype=torch.float64), factor, layer.out_zero_point, bounds, 8).numpy()
    values = {"batch": prod(leading), "m": m, "n": build.tensors[b].shape[-2], "k": k, "unsigned": unsigned}
    values["planes"] = binary_layout.product_planes(k, unsigned)
    build.step(
        layer,
        "binary_matmul",
        [a, b],
        build.output(layer, last=False),
        values=values,
        arrays={"results": results},
        macs=layer.macs,
        bits=1,
    )


RULES: dict[str, Callable[[Builder, Layer], None]] = {
    "binarize": _binarize,
    "binary_conv2d": _conv2d,
    "binary_qconv2d": _conv2d,
    "binary_linear": _linear,
    "binary_qlinear": _linear,
    "binary_qmatmul": _matmul,
}
"""Operator to its rule."""
