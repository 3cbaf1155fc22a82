"""Low-rank splits against brute force: LAPACK's SVD, unfolded convolutions, measured output errors and hand counts."""

from __future__ import annotations

import copy
from math import prod

import pytest
import torch
from float_models import SHAPES, build
from torch import nn
from torch.nn import functional as F

from edgekit.compress.capture import capture
from edgekit.compress.lowrank import LowRank, factorize
from edgekit.compress.lowrank.layers import Layer, effective_weight, macs_of, params_of, run_parts
from edgekit.compress.lowrank.moments import Moments, side_of
from edgekit.compress.lowrank.split import Split, split_layer
from edgekit.compress.lowrank.step import graph_cost, lowrank
from edgekit.compress.ptq import PTQ
from edgekit.compress.steps import apply
from edgekit.data import Data
from edgekit.errors import InputError
from edgekit.recipe import Block


def layer_of(weight: torch.Tensor, bias: torch.Tensor | None = None, size: tuple[int, int] = (9, 8), **geometry: object) -> Layer:
    return Layer("layer", weight, bias, in_size=size if weight.dim() == 4 else (1, 1), **geometry)


def split(layer: Layer, x: torch.Tensor | None = None, schemes: tuple[str, ...] = ("ced",), **more: object) -> Split:
    moments = None
    if x is not None:
        moments = Moments.empty(layer, side_of(layer, schemes))
        for part in x.split(7):  # streamed
            moments.add(layer, part, dense(layer, part))
    values = {"solver": "svd", "multiple": 1, "iterations": 20, "seed": 0, **more}
    return split_layer(layer, moments, schemes=schemes, **values)


def dense(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    if layer.is_linear:
        return F.linear(x, layer.weight, layer.bias)
    return F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def uneven(n: int, features: int) -> torch.Tensor:
    """Correlated samples with a mean, as activations are."""
    mix = torch.randn(features, features, dtype=torch.float64) * torch.logspace(0, -2, features, dtype=torch.float64)
    return torch.randn(n, features, dtype=torch.float64) @ mix + torch.randn(features, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_a_plain_split_is_the_best_matrix_of_its_rank(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    layer = layer_of(torch.randn(shape, dtype=torch.float64))
    values = torch.linalg.svdvals(layer.weight)
    found = split(layer)
    assert [o.rank for o in found.options] == list(range(1, int(24 * 40 / 64 - 1e-9) + 1))
    for option in found.options:
        first, second = found.build(option)
        tail = values[option.rank :].square().sum()
        assert torch.allclose((layer.weight - second.weight @ first.weight).square().sum(), tail, rtol=1e-9)
        assert option.error == pytest.approx(float(tail / values.square().sum()), rel=1e-9)
        for norms in (first.weight.norm(dim=1), second.weight.norm(dim=0)):  # sqrt(S) on both sides
            assert torch.allclose(norms, values[: option.rank].sqrt(), rtol=1e-6)


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_with_data_no_map_of_the_rank_has_a_smaller_output_error(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    x = uneven(500, shape[1])
    layer = layer_of(torch.randn(shape, dtype=torch.float64), torch.randn(shape[0], dtype=torch.float64))
    y = dense(layer, x)
    values = torch.linalg.svdvals(y - y.mean(0))  # the outputs' own best approximation of the rank (and their mean)
    found, plain = split(layer, x, solver="svd_data"), split(layer)
    for option, other in zip(found.options, plain.options, strict=True):
        error = (y - run_parts(found.build(option), x)).square().sum()
        assert float(error) == pytest.approx(float(values[option.rank :].square().sum()), rel=1e-4)
        assert float(error) <= float((y - run_parts(plain.build(other), x)).square().sum()) * (1 + 1e-9)
        assert option.error == pytest.approx(float(error / values.square().sum()), rel=1e-3)


GEOMETRIES = [
    {"groups": 1, "stride": (2, 1), "padding": (1, 2), "dilation": (1, 1)},
    {"groups": 2, "stride": (1, 1), "padding": (0, 1), "dilation": (2, 1)},
    {"groups": 4, "stride": (1, 2), "padding": (1, 1), "dilation": (1, 1)},
]


@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("scheme", ["ced", "spatial", "tucker"])
@pytest.mark.parametrize("data", [False, True])
def test_convolutions_are_exact_at_full_rank_and_errors_are_the_measured_ones(
    scheme: str, geometry: dict[str, object], data: bool
) -> None:
    torch.manual_seed(2)
    groups = int(geometry["groups"])  # type: ignore[call-overload]
    weight = torch.randn(16, 8 // groups, 3, 2, dtype=torch.float64)
    layer = layer_of(weight, torch.randn(16, dtype=torch.float64), **geometry)
    x = uneven(40, 8 * 9 * 8).view(40, 8, 9, 8)
    y = dense(layer, x)
    rank = {"ced": min(layer.rows, layer.columns), "spatial": min(3 * 8 // groups, 2 * layer.rows), "tucker": layer.rows}[scheme]
    found = split(layer, x if data else None, (scheme,), solver="svd_data" if data else "svd")
    from edgekit.compress.lowrank.split import Option

    full = run_parts(found.build(Option(scheme, rank, 0, 0, 0, 0.0)), x)
    assert torch.allclose(full, y, atol=2e-4 if data else 1e-9)  # the ridge is there with data only
    small = Option(scheme, 2, 0, 0, 0, 0.0)
    parts = found.build(small)
    shapes = tuple(p.shape for p in parts)
    assert params_of(shapes) == sum(p.weight.numel() for p in parts) and [tuple(p.weight.shape) for p in parts] == [
        s.weight for s in shapes
    ]
    whole = effective_weight(layer, parts)
    again = F.conv2d(x, whole, parts[-1].bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    assert torch.allclose(run_parts(parts, x), again)
    if data:
        plain = run_parts(split(layer, None, (scheme,)).build(small), x)
        assert (again - y).square().sum() <= (plain - y).square().sum() * (1 + 1e-6)


def test_costs_are_those_that_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    layer = layer_of(torch.randn(32, 8, 3, 3), None, (11, 7), stride=(2, 1), padding=(1, 1), groups=2)
    found = split(layer, None, ("ced", "spatial", "tucker"))
    for option in found.options:
        parts = found.build(option)
        with FlopCounterMode(display=False) as counter:
            run_parts(parts, torch.randn(1, 16, 11, 7))
        assert option.macs == counter.get_total_flops() // 2
    shapes = tuple(p.shape for p in parts)
    assert option.params == sum(prod(s.weight) for s in shapes) and macs_of(shapes, (11, 7)) == option.macs


def test_semi_nmf_comes_down_to_the_svd_and_keeps_one_factor_positive() -> None:
    torch.manual_seed(3)
    layer = layer_of(torch.randn(20, 30, dtype=torch.float64))
    best = split(layer, None, exact=6)
    errors = []
    for iterations in (1, 10, 200):
        found = split(layer, None, solver="snmf", exact=6, iterations=iterations)
        first, second = found.build(found.options[0])
        assert (second.weight >= 0).all()
        errors.append(float((layer.weight - second.weight @ first.weight).square().sum() / layer.weight.square().sum()))
    assert errors == sorted(errors, reverse=True) and best.options[0].error <= errors[-1] < 2 * best.options[0].error


@pytest.mark.parametrize("kind", list(SHAPES))
@pytest.mark.parametrize("scheme", ["ced", "auto"])
def test_a_captured_model_computes_what_its_split_layers_say(kind: type[nn.Module], scheme: str) -> None:
    model, x = build(kind)
    graph = capture(model, (x[:2],))
    wanted, state = graph.module(x).detach(), copy.deepcopy(graph.module.state_dict())
    settings = LowRank(rank="energy:0.999999", scheme=scheme, min_features=1, multiple=1)
    made, record = lowrank(graph, settings, Data(calibration=x))
    assert set(record.layers) | set(record.left) == {
        graph.names[n.name] for n in graph.module.graph.nodes if n.op == "call_function" and n.name[:6] in ("conv2d", "linear")
    }
    before, after = graph_cost(graph), graph_cost(made)
    assert after["params"] <= before["params"] and after["macs"] <= before["macs"]
    assert torch.allclose(made.module(x), wanted, atol=0.02 * float(wanted.abs().max()))
    assert all(torch.equal(v, state[k]) for k, v in graph.module.state_dict().items())


@pytest.mark.parametrize("rank", ["params:0.7", "macs:0.7", "size:1700B"])
def test_a_budget_is_kept_and_spent_where_the_output_suffers_least(rank: str) -> None:
    model, x = build(next(k for k in SHAPES if k.__name__ == "Encoder"), 128)
    graph = capture(model, (x[:2],))
    made, record = lowrank(graph, LowRank(rank=rank, min_features=1, multiple=2), Data(calibration=x))
    before, after = graph_cost(graph), graph_cost(made)
    if rank.startswith("size"):
        assert 0.85 * 1700 < after["size"] <= 1700 < before["size"]
    else:
        share = after[rank[:-4]] / before[rank[:-4]]
        assert 0.6 < share <= 0.7
    even = lowrank(graph, LowRank(rank=0.7, min_features=1, multiple=2), Data(calibration=x))[0]
    if graph_cost(even)["params"] >= after["params"] and rank.startswith("params"):
        wanted = model(x)
        assert (made.module(x) - wanted).norm() < (even.module(x) - wanted).norm()
    kind = rank.split(":")[0]
    with pytest.raises(InputError, match=rf"cannot be reached; the least reachable is {kind}:[0-9.]+B?$") as failure:
        lowrank(graph, LowRank(rank=f"{kind}:10B" if kind == "size" else f"{kind}:0.01", min_features=1), Data(calibration=x))
    least = str(failure.value).rsplit(" ", 1)[1]
    lowrank(graph, LowRank(rank=least, min_features=1), Data(calibration=x))
    assert record.layers


class Tied(nn.Module):
    """One linear used twice, an embedding tied to the head, a depthwise and a conv."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.twice = nn.Embedding(32, 16), nn.Linear(16, 16)
        self.other = nn.Linear(16, 16)
        self.other.weight, self.other.bias = self.twice.weight, self.twice.bias
        self.head = nn.Linear(16, 32, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.other(torch.relu(self.twice(self.table(x))))))


def test_tied_weights_stay_tied() -> None:
    torch.manual_seed(4)
    model, x = Tied().eval(), torch.randint(0, 32, (64, 5))
    small, record = factorize(model, 4, x)
    assert list(record.layers) == ["twice"] and record.left == {"head": "its weight is tied to table"}
    assert small.twice is small.other and small.head.weight is small.table.weight
    graph = capture(model, (x[:2],))
    made, again = lowrank(graph, LowRank(rank=4), Data(calibration=x))
    assert list(again.layers) in (["twice"], ["other"]) and "tied to" in again.left["head"]  # torch.export takes either name
    assert torch.allclose(made.module(x), small(x), atol=1e-5)
    saved = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in small.parameters())
    assert saved == 16 * 16 - 2 * 16 * 4


def test_one_call_leaves_the_module_as_it_was() -> None:
    torch.manual_seed(5)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding="same"), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, groups=2), nn.Flatten(2),
        nn.Conv1d(32, 32, 5, padding=2), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 9, 40), nn.Dropout(0.5), nn.Linear(40, 10),
    )  # fmt: skip
    x = torch.randn(64, 3, 7, 7)
    state = copy.deepcopy(model.state_dict())
    small, record = factorize(model, 0.9, x, multiple=1)
    assert model.training and small.training and all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert record.figures["params after"] == sum(t.numel() for t in small.state_dict().values()) < record.figures["params before"]
    with torch.no_grad():
        wanted, found = model.eval()(x), small.eval()(x)
    assert (found - wanted).norm() < 0.7 * (wanted - wanted.mean(0)).norm()
    assert isinstance(small[8], nn.Sequential) and small[8][0].weight.requires_grad
    assert not {p.data_ptr() for p in small.parameters()} & {p.data_ptr() for p in model.parameters()}
    same, _ = factorize(model, 0.5, solver="random", in_place=True)
    assert same is model and isinstance(model[8], nn.Sequential)
    variance = [float(m(x).detach().var()) for m in (small, model)]
    assert 0.1 < variance[1] / variance[0] < 10


def test_what_does_not_pay_is_left_with_the_reason() -> None:
    model = nn.Sequential(nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 24, 1), nn.Conv2d(24, 4, 1), nn.Conv2d(4, 24, 3))
    _, record = factorize(model, 64, exclude=("3",))
    assert record.left == {
        "0": "a depthwise convolution has nothing to factorize",
        "1": "rank 64 saves nothing: 24 x 16 breaks even at rank 9.6",
        "2": "only 4 features (`min_features`)",
        "3": "in `exclude`",
    }
    for wrong in (
        {"rank": "energy:1.5"},
        {"rank": 0},
        {"rank": "half"},
        {"rank": "params:0.5"},
        {"rank": 0.5, "solver": "svd_data"},
    ):
        with pytest.raises(InputError) as failure:
            factorize(model, **wrong)  # type: ignore[arg-type]
        assert "\n" not in str(failure.value) and "pydantic" not in str(failure.value)


def test_int8_on_top_costs_no_more_than_int8_alone() -> None:
    torch.manual_seed(6)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
    for m in model:
        if isinstance(m, nn.Linear):  # weights of low rank, so that nothing is lost before quantization
            m.weight.data = m.weight.data @ torch.linalg.qr(torch.randn(m.in_features, 8))[0] @ torch.randn(8, m.in_features)
    x = torch.randn(512, 32)
    wanted = model(x)

    def error(*blocks: Block) -> float:
        found = apply(model, blocks, Data(calibration=x)).simulation(x)
        return float((found - wanted).norm() / wanted.norm())

    one = error(Block("ptq", PTQ(observer="minmax")))
    both = error(Block("lowrank", LowRank(rank=8)), Block("ptq", PTQ(observer="minmax")))
    assert both < 2 * one  # twice as many layers round
    program = apply(model, [Block("lowrank", LowRank(rank=8)), Block("ptq", PTQ())], Data(calibration=x)).program
    assert [layer.name for layer in program.layers if layer.op == "qlinear"] == ["0.0", "0.1", "2.0", "2.1", "4.0", "4.1"]


def test_order_and_absence_of_quantization() -> None:
    model, x = build(next(iter(SHAPES)))
    data, low = Data(calibration=x), Block("lowrank", LowRank(rank=0.5, min_features=1, multiple=1))
    with pytest.raises(InputError, match="before ptq"):
        apply(model, [Block("ptq", PTQ()), low], data)
    made = apply(model, [low], data)
    assert "nothing is quantized" in made.record["warnings"][-1] and not made.program.layers
    assert {reason for *_, reason in made.record["unquantized"]} >= {"the recipe has no ptq or qat step"}
    assert torch.allclose(made.program.run(x[:8])[0], made.simulation(x[:8]), atol=1e-5)
