"""The NIR node of each operator of a frozen program: one function for each kind of node, and the table of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from edgekit.frozen.spiking_ops import RECURRENT_OPS

__all__ = ["NEURONS", "REMEDIES", "RULES", "Call", "Refused", "loop", "numbers"]

Array = np.ndarray


class Refused(Exception):
    """NIR cannot hold an operator: the reason, and what to do instead."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.reason, self.remedy = reason, remedy


@dataclass(frozen=True)
class Call:
    """One operator of a program.

    Attributes:
        op: "aten.linear.default", or "edgekit.lif_sequence".
        args: by schema name; constants are tensors, values of the graph None.
        before, after: shape of a sample before and after it, without steps and batch.
        dt: length of a step.
    """

    op: str
    args: Mapping[str, Any]
    before: tuple[int, ...]
    after: tuple[int, ...]
    dt: float

    def array(self, name: str) -> Array:
        """A constant argument."""
        value = self.args[name]
        if not isinstance(value, Tensor):
            raise Refused(f"its {name} is computed, not constant", "make it a constant")
        return numbers(value)


def numbers(value: Tensor) -> Array:
    """A tensor as an array of its own."""
    array: Array = value.detach().cpu().numpy().copy()
    return array


def _linear(call: Call) -> Any:
    import nir

    weight = call.array("weight")
    return nir.Linear(weight) if call.args["bias"] is None else nir.Affine(weight, call.array("bias"))


def _conv(call: Call) -> Any:
    import nir

    weight, size = call.array("weight"), call.before[1:]
    bias = np.zeros(len(weight), np.float32) if call.args["bias"] is None else call.array("bias")
    if call.args.get("transposed"):
        raise Refused("it is a transposed convolution", "use an ordinary one")
    geometry: dict[str, Any] = {}
    for key in ("stride", "padding", "dilation"):
        value = call.args[key]
        value = value if isinstance(value, str) else tuple(map(int, value))
        if not isinstance(value, str):
            value = value[0] if len(size) == 1 else value if len(value) == 2 else value * 2
        geometry[key] = value
    made, shape = (nir.Conv1d, size[0]) if len(size) == 1 else (nir.Conv2d, size)
    return made(input_shape=shape, weight=weight, groups=int(call.args["groups"]), bias=bias, **geometry)


def _avg_pool(call: Call) -> Any:
    kernel, padding = _two(call.args["kernel_size"]), _two(call.args["padding"])
    stride = _two(call.args["stride"]) if call.args["stride"] else kernel
    over = [(n + 2 * p - k) % s for n, k, s, p in zip(call.before[1:], kernel, stride, padding, strict=True)]
    if (call.args["ceil_mode"] and any(over)) or (any(padding) and not call.args["count_include_pad"]):
        raise Refused("its average leaves padding out", "use count_include_pad and no ceil_mode")
    return _pool(kernel, stride, padding, call.args["divisor_override"])


def _pool(kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], divisor: int | None = None) -> Any:
    import nir

    sizes = [np.array(v) for v in (kernel, stride, padding)]
    if divisor not in (None, 1, math.prod(kernel)):
        raise Refused(f"its divisor is {divisor}", "use a mean or a sum")
    return nir.SumPool2d(*sizes) if divisor == 1 else nir.AvgPool2d(*sizes)


def _sum_pool(call: Call) -> Any:
    return _pool(call.args["kernel"], call.args["stride"], call.args["padding"], 1)


def _global_pool(call: Call) -> Any:
    size, out = call.before[1:], call.after[1:]
    if len(size) != 2 or len(out) != 2 or any(n % o for n, o in zip(size, out, strict=True)):
        raise Refused("its windows differ in size, or it drops the image's dimensions", "keep them (keepdim=True)")
    kernel = [n // o for n, o in zip(size, out, strict=True)]
    return _pool(kernel, kernel, [0, 0])


def _reshape(call: Call) -> Any:
    import nir

    before, after = call.before, call.after
    if before == after:
        return None
    for start in range(len(before)):
        for end in range(start + 1, len(before)):
            if (*before[:start], math.prod(before[start : end + 1]), *before[end + 1 :]) == after:
                return nir.Flatten({"input": np.array(before)}, start, end)
    raise Refused(f"it reshapes {before} to {after}, and NIR has Flatten only", "flatten instead")


def _full(value: Any, call: Call) -> Array:
    """A constant in float32, written out for every value of a sample."""
    if value is None:
        raise Refused("both of its operands are values of the network", "NIR scales and compares with constants only")
    array = numbers(value) if isinstance(value, Tensor) else np.asarray(value, np.float32)
    array = array[0] if array.ndim > len(call.after) else array
    return np.broadcast_to(array, call.after).copy()


def _scale(call: Call) -> Any:
    import nir

    factor = _full(call.args["other"], call)
    if call.op.startswith("aten.div"):
        factor = (1.0 / factor.astype(np.float64)).astype(np.float32)
    return nir.Scale(factor)


def _compare(call: Call) -> Any:
    import nir

    return nir.Threshold(_full(call.args["other"], call), metadata={"tie": "ge" if ".ge." in call.op else "gt"})


def _delay(call: Call) -> Any:
    import nir

    return nir.Delay(_full(call.args["delay"], call) * call.dt)


_CELL = ("tau", "r", "v_leak")
_CUBA = ("tau_syn", "tau_mem", "r", "v_leak", "w_in")
_FIRES = ("v_threshold", "v_reset")
NEURONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "lif_sequence": ("LIF", (*_CELL, *_FIRES)),
    "if_sequence": ("IF", ("r", *_FIRES)),
    "cuba_lif_sequence": ("CubaLIF", (*_CUBA, *_FIRES)),
    "li_sequence": ("LI", _CELL),
    "i_sequence": ("I", ("r",)),
    "cuba_li_sequence": ("CubaLI", _CUBA),
}
"""Operator to NIR's class and its fields, which have the same names here and there."""


def _neuron(call: Call) -> Any:
    import nir

    name, fields = NEURONS[call.op.removeprefix("edgekit.").replace("_recurrent", "_sequence")]
    values = {field: _full(call.args[field], call) for field in fields}
    start = call.array("v_init")
    metadata: dict[str, Any] = {"v_init": float(start) if start.size == 1 else _full(call.args["v_init"], call)}
    if "reset" in call.args:
        metadata |= {"reset": call.args["reset"], "tie": call.args["tie"], "max_spikes": int(call.args["max_spikes"])}
        if call.args["reset"] == "zero":
            values["v_reset"] = np.zeros_like(values["v_reset"])
    return getattr(nir, name)(**values, metadata=metadata)


def loop(call: Call) -> Any:
    """The layer of a recurrent neuron from its spikes back to itself."""
    import nir

    weight, bias = call.array("weight"), call.args["bias"]
    if weight.ndim == 2:
        return nir.Linear(weight) if bias is None else nir.Affine(weight, numbers(bias))
    offset = np.zeros(len(weight), np.float32) if bias is None else numbers(bias)
    padding = tuple(size // 2 for size in weight.shape[2:])
    return nir.Conv2d(call.after[1:], weight, (1, 1), padding, (1, 1), len(weight) // weight.shape[1], offset)


def _two(value: Sequence[int]) -> tuple[int, int]:
    return int(value[0]), int(value[-1])


RULES: dict[str, Callable[[Call], Any]] = {
    "aten.linear.default": _linear,
    **dict.fromkeys(("aten.conv1d.default", "aten.conv1d.padding", "aten.conv2d.default", "aten.conv2d.padding"), _conv),
    "aten.convolution.default": _conv,
    "aten.avg_pool2d.default": _avg_pool,
    "aten.adaptive_avg_pool2d.default": _global_pool,
    "aten.mean.dim": _global_pool,
    "edgekit.spike_sum_pool2d": _sum_pool,
    **dict.fromkeys((f"aten.{op}" for op in ("flatten.using_ints", "view.default", "reshape.default")), _reshape),
    **dict.fromkeys((f"aten.{op}" for op in ("squeeze.dims", "squeeze.dim", "_unsafe_view.default")), _reshape),
    **dict.fromkeys((f"aten.{op}" for op in ("mul.Tensor", "mul.Scalar", "div.Tensor", "div.Scalar")), _scale),
    **dict.fromkeys((f"aten.{op}" for op in ("ge.Tensor", "ge.Scalar", "gt.Tensor", "gt.Scalar")), _compare),
    "edgekit.delay_steps": _delay,
    **dict.fromkeys((f"edgekit.{op}" for op in (*NEURONS, *RECURRENT_OPS)), _neuron),
}
"""Operator to what makes its node; None instead of a node: the value passes through unchanged."""

_INTEGER = "the rounding and saturation of integer networks have no form in NIR: export the float program"
REMEDIES = {
    "max_pool2d": "use an average pool (recipe block spiking: max_pool: average)",
    "cat": "sum the branches instead, or take target executorch, tflite or onnx",
    "batch_norm": "fold the batch normalization into the layer before it",
    "relu": "convert the activation to neurons (recipe block spiking)",
    "sub": "put the constant into the bias of the layer before",
    "add": "put the constant into the bias of the layer before",
    **dict.fromkeys(("qlif_sequence", "spiking_linear", "spiking_conv2d", "qaccumulate", "qconv2d", "qlinear"), _INTEGER),
    **dict.fromkeys(("add_currents", "add_spikes", "quantize", "dequantize", "qlif_recurrent", "qsynapse_sequence"), _INTEGER),
}
"""What to do about an operator without a rule."""
