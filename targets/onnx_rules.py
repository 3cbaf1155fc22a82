"""Frozen layers as ONNX nodes: the table of rules that :mod:`edgekit.targets.onnx` lowers with.

Activations are uint8 with zero point + 128, for onnxruntime turns only those into QLinear operators. A weighted layer is
``DequantizeLinear -> Conv | Gemm -> QuantizeLinear`` with an int8 weight and an int32 bias, each behind a DequantizeLinear of its
own; what only moves integers (pad, max pool, reshape, ...) works on the uint8 tensor itself. A fused activation is the clamp of
QuantizeLinear where it can be, else a Clip of integers. Weights of 4 and 2 bits are INT4 and INT2 initializers behind a Cast to
INT8, which onnxruntime folds while loading; without the Cast it would compute the layer in float.

Names: the output of layer ``a.b`` is the tensor ``a.b``, its main node is called ``a.b``, its initializers ``a.b.weight``,
``a.b.weight_scale``, ``a.b.bias``, ``a.b.bias_scale``, ``a.b.scale``; uint8 constants are shared as ``uint8.<value>``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.frozen import Layer
from edgekit.frozen.ops import activation_bounds

__all__ = ["FUNCTIONS", "RULES", "Expansion", "bias_scale", "bounds", "unsigned"]

Parameters = tuple[float, int]
Rule = Callable[["Expansion", Layer, Sequence[str]], None]


def unsigned(zero_point: int) -> int:
    """A frozen program's int8 value or zero point in the file's uint8 convention."""
    return int(zero_point) + 128


def bounds(layer: Layer) -> tuple[int, int]:
    """The uint8 clamp of a layer's fused activation; (0, 255) where there is none."""
    if "activation" not in layer.args:
        return 0, 255
    low, high = activation_bounds(layer.args["activation"], layer.args["out_scale"], layer.args["out_zp"])
    return unsigned(low), unsigned(high)


def bias_scale(layer: Layer) -> NDArray[np.float32]:
    """Scale of a weighted layer's bias, float32 (channels,): ``in_scale * weight_scale``."""
    scale: NDArray[np.float32] = np.float32(layer.args["in_scale"]) * layer.args["weight_scale"].float().numpy()
    return scale


@dataclass
class Expansion:
    """ONNX nodes and initializers while they are made.

    Attributes:
        pack: store weights of 4 and 2 bits in 4 and 2 bits.
        tables: replace functions that onnxruntime has no integer kernel for by a table look-up.
    """

    pack: bool = True
    tables: bool = False
    nodes: list[Any] = field(default_factory=list)
    initializers: dict[str, Any] = field(default_factory=dict)
    parameters: dict[str, tuple[str, str, Parameters]] = field(default_factory=dict)
    real: dict[tuple[str, tuple[str, str]], str] = field(default_factory=dict)

    def node(self, op: str, inputs: Sequence[str], output: str, name: str = "", **attributes: Any) -> str:
        """Append a node with one output; returns the output's name."""
        import onnx

        self.nodes.append(onnx.helper.make_node(op, list(inputs), [output], name=name, **attributes))
        return output

    def constant(self, name: str, values: Any, dtype: Any = None) -> str:
        """Add an initializer, once for each name; returns the name."""
        import onnx

        if name not in self.initializers:
            array = np.array(values, dtype=dtype)
            self.initializers[name] = onnx.numpy_helper.from_array(array, name)
        return name

    def byte(self, value: int) -> str:
        """A shared uint8 scalar."""
        return self.constant(f"uint8.{value}", value, np.uint8)

    def parameters_of(self, tensor: str, scale: float, zero_point: int) -> tuple[str, str]:
        """Names of a tensor's scale and zero point; its producer's where they are the same numbers."""
        wanted = (float(np.float32(scale)), int(zero_point))
        scale_name, zero_name, known = self.parameters.get(tensor, ("", "", None))
        if known == wanted:
            return scale_name, zero_name
        return self.constant(f"{tensor}.scale_{len(self.initializers)}", wanted[0], np.float32), self.byte(unsigned(zero_point))

    def dequantize(self, tensor: str, scale: float, zero_point: int) -> str:
        """The float of an integer tensor, made once for all its consumers."""
        names = self.parameters_of(tensor, scale, zero_point)
        if (tensor, names) not in self.real:
            suffix = f"_{len(self.real)}" if any(t == tensor for t, _ in self.real) else ""
            self.real[tensor, names] = self.node("DequantizeLinear", [tensor, *names], f"{tensor}/real{suffix}")
        return self.real[tensor, names]

    def quantize(self, layer: Layer, real: str, output: str | None = None, name: str = "") -> str:
        """The layer's uint8 output from its float one, clamped to the fused activation's range."""
        assert layer.out_scale is not None and layer.out_zero_point is not None
        scale = self.constant(f"{layer.name}.scale", layer.out_scale, np.float32)
        zero = self.byte(unsigned(layer.out_zero_point))
        output = output or layer.name
        low, high = bounds(layer)
        wide = output if (low, high) == (0, 255) else f"{layer.name}/wide"
        self.node("QuantizeLinear", [real, scale, zero], wide, name)
        if wide != output:
            self.node("Clip", [wide, self.byte(low), self.byte(high)], output)
        self.parameters[layer.name] = (scale, zero, (float(np.float32(layer.out_scale)), layer.out_zero_point))
        return output

    def weight(self, layer: Layer) -> list[str]:
        """Float weight and float bias of a layer, from their integers."""
        import ml_dtypes

        name, args = layer.name, layer.args
        stored = args["weight"].numpy()
        packed = {4: ml_dtypes.int4, 2: ml_dtypes.int2}.get(args["weight_bits"]) if self.pack else None
        integers = self.constant(f"{name}.weight", stored, packed)
        if packed is not None:
            integers = self.node("Cast", [integers], f"{name}.weight/int8", to=3)
        scale = self.constant(f"{name}.weight_scale", args["weight_scale"].float().numpy())
        # optional in ONNX, but onnxruntime 1.32 breaks a Gemm without it, and any layer that shares it (x64quantprecision)
        zero = self.constant(f"{name}.weight_zero_point", np.zeros(len(stored)), np.int8)
        real = self.node("DequantizeLinear", [integers, scale, zero], f"{name}.weight/real", axis=0)
        bias = self.constant(f"{name}.bias", args["bias"].numpy(), np.int32)
        b_scale = self.constant(f"{name}.bias_scale", bias_scale(layer))
        return [real, self.node("DequantizeLinear", [bias, b_scale], f"{name}.bias/real", axis=0)]

    def moved(self, source: str, output: str) -> str:
        """State that ``output`` holds integers of ``source`` at its scale; returns ``output``."""
        if source in self.parameters:
            self.parameters[output] = self.parameters[source]
        return output


def _quantize(e: Expansion, layer: Layer, xs: Sequence[str]) -> None:
    e.quantize(layer, xs[0], name=layer.name)


def _dequantize(e: Expansion, layer: Layer, xs: Sequence[str]) -> None:
    names = e.parameters_of(xs[0], layer.args["scale"], layer.args["zero_point"])
    e.node("DequantizeLinear", [xs[0], *names], layer.name, layer.name)


def _conv(e: Expansion, layer: Layer, xs: Sequence[str]) -> None:
    a = layer.args
    x = e.dequantize(xs[0], a["in_scale"], a["in_zp"])
    y = e.node(
        "Conv", [x, *e.weight(layer)], f"{layer.name}/sum", layer.name,
        kernel_shape=list(a["weight"].shape[2:]), strides=list(a["stride"]), pads=list(a["padding"]) * 2,
        dilations=list(a["dilation"]), group=a["groups"],
    )  # fmt: skip
    e.quantize(layer, y)


def _linear(e: Expansion, layer: Layer, xs: Sequence[str]) -> None:
    a, x, flat = layer.args, xs[0], len(layer.shape) == 2
    if not flat:  # Gemm takes two dimensions; MatMul would leave the bias in float
        rows = e.constant(f"{layer.name}.rows", [-1, a["weight"].shape[1]], np.int64)
        x = e.moved(xs[0], e.node("Reshape", [x, rows], f"{layer.name}/rows"))
    x = e.dequantize(x, a["in_scale"], a["in_zp"])
    y = e.node("Gemm", [x, *e.weight(layer)], f"{layer.name}/sum", layer.name, transB=1)
    out = e.quantize(layer, y, layer.name if flat else f"{layer.name}/flat")
    if not flat:
        e.node("Reshape", [out, e.constant(f"{layer.name}.shape", layer.shape, np.int64)], layer.name)


def _binary(op: str) -> Rule:
    def rule(e: Expansion, layer: Layer, xs: Sequence[str]) -> None:
        a = layer.args
        real = [e.dequantize(xs[0], a["a_scale"], a["a_zp"]), e.dequantize(xs[1], a["b_scale"], a["b_zp"])]
        e.quantize(layer, e.node(op, real, f"{layer.name}/sum", layer.name))

    return rule


def _float(op: str, attributes: Callable[[Layer], dict[str, Any]]) -> Rule:
    def rule(e: Expansion, layer: Layer, xs: Sequence[str]) -> None:
        x = e.dequantize(xs[0], layer.args["in_scale"], layer.args["in_zp"])
        e.quantize(layer, e.node(op, [x], f"{layer.name}/sum", layer.name, **attributes(layer)))

    return rule


def _move(op: str, inputs: Callable[[Expansion, Layer], list[str]], attributes: Callable[[Layer], dict[str, Any]]) -> Rule:
    def rule(e: Expansion, layer: Layer, xs: Sequence[str]) -> None:
        e.moved(xs[0], e.node(op, [xs[0], *inputs(e, layer)], layer.name, layer.name, **attributes(layer)))

    return rule


def _concat(e: Expansion, layer: Layer, xs: Sequence[str]) -> None:
    a = layer.args
    same = {(float(s), int(z)) for s, z in zip(a["scales"], a["zero_points"], strict=True)} == {(a["out_scale"], a["out_zp"])}
    if same:
        e.moved(xs[0], e.node("Concat", xs, layer.name, layer.name, axis=a["dim"]))
        return
    real = [e.dequantize(x, s, z) for x, s, z in zip(xs, a["scales"], a["zero_points"], strict=True)]
    e.quantize(layer, e.node("Concat", real, f"{layer.name}/sum", layer.name, axis=a["dim"]))


def _lut(e: Expansion, layer: Layer, xs: Sequence[str]) -> None:
    a, name = layer.args, layer.name
    op, attributes, fused = FUNCTIONS[a["function"]]
    if e.tables and not fused:
        table = e.constant(f"{name}.table", a["table"].numpy().astype(np.int16) + 128, np.uint8)
        index = e.node("Cast", [xs[0]], f"{name}/index", to=6)
        e.node("Gather", [table, index], name, name)
        scale = e.constant(f"{name}.scale", a["out_scale"], np.float32)
        e.parameters[name] = (scale, e.byte(unsigned(a["out_zp"])), (float(np.float32(a["out_scale"])), a["out_zp"]))
        return
    x = e.dequantize(xs[0], a["in_scale"], a["in_zp"])
    if op == "Clip":
        limits = [e.constant("float32.0", 0.0, np.float32), e.constant("float32.6", 6.0, np.float32)]
        y = e.node(op, [x, *limits], f"{name}/sum", name)
    elif op == "Swish":
        y = e.node("Mul", [x, e.node("Sigmoid", [x], f"{name}/gate")], f"{name}/sum", name)
    else:
        y = e.node(op, [x], f"{name}/sum", name, **attributes)
    e.quantize(layer, y)


def _pads(pad: Sequence[int], rank: int) -> list[int]:
    """PyTorch's pad (last dimension first, begin and end in turn) as ONNX's (all begins, then all ends)."""
    begin, end = [0] * rank, [0] * rank
    for i in range(len(pad) // 2):
        begin[rank - 1 - i], end[rank - 1 - i] = pad[2 * i], pad[2 * i + 1]
    return begin + end


def _pool(layer: Layer) -> dict[str, Any]:
    a = layer.args
    extra = {"dilations": list(a["dilation"])} if "dilation" in a else {"count_include_pad": int(a["count_include_pad"])}
    # PyTorch writes an empty stride for "the kernel's"
    strides = list(a["stride"]) or list(a["kernel"])
    pads = list(a["padding"]) * 2
    return {"kernel_shape": list(a["kernel"]), "strides": strides, "pads": pads, "ceil_mode": int(a["ceil_mode"]), **extra}


def _none(layer: Layer) -> dict[str, Any]:
    return {}


def _vector(e: Expansion, layer: Layer, key: str, values: Any) -> str:
    return e.constant(f"{layer.name}.{key}", values, np.int64)


FUNCTIONS: dict[str, tuple[str, dict[str, float], bool]] = {
    "relu": ("Relu", {}, False),
    "relu6": ("Clip", {}, False),
    "sigmoid": ("Sigmoid", {}, True),
    "tanh": ("Tanh", {}, False),
    "silu": ("Swish", {}, False),
    "hardswish": ("HardSwish", {}, False),
    "hardsigmoid": ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}, False),
    "gelu": ("Gelu", {}, False),
    "leaky_relu": ("LeakyRelu", {"alpha": 0.01}, True),
    "elu": ("Elu", {"alpha": 1.0}, False),
}
"""Function of a qlut: ONNX operator, its attributes, and whether onnxruntime has an integer kernel for it."""

RULES: dict[str, Rule] = {
    "quantize": _quantize,
    "dequantize": _dequantize,
    "qconv2d": _conv,
    "qlinear": _linear,
    "qadd": _binary("Add"),
    "qmul": _binary("Mul"),
    "qmean": _float("GlobalAveragePool", _none),
    "qavg_pool2d": _float("AveragePool", _pool),
    "qmax_pool2d": _move("MaxPool", lambda e, layer: [], _pool),
    "qconcat": _concat,
    "qpad": _move(
        "Pad",
        lambda e, n: [_vector(e, n, "pads", _pads(n.args["pad"], len(n.shape))), e.byte(unsigned(n.args["zero_point"]))],
        _none,
    ),
    "qreshape": _move("Reshape", lambda e, n: [_vector(e, n, "shape", n.shape)], _none),
    "qpermute": _move("Transpose", lambda e, n: [], lambda n: {"perm": [d % len(n.shape) for d in n.args["dims"]]}),
    "qslice": _move(
        "Slice",
        lambda e, n: [
            _vector(e, n, key, [n.args[arg]])
            for key, arg in (("start", "start"), ("end", "end"), ("axis", "dim"), ("step", "step"))
        ],
        _none,
    ),
    "qlut": _lut,
}
"""What this target takes: ``edgekit`` operator to the rule that writes its nodes; the rule gets the names of its int8 inputs."""
