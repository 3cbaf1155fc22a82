"""Frozen programs: runs, traces, forced runs that localize a fault, and what each layer costs, against values counted by hand."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from nets import ResidualNet, images, linear, residual_net
from torch import Tensor, nn

from edgekit.errors import ModelError
from edgekit.frozen import FrozenOp, FrozenProgram, freeze_module

NAMES = [
    "quantize", "stem", "pad", "down", "block.dw", "block.pw", "add", "maxpool", "avgpool", "cat", "gate", "mul", "mean",
    "flatten", "head", "dequantize",
]  # fmt: skip


@pytest.fixture(scope="module")
def program() -> FrozenProgram:
    return residual_net(bits=4)


def altered(layer: str, field: str = "weight", delta: int = 50) -> FrozenProgram:
    """The same program with one value of one layer's constant changed."""
    torch.manual_seed(0)
    module = ResidualNet(4)
    constant: Tensor = module.get_submodule(layer).get_buffer(field)
    flat = constant.view(-1)
    flat[1] = flat[1] + delta if constant.dtype != torch.int8 else int(flat[1]) + (delta if flat[1] < 60 else -delta)
    return freeze_module(module, (torch.zeros(1, 3, 16, 16),))


def test_layers_have_the_modules_names_in_order(program: FrozenProgram) -> None:
    assert [layer.name for layer in program.layers] == NAMES
    assert program.layer("block.dw").op == "qconv2d"
    with pytest.raises(ModelError, match=r"no integer layer 'block\.dv'; layers are called block\.dw, "):
        program.layer("block.dv")


def test_an_array_is_refused_with_the_way_to_convert_it(program: FrozenProgram) -> None:
    with pytest.raises(
        ModelError, match=r"input 0: numpy\.ndarray given, a torch\.Tensor expected; convert it with torch\.from_numpy"
    ):
        program.run(np.zeros((1, 3, 16, 16), np.float32))  # type: ignore[arg-type]


def test_layers_know_their_producers(program: FrozenProgram) -> None:
    wanted = {"add": ("down", "block.pw"), "cat": ("maxpool", "avgpool"), "mul": ("cat", "gate"), "head": ("flatten",)}
    for name, inputs in wanted.items():
        assert program.layer(name).inputs == inputs
    assert program.layer("quantize").inputs == ("x",)


def test_costs_counted_by_hand(program: FrozenProgram) -> None:
    """(parameters, MACs, packed bytes): weights at their bits, 4 bytes for each bias and each scale."""
    wanted = {
        "stem": (8 * 3 * 9 + 8, 8 * 16 * 16 * 27, 216 + 8 * 8),
        "down": (16 * 8 * 9 + 16, 16 * 8 * 8 * 72, 1152 // 2 + 16 * 8),
        "block.dw": (16 * 9 + 16, 16 * 8 * 8 * 9, 144 + 16 * 8),
        "block.pw": (16 * 16 + 16, 16 * 8 * 8 * 16, 256 // 2 + 16 * 8),
        "head": (320 + 10, 320, 320 + 80),
        "gate": (0, 0, 256),
        "add": (0, 0, 0),
    }
    for name, (parameters, macs, size) in wanted.items():
        layer = program.layer(name)
        assert (layer.parameters, layer.macs, layer.weight_bytes) == (parameters, macs, size), name


def test_odd_numbers_of_small_weights_round_up_to_bytes() -> None:
    op = linear(5, 1, (0.1, 0), (0.1, 0), bits=2)
    layer = freeze_module(nn.Sequential(op), (torch.zeros(1, 5, dtype=torch.int8),)).layers[0]
    assert layer.weight_bytes == 2 + 4 + 4  # 10 bits, a bias, a scale
    assert (layer.weight_bits, layer.macs) == (2, 5)


def test_output_parameters(program: FrozenProgram) -> None:
    assert (program.layer("quantize").out_scale, program.layer("quantize").out_zero_point) == (0.03, -3)
    assert (program.layer("add").out_scale, program.layer("add").out_zero_point) == (0.11, -128)
    assert (program.layer("maxpool").out_scale, program.layer("maxpool").out_zero_point) == (0.11, -128)
    assert (program.layer("dequantize").out_scale, program.layer("dequantize").out_zero_point) == (None, None)


def test_many_samples_equal_one_by_one(program: FrozenProgram) -> None:
    x = images(6)
    done: list[tuple[int, int]] = []
    (together,) = program.run(x, progress=lambda i, n: done.append((i, n)))
    assert together.shape == (6, 10)
    assert done == [(i + 1, 6) for i in range(6)]
    for i in range(6):
        assert torch.equal(program.run(x[i : i + 1])[0][0], together[i])
    assert together.unique(dim=0).shape[0] == 6  # the net does tell samples apart


def test_run_equals_the_module_it_was_made_from() -> None:
    torch.manual_seed(0)
    module = ResidualNet(4)
    x = images(1)
    assert torch.equal(residual_net(4).run(x)[0], module(x))


def test_trace_ends_in_the_output(program: FrozenProgram) -> None:
    x = images(1)
    trace = program.trace(x)
    assert list(trace) == NAMES
    assert torch.equal(trace["dequantize"], program.run(x)[0])
    assert {v.dtype for k, v in trace.items() if k != "dequantize"} == {torch.int8}
    for layer in program.layers:
        assert trace[layer.name].shape == layer.shape


@pytest.mark.parametrize(
    ("layer", "field"), [("stem", "weight"), ("down", "weight"), ("block.dw", "bias"), ("block.pw", "weight_scale")]
)
def test_forced_localizes_a_fault(program: FrozenProgram, layer: str, field: str) -> None:
    """A target with one altered value: fed the target's own tensors, only that layer differs; free running smears it."""
    x = images(1)
    taps = altered(layer, field, delta=20_000 if field == "bias" else 50).trace(x)
    forced, free = program.forced(taps, x), program.trace(x)
    differs = [name for name in NAMES if not torch.equal(forced[name], taps[name])]
    assert differs == [layer]
    smeared = [name for name in NAMES if not torch.equal(free[name], taps[name])]
    assert layer in smeared and len(smeared) > 1


def test_forced_with_its_own_trace_changes_nothing(program: FrozenProgram) -> None:
    x = images(1)
    trace = program.trace(x)
    forced = program.forced(trace, x)
    assert all(torch.equal(forced[name], trace[name]) for name in NAMES)


def test_forced_runs_on_where_there_is_no_tap(program: FrozenProgram) -> None:
    x = images(1)
    trace = program.trace(x)
    zeros = torch.full_like(trace["mean"], -128)
    forced = program.forced({"mean": zeros}, x)
    assert torch.equal(forced["mean"], trace["mean"])  # what the layer itself computes
    assert torch.equal(forced["flatten"], zeros.view(1, 32))  # what follows from the tap


def test_wrong_inputs_are_named(program: FrozenProgram) -> None:
    for inputs, message in (
        ((), "0 inputs given, it takes 1"),
        ((images(1), images(1)), "2 inputs given, it takes 1"),
        ((torch.zeros(2, 3, 8, 8),), r"input 0: shape \(2, 3, 8, 8\) given, \(N >= 1, 3, 16, 16\) expected"),
        ((torch.zeros(3, 16, 16),), r"shape \(3, 16, 16\) given"),
        ((torch.zeros(0, 3, 16, 16),), r"shape \(0, 3, 16, 16\) given"),
    ):
        with pytest.raises(ModelError, match=message):
            program.run(*inputs)


def test_two_inputs_and_two_outputs() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qa = FrozenOp("quantize", 1, {}, scale=0.1, zero_point=0, bits=8)
            self.qb = FrozenOp("quantize", 1, {}, scale=0.2, zero_point=5, bits=8)
            self.add = FrozenOp(
                "qadd", 2, {}, a_scale=0.1, a_zp=0, b_scale=0.2, b_zp=5, out_scale=0.3, out_zp=1, activation="none", out_bits=8
            )
            self.out = FrozenOp("dequantize", 1, {}, scale=0.3, zero_point=1)

        def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            return self.out(self.add(self.qa(a), self.qb(b))), a.softmax(-1)

    program = freeze_module(Net(), (torch.zeros(1, 4), torch.zeros(1, 4)))
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    total, soft = program.run(a, b)
    torch.testing.assert_close(total, a + b, atol=0.3, rtol=0)
    torch.testing.assert_close(soft, a.softmax(-1))
    assert program.input_shapes == ((1, 4), (1, 4))
    assert program.input_dtypes == (torch.float32, torch.float32)


def test_a_module_used_twice_gives_two_layers() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = linear(4, 4, (0.1, 0), (0.1, 0))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.fc(x))

    program = freeze_module(Net(), (torch.zeros(1, 4, dtype=torch.int8),))
    assert [layer.name for layer in program.layers] == ["fc", "fc_2"]
    assert program.layers[1].inputs == ("fc",)


def test_a_module_that_cannot_be_exported_is_a_model_error() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.sum() > 0 else x

    with pytest.raises(ModelError, match="frozen module of net cannot be exported"):
        freeze_module(Branch(), (torch.ones(1, 2),), name="net")


def test_freezing_does_not_touch_the_module() -> None:
    torch.manual_seed(0)
    module = ResidualNet()
    before = copy.deepcopy(module.state_dict())
    sample = images(4)
    freeze_module(module, (sample,)).run(sample)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert torch.equal(sample, images(4))
