"""The spiking operators against loops over single neurons in numpy scalars and Python integers, written from their docstring."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from core.test_ops import call
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from edgekit.frozen import FrozenOp, freeze_module, load, save
from edgekit.frozen.describe import describe
from edgekit.frozen.ops import OPS
from edgekit.frozen.spiking_ops import NO_LEAK, SPIKING_OPS, charge, current_bounds, fire

F32 = np.float32
SEEDS = st.integers(0, 2**32 - 1)
RESET = st.sampled_from(["subtract", "zero", "value"])
TIE = st.sampled_from(["ge", "gt"])


def grid(rng: np.random.Generator, shape: tuple[int, ...], low: float = -1.0, high: float = 2.0) -> np.ndarray:
    """Multiples of 1/4, so that membranes often equal their threshold exactly."""
    return np.asarray(rng.integers(int(low * 4), int(high * 4) + 1, shape) / 4, F32)


def tensors(values: dict[str, np.ndarray]) -> list[Tensor]:
    return [torch.from_numpy(np.asarray(v)) for v in values.values()]


def fired(v: F32, threshold: F32, v_reset: F32, reset: str, tie: str, most: int) -> tuple[F32, F32]:
    s = F32(v >= threshold if tie == "ge" else v > threshold)
    if most > 1:
        s = F32(min(max(np.floor(v / threshold), 0), most))
    if reset == "subtract":
        return s, v - s * threshold
    return s, (F32(0) if reset == "zero" else v_reset) if s > 0 else v


def integrated(kind: str, v: F32, i: F32, x: F32, p: dict[str, F32], dt: float) -> tuple[F32, F32]:
    """(membrane, current) after step 1."""
    if kind in ("if", "i"):
        return v + F32(float(p["r"]) * dt) * x, i
    if kind.startswith("cuba"):
        i = i + F32(dt / float(p["tau_syn"])) * (p["w_in"] * x - i)
        x = i
    k = F32(dt / float(p["tau_mem" if kind.startswith("cuba") else "tau"]))
    return v + k * ((p["v_leak"] - v) + p["r"] * x), i


PARAMETERS = {
    "lif": ("tau", "r", "v_leak"),
    "if": ("r",),
    "cuba_lif": ("tau_syn", "tau_mem", "r", "v_leak", "w_in"),
    "li": ("tau", "r", "v_leak"),
    "i": ("r",),
    "cuba_li": ("tau_syn", "tau_mem", "r", "v_leak", "w_in"),
}


@pytest.mark.parametrize("kind", PARAMETERS)
@given(SEEDS, RESET, TIE, st.sampled_from([1, 1, 3]), st.sampled_from([1.0, 0.5, 1e-3]))
def test_float_neurons_equal_loops_over_single_neurons(kind: str, seed: int, reset: str, tie: str, most: int, dt: float) -> None:
    rng = np.random.default_rng(seed)
    fires, tie = kind.endswith("if"), "ge" if most > 1 else tie
    steps, n, shape = 6, 2, (3, 2, 2)
    shapes = [(), (3, 1, 1), shape]
    p = {name: grid(rng, shapes[rng.integers(3)]) for name in PARAMETERS[kind]}
    p |= {name: np.asarray(dt * rng.choice([1.0, 2.0, 4.0, 3.3], np.shape(p[name])), F32) for name in p if name.startswith("tau")}
    if fires:
        p |= {"v_threshold": grid(rng, shapes[rng.integers(3)], 0.25, 1.5), "v_reset": grid(rng, ())}
    p["v_init"] = grid(rng, shapes[rng.integers(3)])
    x = grid(rng, (steps * n, *shape))
    found = call(f"{kind}_sequence", torch.from_numpy(x), *tensors(p), dt, steps, *([reset, tie, most] if fires else []))

    each = {name: np.broadcast_to(value, shape) for name, value in p.items()}
    for at in np.ndindex(n, *shape):
        q = {name: F32(value[at[1:]]) for name, value in each.items()}
        v, i = q["v_init"], F32(0)
        for t in range(steps):
            v, i = integrated(kind, v, i, x.reshape(steps, n, *shape)[(t, *at)], q, dt)
            out = v
            if fires:
                out, v = fired(v, q["v_threshold"], q["v_reset"], reset, tie, most)
            assert found.view(steps, n, *shape)[(t, *at)].item() == out


@pytest.mark.parametrize("kind", ["lif", "if", "cuba_lif"])
@pytest.mark.parametrize("image", [False, True])
@given(SEEDS, RESET, st.sampled_from([1, 3]), st.booleans())
def test_recurrent_neurons_equal_loops(kind: str, image: bool, seed: int, reset: str, most: int, bias: bool) -> None:
    """Numbers are multiples of 1/8 where they are summed, so that no order of summation rounds."""
    rng = np.random.default_rng(seed)
    steps, n, shape = 5, 2, (4, 3, 2) if image else (4,)
    p = {name: F32({"tau": 2, "tau_mem": 2, "tau_syn": 4, "v_leak": 0.25}.get(name, 1)) for name in PARAMETERS[kind]}
    p |= {"v_threshold": F32(1.25), "v_reset": F32(-0.5), "v_init": F32(0.5)}
    x, weight = (F32(rng.integers(-9, 10, s) / 8) for s in ((steps * n, *shape), (4, 2, 3, 1) if image else (4, 4)))
    offset = F32(rng.integers(-4, 5, 4) / 8)
    given = (torch.from_numpy(x), torch.from_numpy(weight), torch.from_numpy(offset) if bias else None, *tensors(p))
    found = call(f"{kind}_recurrent", *given, 1.0, steps, reset, "ge", most, "back").view(steps, n, *shape)

    def back(s: np.ndarray, at: tuple[int, ...]) -> F32:
        o, total = at[0], offset[at[0]] if bias else F32(0)
        for c in range(weight.shape[1]):
            if not image:
                total += weight[o, c] * s[c]
            for k in range(3) if image else ():
                row = at[1] + k - 1
                total += weight[o, c, k, 0] * s[o // 2 * 2 + c, row, at[2]] if 0 <= row < 3 else F32(0)
        return total

    for b in range(n):
        v, i = np.full(shape, p["v_init"], F32), np.zeros(shape, F32)
        s = np.zeros(shape, F32)
        for t in range(steps):
            before = s.copy()
            for at in np.ndindex(*shape):
                current = x.reshape(steps, n, *shape)[(t, b, *at)] + (back(before, at) if t else F32(0))
                v[at], i[at] = integrated(kind, v[at], i[at], current, p, 1.0)
                s[at], v[at] = fired(v[at], p["v_threshold"], p["v_reset"], reset, "ge", most)
            assert np.array_equal(found[t, b].numpy(), s)


@given(SEEDS, st.sampled_from(["subtract", "zero"]), st.sampled_from([1, 3]), st.sampled_from([0, 20000, NO_LEAK]))
def test_recurrent_integer_neurons_and_fading_currents_equal_python_integers(seed: int, reset: str, most: int, fade: int) -> None:
    rng = np.random.default_rng(seed)
    steps, n, features = 6, 2, 4
    x = rng.integers(-9000, 9001, (steps * n, features)).astype(np.int16)
    weight = rng.integers(-128, 128, (features, features)).astype(np.int8)
    bias, threshold = (rng.integers(*span, features).astype(np.int16) for span in ((-900, 900), (1, 9000)))
    decay = rng.choice([16384, 29491, NO_LEAK], features).astype(np.int16)
    start, fades = rng.integers(-900, 900, features).astype(np.int16), np.full(features, fade, np.int16)
    tensors_ = [torch.from_numpy(a) for a in (x, weight, np.ones(features, F32), bias, fades, threshold, decay, start)]
    found = call("qlif_recurrent", *tensors_, steps, reset, most, 8).view(steps, n, features)
    faded = call("qsynapse_sequence", tensors_[0], tensors_[4], steps).view(steps, n, features)

    def leaked(value: int, d: int) -> int:
        return value if d == NO_LEAK else (value * d + 0x4000) >> 15

    def sat(value: int) -> int:
        return min(max(value, -32768), 32767)

    for b in range(n):
        v, j, alone, s = [int(a) for a in start], [0] * features, [0] * features, [0] * features
        for t in range(steps):
            before = list(s)
            for f in range(features):
                given = int(x.reshape(steps, n, features)[t, b, f])
                alone[f] = sat(leaked(alone[f], fade) + given)
                if t:
                    given = sat(given + int(bias[f]) + sum(int(w) * a for w, a in zip(weight[f], before, strict=True)))
                j[f] = sat(leaked(j[f], fade) + given)
                v[f] = sat(leaked(v[f], int(decay[f])) + j[f])
                s[f] = min(max(v[f] // int(threshold[f]), 0), most)
                v[f] = (v[f] - s[f] * int(threshold[f])) if reset == "subtract" else 0 if s[f] else v[f]
            assert found[t, b].tolist() == s and faded[t, b].tolist() == alone


@given(SEEDS, st.sampled_from(["subtract", "zero"]), st.sampled_from([1, 1, 15]))
def test_integer_neuron_equals_python_integers(seed: int, reset: str, most: int) -> None:
    rng = np.random.default_rng(seed)
    steps, n, features = 8, 2, 6
    scale = rng.choice([100, 5000, 32767])
    x = rng.integers(-scale, scale + 1, (steps * n, features)).astype(np.int16)
    threshold = rng.integers(1, scale + 1, features).astype(np.int16)
    decay = rng.choice([0, 1, 16384, 29491, 32766, NO_LEAK], features).astype(np.int16)
    start = rng.integers(-scale, scale + 1, features).astype(np.int16)
    found = call("qlif_sequence", *map(torch.from_numpy, (x, threshold, decay, start)), steps, reset, most)
    for b in range(n):
        for f in range(features):
            v, d, thr = int(start[f]), int(decay[f]), int(threshold[f])
            for t in range(steps):
                v = v if d == NO_LEAK else (v * d + 0x4000) // 32768
                v = min(max(v + int(x[t * n + b, f]), -32768), 32767)
                s = min(max(v // thr, 0), most)
                v = v - s * thr if reset == "subtract" else (0 if s else v)
                assert int(found[t * n + b, f]) == s


@given(SEEDS, st.sampled_from([8, 4, 2]), st.sampled_from([1, 3]))
def test_synapses_add_the_weights_that_spikes_select(seed: int, bits: int, most: int) -> None:
    rng = np.random.default_rng(seed)
    w = rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, 7)).astype(np.int8)
    b = rng.integers(-3000, 3000, 5).astype(np.int16)
    s = rng.integers(0, most + 1, (4, 7)).astype(np.int8)
    scale = torch.rand(5)
    found = call("spiking_linear", torch.from_numpy(s), torch.from_numpy(w), scale, torch.from_numpy(b), most, bits)
    low, high = current_bounds(torch.from_numpy(w), torch.from_numpy(b), most)
    for n in range(4):
        for o in range(5):
            total = int(b[o])
            for f in range(7):
                total += int(s[n, f]) * int(w[o, f])
                assert low <= total <= high
            assert int(found[n, o]) == total


@given(SEEDS, st.sampled_from([1, 2]), st.sampled_from([1, 2]), st.sampled_from([0, 1]), st.sampled_from([1, 2]))
def test_spiking_conv2d_equals_loops(seed: int, groups: int, stride: int, padding: int, dilation: int) -> None:
    rng = np.random.default_rng(seed)
    s = rng.integers(0, 2, (2, 4, 6, 5)).astype(np.int8)
    w = rng.integers(-128, 128, (2 * groups, 4 // groups, 2, 3)).astype(np.int8)
    b = rng.integers(-100, 100, 2 * groups).astype(np.int16)
    args: list[Any] = [[stride] * 2, [padding] * 2, [dilation] * 2, groups, 1, 8]
    found = call("spiking_conv2d", *map(torch.from_numpy, (s, w)), torch.ones(2 * groups), torch.from_numpy(b), *args)
    for n, o, i, j in np.ndindex(*found.shape):
        total = int(b[o])
        for c, y, z in np.ndindex(*w.shape[1:]):
            r, q = i * stride - padding + y * dilation, j * stride - padding + z * dilation
            if 0 <= r < 6 and 0 <= q < 5:
                total += int(w[o, c, y, z]) * int(s[n, o // 2 * (4 // groups) + c, r, q])
        assert int(found[n, o, i, j]) == total


def test_sums_of_currents_equal_python_integers() -> None:
    torch.manual_seed(1)
    a, b = (torch.randint(-30000, 30000, (6, 3, 2, 2), dtype=torch.int16) for _ in range(2))
    s, each = torch.randint(0, 4, a.shape, dtype=torch.int8), torch.tensor([12000, -9000, 7], dtype=torch.int16)
    two, skipped = call("add_currents", a, b), call("add_spikes", a, s, each)
    for at in np.ndindex(*a.shape):
        assert int(two[at]) == min(max(int(a[at]) + int(b[at]), -32768), 32767)
        assert int(skipped[at]) == min(max(int(a[at]) + int(s[at]) * int(each[at[1]]), -32768), 32767)


def test_time_operators_move_and_add_steps() -> None:
    x = torch.arange(2 * 3 * 4).view(2, 3, 4).float()  # N, T, F
    folded = call("fold_steps", x)
    assert folded.shape == (6, 4)
    assert torch.equal(folded.view(3, 2, 4)[1, 0], x[0, 1])
    assert torch.equal(call("unfold_steps", folded, 3), x)
    assert torch.equal(call("repeat_steps", x[:, 0], 3).view(3, 2, 4)[2], x[:, 0])
    assert torch.equal(call("accumulate", folded, 0.5, 3), x.sum(1) * 0.5)
    assert torch.equal(call("qaccumulate", folded.to(torch.int16) * 1400, 3), (x.int() * 1400).sum(1, dtype=torch.int32))
    late = call("delay_steps", folded, torch.tensor([0, 1, 2, 9], dtype=torch.int32), [0, 1, 2, 9], 3).view(3, 2, 4)
    assert late[:, 1].T.tolist() == [[12, 16, 20], [0, 13, 17], [0, 0, 14], [0, 0, 0]]
    pooled = call("spike_sum_pool2d", torch.ones(2, 1, 4, 4, dtype=torch.int8), [2, 2], [2, 2], [1, 1])
    assert pooled[0, 0].tolist() == [[1, 2, 1], [2, 4, 2], [1, 2, 1]]


def test_wrong_steps_and_rules_are_refused() -> None:
    zero, one = torch.zeros(()), torch.ones(())
    with pytest.raises(ValueError, match="4 time steps: a first dimension of 6"):
        OPS.li_sequence.default(torch.zeros(6, 2), one, one, zero, zero, 1.0, 4)
    with pytest.raises(ValueError, match="reset 'soft'"):
        OPS.if_sequence.default(torch.zeros(6, 2), one, one, zero, zero, 1.0, 3, "soft", "ge", 1)
    with pytest.raises(ValueError, match=r"delays of \[2\] steps, lengths \[1\]: expected the same"):
        OPS.delay_steps.default(torch.zeros(6, 2), torch.tensor(2), [1], 3)
    with pytest.raises(ValueError, match="tie ge above 1"):
        OPS.if_sequence.default(torch.zeros(6, 2), one, one, zero, zero, 1.0, 3, "zero", "gt", 2)


class Net(nn.Module):
    """3 inputs for 4 steps, an integer layer of 2 neurons, the sum of their spikes."""

    def __init__(self) -> None:
        super().__init__()
        integers = torch.tensor([[100, -50, 20], [5, 60, -128]], dtype=torch.int8)
        self.enter = FrozenOp("repeat_steps", 1, {}, steps=4)
        synapse = {"weight": integers, "weight_scale": torch.full((2,), 0.01), "bias": torch.tensor([7, -3], dtype=torch.int16)}
        self.synapse = FrozenOp("spiking_linear", 1, synapse, spikes_max=1, weight_bits=8)
        neuron = {"threshold": torch.tensor([150, 90]), "decay": torch.tensor([29491, NO_LEAK]), "v_init": torch.tensor([0, 0])}
        neuron = {k: v.to(torch.int16) for k, v in neuron.items()}
        self.neuron = FrozenOp("qlif_sequence", 1, neuron, steps=4, reset="subtract", max_spikes=1)
        self.leave = FrozenOp("unfold_steps", 1, {}, steps=4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.leave(self.neuron(self.synapse(self.enter(x))))
        return y


def test_programs_of_spiking_operators_describe_save_and_load(tmp_path: Any) -> None:
    x = torch.tensor([[1, 1, 0], [0, 1, 0]], dtype=torch.int8)
    program = freeze_module(Net(), (x,))
    save(program, tmp_path / "frozen.pt2")
    again = load(tmp_path / "frozen.pt2")
    (spikes,) = again.run(x)
    assert torch.equal(spikes, program.run(x)[0])
    assert spikes.shape == (2, 4, 2)
    assert spikes[0, :, 1].tolist() == [0, 1, 1, 0]  # 62 a step, no leak, threshold 90: 62, 124 - 90 = 34, 96 - 90 = 6, 68
    synapse, neuron = again.layer("synapse"), again.layer("neuron")
    assert (synapse.parameters, synapse.macs, synapse.weight_bytes) == (6 + 2, 4 * 2 * 3, 6 + 2 * 2 + 4 * 2)
    assert (neuron.parameters, neuron.weight_bytes, neuron.steps, neuron.state_updates, neuron.macs) == (6, 12, 4, 8, 0)
    assert neuron.inputs == ("synapse",)
    table = describe(again)
    assert (table.macs_by_bits, table.state_updates) == ({"w8a1": 24}, 8)
    assert [row.activation_bits for row in table.rows] == [None, 16, 1, None]


@pytest.mark.parametrize("reset", ["zero", "subtract"])
@pytest.mark.parametrize("tie", ["ge", "gt"])
@pytest.mark.parametrize(("r", "leak"), [(1.0, 0.0), (1.0, -0.2), (2.0, 0.0)])
def test_the_fast_way_of_single_spikes_is_the_written_one(reset: str, tie: str, r: float, leak: float) -> None:
    """To the last bit, for membranes on the threshold, and for those that overflow."""
    x = torch.round(torch.randn(9 * 2, 5, generator=torch.Generator().manual_seed(0)) * 4) / 4
    x[8, 0], x[12, 1] = torch.inf, -torch.inf
    k, threshold, zero = torch.tensor(0.5), torch.full((5,), 0.75), torch.tensor(0.0)
    v, expected = torch.full((2, 5), 0.25), []
    for current in x.reshape(9, 2, 5):
        s, v = fire(charge(v, current, k, torch.tensor(r), torch.tensor(leak)), threshold, zero, reset, tie)
        expected.append(s)
    arguments = (x, torch.tensor(2.0), torch.tensor(r), torch.tensor(leak), threshold, zero, torch.tensor(0.25))
    found = torch.ops.edgekit.lif_sequence(*arguments, 1.0, 9, reset, tie, 1)
    assert torch.equal(found, torch.cat(expected)) and found.any()


def samples() -> dict[str, tuple[Any, ...]]:
    """Arguments for every operator: four steps of two samples with three channels."""
    x, one, half, none = torch.randn(8, 3), torch.ones(3), torch.full((3,), 0.5), torch.zeros(3)
    spikes, image = torch.randint(0, 2, (8, 3), dtype=torch.int8), torch.randint(0, 2, (8, 3, 4, 4), dtype=torch.int8)
    weight, scale = torch.randint(-7, 8, (2, 3, 3, 3), dtype=torch.int8), torch.rand(2)
    bias, current = torch.tensor([5, -5], dtype=torch.int16), torch.randint(-90, 90, (8, 3), dtype=torch.int16)
    level, start = torch.full((3,), 50, dtype=torch.int16), torch.zeros(3, dtype=torch.int16)
    firing = (one, none, none, 1.0, 4, "subtract", "ge", 1)
    return {
        "lif_sequence": (x, half + 1, one, none, *firing),
        "if_sequence": (x, one, *firing),
        "cuba_lif_sequence": (x, half + 1, half + 1, one, none, one, *firing),
        "li_sequence": (x, half + 1, one, none, none, 1.0, 4),
        "cuba_li_sequence": (x, half + 1, half + 1, one, none, one, none, 1.0, 4),
        "i_sequence": (x, one, none, 1.0, 4),
        "lif_recurrent": (x, weight.float()[:, :, 0, 0].repeat(2, 1)[:3], None, half + 1, one, none, *firing, "back"),
        "if_recurrent": (x, torch.eye(3), one, one, *firing, "back"),
        "cuba_lif_recurrent": (x, torch.eye(3), None, half + 1, half + 1, one, none, one, *firing, "back"),
        "qlif_recurrent": (
            current,
            torch.eye(3, dtype=torch.int8),
            one,
            start,
            start,
            level,
            level,
            start,
            4,
            "zero",
            1,
            8,
        ),
        "qsynapse_sequence": (current, level, 4),
        "qlif_sequence": (current, level, torch.full((3,), 30000, dtype=torch.int16), start, 4, "subtract", 1),
        "lif_charge": (x, x + 1, half + 1, one, none, 1.0),
        "if_charge": (x, x + 1, one, 1.0),
        "synapse": (x, x + 1, half + 1, one, 1.0),
        "fire": (x, one, "gt", 1),
        "fire_reset": (x, (x > 0).float(), one, none, "value"),
        "spiking_linear": (spikes, weight[:, :, 0, 0].contiguous(), scale, bias, 1, 4),
        "spiking_conv2d": (image, weight, scale, bias, [1, 2], [1, 0], [1, 1], 1, 1, 4),
        "spike_sum_pool2d": (image, [2, 2], [2, 2], [0, 0]),
        "repeat_steps": (x, 4),
        "fold_steps": (torch.randn(4, 2, 3),),
        "unfold_steps": (x, 4),
        "delay_steps": (x, torch.tensor([0, 1, 2]), [0, 1, 2], 4),
        "accumulate": (x, 0.25, 4),
        "qaccumulate": (current, 4),
        "add_currents": (current, current + 1),
        "add_spikes": (current, spikes, level),
    }


@pytest.mark.parametrize("name", sorted(SPIKING_OPS))
def test_torch_accepts_the_operator(name: str) -> None:
    """torch's own checks of the schema (nothing is mutated or aliased) and the fake kernel."""
    torch.manual_seed(0)
    torch.library.opcheck(getattr(OPS, name).default, samples()[name], test_utils=("test_schema", "test_faketensor"))
