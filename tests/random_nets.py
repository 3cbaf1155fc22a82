"""Random small frozen programs: convolutions of every kind, pools, sums, products, tables, pads, joins, and a linear layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from cortex_nets import lut, op
from hypothesis import strategies as st
from nets import conv, linear
from torch import Tensor, nn

from edgekit.frozen import FrozenProgram, freeze_module

SCALES = st.tuples(st.sampled_from((0.02, 0.031, 0.05, 0.11)), st.integers(-128, 127))


@dataclass(frozen=True)
class Plan:
    """Input shape (channels, height, width) and the layers as (kind, numbers, output scale and zero point)."""

    shape: tuple[int, int, int]
    first: tuple[float, int]
    layers: tuple[tuple[str, dict[str, Any], tuple[float, int]], ...]
    outputs: int
    seed: int


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Images up to 6 x 11 x 11 and sequences (height 1), one to five layers."""
    sides = st.integers(3, 11)
    shape = (draw(st.integers(1, 6)), 1 if draw(st.integers(0, 5)) == 0 else draw(sides), draw(sides))
    size, layers = list(shape), []
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(("conv", "conv", "depthwise", "pointwise", "max", "avg", "add", "mul", "lut", "pad", "join")))
        found = _numbers(draw, kind, size)
        if found is not None:
            layers.append((kind, found, draw(SCALES)))
    return Plan(shape, draw(SCALES), tuple(layers), draw(st.integers(1, 9)), draw(st.integers(0, 99)))


def _numbers(draw: st.DrawFn, kind: str, size: list[int]) -> dict[str, Any] | None:
    """The numbers of a layer for an input of ``size``, which becomes its output's; None if the image is too small for it."""
    channels, small = size[0], st.integers(1, 3)
    if kind in ("conv", "depthwise", "max", "avg"):
        kernel = [min(draw(small), n) for n in size[1:]]
        stride = [draw(st.integers(1, 2)) for _ in kernel]
        padding = [draw(st.integers(0, k // 2)) for k in kernel]
        dilation = [draw(st.integers(1, 2)) if kind in ("conv", "max") else 1 for _ in kernel]
        out = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(size[1:], kernel, stride, padding, dilation, strict=True)
        ]
        if min(out) < 1:
            return None
        size[1:] = out
        found = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}
        if kind == "conv":
            groups = draw(st.sampled_from([g for g in (1, 2, 3) if channels % g == 0]))
            size[0] = groups * draw(st.integers(1, 5))
            found |= {"groups": groups, "bits": draw(st.sampled_from((8, 8, 4, 2)))}
        return found | {"inputs": channels, "outputs": size[0], "activation": draw(st.sampled_from(("none", "relu", "relu6")))}
    if kind == "pointwise":
        size[0] = draw(st.integers(1, 17))
        return {"inputs": channels, "outputs": size[0]}
    if kind == "pad":
        sides = [draw(st.integers(0, 2)) for _ in range(4)]
        size[1], size[2] = size[1] + sides[2] + sides[3], size[2] + sides[0] + sides[1]
        return {"sides": sides}
    if kind == "join":
        size[0] *= 2
    return {"channels": channels, "function": draw(st.sampled_from(("sigmoid", "tanh", "hardswish")))}


class RandomNet(nn.Module):
    """The network of a plan."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.kinds = [kind for kind, _, _ in plan.layers]
        q, size, self.steps = plan.first, torch.zeros(1, *plan.shape), nn.ModuleList()
        self.quantize = op("quantize", q=q, bits=8)
        for kind, numbers, o in plan.layers:
            step = nn.ModuleList(_operators(kind, numbers, q, o))
            with torch.no_grad():
                size = self._apply(kind, step, size.to(torch.int8))
            self.steps.append(step)
            q = q if kind in ("max", "pad") else o
        total = size[0].numel()
        self.flat = op("qreshape", shape=[1, total], q=q)
        self.head = linear(total, plan.outputs, q, (0.25, 3))
        self.dequantize = op("dequantize", q=(0.25, 3))

    def _apply(self, kind: str, step: nn.ModuleList, x: Tensor) -> Tensor:
        if kind in ("add", "mul", "join"):
            return step[1](x, step[0](x))  # type: ignore[no-any-return]
        return step[0](x)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        x = self.quantize(x)
        for kind, step in zip(self.kinds, self.steps, strict=True):
            x = self._apply(kind, step, x)  # type: ignore[arg-type]
        return self.dequantize(self.head(self.flat(x)))  # type: ignore[no-any-return]


def _operators(kind: str, n: dict[str, Any], i: tuple[float, int], o: tuple[float, int]) -> list[nn.Module]:
    window = {k: n[k] for k in ("kernel", "stride", "padding") if k in n}
    if kind in ("conv", "depthwise", "pointwise"):
        groups = n["inputs"] if kind == "depthwise" else n.get("groups", 1)
        layer = conv(n["inputs"], n["outputs"], 3, i, o, n.get("activation", "relu"), groups=groups, bits=n.get("bits", 8))
        kernel = n.get("kernel", [1, 1])
        layer.weight = layer.weight[:, :, : kernel[0], : kernel[1]].contiguous()
        layer.attributes |= {"padding": [0, 0]} | {k: v for k, v in n.items() if k in ("stride", "padding", "dilation")}
        return [layer]
    if kind == "max":
        return [op("qmax_pool2d", q=i, **window, dilation=n["dilation"], ceil_mode=False)]
    if kind == "avg":
        return [op("qavg_pool2d", **{"in": i}, out=o, **window, ceil_mode=False, count_include_pad=n["activation"] == "none")]
    if kind == "pad":
        return [op("qpad", pad=n["sides"], q=i)]
    if kind == "lut":
        return [lut(n["function"], i, o)]
    other = (0.04, 9)
    second = conv(n["channels"], n["channels"], 3, i, other, "none")
    if kind == "join":
        return [second, op("qconcat", out=o, scales=[i[0], other[0]], zero_points=[i[1], other[1]], dim=1)]
    return [second, op(f"q{kind}", a=i, b=other, out=o, activation="none", out_bits=8)]


def program(plan: Plan) -> FrozenProgram:
    """The plan as a frozen program with one input of its shape."""
    torch.manual_seed(plan.seed)
    return freeze_module(RandomNet(plan).eval(), (torch.zeros(1, *plan.shape),), name="random")
