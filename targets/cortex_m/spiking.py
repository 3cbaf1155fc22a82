"""Steps of spiking layers: C calls, constants and numpy forms. Time is the first dimension of a tensor; a step runs all of it.

The arithmetic is that of the integer operators of :mod:`edgekit.frozen.spiking_ops`, to the last bit; currents of real-valued
inputs are requantized as ``qconv2d`` says, in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekit.firmware_sim import kernels as sim
from edgekit.frozen.spiking_ops import NO_LEAK
from edgekit.targets.cortex_m.calls import Call, Constant, Kernel, Struct, members, sizes16
from edgekit.targets.cortex_m.graph import Step

__all__ = ["KERNELS", "REFERENCES"]

Bytes = NDArray[np.int8]


def _window(v: Mapping[str, Any]) -> dict[str, tuple[str, int]]:
    (in_h, in_w, in_c), (out_h, out_w, out_c) = v["in"], v["out"]
    return {
        **sizes16(steps=v["steps"], in_h=in_h, in_w=in_w, in_c=in_c, out_h=out_h, out_w=out_w, out_c=out_c),
        **sizes16(kernel_h=v["kernel"][0], kernel_w=v["kernel"][1], stride_h=v["stride"][0], stride_w=v["stride"][1]),
        **sizes16(dilation_h=v["dilation"][0], dilation_w=v["dilation"][1], pad_top=v["pad"][0], pad_left=v["pad"][1]),
        **sizes16(groups=v["groups"]),
    }


def _spiking_constants(step: Step) -> list[Constant]:
    """Rows of a group's outputs, one for each tap and input, filled up to a multiple of four."""
    weight, groups = step.arrays["weight"], step.values["groups"]
    per = len(weight) // groups
    rows = weight.reshape(groups, per, *weight.shape[1:]).transpose(0, 2, 3, 4, 1)
    rows = np.pad(rows, [(0, 0)] * 4 + [(0, -per % 4)]).astype(np.int8)
    return [Constant("weights", rows.reshape(-1), "int8_t"), Constant("bias", step.arrays["bias"], "int16_t")]


def _spiking(step: Step) -> list[Call]:
    fields = {"weights": ("*", "weights"), "bias": ("*", "bias"), **_window(step.values)}
    return [Call("ek_spiking_s16", ("$p", "$x0", "$y", "$s"), Struct("ek_spiking", members(fields)))]


def _counts(step: Step) -> dict[str, tuple[str, Any]]:
    v = step.values
    pairs = {"n": v["n"], "period": len(step.arrays["decay"]), "x_step": v["x_step"]}
    return {**{name: ("uint32_t", value) for name, value in pairs.items()}, **sizes16(steps=v["steps"])}


def _firing(step: Step) -> dict[str, tuple[str, Any]]:
    leaky = step.arrays["decay"] < NO_LEAK
    pairs = {"leak": 1 if leaky.all() else 2 if leaky.any() else 0, **{k: step.values[k] for k in ("zero", "max_spikes")}}
    return {name: ("uint8_t", value) for name, value in pairs.items()}


def _neurons(step: Step) -> list[Call]:
    fields = {**{r: ("*", r) for r in ("threshold", "decay", "v_init")}, **_counts(step), **_firing(step)}
    return [Call("ek_neurons_s16", ("$p", "$x0", "$y", "$s"), Struct("ek_neurons", members(fields)))]


def _neurons_step(step: Step) -> list[Call]:
    (whole,) = _neurons(step)
    return [Call("ek_neurons_step_s16", ("$p", "$x0", "$y", "$v"), whole.struct)]


def _recurrent(step: Step) -> list[Call]:
    v, (height, width, channels) = step.values, step.values["in"]
    pointers = ("weights", "bias", "threshold", "decay", "v_init", "decay_syn")
    fields = {
        **{r: ("*", r) for r in pointers}, **_counts(step), **sizes16(in_h=height, in_w=width, in_c=channels),
        **sizes16(kernel_h=v["kernel"][0], kernel_w=v["kernel"][1], pad_top=v["pad"][0], pad_left=v["pad"][1]),
        **sizes16(groups=v["groups"]), **_firing(step),
    }  # fmt: skip
    return [Call("ek_recurrent_s16", ("$p", "$x0", "$y", "$s"), Struct("ek_recurrent", members(fields)))]


def _recurrent_step(step: Step) -> list[Call]:
    (whole,) = _recurrent(step)
    return [Call("ek_recurrent_step_s16", ("$p", "$x0", "$y", "$v", "$s"), whole.struct)]


def _recurrent_constants(step: Step) -> list[Constant]:
    return [*_spiking_constants(step), *_neuron_constants(step), Constant("decay_syn", step.arrays["decay_syn"], "int16_t")]


def _fade(step: Step) -> list[Call]:
    struct = Struct("ek_fade", members({"decay": ("*", "decay"), **_counts(step)}))
    return [Call("ek_fade_s16", ("$p", "$x0", "$y"), struct)]


def _fade_step(step: Step) -> list[Call]:
    (whole,) = _fade(step)
    return [Call("ek_fade_step_s16", ("$p", "$x0", "$v"), whole.struct)]


def _fade_constants(step: Step) -> list[Constant]:
    return [Constant("decay", step.arrays["decay"], "int16_t")]


def _current(step: Step) -> list[Call]:
    pointers = {r: ("*", r) for r in ("weights", "bias", "multiplier")}
    fields = {**pointers, **_window(step.values), "in_zp": ("int8_t", step.values["in_zp"])}
    return [Call("ek_current_s16", ("$p", "$x0", "$y"), Struct("ek_current", members(fields)))]


def _current_constants(step: Step) -> list[Constant]:
    bits = step.arrays["multiplier"].astype(np.float32)
    weights = Constant("weights", step.arrays["weight"].astype(np.int8).reshape(-1), "int8_t")
    return [weights, Constant("bias", step.arrays["bias"], "int32_t"), Constant("multiplier", bits, "float")]


def _pool(step: Step) -> list[Call]:
    v = step.values
    (in_h, in_w, channels), (out_h, out_w, _) = v["in"], v["out"]
    fields = {
        **sizes16(steps=v["steps"], in_h=in_h, in_w=in_w, channels=channels, out_h=out_h, out_w=out_w),
        **sizes16(kernel_h=v["kernel"][0], kernel_w=v["kernel"][1], stride_h=v["stride"][0], stride_w=v["stride"][1]),
        **sizes16(pad_top=v["pad"][0], pad_left=v["pad"][1]),
    }
    return [Call("ek_spike_pool_s8", ("$p", "$x0", "$y"), Struct("ek_spike_pool", members(fields)))]


def _delay(step: Step) -> list[Call]:
    v = step.values
    sizes = {"n": ("uint32_t", v["n"]), "period": ("uint32_t", len(step.arrays["delay"]))}
    fields = {"delay": ("*", "delay"), **sizes, **sizes16(steps=v["steps"], longest=v["longest"])}
    return [Call("ek_delay_s8", ("$p", "$x0", "$y"), Struct("ek_delay", members(fields)))]


def _delay_step(step: Step) -> list[Call]:
    (whole,) = _delay(step)
    return [Call("ek_delay_step_s8", ("$p", "$x0", "$y", "$v"), whole.struct)]


def _delay_constants(step: Step) -> list[Constant]:
    return [Constant("delay", step.arrays["delay"], "uint16_t")]


def _accumulate(step: Step) -> list[Call]:
    return [
        Call(
            "ek_accumulate_s8" if step.values["spikes"] else "ek_accumulate_s16",
            ("$x0", "$y", str(step.values["n"]), str(step.values["steps"])),
        )
    ]


def _accumulate_step(step: Step) -> list[Call]:
    return [
        Call("ek_accumulate_step_s8" if step.values["spikes"] else "ek_accumulate_step_s16", ("$x0", "$v", str(step.values["n"])))
    ]


def _add_currents(step: Step) -> list[Call]:
    return [Call("ek_add_currents_s16", ("$x0", "$x1", "$y", str(step.values["n"])))]


def _add_spikes(step: Step) -> list[Call]:
    sizes = (str(step.values["n"]), str(len(step.arrays["amplitude"])))
    return [Call("ek_add_spikes_s16", ("$x0", "$x1", "$y", "$amplitude", *sizes))]


def _scratch(step: Step, kernel_set: str) -> int:
    return sim.spiking_scratch(step.values["kernel"], step.values["in"][2], step.values["groups"])


def _neuron_constants(step: Step) -> list[Constant]:
    return [Constant(r, step.arrays[r], "int16_t") for r in ("threshold", "decay", "v_init")]


KERNELS: dict[str, Kernel] = {
    "spiking": Kernel(_spiking, _spiking_constants, scratch=_scratch),
    "neurons": Kernel(
        _neurons,
        _neuron_constants,
        scratch=lambda step, kernel_set: 2 * int(step.values["n"]),
    ),
    "current": Kernel(_current, _current_constants),
    "spike_pool": Kernel(_pool),
    "neurons_step": Kernel(_neurons_step, _neuron_constants, resets=lambda step: [Call("ek_neurons_reset_s16", ("$p", "$v"))]),
    "recurrent": Kernel(
        _recurrent,
        _recurrent_constants,
        scratch=lambda step, kernels: 4 * -(-6 * step.values["n"] // 4) + _scratch(step, kernels),
    ),
    "recurrent_step": Kernel(
        _recurrent_step,
        _recurrent_constants,
        scratch=_scratch,
        resets=lambda step: [Call("ek_recurrent_reset_s16", ("$p", "$v"))],
    ),
    "fade": Kernel(_fade, _fade_constants),
    "fade_step": Kernel(
        _fade_step, _fade_constants, resets=lambda step: [Call("ek_fade_reset_s16", ("$v", str(step.values["n"])))]
    ),
    "delay": Kernel(_delay, _delay_constants),
    "delay_step": Kernel(_delay_step, _delay_constants, resets=lambda step: [Call("ek_delay_reset_s8", ("$p", "$v"))]),
    "accumulate": Kernel(_accumulate),
    "accumulate_step": Kernel(
        _accumulate_step, resets=lambda step: [Call("ek_accumulate_reset_s16", ("$v", str(step.values["n"])))]
    ),
    "add_currents": Kernel(_add_currents, in_place=(0, 1)),
    "add_spikes": Kernel(_add_spikes, lambda step: [Constant("amplitude", step.arrays["amplitude"], "int16_t")], in_place=(0,)),
}
"""Rows of the table of kernels."""


def _windows(x: Bytes, v: Mapping[str, Any], fill: int) -> list[NDArray[np.int64]]:
    """For each tap (row-major) what it sees, (steps, out_h, out_w, channels)."""
    (height, width, channels), (out_h, out_w, _), pad, stride = v["in"], v["out"], v["pad"], v["stride"]
    dilation = v.get("dilation", (1, 1))
    need = [(v["out"][i] - 1) * stride[i] + (v["kernel"][i] - 1) * dilation[i] + 1 for i in range(2)]
    size = max(need[0], pad[0] + height), max(need[1], pad[1] + width)
    image = np.full((v["steps"], *size, channels), fill, np.int64)
    image[:, pad[0] : pad[0] + height, pad[1] : pad[1] + width] = x.reshape(v["steps"], height, width, channels)
    found = []
    for i in range(v["kernel"][0]):
        for j in range(v["kernel"][1]):
            top, left = i * dilation[0], j * dilation[1]
            rows = slice(top, top + (out_h - 1) * stride[0] + 1, stride[0])
            found.append(image[:, rows, left : left + (out_w - 1) * stride[1] + 1 : stride[1]])
    return found


def _sums(step: Step, x: Bytes, fill: int) -> NDArray[np.int64]:
    """bias + sum of weight * x, (steps, out_h, out_w, outputs)."""
    v, weight = step.values, step.arrays["weight"].astype(np.int64)
    per, each, groups = len(weight) // v["groups"], weight.shape[3], v["groups"]
    taps = weight.reshape(len(weight), -1, each)
    acc: NDArray[np.int64] = np.zeros((v["steps"], *v["out"]), np.int64) + step.arrays["bias"]
    for position, seen in enumerate(_windows(x, v, fill)):
        for g in range(groups):
            block = slice(g * per, (g + 1) * per)
            acc[..., block] += seen[..., g * each : (g + 1) * each] @ taps[block, position].T
    return acc


def _spiking_reference(step: Step, inputs: Sequence[Bytes]) -> Bytes:
    return _sums(step, inputs[0], 0).astype("<i2").reshape(-1).view(np.int8)


def _current_reference(step: Step, inputs: Sequence[Bytes]) -> Bytes:
    acc = _sums(step, inputs[0], step.values["in_zp"])
    scaled = np.rint(acc.astype(np.float32) * step.arrays["multiplier"].astype(np.float32))
    result: Bytes = np.clip(scaled, -32768, 32767).astype("<i2").reshape(-1).view(np.int8)
    return result


def _neurons_reference(step: Step, inputs: Sequence[Bytes]) -> Bytes:
    v = step.values
    x = inputs[0].view("<i2").astype(np.int64).reshape(-1, v["n"])
    threshold, decay, start = (
        np.tile(step.arrays[r].astype(np.int64), v["n"] // len(step.arrays[r])) for r in ("threshold", "decay", "v_init")
    )
    found, membrane = [], start
    for t in range(v["steps"]):
        leaked = np.where(decay == NO_LEAK, membrane, (membrane * decay + 0x4000) >> 15)
        membrane = np.clip(leaked + x[t if v["x_step"] else 0], -32768, 32767)
        spikes = np.clip(membrane // threshold, 0, v["max_spikes"])
        membrane = np.where(spikes > 0, 0, membrane) if v["zero"] else membrane - spikes * threshold
        found.append(spikes.astype(np.int8))
    return np.stack(found)


def _faded(j: NDArray[np.int64], decay: NDArray[np.int64], x: NDArray[np.int64]) -> NDArray[np.int64]:
    left = np.where(decay == NO_LEAK, j, (j * decay + 0x4000) >> 15)
    return np.clip(left + x, -32768, 32767)


def _fade_reference(step: Step, inputs: Sequence[Bytes]) -> Bytes:
    v, found = step.values, []
    x = inputs[0].view("<i2").astype(np.int64).reshape(-1, v["n"])
    decay, j = np.tile(step.arrays["decay"].astype(np.int64), v["n"] // len(step.arrays["decay"])), np.zeros(v["n"], np.int64)
    for t in range(v["steps"]):
        j = _faded(j, decay, x[t if v["x_step"] else 0])
        found.append(j)
    return _int16(np.stack(found))


def _recurrent_reference(step: Step, inputs: Sequence[Bytes]) -> Bytes:
    v, n = step.values, step.values["n"]
    x = inputs[0].view("<i2").astype(np.int64).reshape(-1, n)
    threshold, decay, membrane, fade = (
        np.tile(step.arrays[r].astype(np.int64), n // len(step.arrays[r])) for r in ("threshold", "decay", "v_init", "decay_syn")
    )
    once = replace(step, values={**v, "steps": 1})
    current, given, found = np.zeros(n, np.int64), np.zeros(n, np.int64), []
    for t in range(v["steps"]):
        current = _faded(current, fade, np.clip(x[t if v["x_step"] else 0] + given, -32768, 32767))
        membrane = _faded(membrane, decay, current)
        spikes = np.clip(membrane // threshold, 0, v["max_spikes"])
        membrane = np.where(spikes > 0, 0, membrane) if v["zero"] else membrane - spikes * threshold
        given = _sums(once, spikes.astype(np.int8), 0).reshape(-1)
        found.append(spikes.astype(np.int8))
    return np.stack(found)


def _pool_reference(step: Step, inputs: Sequence[Bytes]) -> Bytes:
    total = np.sum(_windows(inputs[0], step.values, 0), axis=0)
    result: Bytes = total.astype(np.int8)
    return result


def _delay_reference(step: Step, inputs: Sequence[Bytes]) -> Bytes:
    v, x = step.values, inputs[0].reshape(step.values["steps"], step.values["n"])
    at = np.arange(v["steps"])[:, None] - np.tile(step.arrays["delay"].astype(np.int64), v["n"] // len(step.arrays["delay"]))
    late: Bytes = np.where(at >= 0, np.take_along_axis(x, np.maximum(at, 0), 0), 0).astype(np.int8)
    return late


def _accumulate_reference(step: Step, inputs: Sequence[Bytes]) -> Bytes:
    given = inputs[0] if step.values["spikes"] else inputs[0].view("<i2")
    x = given.astype(np.int64).reshape(step.values["steps"], step.values["n"])
    result: Bytes = x.sum(0).astype("<i4").view(np.int8)
    return result


def _int16(values: NDArray[np.int64]) -> Bytes:
    return np.clip(values, -32768, 32767).astype("<i2").reshape(-1).view(np.int8)


def _add_currents_reference(step: Step, inputs: Sequence[Bytes]) -> Bytes:
    a, b = (x.view("<i2").astype(np.int64) for x in inputs)
    return _int16(a + b)


def _add_spikes_reference(step: Step, inputs: Sequence[Bytes]) -> Bytes:
    amplitude = step.arrays["amplitude"].astype(np.int64)
    x, s = inputs[0].view("<i2").astype(np.int64), inputs[1].astype(np.int64)
    return _int16(x.reshape(-1, len(amplitude)) + s.reshape(-1, len(amplitude)) * amplitude)


REFERENCES: dict[str, Callable[[Step, Sequence[Bytes]], Bytes]] = {
    "spiking": _spiking_reference,
    "neurons": _neurons_reference,
    "current": _current_reference,
    "spike_pool": _pool_reference,
    "fade": _fade_reference,
    "recurrent": _recurrent_reference,
    "delay": _delay_reference,
    "accumulate": _accumulate_reference,
    "add_currents": _add_currents_reference,
    "add_spikes": _add_spikes_reference,
}
"""Rows of the table of numpy forms."""
