"""A softmax between integers: float in the frozen program, from int8 to int8 by a table of exponentials in firmware.

Where the program quantizes the softmax again, the scale and zero point are those of that ``quantize`` layer, and the result is
within one step of it. Where the program returns the softmax, firmware gives it in steps of 1/256 from zero point -128, as TFLite
does: the softmax of the same integers to within 1/256. Nothing else that stays in float has a firmware form.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor as TorchTensor
from torch import fx

from edgekit.frozen import FrozenProgram, Layer
from edgekit.targets.cortex_m.fixedpoint import quantize_multiplier

if TYPE_CHECKING:
    from edgekit.targets.cortex_m.lowering import Builder

__all__ = ["LONGEST", "OUTPUT", "add_step", "found"]

OUTPUT = (1.0 / 256, -128)
"""Scale and zero point of a softmax that the program returns: TFLite's."""

LONGEST = 1023
"""Numbers in a row: their exponentials, 22 bits each, are summed in 32."""

_NAMES = ("softmax.int", "_softmax.default")


def found(program: FrozenProgram) -> Mapping[str, str]:
    """Each softmax that firmware can compute: its fx node to the ``dequantize`` layer it reads.

    It reads a ``dequantize`` directly, runs along the last axis of at most 1023 numbers, and only ``quantize`` layers of 8 bits
    or the program's output read it.
    """
    layers = {layer.node: layer for layer in program.layers}
    result = {}
    for node in program.module.graph.nodes:
        if node.op != "call_function" or str(node.target).removeprefix("aten.") not in _NAMES:
            continue
        source, value = layers.get(getattr(node.args[0], "name", "")), node.meta.get("val")
        if source is None or source.op != "dequantize" or not isinstance(value, TorchTensor) or value.dim() < 1:
            continue
        last = int(node.args[1]) % value.dim() == value.dim() - 1
        if last and value.shape[-1] <= LONGEST and all(_takes_it(user, layers) for user in node.users):
            result[node.name] = source.name
    return result


def _takes_it(user: fx.Node, layers: Mapping[str, Layer]) -> bool:
    return user.op == "output" or (
        user.name in layers and layers[user.name].op == "quantize" and layers[user.name].args["bits"] == 8
    )


def add_step(build: Builder, name: str, source: str, output: int) -> None:
    """The step for a softmax of what the ``dequantize`` layer ``source`` reads.

    Args:
        name: of the layer whose output it is, or of the softmax itself.
        output: its tensor.
    """
    layer = build.program.layer(source)
    x = build.read(layer.inputs[0], last=False)
    shape, target = build.tensors[x].shape, build.tensors[output]
    scale = float(layer.args["scale"])
    table = np.round(2.0**22 * np.exp(-np.arange(256) * np.float64(np.float32(scale)))).astype(np.uint32)
    try:
        mantissa, shift = quantize_multiplier(1 / (float(np.float32(target.scale)) * (1 << 20)))
    except ValueError as error:
        raise build.refuse(name, f"has a scale that makes the {error}", "calibrate it again with other samples") from None
    values = {"rows": prod(shape[:-1]), "n": shape[-1], "multiplier": mantissa, "shift": shift, "out_zp": target.zero_point}
    build.step(name, "softmax", [x], output, values=values, arrays={"table": table})
