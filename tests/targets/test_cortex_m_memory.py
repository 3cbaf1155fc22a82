"""The arena: tensors that live at the same time never overlap, and the plan is no larger than a simple one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cortex_nets import borders, moves
from hypothesis import given, settings
from hypothesis import strategies as st
from nets import residual_net

from edgekit.frozen import FrozenProgram
from edgekit.targets.cortex_m.graph import Firmware
from edgekit.targets.cortex_m.memory import ALIGNMENT, Buffer, Trail, lower_bound, place
from edgekit.targets.cortex_m.preparation import prepare
from edgekit.targets.cortex_m.reference import run, step

SIZES, STEPS, LENGTHS = st.integers(0, 3000), st.integers(-1, 20), st.integers(0, 9)
BUFFERS = st.lists(st.builds(lambda size, first, length: Buffer(size, first, first + length), SIZES, STEPS, LENGTHS), max_size=24)


def first_fit(buffers: list[Buffer]) -> int:
    """Arena of the plainest plan: in order of their first step, each at the lowest place that is free."""
    placed: list[tuple[int, Buffer]] = []
    for buffer in sorted(buffers, key=lambda b: (b.first, -b.size)):
        taken = sorted((o, o + -(-b.size // ALIGNMENT) * ALIGNMENT) for o, b in placed if b.meets(buffer))
        offset = 0
        for start, end in taken:
            if offset + buffer.size <= start:
                break
            offset = max(offset, end)
        placed.append((offset, buffer))
    return max((o + -(-b.size // ALIGNMENT) * ALIGNMENT for o, b in placed), default=0)


@settings(deadline=None, max_examples=150)
@given(BUFFERS)
def test_no_two_buffers_of_one_moment_overlap(buffers: list[Buffer]) -> None:
    placed = place(buffers, tries=30)
    assert all(
        offset % ALIGNMENT == 0 and offset + b.size <= placed.size for b, offset in zip(buffers, placed.offsets, strict=True)
    )
    for i, (a, at) in enumerate(zip(buffers, placed.offsets, strict=True)):
        for b, there in zip(buffers[:i], placed.offsets[:i], strict=True):
            assert not a.meets(b) or at + a.size <= there or there + b.size <= at


@settings(deadline=None, max_examples=150)
@given(BUFFERS)
def test_the_plan_lies_between_the_bound_and_first_fit(buffers: list[Buffer]) -> None:
    placed = place(buffers, tries=60)
    busiest = max((sum(-(-b.size // 16) * 16 for b in buffers if b.first <= t <= b.last) for t in range(-1, 30)), default=0)
    assert placed.bound == lower_bound(buffers) == busiest
    assert placed.bound <= placed.size <= first_fit(buffers)


@settings(deadline=None, max_examples=100)
@given(BUFFERS, st.lists(st.integers(-400, 3000), min_size=24, max_size=24))
def test_trails_overlap_only_as_far_as_they_may(buffers: list[Buffer], distances: list[int]) -> None:
    pairs = [
        (i, j) for i, a in enumerate(buffers) for j, b in enumerate(buffers) if i != j and a.last == b.first and a.first < b.first
    ]
    trails = [Trail(i, j, d) for (i, j), d in zip(pairs, distances, strict=False)]
    placed, known = place(buffers, trails, tries=30), {(t.input, t.output): t.distance for t in trails}
    assert placed.size <= place(buffers, tries=30).size + 3000 and placed.bound == lower_bound(buffers)
    assert lower_bound(buffers, trails) <= placed.bound
    for i, (a, at) in enumerate(zip(buffers, placed.offsets, strict=True)):
        for j, (b, there) in enumerate(zip(buffers, placed.offsets, strict=True)):
            if i != j and a.meets(b) and at < there + b.size and there < at + a.size:
                assert (i, j) in known or (j, i) in known
                assert (i, j) not in known or at - there >= known[i, j]


def test_a_chain_of_trails_slides_down_by_its_distances() -> None:
    chain = [Buffer(1600, i, i + 1) for i in range(6)]
    placed = place(chain, [Trail(i, i + 1, 160) for i in range(5)])
    assert (placed.bound, placed.size) == (3200, 1600 + 5 * 160)


def test_the_plan_is_the_same_every_time() -> None:
    chance = np.random.default_rng(0)
    buffers = [Buffer(int(s), int(f), int(f + n)) for s, f, n in chance.integers(1, 30, (40, 3))]
    assert place(buffers) == place(buffers)


def test_a_buffer_that_makes_no_sense() -> None:
    with pytest.raises(ValueError, match="from step 3 to 2"):
        Buffer(10, 3, 2)


def in_one_arena(firmware: Firmware, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """The outputs when every tensor lies in one block of bytes at its planned offset, and scratch is filled with rubbish."""
    arena = np.random.default_rng(1).integers(-128, 128, firmware.arena).astype(np.int8)

    def view(tensor: int) -> np.ndarray:
        return arena[firmware.offsets[tensor] : firmware.offsets[tensor] + firmware.tensors[tensor].size]

    for port, value in zip(firmware.inputs, inputs, strict=True):
        view(port.tensor)[:] = value
    for one, place_ in zip(firmware.steps, firmware.scratch_offsets, strict=True):
        operands = [view(i) for i in one.inputs]
        arena[place_ : place_ + one.scratch] = 85
        result = step(one, operands)
        view(one.output)[:] = result
    return [view(port.tensor).copy() for port in firmware.outputs]


@pytest.mark.parametrize("kernel_set", ["portable", "dsp", "mve"])
@pytest.mark.parametrize("program", [residual_net(8), residual_net(4), moves(), borders()], ids=lambda p: p.name)
def test_networks_compute_the_same_in_their_arena(program: FrozenProgram, kernel_set: str) -> None:
    firmware = prepare(program, kernel_set)
    chance = np.random.default_rng(0)
    inputs = [chance.integers(-128, 128, firmware.tensors[p.tensor].size).astype(np.int8) for p in firmware.inputs]
    free = run(firmware, inputs)
    for port, found in zip(firmware.outputs, in_one_arena(firmware, inputs), strict=True):
        assert np.array_equal(found, free[port.tensor])
    assert firmware.arena <= firmware.bound


def test_a_plan_that_overlaps_is_noticed() -> None:
    firmware = prepare(residual_net(8), "dsp")
    broken = replace(firmware, offsets=tuple(0 for _ in firmware.offsets))
    inputs = [np.random.default_rng(0).integers(-128, 128, 768).astype(np.int8)]
    free = run(firmware, inputs)
    wrong = in_one_arena(replace(broken, arena=4 * firmware.arena), inputs)
    assert not np.array_equal(wrong[0], free[firmware.outputs[0].tensor])


def test_elementwise_steps_write_over_an_operand_that_nobody_needs() -> None:
    firmware = prepare(residual_net(8), "dsp")
    reused = {s.layer: s.reuse for s in firmware.steps if s.kind in ("add", "mul", "lut")}
    assert reused == {"add": 0, "gate": None, "mul": 0}
    add = next(s for s in firmware.steps if s.kind == "add")
    assert firmware.offsets[add.inputs[0]] == firmware.offsets[add.output]
