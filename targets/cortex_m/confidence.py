"""When the integer sum of a readout is sure enough: Dynamic Confidence without floats, for streaming firmware.

The rule is that of :mod:`edgekit.compress.spiking.confidence`: stop after the first step with ``max softmax(A / temperature) >
threshold``, A the sum of the outputs so far. With d the distance of a sum from the largest one and u the real value of a unit
that is ``sum(exp(-d * u / temperature)) < 1 / threshold``. For exp firmware takes ``2^-(d * scale / 2^24)``: d * scale in 64
bits, then an exponent with 16 fraction bits, ``2^-f`` by a cubic within 9e-5. :func:`sure` is the same in numpy, bit by bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, e, log2, prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.errors import UnsupportedError
from edgekit.targets.cortex_m.graph import Firmware

__all__ = ["Rule", "rule_of", "sure"]

_CUBIC = (45340, 15200, 2632)
"""2^-f = 1 - f * (a - f * (b - f * c)), least greatest error on 0 .. 1, in 2^-16."""
_MOST_CLASSES = 255


@dataclass(frozen=True)
class Rule:
    """Sure if the sum of ``classes`` powers, in 2^-24, is below ``limit``; ``scale`` / 2^24: the base-2 exponent of a unit."""

    tensor: int
    classes: int
    scale: int
    limit: int


def rule_of(firmware: Firmware, temperature: float, threshold: float) -> Rule:
    """The integers of a rule.

    Raises:
        UnsupportedError: the firmware has no sum of at most 255 outputs that could be sure, or a temperature out of range.
    """
    stream = firmware.stream
    if stream is None or stream.each or len(firmware.outputs) != 1:
        raise UnsupportedError(f"{firmware.name}: exit_threshold needs stream: true and one output that is summed over the steps")
    (port,) = firmware.outputs
    classes = prod(firmware.tensors[port.tensor].shape)
    unit = (port.scale or 1.0) * stream.count  # the output's scale is that of a mean
    scale = round(unit / temperature * log2(e) * 2**24)
    if not (1 < classes <= _MOST_CLASSES and 64 <= scale < 2**32):
        raise UnsupportedError(
            f"{firmware.name}: {classes} outputs at exit_temperature {temperature:g} (scale {scale}): "
            f"early exit takes 2 to {_MOST_CLASSES} outputs and a scale from 64 to 2^32"
        )
    return Rule(port.tensor, classes, scale, ceil(2**24 / threshold))


def sure(rule: Rule, sums: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether the firmware stops, for int32 sums (..., classes)."""
    values = sums.astype(np.int64)
    distance = (values.max(-1, keepdims=True) - values).astype(np.uint64)
    exponent = (distance * np.uint64(rule.scale)) >> np.uint64(8)
    f, whole = (exponent & np.uint64(0xFFFF)).astype(np.int64), np.minimum(exponent >> np.uint64(16), 63).astype(np.int64)
    a, b, c = _CUBIC
    power = 65536 - ((f * (a - ((f * (b - ((f * c) >> 16))) >> 16))) >> 16)
    total = np.where(whole < 25, (power << 8) >> np.minimum(whole, 25), 0).sum(-1)
    found: NDArray[np.bool_] = total < rule.limit
    return found
