"""Calibration, plan and freeze on models in several styles; the frozen program against the eager model."""

from __future__ import annotations

import tracemalloc
from collections import OrderedDict

import pytest
import torch
from float_models import SHAPES, Encoder, Functional, Modules, PreActivation, Waves, build
from torch import nn

from edgekit.compress.capture import capture
from edgekit.compress.ptq import PTQ, quantize_model
from edgekit.compress.ptq.freeze import bias_integers
from edgekit.compress.ptq.plan import weight_scale
from edgekit.compress.ptq.units import find_units
from edgekit.data import Data
from edgekit.errors import DataError, InputError, ModelError
from edgekit.frozen import FrozenProgram

CNNS = [Modules, Functional, Waves, PreActivation]


def frozen(kind: type[nn.Module], **settings: object) -> tuple[FrozenProgram, nn.Module, torch.Tensor]:
    model, x = build(kind)
    return quantize_model(model, Data(x), PTQ(**settings), name=kind.__name__.lower()), model, x


@pytest.mark.parametrize("kind", SHAPES)
def test_the_frozen_program_follows_the_float_model(kind: type[nn.Module]) -> None:
    program, model, x = frozen(kind, observer="minmax")
    with torch.no_grad():
        real = model(x)
    result = program.run(x)[0]
    noise = (result - real).square().mean() / real.square().mean()
    assert float(noise) < 0.01, "less than 20 dB"
    assert float((result.argmax(1) == real.argmax(1)).float().mean()) > 0.9


@pytest.mark.parametrize("kind", CNNS)
def test_a_cnn_is_integer_from_end_to_end(kind: type[nn.Module]) -> None:
    program, _, _ = frozen(kind)
    assert program.unquantized == ()
    kinds = [layer.op for layer in program.layers]
    assert kinds.count("quantize") == 1 and kinds.count("dequantize") == 1


def test_functional_and_module_relu_are_both_fused() -> None:
    for kind, layers in (
        (Modules, {"features.0": "relu6", "features.3": "relu", "features.6": "relu"}),
        (Functional, {"a": "relu", "add": "relu"}),
    ):
        program, _, _ = frozen(kind)
        assert {n: program.layer(n).args["activation"] for n in layers} == layers


def test_a_transformer_keeps_its_norms_in_float_and_says_so() -> None:
    program, _, _ = frozen(Encoder)
    linears = [n.name for n in program.layers if n.op == "qlinear"]
    assert len(linears) == 6
    reasons = {u.op: u.reason for u in program.unquantized}
    assert {"layer_norm", "scaled_dot_product_attention", "add"} <= set(reasons)
    assert [n.args["function"] for n in program.layers if n.op == "qlut"] == ["gelu"], "between two integer linears"
    assert all(reasons.values())


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x) + self.last(x[:, :1]))  # type: ignore[no-any-return]


def test_a_reason_has_no_symbols_of_torch() -> None:
    found = {u.layer: u.reason for u in find_units(capture(Positions(), (torch.randn(2, 5, 4),)))[1]}
    assert found["add"].startswith("its operands have shapes (N, 5, 4) and (N, 1, 4)")


def test_bits_by_scope_first_and_last() -> None:
    program, _, _ = frozen(Modules, weights="int4", scopes={r"features\.6": "int2"})
    bits = {n.name: n.weight_bits for n in program.layers if n.weight_bits}
    assert bits == {"features.0": 8, "features.3": 4, "features.6": 2, "head.3": 8}
    assert int(program.layer("features.3").args["weight"].abs().max()) <= 7
    assert int(program.layer("features.6").args["weight"].abs().max()) <= 1


def test_16_bit_activations_are_closer_to_float() -> None:
    model, x = build(PreActivation)
    with torch.no_grad():
        real = model(x)
    errors = {}
    for kind in ("int8", "int16"):
        program = quantize_model(model, Data(x), PTQ(activations=kind, observer="minmax"))
        errors[kind] = float((program.run(x)[0] - real).square().mean())
    assert program.layer("conv").args["out_bits"] == 16
    assert errors["int16"] < 0.5 * errors["int8"], "what is left comes from the 8-bit weights"


def test_skipped_layers_are_listed() -> None:
    program, _, x = frozen(Modules, skip=("head.3",))
    assert [(u.layer, u.op) for u in program.unquantized] == [("head.3", "linear")]
    assert "skip" in program.unquantized[0].reason
    assert program.run(x[:2])[0].shape == (2, 5)


def test_weight_scale_mse_beats_max() -> None:
    weight = torch.randn(8, 1024, generator=torch.Generator().manual_seed(0))
    weight[:, 0] = 6
    errors = {}
    for method in ("max", "mse"):
        scale = weight_scale(weight, 4, PTQ(weight_scale=method)).unsqueeze(1)
        errors[method] = float((torch.round(weight / scale).clamp(-7, 7) * scale - weight).square().sum())
    assert errors["mse"] < 0.8 * errors["max"]


def test_concat_inputs_share_one_scale() -> None:
    program, _, _ = frozen(Functional)
    concat = next(n for n in program.layers if n.op == "qconcat")
    assert set(concat.args["scales"]) == {concat.args["out_scale"]}


def test_the_same_seed_gives_the_same_program() -> None:
    from edgekit.frozen.archive import to_bytes

    assert to_bytes(frozen(Functional)[0]) == to_bytes(frozen(Functional)[0])


@pytest.mark.slow
def test_memory_does_not_grow_with_samples() -> None:
    """Traced Python and numpy memory; tensors are streamed, so only one batch is alive."""
    model, _ = build(Modules)
    seen: list[int] = []

    def stream(n: int) -> object:
        def batches() -> object:
            generator = torch.Generator().manual_seed(0)
            for _ in range(n):
                seen.append(1)
                yield torch.randn(4, 3, 16, 16, generator=generator)

        return batches

    peaks = []
    for n in (4, 40):
        tracemalloc.start()
        quantize_model(model, Data(stream(n)), PTQ(samples=4 * n, batch_size=4, observer="mse"))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert len(seen) >= 2 * 44
    assert peaks[1] < 1.3 * peaks[0]


def test_bad_data_names_the_layer_or_the_shape() -> None:
    model, x = build(Modules)
    model.features[3].weight.data *= 1e38
    with pytest.raises(DataError, match=r"NaN or Inf in the output of layer features"):
        quantize_model(model, Data(x * 1e30), PTQ())
    model, x = build(Modules)
    with pytest.raises(DataError, match="empty"):
        quantize_model(model, Data(x[:0]), PTQ())


def test_a_constant_layer_is_warned_about() -> None:
    from edgekit.compress.ptq.quantize import quantize

    model, x = build(Modules)
    model.features[6].weight.data.zero_()
    model.features[7].bias.data.fill_(-1.0)
    model.features[7].running_mean.zero_()
    graph = capture(model, (x[:1],))
    _, plan = quantize(graph, PTQ(), Data(x))
    assert any("features.8" in w or "features.6" in w for w in plan.warnings), plan.warnings


def test_bias_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ModelError, match="layer head: a bias of 1e"):
        bias_integers(torch.tensor([1e9]), 1e-3, torch.tensor([1e-3]), "head")


def test_units_say_why_a_layer_stays_float() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cumsum(self.conv(x), 1) * 2.0

    graph = capture(Odd(), (torch.randn(1, 3, 8, 8),))
    _, left = find_units(graph)
    assert {(u.op, u.reason) for u in left} == {("cumsum", "cumsum has no integer form"), ("mul", "one operand is a constant")}


def test_patterns_that_fit_no_layer_are_refused() -> None:
    model, x = build(Modules)
    for settings in ({"scopes": {r"features\.60": "int4"}}, {"skip": ("heads.3",)}):
        with pytest.raises(InputError, match=r"fits no layer .*; layers are called .*(features\.6|head\.3)"):
            quantize_model(model, Data(x), PTQ(**settings))


def test_a_scope_that_fits_only_layers_without_weights_is_refused() -> None:
    model = nn.Sequential(OrderedDict(fc=nn.Linear(8, 8), sigmoid=nn.Sigmoid(), head=nn.Linear(8, 4))).eval()
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match=r"^scopes: 'sigmoid' fits no layer with weights; layers are called fc, head, \.\.\.$"):
        quantize_model(model, Data(x), PTQ(scopes={"sigmoid": "int4"}))
    program = quantize_model(model, Data(x), PTQ(scopes={"sigmoid|fc": "int4"}, keep_first_last_8bit=False))
    assert [layer.weight_bits for layer in program.layers if layer.weight_bits] == [4, 8]


def test_a_mean_over_time_is_integer_and_a_1d_layer_keeps_its_relu() -> None:
    class Sensor(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.fc = nn.Conv1d(3, 8, 3), nn.Conv1d(8, 8, 3), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(torch.relu(self.b(torch.relu(self.a(x)))).mean(-1))

    torch.manual_seed(0)
    model, x = Sensor().eval(), torch.randn(32, 3, 32)
    program = quantize_model(model, Data(x))
    assert program.unquantized == ()
    kinds = ["quantize", "qreshape", "qconv2d", "qconv2d", "qmean", "qreshape", "qlinear", "dequantize"]
    assert [n.op for n in program.layers] == kinds
    assert program.layer("a").args["activation"] == program.layer("b").args["activation"] == "relu"


def test_an_lstm_is_listed_as_float() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm, self.fc = nn.LSTM(3, 8, batch_first=True), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.lstm(x)[0][:, -1])

    program = quantize_model(Recurrent().eval(), Data(torch.randn(8, 6, 3)))
    assert [u.op for u in program.unquantized] == ["lstm"]
