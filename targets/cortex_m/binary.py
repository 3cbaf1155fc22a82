"""Steps of 1-bit layers: which kernel they take, their C calls, constants and scratch, and their numpy forms.

A step's arrays are the program's: ``weight`` with a 1 for +1, (O, kh, kw, C / groups); ``threshold``, or ``bias``, ``multiplier``
and ``shift``; of a product of two activations ``results``, int8 for the sums -K to K.
:mod:`~edgekit.targets.cortex_m.binary_layout` lays them out for the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.firmware_sim import kernels as sim
from edgekit.targets.cortex_m import binary_layout as layout
from edgekit.targets.cortex_m.calls import Call, Constant, Kernel, Struct, ending, members, sizes16
from edgekit.targets.cortex_m.fixedpoint import multiply
from edgekit.targets.cortex_m.graph import Step

__all__ = ["KERNELS", "LONGEST", "REFERENCES", "kind_of", "stored_signs"]

LONGEST = 1 << 14
"""Inputs of an output that the counting kernels take, less one: their counts have 16 bit planes."""

FEW = 8
"""With fewer outputs (or less than three times as many positions) so many of the 32 lanes of a word are idle that it is quicker
to take one output after the other."""


def kind_of(values: dict[str, Any]) -> str:
    """The kernel for a layer: "binary_vectors" (32 outputs at once), "binary_planes" (32 positions at once) or "binary_rows"."""
    (_, _, channels), (out_h, out_w, outputs), kernel = values["in"], values["out"], values["kernel"]
    k = prod(kernel) * channels // values["groups"]
    if k >= LONGEST or max(kernel) > 255:
        return "binary_rows"
    plain = kernel == (1, 1) and values["groups"] == 1 and values["in"][:2] == values["out"][:2] and values["pad"] == (0, 0)
    if plain and outputs >= FEW and out_h * out_w < 4 * FEW:
        return "binary_vectors"
    return "binary_planes" if out_h * out_w >= 3 * FEW else "binary_rows"


def _k(step: Step) -> int:
    return prod(step.arrays["weight"].shape[1:])


def _sums(step: Step) -> NDArray[np.int64]:
    """The sum of each output's weights, +1 and -1."""
    found: NDArray[np.int64] = 2 * step.arrays["weight"].reshape(len(step.arrays["weight"]), -1).sum(1, dtype=np.int64) - _k(step)
    return found


def _constants(step: Step) -> list[Constant]:
    weight, transposed = step.arrays["weight"].astype(bool), step.kind == "binary_vectors"
    taps = weight.reshape(len(weight), -1, weight.shape[-1])
    words = layout.transposed(taps) if transposed else layout.rows(taps)
    spare = 3 if transposed and words.shape[-1] % 4 else 0  # vectors of four words read a little further
    found = [Constant("weights", np.pad(words.reshape(-1), (0, spare)), "uint32_t")]
    if step.values["packed"]:
        threshold: NDArray[Any] = step.arrays["threshold"].astype(np.int64)
        if transposed:
            planes = layout.threshold_planes(threshold, _sums(step), _k(step))
            return [*found, Constant("thresholds", planes, "uint32_t")]
        return [*found, Constant("thresholds", threshold.astype(np.int32), "int32_t")]
    bias = step.arrays["bias"].astype(np.int64)
    if transposed:
        away = _sums(step) + 2 * _k(step)
        bias = np.concatenate([bias - away, bias + away])
    others = {"multiplier": "int32_t", "shift": "int8_t"}
    found.append(Constant("base", bias.astype(np.int32), "int32_t"))
    return [*found, *(Constant(role, step.arrays[role], kind) for role, kind in others.items())]


def stored_signs(step: Step, stored: NDArray[np.uint32]) -> NDArray[np.int8]:
    """The weights, +1 and -1, flat in the program's order, from a step's stored words."""
    weight = step.arrays["weight"]
    if step.kind == "binary_vectors":
        bits = layout.from_transposed(stored[: weight[0].size * layout.words(len(weight))], len(weight))
    else:
        bits = layout.from_rows(stored, prod(weight.shape[1:3]), weight.shape[3])
    signs: NDArray[np.int8] = (2 * bits.astype(np.int8) - 1).reshape(-1)
    return signs


def _layer(step: Step) -> list[Call]:
    v = step.values
    (in_h, in_w, in_c), (out_h, out_w, out_c) = v["in"], v["out"]
    roles = ("thresholds",) if v["packed"] else ("base", "multiplier", "shift")
    pointers = {r: ("*", r if r in roles else None) for r in ("thresholds", "base", "multiplier", "shift")}
    fields = {
        "weights": ("*", "weights"),
        **pointers,
        **sizes16(in_h=in_h, in_w=in_w, in_c=in_c, out_h=out_h, out_w=out_w, out_c=out_c),
        **sizes16(kernel_h=v["kernel"][0], kernel_w=v["kernel"][1], stride_h=v["stride"][0], stride_w=v["stride"][1]),
        **sizes16(dilation_h=v["dilation"][0], dilation_w=v["dilation"][1], pad_top=v["pad"][0], pad_left=v["pad"][1]),
        **sizes16(groups=v["groups"]),
        "planes": ("uint8_t", min(layout.n_planes(_k(step)), 255)),
        **ending(v),
    }
    return [Call(f"ek_{step.kind}", ("$p", "$x0", "$y", "$s"), Struct("ek_binary", members(fields)))]


def _scratch(step: Step, kernel_set: str) -> int:
    v = step.values
    channels, outputs = v["in"][2], v["out"][2]
    if step.kind == "binary_vectors":
        return sim.binary_vectors_scratch(kernel_set, channels, outputs)
    if step.kind == "binary_rows":
        return sim.binary_rows_scratch(channels, v["groups"], v["kernel"])
    return sim.binary_planes_scratch(kernel_set, channels, v["groups"], v["kernel"], v["out"][:2], layout.n_planes(_k(step)))


def _binarize(step: Step) -> list[Call]:
    v = step.values
    fields = {"threshold": ("*", "threshold"), "positions": ("uint32_t", v["positions"])}
    sized = sizes16(channels=v["channels"], n=len(step.arrays["threshold"]))
    return [Call("ek_binarize_s8", ("$p", "$x0", "$y"), Struct("ek_binarize", members({**fields, **sized})))]


def _matmul(step: Step) -> list[Call]:
    v = step.values
    fields = {"table": ("*", "table"), **sizes16(batch=v["batch"], m=v["m"], n=v["n"], k=v["k"])}
    fields |= {"planes": ("uint8_t", v["planes"]), "a_unsigned": ("uint8_t", int(v["unsigned"]))}
    return [Call("ek_binary_matmul_s8", ("$p", "$x0", "$x1", "$y", "$s"), Struct("ek_binary_matmul", members(fields)))]


def _product_table(step: Step) -> list[Constant]:
    return [Constant("table", layout.product_table(step.arrays["results"], step.values["unsigned"]), "int8_t")]


def _matmul_scratch(step: Step, kernel_set: str) -> int:
    return sim.binary_matmul_scratch(kernel_set, step.values["n"], step.values["k"], step.values["planes"])


_LAYER = Kernel(_layer, _constants, scratch=_scratch)
KERNELS: dict[str, Kernel] = {
    "binarize": Kernel(_binarize, lambda step: [Constant("threshold", step.arrays["threshold"], "int16_t")]),
    "binary_vectors": _LAYER,
    "binary_planes": _LAYER,
    "binary_rows": _LAYER,
    "binary_matmul": Kernel(_matmul, _product_table, scratch=_matmul_scratch),
}
"""Rows of the table of kernels."""


def _packed(bits: NDArray[np.bool_]) -> NDArray[np.int8]:
    return layout.packed_words(bits).view(np.int8)


def _binarized(step: Step, inputs: Sequence[NDArray[np.int8]]) -> NDArray[np.int8]:
    x = inputs[0].reshape(step.values["positions"], step.values["channels"])
    return _packed(x >= step.arrays["threshold"])


def _sum(step: Step, packed: NDArray[np.int8]) -> NDArray[np.int64]:
    """Sums of products of +1 and -1, (height, width, outputs); taps outside are 0."""
    v, weight = step.values, 2 * step.arrays["weight"].astype(np.int64) - 1
    (height, width, channels), (out_h, out_w, outputs), groups = v["in"], v["out"], v["groups"]
    bits = layout.unpacked_bytes(packed.view(np.uint8).reshape(height, width, -1), channels)
    pad, stride, dilation = v["pad"], v["stride"], v["dilation"]
    need = [(v["out"][i] - 1) * stride[i] + (v["kernel"][i] - 1) * dilation[i] + 1 for i in range(2)]
    x = np.zeros((max(need[0], pad[0] + height), max(need[1], pad[1] + width), channels), np.int64)
    x[pad[0] : pad[0] + height, pad[1] : pad[1] + width] = 2 * bits.astype(np.int64) - 1
    acc, each, per = np.zeros((out_h, out_w, outputs), np.int64), channels // groups, outputs // groups
    for i in range(v["kernel"][0]):
        for j in range(v["kernel"][1]):
            rows, columns = (slice(k * d, k * d + (n - 1) * s + 1, s) for k, d, n, s in
                             ((i, dilation[0], out_h, stride[0]), (j, dilation[1], out_w, stride[1])))  # fmt: skip
            for g in range(groups):
                part = x[rows, columns, g * each : (g + 1) * each]
                acc[..., g * per : (g + 1) * per] += part @ weight[g * per : (g + 1) * per, i, j].T
    return acc


def _computed(step: Step, inputs: Sequence[NDArray[np.int8]]) -> NDArray[np.int8]:
    acc, v = _sum(step, inputs[0]), step.values
    if v["packed"]:
        return _packed(acc >= step.arrays["threshold"])
    scaled = multiply(acc + step.arrays["bias"], step.arrays["multiplier"], step.arrays["shift"]) + v["out_zp"]
    result: NDArray[np.int8] = np.clip(scaled, v["low"], v["high"]).astype(np.int8)
    return result


def _product(step: Step, inputs: Sequence[NDArray[np.int8]]) -> NDArray[np.int8]:
    v = step.values
    a, b = (
        layout.unpacked_bytes(x.view(np.uint8).reshape(v["batch"], rows, -1), v["k"]).astype(np.int64)
        for x, rows in zip(inputs, (v["m"], v["n"]), strict=True)
    )
    acc = (a if v["unsigned"] else 2 * a - 1) @ (2 * b - 1).transpose(0, 2, 1)
    found: NDArray[np.int8] = step.arrays["results"][acc + v["k"]]
    return found


REFERENCES: dict[str, Callable[[Step, Sequence[NDArray[np.int8]]], NDArray[np.int8]]] = {
    "binarize": _binarized,
    "binary_vectors": _computed,
    "binary_planes": _computed,
    "binary_rows": _computed,
    "binary_matmul": _product,
}
"""Rows of the table of numpy forms."""
