"""SiLU of integers as a sigmoid and a product of integers, where that is within one step of the program's table.

XNNPACK has int8 kernels for both; a table, or SiLU in float between a dequantize and a quantize, is slower.
"""

from __future__ import annotations

import numpy as np

from edgekit.frozen import Layer

__all__ = ["GATE", "error", "is_gated"]

GATE = (1 / 256, -128)
"""Scale and zero point of a sigmoid in int8, the only ones that LiteRT's and XNNPACK's kernels write."""


def is_gated(layer: Layer) -> bool:
    """True if the layer is a SiLU that two int8 operators compute to within 1 for all 256 inputs."""
    return layer.op == "qlut" and layer.args["function"] == "silu" and error(layer) <= 1


def error(layer: Layer) -> int:
    """Largest difference of ``x * sigmoid(x)``, both rounded to int8 as XNNPACK does, from the table, over all 256 inputs."""
    a, q = layer.args, np.arange(-128, 128)
    real = (q - a["in_zp"]) * float(np.float32(a["in_scale"]))
    gate = np.clip(np.rint(1 / (1 + np.exp(-real)) / GATE[0]), 0, 255)
    factor = np.float32(a["in_scale"]) * np.float32(GATE[0]) / np.float32(a["out_scale"])
    product = ((q - a["in_zp"]) * gate).astype(np.float32) * factor
    found = np.clip(np.rint(product) + a["out_zp"], -128, 127)
    return int(np.abs(found - a["table"].numpy()).max())
