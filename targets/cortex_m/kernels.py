"""The kernels of the firmware: how a step becomes a C struct and a call, one row of :data:`KERNELS` a kernel.

A new kernel needs its C in ``firmware_sim/runtime``, its numpy form in ``reference.py``, a row here, and a rule in ``rules.py``
that makes steps of it (``docs/targets/cortex_m.md``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.firmware_sim import kernels as sim
from edgekit.targets.cortex_m import binary, spiking, trails
from edgekit.targets.cortex_m.calls import Call, Constant, Field, Kernel, Struct, ending, members, sizes16
from edgekit.targets.cortex_m.graph import Step

__all__ = ["IN_PLACE", "KERNELS", "Call", "Constant", "Field", "Kernel", "Struct", "calls", "packed"]


def calls(step: Step) -> Sequence[Call]:
    """The C calls of a step."""
    return KERNELS[step.kind].calls(step)


def packed(weight: NDArray[Any], bits: int) -> NDArray[Any]:
    """Weights as the kernels read them: rows (all axes but the first) of int8, or of groups of 32 bits.

    Byte i of a group holds the weights i and i + 4 (and i + 8, i + 12 of 2 bits), low bits first; rows are filled up with zeros.
    """
    if bits == 8:
        return weight.astype(np.int8).reshape(-1)
    rows = weight.reshape(weight.shape[0], -1).astype(np.int64) & ((1 << bits) - 1)
    fields = 8 // bits
    rows = np.pad(rows, ((0, 0), (0, -rows.shape[1] % (4 * fields)))).reshape(-1, fields, 4)
    result: NDArray[np.uint8] = (rows << (np.arange(fields) * bits)[:, None]).sum(1).astype(np.uint8).reshape(-1)
    return result


_CHANNELS = {role: ("*", role) for role in ("weights", "bias", "multiplier", "shift")}


def _weighted_constants(step: Step) -> list[Constant]:
    if step.kind == "depthwise":  # rows of channels, one for each kernel position
        rows = step.arrays["weight"].reshape(-1, step.arrays["weight"].shape[-1])
    else:
        rows = step.arrays["weight"].reshape(len(step.arrays["weight"]), -1)
    others = {"bias": "int32_t", "multiplier": "int32_t", "shift": "int8_t"}
    weights = Constant("weights", packed(rows, step.bits), "int8_t" if step.bits == 8 else "uint8_t")
    return [weights, *(Constant(role, step.arrays[role], kind) for role, kind in others.items())]


def _conv2d(step: Step) -> list[Call]:
    v = step.values
    (in_h, in_w, in_c), (out_h, out_w, out_c) = v["in"], v["out"]
    fields = {
        **_CHANNELS,
        **sizes16(in_h=in_h, in_w=in_w, in_c=in_c, out_h=out_h, out_w=out_w, out_c=out_c),
        **sizes16(kernel_h=v["kernel"][0], kernel_w=v["kernel"][1], stride_h=v["stride"][0], stride_w=v["stride"][1]),
        **sizes16(dilation_h=v["dilation"][0], dilation_w=v["dilation"][1], pad_top=v["pad"][0], pad_left=v["pad"][1]),
        **sizes16(groups=v["groups"]),
        "weight_bits": ("uint8_t", step.bits),
        **ending(v, "in_zp"),
    }
    function = "ek_depthwise_s8" if step.kind == "depthwise" else "ek_conv2d_s8"
    return [Call(function, ("$p", "$x0", "$y", "$s"), Struct("ek_conv2d", members(fields)))]


def _conv2d_scratch(step: Step, kernel_set: str) -> int:
    v = step.values
    return sim.conv2d_scratch(kernel_set, v["in"][2], v["groups"], v["kernel"], step.bits, trails.pointwise(step))


def _depthwise_scratch(step: Step, kernel_set: str) -> int:
    return sim.depthwise_scratch(kernel_set, step.values["in"][2], step.values["kernel"], step.bits)


def _linear_scratch(step: Step, kernel_set: str) -> int:
    return sim.linear_scratch(kernel_set, step.values["inputs"], step.bits)


def _linear(step: Step) -> list[Call]:
    v = step.values
    sizes = sizes16(rows=v["rows"], in_n=v["inputs"], out_n=v["outputs"])
    fields = {**_CHANNELS, **sizes, "weight_bits": ("uint8_t", step.bits), **ending(v)}
    return [Call("ek_linear_s8", ("$p", "$x0", "$y", "$s"), Struct("ek_linear", members(fields)))]


def _binary(step: Step, multipliers: Mapping[str, tuple[str, Any]], function: str) -> list[Call]:
    """A call of a kernel that may write over its first operand only: the operands change places if the plan wants the second."""
    v, swap = step.values, step.reuse == 1
    zero_points = {"a_zp": v["b_zp" if swap else "a_zp"], "b_zp": v["a_zp" if swap else "b_zp"]}
    sizes = {"n": ("uint32_t", v["size"]), "b_n": ("uint32_t", v["repeat"])}
    fields = {**sizes, **multipliers, **ending({**v, **zero_points}, "a_zp", "b_zp")}
    operands = ("$x1", "$x0") if swap else ("$x0", "$x1")
    return [Call(function, ("$p", *operands, "$y"), Struct(function.removesuffix("_s8"), members(fields)))]


def _add(step: Step) -> list[Call]:
    fixed = [*zip(step.values["multipliers"], step.values["shifts"], strict=True)]
    a, b, out = (fixed[1], fixed[0], fixed[2]) if step.reuse == 1 else fixed
    by_name = {"a": a, "b": b, "out": out}
    fields = {f"{n}_multiplier": ("int32_t", m) for n, (m, _) in by_name.items()}
    fields |= {f"{n}_shift": ("int8_t", s) for n, (_, s) in by_name.items()}
    return _binary(step, fields, "ek_add_s8")


def _mul(step: Step) -> list[Call]:
    fields = {"multiplier": ("int32_t", step.values["multiplier"]), "shift": ("int8_t", step.values["shift"])}
    return _binary(step, fields, "ek_mul_s8")


def _scaled(values: Mapping[str, Any]) -> dict[str, tuple[str, Any]]:
    return {"multiplier": ("int32_t", values["multiplier"]), "shift": ("int8_t", values["shift"]), **ending(values, "in_zp")}


def _requant(step: Step) -> list[Call]:
    fields = {"n": ("uint32_t", step.values["size"]), **_scaled(step.values)}
    return [Call("ek_requant_s8", ("$p", "$x0", "$y"), Struct("ek_requant", members(fields)))]


def _lut(step: Step) -> list[Call]:
    return [Call("ek_lut_s8", ("$table", "$x0", "$y", str(step.values["size"])))]


def _softmax(step: Step) -> list[Call]:
    v = step.values
    fields = {"table": ("*", "table"), **sizes16(rows=v["rows"], n=v["n"]), "multiplier": ("int32_t", v["multiplier"])}
    fields |= {"shift": ("int8_t", v["shift"]), "out_zp": ("int8_t", v["out_zp"])}
    return [Call("ek_softmax_s8", ("$p", "$x0", "$y"), Struct("ek_softmax", members(fields)))]


def _mean(step: Step) -> list[Call]:
    v = step.values
    fields = {"positions": ("uint32_t", v["positions"]), **sizes16(channels=v["channels"]), **_scaled(v)}
    return [Call("ek_mean_s8", ("$p", "$x0", "$y"), Struct("ek_mean", members(fields)))]


_DIVISOR = np.dtype(
    {"names": ["multiplier", "shift", "divisor"], "formats": ["<i4", "i1", "<u2"], "offsets": [0, 4, 6], "itemsize": 8}
)


def _pool_constants(step: Step) -> list[Constant]:
    if step.kind == "max_pool":
        return []
    rows = np.zeros(len(step.values["divisors"]), _DIVISOR)
    for row, values in zip(rows, step.values["divisors"], strict=True):
        row["multiplier"], row["shift"], row["divisor"] = values
    return [Constant("divisors", rows, "ek_divisor")]


def _pool(step: Step) -> list[Call]:
    v = step.values
    (in_h, in_w, channels), (out_h, out_w, _) = v["in"], v["out"]
    average = step.kind == "avg_pool"
    dilation = v.get("dilation", (1, 1))
    fields = {
        "divisors": ("*", "divisors" if average else None),
        **sizes16(n_divisors=len(v.get("divisors", ()))),
        **sizes16(in_h=in_h, in_w=in_w, channels=channels, out_h=out_h, out_w=out_w),
        **sizes16(kernel_h=v["kernel"][0], kernel_w=v["kernel"][1], stride_h=v["stride"][0], stride_w=v["stride"][1]),
        **sizes16(dilation_h=dilation[0], dilation_w=dilation[1]),
        **sizes16(pad_top=v["pad"][0], pad_left=v["pad"][1], pad_bottom=v["pad"][0], pad_right=v["pad"][1]),
        "include_pad": ("uint8_t", int(v.get("include", False))),
        **ending({"in_zp": 0, "out_zp": 0, "low": -128, "high": 127, **v}, "in_zp"),
    }
    function = "ek_average_pool_s8" if average else "ek_max_pool_s8"
    return [Call(function, ("$p", "$x0", "$y"), Struct("ek_pool", members(fields)))]


def _concat(step: Step) -> list[Call]:
    v, found, place = step.values, [], 0
    stride = sum(width for width, *_ in v["parts"])
    for i, (width, mantissa, shift, zero_point) in enumerate(v["parts"]):
        sizes = {"outer": ("uint32_t", v["rows"]), "n": ("uint32_t", width), "y_stride": ("uint32_t", stride)}
        fields = {**sizes, **_scaled({**v, "multiplier": mantissa, "shift": shift, "in_zp": zero_point})}
        found.append(Call("ek_concat_s8", ("$p", f"$x{i}", f"$y+{place}"), Struct("ek_concat", members(fields))))
        place += width
    return found


def _pad(step: Step) -> list[Call]:
    v = step.values
    (height, width, channels), (top, bottom), (left, right) = v["in"], v["vertical"], v["horizontal"]
    sizes = sizes16(in_h=height, in_w=width, channels=channels, top=top, bottom=bottom, left=left, right=right)
    return [Call("ek_pad_s8", ("$p", "$x0", "$y"), Struct("ek_pad", members({**sizes, "value": ("int8_t", v["zp"])})))]


def _gather(step: Step) -> list[Call]:
    v = step.values
    fields = {"shape": ("uint32_t[4]", v["shape"]), "stride": ("int32_t[4]", v["stride"]), "offset": ("int32_t", v["offset"])}
    return [Call("ek_gather_s8", ("$p", "$x0", "$y"), Struct("ek_gather", members(fields)))]


KERNELS: dict[str, Kernel] = {
    "conv2d": Kernel(_conv2d, _weighted_constants, scratch=_conv2d_scratch, trail=trails.conv2d),
    "depthwise": Kernel(_conv2d, _weighted_constants, scratch=_depthwise_scratch, trail=trails.window),
    "linear": Kernel(_linear, _weighted_constants, scratch=_linear_scratch, trail=trails.linear),
    "add": Kernel(_add, in_place=(0, 1)),
    "mul": Kernel(_mul, in_place=(0, 1)),
    "requant": Kernel(_requant, in_place=(0,)),
    "lut": Kernel(_lut, lambda step: [Constant("table", step.arrays["table"], "int8_t")], in_place=(0,)),
    "softmax": Kernel(_softmax, lambda step: [Constant("table", step.arrays["table"], "uint32_t")], in_place=(0,)),
    "mean": Kernel(_mean, trail=lambda step, kernel_set: 0),  # channel by channel, each read whole before it is written
    "avg_pool": Kernel(_pool, _pool_constants, trail=trails.window),
    "max_pool": Kernel(_pool, _pool_constants, trail=trails.window),
    "concat": Kernel(_concat),
    "pad": Kernel(_pad),
    "gather": Kernel(_gather),
    **binary.KERNELS,
    **spiking.KERNELS,
}
"""Kernel kind to its row."""

IN_PLACE: dict[str, tuple[int, ...]] = {kind: kernel.in_place for kind, kernel in KERNELS.items()}
"""For the memory plan."""
