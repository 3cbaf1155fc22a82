"""Linear layers of integer weights and float activations: the operators against loops, rounding, groups, smoothing, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from float_models import Encoder, Modules, build, related
from pydantic import ValidationError
from torch import nn

from edgekit.compress.capture import capture
from edgekit.compress.ptq import PTQ, QAT
from edgekit.compress.ptq.dynamic import gptq, nearest
from edgekit.compress.ptq.smooth import find_norms, smooth
from edgekit.compress.steps import Compressed, apply
from edgekit.data import Data
from edgekit.errors import InputError
from edgekit.frozen import load, save
from edgekit.frozen.ops import OPS
from edgekit.recipe import Block


def compressed(model: nn.Module, x: torch.Tensor, **how: object) -> Compressed:
    return apply(model, [Block("ptq", PTQ(**{"activations": "dynamic", **how}))], Data(calibration=x))


@pytest.mark.parametrize("group", [0, 4])
def test_the_operators_against_integer_loops(group: int) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(3, 8) * 3, torch.randint(-7, 8, (5, 8), dtype=torch.int8)
    x[2] = x[2].abs() + 1  # a row whose range does not contain 0
    scale, b = (torch.rand(5, 8 // group) if group else torch.rand(5)) + 0.1, torch.randn(5)
    dynamic = OPS.dynamic_qlinear.default(x, w, scale, b, group, 4)
    plain = OPS.weight_only_linear.default(x, w, scale, b, group, 4)
    for r in range(3):
        low, high = min(x[r].min().item(), 0.0), max(x[r].max().item(), 0.0)
        step = (torch.tensor(high) - torch.tensor(low)).item() / 255
        zero = round(-128 - low / step) if (-128 + low / step) + (127 + high / step) > 0 else round(127 - high / step)
        q = [max(-128, min(127, round(v.item() / step) + zero)) for v in x[r]]
        for o in range(5):
            scales = [scale[o, i // group].item() if group else scale[o].item() for i in range(8)]
            wanted = sum((q[i] - zero) * int(w[o, i]) * scales[i] for i in range(8)) * step + b[o].item()
            assert dynamic[r, o].item() == pytest.approx(wanted, rel=1e-5, abs=1e-5)
            wanted = sum(x[r, i].item() * int(w[o, i]) * scales[i] for i in range(8)) + b[o].item()
            assert plain[r, o].item() == pytest.approx(wanted, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("name", ["dynamic_qlinear", "weight_only_linear"])
def test_torch_accepts_the_operators(name: str) -> None:
    w = torch.randint(-8, 8, (5, 8), dtype=torch.int8)
    torch.library.opcheck(getattr(OPS, name).default, (torch.randn(2, 3, 8), w, torch.rand(5), torch.randn(5), 0, 8))


@pytest.mark.parametrize("activations", ["dynamic", "float"])
def test_the_frozen_program_computes_what_the_simulation_does_and_is_near_the_model(activations: str, tmp_path: object) -> None:
    model, x = build(Encoder, 16)
    made = compressed(model, x, activations=activations)
    with torch.no_grad():
        real = model(x)
    found = torch.cat([made.program.run(x[i : i + 1])[0] for i in range(4)])
    assert torch.allclose(found, made.simulation(x)[:4], atol=1e-6)
    assert float((made.simulation(x) - real).square().mean() / real.var()) < 1e-3
    kinds = {layer.op for layer in made.program.layers}
    assert kinds == {"dynamic_qlinear" if activations == "dynamic" else "weight_only_linear"}, "nothing else is quantized"
    path = tmp_path / "frozen.pt2"  # type: ignore[operator]
    save(made.program, path)
    assert torch.equal(load(path).run(x[:1])[0], made.program.run(x[:1])[0])


def test_groups_have_less_error_than_channels_and_bfloat16_scales() -> None:
    torch.manual_seed(1)
    w = torch.randn(6, 64) * torch.logspace(-1, 1, 64)
    whole, grouped = nearest(w, 4, 0), nearest(w, 4, 16)
    error = [float((q * s.repeat_interleave(64 // s.shape[-1], -1).view(6, -1) - w).square().sum()) for q, s in
             ((whole[0], whole[1].view(6, 1)), grouped)]  # fmt: skip
    assert error[1] < 0.7 * error[0]
    assert grouped[1].shape == (6, 4) and torch.equal(grouped[1], grouped[1].bfloat16().float())


def test_gptq_lowers_the_output_error_on_related_inputs_and_is_nearest_on_unrelated_ones() -> None:
    torch.manual_seed(2)
    x = related((32,), 512)
    w = torch.randn(8, 32)
    moment = (x.double().T @ x.double()) / len(x)

    def error(found: tuple[torch.Tensor, torch.Tensor]) -> float:
        q, s = found
        wide = s.view(8, -1).repeat_interleave(32 // s.view(8, -1).shape[1], 1)
        return float((x @ (q * wide - w).T).square().mean())

    for group in (0, 8):
        assert error(gptq(w, 4, group, "max", moment)) < 0.6 * error(nearest(w, 4, group))
    diagonal = torch.diag(torch.rand(32, dtype=torch.float64) + 0.5)
    assert torch.equal(gptq(w, 4, 0, "max", diagonal)[0], nearest(w, 4, 0)[0])


def outlying() -> tuple[nn.Module, torch.Tensor]:
    """An encoder whose normalizations give two channels fifty times the size of the others, and weights that undo it."""
    model, x = build(Encoder, 32)
    model = copy.deepcopy(model)
    with torch.no_grad():
        for norm, weight in (
            (model.layer.norm1, model.layer.self_attn.in_proj_weight),
            (model.layer.norm2, model.layer.linear1.weight),
        ):
            norm.weight[:2] *= 50
            weight[:, :2] /= 50
    return model, x


def test_smoothing_keeps_the_function_and_helps_where_channels_stick_out() -> None:
    model, x = outlying()
    graph = capture(model, (x[:1],))
    assert len(find_norms(graph.module)) == 2
    smoothed, names = smooth(graph, 0.5, lambda: [(x,)])
    assert set(names) == {"layer.self_attn.in_proj", "layer.linear1"}
    with torch.no_grad():
        real = model(x)
        assert torch.allclose(smoothed.module(x), real, atol=1e-5)
        assert torch.allclose(graph.module(x), real, atol=1e-6), "the given graph stays"
        errors = []
        for how in ({}, {"smooth": 0.5}):
            made = compressed(model, x, activations="int8", samples=32, **how)
            errors.append(float((made.simulation(x) - real).square().mean()))
    assert errors[1] < 0.3 * errors[0]


def test_what_cannot_be_is_said() -> None:
    model, x = build(Encoder, 4)
    with pytest.raises(InputError, match="does not divide the 8 inputs of embed"):
        compressed(model, x, weights="int4", group_size=32, keep_first_last_8bit=False)
    with pytest.raises(InputError, match="weights of 4 and 2 bits"):
        compressed(model, x, group_size=4)
    with pytest.raises(ValidationError, match="nearest or gptq"):
        PTQ(activations="dynamic", method="brecq")
    with pytest.raises(ValidationError, match="does not go with equalize"):
        PTQ(activations="float", equalize=True)
    with pytest.raises(ValidationError, match="group_size is for"):
        PTQ(group_size=32)
    with pytest.raises(ValidationError, match="ptq's"):
        QAT(activations="dynamic")
    made = compressed(*build(Modules, 4))
    assert [layer.name for layer in made.program.layers] == ["head.3"]
    assert any("linear layers only" in u.reason for u in made.program.unquantized)


def test_every_operator_that_stays_in_float_is_named() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 4)
    ).eval()  # the first GELU feeds a normalization, the second a linear layer
    left = compressed(model, torch.randn(64, 16)).program.unquantized
    assert sorted((u.layer, u.op) for u in left) == [("1", "gelu"), ("2", "layer_norm"), ("4", "gelu")]
