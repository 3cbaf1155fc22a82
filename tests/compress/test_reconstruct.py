"""Reconstruction: regions, learned layers and scales against plain formulas, the held-out guard, spilling and resuming."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from float_models import SHAPES, Encoder, Functional, Modules, PreActivation, build, related
from pydantic import ValidationError
from torch import nn

from edgekit.compress.capture import Graph, capture
from edgekit.compress.ptq import PTQ
from edgekit.compress.ptq.freeze import freeze
from edgekit.compress.ptq.observers import ActQ, narrowed
from edgekit.compress.ptq.plan import Plan, WeightQ
from edgekit.compress.ptq.quantize import quantize
from edgekit.compress.ptq.regions import extract, find_regions, run_region
from edgekit.compress.ptq.sample_store import Store
from edgekit.compress.ptq.settings import Reconstruct
from edgekit.compress.ptq.simulate import FakeQuantize, simulate
from edgekit.compress.ptq.soft import Chances, LearnedActivation, SoftLayer, rounding_loss
from edgekit.compress.ptq.units import Unit, find_units, weight_of
from edgekit.compress.steps import apply
from edgekit.data import Data
from edgekit.errors import DataError, InputError, ModelError
from edgekit.recipe import Block

FOUR = {"weights": "int4", "keep_first_last_8bit": False, "observer": "minmax"}


@cache
def ready(kind: type[nn.Module], n: int = 32) -> tuple[Graph, torch.Tensor]:
    model, x = build(kind, n)
    return capture(model, (x[:1],)), x


def plan_of(kind: type[nn.Module], how: dict[str, object], folder: Path | None = None, **settings: object) -> Plan:
    graph, x = ready(kind)
    return quantize(graph, PTQ(reconstruct=Reconstruct(**how), **{**FOUR, **settings}), Data(x), folder=folder)[1]


@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize("kind", SHAPES)
def test_regions_in_order_compute_the_whole(kind: type[nn.Module], blocks: bool) -> None:
    graph, x = ready(kind)
    values = dict(zip((n.name for n in graph.module.graph.nodes if n.op == "placeholder"), (x,), strict=True))
    with torch.no_grad():
        for region in find_regions(graph, find_units(graph)[0], blocks):
            found = run_region(extract(graph, region).module, [values[n] for n in region.inputs])
            values |= dict(zip(region.outputs, found, strict=True))
        assert torch.equal(values[region.outputs[-1]], graph.module(x))


def layers_by_region(kind: type[nn.Module], blocks: bool) -> list[tuple[str, ...]]:
    graph, _ = ready(kind)
    return [r.layers for r in find_regions(graph, find_units(graph)[0], blocks)]


def test_blocks_are_residual_branches_and_depthwise_pairs() -> None:
    assert layers_by_region(Modules, True) == [("features.0",), ("features.3", "features.6"), ("head.3",)]
    assert layers_by_region(Functional, True) == [("a",), ("b",), ("fc",)]
    assert layers_by_region(PreActivation, True) == [("bn", "conv"), ("fc",)]
    blocks = layers_by_region(Encoder, True)
    assert [len(b) for b in blocks] == [1, 2, 2, 1], "embedding, attention, feed-forward, head"
    layers = layers_by_region(Encoder, False)
    assert sorted(n for r in layers for n in r) == sorted(n for r in blocks for n in r)
    assert [len(r) for r in layers if r] == [1, 2, 1, 1, 1], "attention works on sequences first: its values have no sample axis"


def test_a_soft_layer_starts_at_the_float_weight_and_ends_at_a_neighbour() -> None:
    weight = torch.randn(4, 3, 3, 3)
    scale = weight.abs().amax((1, 2, 3)) / 7
    unit = Unit("qconv2d", "x", (), (), "none", {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1})
    soft = SoftLayer(unit, weight, WeightQ(torch.zeros(4, 3, 3, 3, dtype=torch.int8), scale, 4, torch.zeros(4)))
    x = torch.randn(2, 3, 6, 6)
    torch.testing.assert_close(soft(x), nn.functional.conv2d(x, weight, padding=1), rtol=1e-4, atol=1e-4)
    down = soft.integers() - torch.floor(weight / scale.view(-1, 1, 1, 1))
    assert set(down.unique().tolist()) <= {-1.0, 0.0, 1.0} and int(soft.integers().abs().max()) <= 7
    assert rounding_loss([soft], 2.0).item() > 0.1
    soft.gate.data = torch.where(soft.gate > 0, 50.0, -50.0)
    assert rounding_loss([soft], 2.0).item() == 0


@pytest.mark.parametrize(
    ("activation", "q"), [("none", ActQ(0.1, 3)), ("relu", narrowed(0.0, 1.5, 4, 0.0)), ("relu6", ActQ(0.05, -128))]
)
@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_a_learned_activation_is_the_quantizer_and_its_gradient_the_straight_through_one(
    activation: str, q: ActQ, drop: float
) -> None:
    x = (torch.randn(3, 4, 5, 6) * 4).contiguous(memory_format=torch.channels_last).requires_grad_()
    log_scale = nn.Parameter(torch.tensor(q.scale).log())
    made = LearnedActivation("x", q, activation, log_scale)
    fixed = FakeQuantize(q, activation)
    torch.testing.assert_close(made(x), fixed(x.detach()), rtol=0, atol=1e-5)
    if drop:
        made.chances = Chances(drop, torch.Generator().manual_seed(0))
    weight = torch.randn(3, 4, 5, 6)
    (made(x) * weight).sum().backward()
    other, log_other = x.detach().clone().requires_grad_(), nn.Parameter(log_scale.detach().clone())
    real = other / log_other.exp()
    limited = real.clamp(fixed.low - q.zero_point, fixed.high - q.zero_point)
    plain = (limited + (limited.round() - limited).detach()) * log_other.exp()
    act = {"none": lambda v: v, "relu": nn.functional.relu, "relu6": nn.functional.relu6}[activation]
    mask = Chances(drop, torch.Generator().manual_seed(0)).mask(x.shape) if drop else torch.zeros(x.shape)
    ((mask * act(other) + (1 - mask) * plain) * weight).sum().backward()
    torch.testing.assert_close(x.grad, other.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(log_scale.grad, log_other.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["adaround", "brecq"])
@pytest.mark.parametrize("kind", SHAPES)
def test_every_kind_of_graph_can_be_reconstructed(method: str, kind: type[nn.Module]) -> None:
    graph, x = ready(kind)
    graph, plan = quantize(
        graph, PTQ(method=method, activations="int4", reconstruct=Reconstruct(steps=3), **FOUR), Data(x)
    )  # fmt: skip
    program = freeze(graph, plan)
    step = plan.activations[plan.units[-1].output.name].scale
    with torch.no_grad():
        difference = (simulate(graph, plan)(x[:4]) - program.run(x[:4])[0]).abs().max()
    assert float(difference) <= 1.01 * step
    assert all(int(w.integers.abs().max()) <= 7 for w in plan.weights.values())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["adaround", "brecq"])
def test_a_residual_block_comes_closer_to_float_than_with_nearest_rounding(method: str) -> None:
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x + self.b(torch.relu(self.a(x))))

    model = nn.Sequential(Block(), Block()).eval()
    x, fresh = related((4, 8, 8), 256), related((4, 8, 8))
    errors = {}
    with torch.no_grad():
        for name, how in (("nearest", Reconstruct()), (method, Reconstruct(steps=150))):
            settings = PTQ(method=name, samples=256, reconstruct=how, **FOUR)
            graph, plan = quantize(capture(model, (x[:1],)), settings, Data(x))
            errors[name] = float((simulate(graph, plan)(fresh) - model(fresh)).square().mean())
    assert errors[method] < 0.7 * errors["nearest"]


def test_few_bits_are_levels_of_int8() -> None:
    graph, x = ready(Functional)
    graph, plan = quantize(graph, PTQ(activations="int4", **FOUR), Data(x))
    program = freeze(graph, plan)
    values = program.layer("a").args
    assert (values["out_zp"], values["activation"]) == (112, "relu")
    found = torch.ops.edgekit.quantize(x[:1], plan.activations["x"].scale, plan.activations["x"].zero_point, 8)
    assert int(found.min()) < 0, "the model's input keeps 8 bits"
    assert any("8-bit inputs" in w for w in plan.warnings), "the gate before the last layer is no ReLU"
    assert PTQ(activations="int4", keep_first_last_8bit=True).activations == "int4"
    assert narrowed(-5.0, 3.0, 2, least=0.0) == ActQ(1.0, 124, 8, few=2)


@pytest.mark.parametrize("method", ["nearest", "brecq"])
def test_few_bits_of_what_enters_from_float_and_of_gelu(method: str) -> None:
    """An encoder's linear layers read 16 levels; the frozen program keeps them by a clamp in front of the quantizer."""
    graph, x = ready(Encoder)
    how = Reconstruct(steps=10, drop=0.5) if method == "brecq" else Reconstruct()
    graph, plan = quantize(graph, PTQ(activations="int4", method=method, reconstruct=how, **FOUR), Data(3 * x))
    few = {n: q for n, q in plan.activations.items() if q.few}
    inner = [u for u in plan.units if u.weight is not None][1:-1]
    assert {u.inputs[0].name for u in inner} <= set(few)
    assert any("1 layers keep 8-bit inputs" in w and "(embed)" in w for w in plan.warnings), "the model's own input"
    assert all(112 <= q.zero_point <= 127 for q in few.values()) and any(q.zero_point > 113 for q in few.values())
    program = freeze(graph, plan)
    seen = program.forced_outputs({}, 9 * x[:1])[0]
    entered = [layer for layer in program.layers if layer.op in ("quantize", "qlut")]
    levels = {layer.name: seen[layer.name] for layer in entered if (layer.out_zero_point or 0) >= 112}
    assert len(levels) == len(few) and any("gelu" in name for name in levels)
    for name, values in levels.items():
        assert int(values.min()) >= 112, name
    with torch.no_grad():
        wanted = simulate(graph, plan)(x)
    step = plan.activations[plan.units[-1].output.name].scale
    found = torch.cat([program.run(one)[0] for one in x.split(1)])
    assert float((found - wanted).abs().max()) <= 2.01 * step


def test_the_same_seed_gives_the_same_integers_resumed_spilled_or_not(tmp_path: Path) -> None:
    how = {"steps": 10}
    first = plan_of(Modules, how, method="brecq", activations="int4")
    folder = tmp_path / "regions"
    plan_of(Modules, how, folder, method="brecq", activations="int4")
    files = sorted(folder.iterdir())
    assert len(files) == 3
    files[1].write_bytes(files[1].read_bytes()[:-9])  # damaged: learned again
    files[2].unlink()
    seen: list[int] = []
    graph, x = ready(Modules)
    settings = PTQ(method="brecq", activations="int4", reconstruct=Reconstruct(**how), **FOUR)
    resumed = quantize(graph, settings, Data(x), None, lambda what, done, total: seen.append(done), folder)[1]
    for name, w in first.weights.items():
        assert torch.equal(w.integers, resumed.weights[name].integers)
        assert torch.equal(w.bias, resumed.weights[name].bias)
    assert dict(first.activations) == dict(resumed.activations)


def test_samples_beyond_the_budget_are_on_disk_and_equal() -> None:
    values = torch.randn(50, 3, 4, 5)
    with Store(2000) as store:
        on_disk = store.new("a", values.shape)
        in_memory = store.new("b", (10, 2))
        ints = store.new("c", (6, 2), torch.int64)
        assert on_disk.on_disk and not in_memory.on_disk and store.used == 10 * 2 * 4 + 6 * 2 * 8
        on_disk.write(0, values[:30])
        on_disk.write(30, values[30:])
        ints.write(0, torch.arange(12).view(6, 2))
        index = torch.tensor([3, 49, 3])
        assert torch.equal(on_disk.rows(index), values[index])
        assert torch.equal(on_disk.rows(slice(28, 33)), values[28:33])
        assert torch.equal(ints.rows(slice(1, 2)), torch.tensor([[2, 3]]))
        store.drop("b")
        assert store.used == 6 * 2 * 8 and "b" not in store


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def test_memory_stays_within_the_budget_whatever_the_samples() -> None:
    before = resident()
    with Store(1 << 20) as store:
        large = store.new("a", (3000, 8, 32, 32))  # 98 MB
        for start in range(0, 3000, 50):
            large.write(start, torch.ones(50, 8, 32, 32))
        for start in range(0, 3000, 50):
            large.rows(torch.arange(start, start + 50))
        assert large.on_disk and large.bytes > 90e6
        assert resident() - before < 60e6


def test_what_does_not_hold_on_held_out_samples_is_not_kept() -> None:
    nearest = plan_of(Modules, {})
    plan = plan_of(Modules, {"steps": 30, "learning_rate": 50.0, "learn_scales": False}, method="brecq")
    assert all("not learned" in text for text in plan.changes.values()) or any("held-out" in w for w in plan.warnings)
    for name, w in plan.weights.items():
        assert torch.equal(w.integers, nearest.weights[name].integers), "all gates flew off: the earlier state is kept"


def test_one_sample_is_too_few() -> None:
    graph, x = ready(Modules)
    with pytest.raises(DataError, match="at least 2"):
        quantize(graph, PTQ(method="adaround", samples=1), Data(x))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "kind"),
    [(t, PreActivation) for t in ("onnx", "tflite", "executorch")] + [(t, Encoder) for t in ("tflite", "executorch")],
)
def test_few_bits_are_exact_in_every_file(target: str, kind: type[nn.Module], tmp_path: Path) -> None:
    from edgekit import targets

    graph, x = ready(kind)
    graph, plan = quantize(graph, PTQ(activations="int4", **FOUR), Data(x))
    assert any(q.few == 4 for q in plan.activations.values())
    program = freeze(graph, plan)
    module = targets.get(target)
    module.lower(program, tmp_path / f"model{module.SUFFIX}")
    (found,) = module.run(tmp_path / f"model{module.SUFFIX}", [x.numpy()])
    step = plan.activations[plan.units[-1].output.name].scale
    assert float((torch.from_numpy(found) - program.run(x)[0]).abs().max()) <= 1.01 * step


@pytest.mark.parametrize("method", ["nearest", "brecq"])
def test_asymmetric_weights_in_simulation_and_refused_when_frozen(method: str, tmp_path: Path) -> None:
    graph, x = ready(Modules)
    how = {"method": method, "asymmetric_weights": True, **FOUR} | (
        {"reconstruct": Reconstruct(steps=5)} if method == "brecq" else {}
    )
    plan = quantize(graph, PTQ(**how), Data(x), folder=tmp_path)[1]
    again = quantize(graph, PTQ(**how), Data(x), folder=tmp_path)[1]
    for unit in plan.units:
        if unit.weight is None:
            continue
        w, real = plan.weights[unit.name], weight_of(graph, unit)[0]
        assert w.zero is not None and w.zero.any() and int(w.integers.min()) >= -8 and int(w.integers.max()) <= 7
        shaped = w.scale.view(-1, *[1] * (real.dim() - 1))
        assert float(((w.real.float() - real) / shaped).abs().max()) <= (0.51 if method == "nearest" else 1.01)
        assert torch.equal(w.integers, again.weights[unit.name].integers) and torch.equal(w.zero, again.weights[unit.name].zero)
    layers = [m for m in simulate(graph, plan).modules() if hasattr(m, "unit_name")]
    assert layers and all(torch.equal(m.weight, plan.weights[m.unit_name].real.float()) for m in layers)
    with pytest.raises(ModelError, match="asymmetric_weights"):
        freeze(graph, plan)
    with pytest.raises(InputError, match="asymmetric_weights"):  # before anything is learned: no model is looked at
        apply(nn.Identity(), [Block("ptq", PTQ(**how))], Data(x))
    with pytest.raises(ValidationError, match="goes with nearest"):
        PTQ(asymmetric_weights=True, method="gptq")


@pytest.mark.parametrize("method", ["nearest", "gptq", "gpfq", "learned_round"])
def test_settings_of_reconstruction_without_it_are_refused(method: str) -> None:
    with pytest.raises(
        ValueError, match=f"reconstruct is of method adaround and brecq; with method {method} it would do nothing"
    ):
        PTQ(method=method, reconstruct=Reconstruct(steps=3))
