"""What firmware consists of: tensors of int8 or packed signs with a place in the arena, and steps that each call one kernel.

A :class:`Firmware` is made from a frozen program by :mod:`edgekit.targets.cortex_m.lowering`; C text
(:mod:`~edgekit.targets.cortex_m.emit`), the numpy reference (:mod:`~edgekit.targets.cortex_m.reference`) and the memory plan all
read it and nothing else.

Tensors of four dimensions that image operators use are stored channel-last; all others are stored as the program has them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from numpy.typing import NDArray

from edgekit.targets.cortex_m.memory import Buffer, Placement, Trail, place

__all__ = ["Firmware", "Port", "Spec", "Step", "Stream", "Tensor", "lifetimes", "plan"]


@dataclass(frozen=True)
class Tensor:
    """int8 values, or packed signs, in the arena.

    Attributes:
        name: of the frozen layer that computes it, with a suffix where the firmware needs more than one.
        shape: the program's shape, batch of one first.
        last: stored channel-last (four dimensions only).
        scale, zero_point: ``scale * (q - zero_point)`` is the real value.
        base: the tensor whose bytes this one shares by a free reshape; its own index otherwise.
        channels: packed signs of so many channels, stored in words of 32 bits; 0 for int8 values.
        width: bytes of a value: 1, 2 for the currents and 4 for the sums of spiking layers.
    """

    index: int
    name: str
    shape: tuple[int, ...]
    last: bool
    scale: float
    zero_point: int
    base: int
    channels: int = 0
    width: int = 1

    @property
    def stored(self) -> tuple[int, ...]:
        """Shape as it lies in memory; in bytes for packed signs."""
        if self.channels:
            return (*self.shape[:-1], 4 * -(-self.channels // 32))
        return tuple(self.shape[i] for i in (0, 2, 3, 1)) if self.last else self.shape

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.stored) * self.width


@dataclass(frozen=True)
class Step:
    """One kernel call.

    Attributes:
        layer: the frozen layer it computes, or that it is needed for.
        kind: row of :data:`edgekit.targets.cortex_m.kernels.KERNELS`.
        inputs, output: indices of tensors.
        values: integers and tuples of integers that the kernel takes.
        arrays: constants in flash by their role ("weight", "bias", "multiplier", "shift", "table").
        macs: multiply-accumulates.
        bits: of the stored weights (8 where there are none).
        scratch: bytes that the kernel needs while it runs.
        trail: bytes by which the output must start below input 0 if it is to be written over it while the kernel reads it
            (:class:`~edgekit.targets.cortex_m.memory.Trail`); None: they must not overlap.
        state: the tensor that it keeps between calls of a streaming firmware.
        reuse: the input (position in ``inputs``) whose bytes the output takes over; None: it has its own.
    """

    layer: str
    kind: str
    inputs: tuple[int, ...]
    output: int
    values: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    macs: int = 0
    bits: int = 8
    scratch: int = 0
    trail: int | None = None
    reuse: int | None = None
    state: int | None = None


@dataclass(frozen=True)
class Port:
    """An input or output: ``source`` is the program's input or output position, ``tensor`` the firmware's tensor.

    ``scale`` None: the program itself has integers here. ``bits``: an input is clamped to so many.
    """

    source: int
    tensor: int
    scale: float | None
    zero_point: int | None
    bits: int = 8


@dataclass(frozen=True)
class Spec:
    """An input or output as a host has to know it: the program's ``shape`` with batch, and how it is stored.

    ``name`` is the layer's; the other attributes are those of :class:`Port` and :class:`Tensor`.
    """

    source: int
    name: str
    shape: tuple[int, ...]
    last: bool
    scale: float | None
    zero_point: int | None
    width: int = 1
    bits: int = 8

    @property
    def stored(self) -> tuple[int, ...]:
        """Shape as it lies in memory."""
        return tuple(self.shape[i] for i in (0, 2, 3, 1)) if self.last else self.shape

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape) * self.width


@dataclass(frozen=True)
class Stream:
    """What a firmware of one time step a call knows of the whole.

    Attributes:
        count: time steps of a sample.
        inputs, outputs: those of a whole sample.
        macs: of all steps.
        sequence: the input differs in each step.
        each: the output is of each step; else it is a sum, there after the last.
        once: so many steps of the firmware come first, and run once, at the reset.
    """

    count: int
    inputs: tuple[Spec, ...]
    outputs: tuple[Spec, ...]
    macs: int
    sequence: bool
    each: bool
    once: int = 0


@dataclass(frozen=True)
class Firmware:
    """A whole network.

    Attributes:
        taps: tensor that holds each frozen layer's output; layers that were merged away are missing.
        stream: of a firmware that takes one time step a call; None: an inference a call.
        offsets: place of each tensor in the arena; ``scratch_offsets`` of each step's scratch (0 where it has none).
    """

    name: str
    tensors: tuple[Tensor, ...]
    steps: tuple[Step, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    taps: Mapping[str, int]
    offsets: tuple[int, ...] = ()
    scratch_offsets: tuple[int, ...] = ()
    arena: int = 0
    bound: int = 0
    stream: Stream | None = None

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one inference."""
        return sum(step.macs for step in self.steps)

    @property
    def kept(self) -> tuple[int, ...]:
        """Tensors that keep their values from one time step to the next: states, and what is computed once."""
        once = self.steps[: self.stream.once] if self.stream else ()
        return (*(s.state for s in self.steps if s.state is not None), *(s.output for s in once))

    def root(self, tensor: int) -> int:
        """The tensor that owns the bytes."""
        while self.tensors[tensor].base != tensor:
            tensor = self.tensors[tensor].base
        return tensor


def lifetimes(firmware: Firmware, reuse: Sequence[int | None]) -> tuple[list[int], list[Buffer]]:
    """The buffer of each tensor, and the buffers; ``reuse`` says for each step which input's bytes its output takes over.

    Inputs are there before step 0 and outputs after the last one. Scratch buffers follow, one for each step that has any.
    """
    owner = [firmware.root(t.index) for t in firmware.tensors]
    for step, position in zip(firmware.steps, reuse, strict=True):
        if position is not None:
            taken, output = owner[step.inputs[position]], owner[step.output]
            owner = [taken if o == output else o for o in owner]
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for port in firmware.inputs:
        first[owner[port.tensor]] = last[owner[port.tensor]] = -1
    for time, step in enumerate(firmware.steps):
        for tensor in (*step.inputs, step.output):
            first.setdefault(owner[tensor], time)
            last[owner[tensor]] = time
    for port in firmware.outputs:
        last[owner[port.tensor]] = len(firmware.steps)
    for tensor in firmware.kept:
        first[owner[tensor]], last[owner[tensor]] = min(first.get(owner[tensor], -1), -1), len(firmware.steps)
    numbers = {o: i for i, o in enumerate(sorted(first))}
    sizes = {o: max(t.size for t in firmware.tensors if owner[t.index] == o) for o in first}
    buffers = [Buffer(sizes[o], first[o], last[o]) for o in sorted(first)]
    buffers += [Buffer(s.scratch, time, time) for time, s in enumerate(firmware.steps) if s.scratch]
    return [numbers.get(o, 0) for o in owner], buffers


def plan(firmware: Firmware, in_place: Mapping[str, Sequence[int]]) -> Firmware:
    """The firmware with all offsets.

    Args:
        in_place: kernel kind to the positions of the inputs over which it may write its output.
    """
    reuse = _reuse(firmware, in_place)
    owner, buffers = lifetimes(firmware, reuse)
    placed: Placement = place(buffers, _trails(firmware, owner, buffers))
    scratch = iter(placed.offsets[len(buffers) - sum(bool(s.scratch) for s in firmware.steps) :])
    return replace(
        firmware,
        steps=tuple(replace(s, reuse=r) for s, r in zip(firmware.steps, reuse, strict=True)),
        offsets=tuple(placed.offsets[o] for o in owner),
        scratch_offsets=tuple(next(scratch) if s.scratch else 0 for s in firmware.steps),
        arena=placed.size,
        bound=placed.bound,
    )


def _trails(firmware: Firmware, owner: Sequence[int], buffers: Sequence[Buffer]) -> list[Trail]:
    """Where a step's output may lie over its input: nobody needs the input afterwards."""
    found = []
    for time, step in enumerate(firmware.steps):
        if step.trail is not None:
            source, target = owner[step.inputs[0]], owner[step.output]
            if source != target and buffers[source].last == time == buffers[target].first:
                found.append(Trail(source, target, step.trail))
    return found


def _reuse(firmware: Firmware, in_place: Mapping[str, Sequence[int]]) -> list[int | None]:
    """For each step the input whose bytes nobody needs afterwards, if its kernel may write over it."""
    end: dict[int, int] = {firmware.root(p.tensor): len(firmware.steps) for p in firmware.outputs}
    end |= {firmware.root(t): len(firmware.steps) for t in firmware.kept}
    for time, step in enumerate(firmware.steps):
        for tensor in step.inputs:
            end[firmware.root(tensor)] = max(end.get(firmware.root(tensor), -1), time)
    found: list[int | None] = []
    for time, step in enumerate(firmware.steps):
        roots = [firmware.root(t) for t in step.inputs]
        size = firmware.tensors[step.output].size
        fits = [
            p
            for p in in_place.get(step.kind, ())
            if p < len(roots) and end[roots[p]] == time and firmware.tensors[step.inputs[p]].size == size
        ]
        found.append(fits[0] if fits else None)
    return found
