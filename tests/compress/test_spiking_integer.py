"""Spiking programs in integers: what is folded, that currents cannot leave int16, how close they stay to the float program."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from spiking_nets import STEPS, Conv, Residual, conv_program, dense_program, neuron, recurrent_program, residual_program
from torch import Tensor, nn

from edgekit.compress.spiking.integer import integer_program
from edgekit.compress.spiking.integer_sums import joint
from edgekit.errors import ModelError
from edgekit.frozen import FrozenOp, FrozenProgram, freeze_module, load, save


def by_hand(program: FrozenProgram, x: Tensor) -> np.ndarray:
    """The dense net's spikes in Python integers, adding weights spike by spike; x (T, 6) of 0 and 1."""
    layers = {layer.name: layer.args for layer in program.layers}
    spikes = [[int(v) for v in row] for row in x]
    for synapse, cell in (("fc1", "spike1"), ("fc2", "spike2")):
        a, n = layers[synapse], layers[cell]
        w, b = a["weight"].tolist(), a["bias"].tolist()
        thr, dec, start = (np.broadcast_to(n[k].numpy(), len(b)).astype(int).tolist() for k in ("threshold", "decay", "v_init"))
        v, rows = list(start), []
        for row in spikes:
            out = []
            for o in range(len(b)):
                current = b[o]
                for f, count in enumerate(row):
                    for _ in range(count):
                        current += w[o][f]
                        assert -32768 <= current <= 32767
                v[o] = min(max((v[o] if dec[o] == 32767 else (v[o] * dec[o] + 0x4000) // 32768) + current, -32768), 32767)
                s = min(max(v[o] // thr[o], 0), int(n["max_spikes"]))
                v[o] = v[o] - s * thr[o] if n["reset"] == "subtract" else (0 if s else v[o])
                out.append(s)
            rows.append(out)
        spikes = rows
    return np.array(spikes)


@pytest.mark.parametrize("kind", ["if", "lif"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("changes", [{}, {"reset": "zero", "v_init": 0.25}, {"max_spikes": 3}, {"v_leak": 0.1}])
def test_the_program_is_its_integers_and_close_to_the_float_one(kind: str, bits: int, changes: dict[str, Any]) -> None:
    changes = changes if kind == "lif" else {k: v for k, v in changes.items() if k != "v_leak"}
    program, x = dense_program(kind, **changes)
    made, layers = integer_program(program, (x,), bits)
    found, real = made.run(x)[0], program.run(x)[0]
    for i in range(3):
        assert np.array_equal(found[i].numpy(), by_hand(made, x[i]))
    assert (found != real).float().mean() < (0.06 if bits == 8 else 0.35)
    assert [layer.neuron for layer in layers] == ["spike1", "spike2"] and not any(layer.coarse for layer in layers if bits == 8)


def test_no_input_can_bring_a_current_out_of_int16() -> None:
    """A wide layer of equal weights: the unit grows until the worst spikes fit."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fold, self.fc = FrozenOp("fold_steps", 1, {}), nn.Linear(600, 3)
            self.spike, self.out = neuron("if", 2, v_threshold=100.0), FrozenOp("unfold_steps", 1, {}, steps=2)
            with torch.no_grad():
                self.fc.weight.fill_(0.5)
                self.fc.weight[1].neg_()
                self.fc.bias.fill_(3.0)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.out(self.spike(self.fc(self.fold(x))))
            return y

    x = (torch.rand(2, 2, 600) < 0.5).float()
    program, (layer,) = integer_program(freeze_module(Wide(), (x,)), (x,))
    assert -32768 <= layer.bounds[0] < -20000 and 20000 < layer.bounds[1] <= 32767
    weight, bias = (program.layer("fc").args[k].int() for k in ("weight", "bias"))
    assert weight.abs().max() < 127  # fewer than its bits
    worst = bias + weight.sum(1)
    assert layer.bounds[1] >= int(worst.max()) and layer.bounds[0] <= int(worst.min())
    assert torch.equal(program.trace(torch.ones(1, 2, 600))["fc"][0].int(), worst)
    # inputs that were never seen are clamped before they count
    assert torch.equal(program.trace(torch.full((1, 2, 600), 9.0))["fc"][0].int(), worst)


@pytest.mark.parametrize("kind", ["if", "lif"])
def test_images_convolutions_and_pools(kind: str, tmp_path: Any) -> None:
    program, x = conv_program(kind, v_threshold=0.4 if kind == "if" else 0.15, v_init=0.1)
    made, layers = integer_program(program, (x,))
    assert [x.op for x in made.layers] == [
        "quantize", "qconv2d", "repeat_steps", "qlif_sequence", "spike_sum_pool2d", "spiking_conv2d", "qlif_sequence", "qreshape",
        "spiking_linear", "qaccumulate", "dequantize",
    ]  # fmt: skip
    assert made.layer("conv1").shape[0] == 1 and made.layer("spike1").shape[0] == STEPS  # a constant input counts once
    real, whole = program.trace(x[:1]), made.trace(x[:1])
    for name in ("spike1", "spike2"):
        assert 0.02 < real[name].mean() < 0.9
        assert (real[name] != whole[name]).float().mean() < 0.05
    y, z = program.run(x)[0], made.run(x)[0]
    assert (y - z).abs().max() < 0.1 * y.abs().max()
    assert not made.unquantized and not [f for f in made.float_layers if f.macs]
    assert layers[-1].threshold is None
    save(made, tmp_path / "frozen.pt2")
    assert torch.equal(load(tmp_path / "frozen.pt2").run(x)[0], z)


@pytest.mark.parametrize("bits", [8, 4])
def test_residual_sums(bits: int) -> None:
    program, x = residual_program()
    made, layers = integer_program(program, (x,), bits)
    real, whole = program.trace(x[:1]), made.trace(x[:1])
    for name in ("spike0", "spike1", "spike2", "spike3"):
        assert 0.02 < real[name].mean() < 0.9
        assert (real[name] != whole[name]).float().mean() < (0.05 if bits == 8 else 0.25), name
    # the readout's sum, of the real weights and the integer program's own spikes
    net, flat = Residual(), [whole[name].flatten(1).float() for name in ("spike3", "spike2")]
    expected = (net.head(flat[0]) + net.second(flat[1])).mean(0).detach()
    assert torch.allclose(made.run(x[:1])[0][0], expected, atol=(0.01 if bits == 8 else 0.2) * float(expected.abs().max()))
    assert {x.op for x in made.layers} > {"add_currents", "add_spikes"} and not made.unquantized
    # the sums, added up again; branches have one unit
    two = whole["conv2"].int() + whole["short2"].int()
    add = next(x for x in made.layers if x.op == "add_currents")
    assert torch.equal(whole[add.name].int(), two) and two.abs().max() > 0
    assert torch.equal(made.layer("conv2").args["weight_scale"], made.layer("short2").args["weight_scale"])
    skip = next(x for x in made.layers if x.op == "add_spikes")
    amplitude = skip.args["amplitude"].int()
    direct = whole["conv1"].int() + amplitude.reshape(6, 1, 1) * whole["spike0"].int()
    assert torch.equal(whole[skip.name].int(), direct)
    unit = made.layer("conv1").args["weight_scale"]
    assert torch.allclose(amplitude * unit, torch.linspace(0.3, 0.9, 6), atol=float(unit.max()) / 2)
    assert next(x for x in layers if x.layer == "conv2").bounds == next(x for x in layers if x.layer == "short2").bounds


def test_no_input_can_bring_a_sum_out_of_int16() -> None:
    """Wide branches of large weights: in any order of summation, whatever the spikes."""
    torch.manual_seed(0)
    a, b = torch.randn(3, 500, dtype=torch.float64) + 1, torch.randn(3, 300, dtype=torch.float64) - 0.5
    bias, skip = torch.tensor([5.0, -40.0, 0.0]).double(), torch.tensor([9.0, 300.0, -20.0]).double()
    made = joint([a, b], bias, [skip], 8, (0, 3), torch.ones(3).double())
    worst: list[int] = []
    for o in range(3):
        terms = [*made.weights[0][o].tolist(), *made.weights[1][o].tolist(), int(made.amplitudes[0][o])]
        offset = int(made.biases[0][o])
        assert int(made.biases[1][o]) == 0
        for sign in (1, -1):
            chosen = [3 * t for t in terms if t * sign > 0]
            for order in (chosen, sorted(chosen)):
                total = 0
                for t in [*order, offset]:
                    total += t
                    assert -32768 <= total <= 32767
            worst.append(total)
    assert 30000 < max(max(worst), -min(worst)) <= max(made.bounds[1], -made.bounds[0])
    assert torch.allclose(made.amplitudes[0] * made.unit, skip, atol=float(made.unit.max()) / 2)


def test_sums_without_an_integer_form_are_refused() -> None:
    class Analogue(Conv):
        def forward(self, x: Tensor) -> Tensor:
            z = self.encode(x)
            return self.mean(self.spike1(self.conv1(z) + self.head(z)).flatten(1))

    net = Analogue("if")
    net.head = nn.Conv2d(1, 4, 1)
    x = torch.rand(2, 1, 8, 8)
    with pytest.raises(ModelError, match=r"layer spike1: it sums the current of \w+, whose input is no spikes"):
        integer_program(freeze_module(net, (x,)), (x,))

    class Spikes(Conv):
        def forward(self, x: Tensor) -> Tensor:
            s = self.spike1(self.conv1(self.encode(x)))
            return self.mean(self.spike2(s + self.pool(s)).flatten(1))

    net = Spikes("if")
    net.pool = nn.AvgPool2d(1)
    with pytest.raises(ModelError, match="at least one must be a layer with weights"):
        integer_program(freeze_module(net, (x,)), (x,))


@pytest.mark.parametrize("recurrent", [False, True])
def test_currents_that_fade_and_come_back_never_leave_16_bits(recurrent: bool) -> None:
    """With every input on, or those of one sign alone; and the spikes are those of the float program."""
    make = recurrent_program if recurrent else dense_program
    program, x = make("cuba_lif", v_threshold=0.15, tau_syn=6.0, tau_mem=8.0)
    integers, rows = integer_program(program, (x,))
    first = integers.layer("fc1").args
    worst = torch.cat([x, torch.ones_like(x[:1]), *((first["weight"][o] > 0).float().expand_as(x[:1]) for o in range(12))])
    same = integers.run(worst)[0] == program.run(worst)[0]
    assert float(same.float().mean()) > 0.95 and 0.05 < float(integers.run(worst)[0].mean()) < 0.95
    wide = lambda layer, key: integers.layer(layer).args[key].double()  # noqa: E731
    fade = wide("spike1", "decay_syn") if recurrent else wide("spike1_current", "decay")
    trace = integers.trace(worst)
    given, s = (trace[n].double().view(STEPS, len(worst), -1) for n in ("fc1", "spike1"))
    j = torch.zeros_like(given[0])
    for t in range(STEPS):
        back = s[t - 1] @ wide("spike1", "weight").T + wide("spike1", "bias") if recurrent and t else 0
        j = j * fade / 32768 + given[t] + back
        assert float(j.min()) >= -32768 and float(j.max()) <= 32767
    assert max(abs(b) for row in rows[:1] for b in row.bounds) / (1 - float(fade.max()) / 32768) <= 32768


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"spike1": neuron("cuba_lif", v_leak=0.5)}, "layer spike1: its leak potential is not 0"),
        ({"spike1": neuron("lif", reset="value", v_reset=0.5)}, "layer spike1: it resets to a value"),
        ({"spike1": neuron("lif", tau=torch.rand(4, 8, 8) + 1)}, "differs within a channel"),
        ({"spike1": neuron("lif", tau=0.5)}, "time constant is shorter than a step"),
        ({"spike1": nn.Identity(), "pool": nn.Identity(), "conv2": nn.Conv2d(4, 6, 7)}, "its current goes to conv2"),
        ({"pool": nn.AvgPool2d(8, 8, 0), "conv2": nn.Conv2d(4, 24, 1), "spike1": neuron("if", max_spikes=9)}, "do not fit int8"),
    ],
)
def test_what_has_no_integer_form_is_refused_by_layer(change: dict[str, nn.Module], sentence: str) -> None:
    net, x = Conv("if"), torch.rand(2, 1, 8, 8)
    for name, part in change.items():
        net.set_submodule(name, part)
    with pytest.raises(ModelError, match=sentence):
        integer_program(freeze_module(net, (x,)), (x,))
