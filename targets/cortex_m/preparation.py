"""Frozen program to planned firmware for one core: lowering, scratch of its kernel set, limits of the C structs, offsets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray
from torch.export import ExportedProgram

from edgekit.errors import InputError
from edgekit.frozen import FrozenProgram
from edgekit.targets.cortex_m.graph import Firmware, Port, Spec, Stream, Tensor, plan
from edgekit.targets.cortex_m.kernels import IN_PLACE, KERNELS, calls
from edgekit.targets.cortex_m.lowering import build, refusal
from edgekit.targets.cortex_m.reference import Int8, run
from edgekit.targets.cortex_m.streaming import one_step, streamed, time_steps

__all__ = ["from_stored", "in_program_layout", "prepare", "simulate", "specs", "taps_of", "to_stored"]

_RANGES = {"uint8_t": (0, 255), "int8_t": (-128, 127), "uint16_t": (0, 65535)}


_made: WeakKeyDictionary[ExportedProgram, dict[tuple[str, bool], Firmware]] = WeakKeyDictionary()


def prepare(program: FrozenProgram, kernel_set: str, stream: bool = False) -> Firmware:
    """The firmware of a program, with all offsets; made once while the program lives.

    Args:
        kernel_set: "portable", "dsp" or "mve"; kernels of each need scratch of their own.
        stream: take one time step a call.

    Raises:
        UnsupportedError: a layer that firmware cannot take.
    """
    known = _made.setdefault(program.exported, {})
    if (kernel_set, stream) not in known:
        firmware = _streaming(program, kernel_set) if stream else build(program)
        _check_ranges(program, firmware)
        rows = [(s, KERNELS[s.kind]) for s in firmware.steps]
        steps = tuple(replace(s, scratch=row.scratch(s, kernel_set), trail=row.trail(s, kernel_set)) for s, row in rows)
        known[kernel_set, stream] = plan(replace(firmware, steps=steps), IN_PLACE)
    return known[kernel_set, stream]


def _streaming(program: FrozenProgram, kernel_set: str) -> Firmware:
    count, all_steps = time_steps(program), prepare(program, kernel_set)
    whole = Stream(
        count=count,
        inputs=specs(all_steps, all_steps.inputs),
        outputs=specs(all_steps, all_steps.outputs),
        macs=all_steps.macs,
        sequence=any(x.op == "fold_steps" for x in program.layers),
        each=any(x.op == "unfold_steps" for x in program.layers),
    )
    return streamed(build(one_step(program)), program, whole)


def _check_ranges(program: FrozenProgram, firmware: Firmware) -> None:
    for step in firmware.steps:
        for member in (m for call in calls(step) if call.struct for m in call.struct.fields if m.type in _RANGES):
            low, high = _RANGES[member.type]
            if not low <= member.value <= high:
                what = f"has {member.name} {member.value} ({low} to {high} is possible)"
                raise refusal(program, step.layer, what, "make its tensors smaller")


def specs(firmware: Firmware, ports: Sequence[Port]) -> tuple[Spec, ...]:
    """What a host has to know of inputs or outputs."""
    found = []
    for port in ports:
        tensor = firmware.tensors[port.tensor]
        found.append(
            Spec(port.source, tensor.name, tensor.shape, tensor.last, port.scale, port.zero_point, tensor.width, port.bits)
        )
    return tuple(found)


def to_stored(inputs: Sequence[Spec], sample: Sequence[NDArray[Any]]) -> list[Int8]:
    """One sample (1, ...) of each program input as the integers that the firmware reads, flat, in its layout.

    ``edgekit::quantize``: float32 product with the reciprocal scale, rounded half to even; int8 arrays pass as they are.

    Raises:
        InputError: a sample that does not fit the program.
    """
    found = []
    for spec in inputs:
        shape = tuple(sample[spec.source].shape[1:]) if spec.source < len(sample) else None
        if shape != spec.shape[1:]:
            raise InputError(f"input {spec.source} takes samples of shape {spec.shape[1:]}, found {shape or 'nothing'}")
        value = np.asarray(sample[spec.source])
        if value.dtype != np.int8:
            scaled = np.rint(value.astype(np.float32) * np.float32(1.0 / (spec.scale or 1.0)))
            least = -(1 << (spec.bits - 1))
            value = np.clip(scaled + (spec.zero_point or 0), least, -least - 1).astype(np.int8)
        found.append(np.ascontiguousarray(value.transpose(0, 2, 3, 1) if spec.last else value).reshape(-1))
    return found


def from_stored(spec: Spec, values: Int8) -> NDArray[np.float32]:
    """The firmware's output bytes as the program's output (1, ...), dequantized."""
    real = in_program_layout(spec, values).astype(np.float32)
    return real if spec.scale is None else (real - np.float32(spec.zero_point or 0)) * np.float32(spec.scale)


def in_program_layout(tensor: Spec | Tensor, values: Int8) -> NDArray[Any]:
    """Stored bytes in the program's shape: int8, int16, int32, or uint8 for packed signs."""
    shape, values = tensor.shape, values.view(f"<i{tensor.width}")
    if isinstance(tensor, Tensor) and tensor.channels:
        return np.ascontiguousarray(values.view(np.uint8).reshape(tensor.stored)[..., : shape[-1]])
    shaped = values.reshape([shape[i] for i in (0, 2, 3, 1)]).transpose(0, 3, 1, 2) if tensor.last else values.reshape(shape)
    return np.ascontiguousarray(shaped)


def taps_of(firmware: Firmware, tensors: Mapping[int, Int8]) -> dict[str, NDArray[Any]]:
    """Each layer's output in the program's layout, from the bytes of the tensors that steps write and that are fed."""
    found = {}
    for name, index in firmware.taps.items():
        values = tensors.get(index, tensors.get(firmware.root(index)))
        if values is not None:
            found[name] = in_program_layout(firmware.tensors[index], values)
    return found


def simulate(firmware: Firmware, sample: Sequence[NDArray[Any]]) -> tuple[dict[str, NDArray[Any]], list[NDArray[np.float32]]]:
    """What the firmware computes for one sample, by the numpy reference: each layer's output, and the program's outputs."""
    tensors = run(firmware, to_stored(specs(firmware, firmware.inputs), sample))
    outputs = [
        from_stored(spec, tensors[port.tensor])
        for spec, port in zip(specs(firmware, firmware.outputs), firmware.outputs, strict=True)
    ]
    return taps_of(firmware, dict(enumerate(tensors))), outputs
