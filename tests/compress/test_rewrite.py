"""Exact rewrites: equality in both precisions on several styles, what is exact about the stream, and what must be refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from transformers_styles import Generator, PreNorm, Reader, Vision, build, inputs

from edgekit.compress.canonical import ATEN
from edgekit.compress.capture import Graph, capture
from edgekit.compress.lowrank import LowRank
from edgekit.compress.ptq import PTQ
from edgekit.compress.rewrite import Rewrite, rewrite
from edgekit.compress.rewrite.stream import find_streams
from edgekit.compress.steps import apply
from edgekit.data import Data
from edgekit.errors import ModelError
from edgekit.recipe import Block

STYLES = (Vision, Generator, Reader)


def targets(graph: Graph) -> list[object]:
    return [n.target for n in graph.module.graph.nodes if n.op == "call_function"]


@pytest.mark.slow
def test_models_of_a_library_are_rewritten_by_their_graph() -> None:
    """ViT and GPT-2 of Hugging Face, random weights, no class of which is known to edgekit."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    vit = transformers.ViTForImageClassification(transformers.ViTConfig(**small, image_size=32, patch_size=8, num_labels=5))
    gpt = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=4))

    class Logits(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x).logits if x.is_floating_point() else self.model(x, use_cache=False).logits

    for model, x in ((vit, torch.randn(3, 3, 32, 32)), (gpt, torch.randint(0, 50, (3, 9)))):
        for name, p in model.named_parameters():
            if "norm" in name or "ln_" in name:
                p.data.add_(torch.randn_like(p) * 0.3)
        made, record = check(Logits(model).eval(), x, Rewrite(norm="rms"))
        assert targets(made).count(ATEN.rms_norm.default) == 5 and not record.left


@lru_cache
def captured(kind: type[nn.Module]) -> Graph:
    """A style's graph in float64; capturing is what takes the time."""
    return capture(build(kind).double(), (as_type(inputs(kind), torch.float64)[:2],))


def as_type(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


def cast(graph: Graph, dtype: torch.dtype, sample: Tensor) -> Graph:
    """The graph in another precision, traced values included."""
    module = copy.deepcopy(graph.module).to(dtype)
    for node in module.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.is_floating_point():
            node.meta = {**node.meta, "val": value.to(dtype)}
    return replace(graph, module=module, sample=(sample,))


def check(model: nn.Module, x: Tensor, settings: Rewrite, known: Graph | None = None) -> tuple[Graph, object]:
    """Equality with the model in float64 and float32; the graph given stays as it was."""
    double = known or capture(copy.deepcopy(model).double(), (as_type(x, torch.float64)[:2],))
    for dtype, bound in ((torch.float64, 1e-9), (torch.float32, 1e-5)):
        own, y = copy.deepcopy(model).to(dtype), as_type(x, dtype)
        graph = cast(double, dtype, y[:2])
        state = copy.deepcopy(graph.module.state_dict())
        made, record = rewrite(graph, settings)
        with torch.no_grad():
            wanted, found = own(y), made.module(y)
        assert float((found - wanted).abs().max()) <= bound * max(1.0, float(wanted.abs().max()))
        assert all(torch.equal(v, state[k]) for k, v in graph.module.state_dict().items())
        assert set(made.names) >= {n.name for n in made.module.graph.nodes if n.op == "call_function"}
        assert len(set(made.names.values())) == len(made.names)
    return made, record


@pytest.mark.slow
@pytest.mark.parametrize("kind", STYLES)
@pytest.mark.parametrize("norm", ["rms", "crms"])
def test_norms_and_attention_are_rewritten_exactly_in_every_style(kind: type[nn.Module], norm: str) -> None:
    model, x = build(kind), inputs(kind)
    if norm == "crms" and kind is Generator:  # the last norm's reader shares its weight with the table
        with pytest.raises(ModelError, match="read by something else than linear layers of its own"):
            check(model, x, Rewrite(norm="crms"), captured(kind))
        return
    made, record = check(model, x, Rewrite(norm=norm, attention=True), captured(kind))
    assert ATEN.scaled_dot_product_attention.default not in targets(made)
    assert sum(t == "attention written out" for t in record.layers.values()) == 2
    assert ATEN.layer_norm.default not in targets(made) and not record.left
    assert targets(made).count(ATEN.rms_norm.default) == (5 if norm == "rms" else 0)
    rewritten = [n for n, text in record.layers.items() if text.startswith("LayerNorm to")]
    assert len(rewritten) == 5
    if kind is Generator:
        assert "untied" in record.layers["tokens"]


def test_a_large_offset_costs_the_original_more_precision_than_the_rewrite() -> None:
    exact = build(Reader, 50.0).double()
    graph = capture(build(Reader, 50.0), (inputs(Reader)[:2],))
    made, _ = rewrite(graph, Rewrite(norm="rms"))
    with torch.no_grad():
        wanted = exact(inputs(Reader))
        errors = [float((g.module(inputs(Reader)) - wanted).abs().max()) for g in (graph, made)]
    assert errors[1] < errors[0]


def test_the_stream_is_what_it_was_minus_its_mean_and_a_second_pass_changes_nothing() -> None:
    model, x = build(Vision, seed=3).double(), inputs(Vision).double()
    graph = capture(model, (x[:2],))
    sums = [n.name for n in graph.module.graph.nodes if n.target == ATEN.add.Tensor]
    made, _ = rewrite(graph, Rewrite(norm="rms", fuse=False))
    values = []
    for g in (graph, made):
        seen: dict[str, Tensor] = {}

        class Watch(fx.Interpreter):
            def run_node(self, n: fx.Node) -> object:
                result = super().run_node(n)
                seen[n.name] = result  # noqa: B023
                return result

        with torch.no_grad():
            Watch(g.module).run(x)
        values.append(seen)
    assert len(sums) == 5
    for name in sums:
        before, after = values[0][name], values[1][name]
        assert after.mean(-1).abs().max() < 1e-12
        assert torch.allclose(after, before - before.mean(-1, keepdim=True), atol=1e-12)
    with pytest.raises(ModelError, match="no LayerNorm"):
        rewrite(made, Rewrite(norm="rms"))


def test_crms_has_one_feature_less_everywhere() -> None:
    model, x = build(Vision), inputs(Vision)
    graph = capture(model, (x[:2],))
    counts = []
    for norm in ("rms", "crms"):
        made, _ = rewrite(graph, Rewrite(norm=norm))
        counts.append(sum(p.numel() for p in made.module.parameters()))
    patch, blocks, head = (
        3 * 4 * 4 + 1,
        2 * (24 + 1 + 48 + 1 + 72 + 48),
        5,
    )  # inputs of producers with their bias, outputs of readers
    assert counts[0] - counts[1] == patch + blocks + head + 1 + 17  # and the class token and the positions


class PostNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.head(self.norm(x + self.b(x)) + x)


class Tapped(nn.Module):
    """An early exit reads the stream without a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.block, self.exit = nn.Linear(8, 24), PreNorm(24, 4), nn.Linear(24, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed(x)
        return self.block.norm1(x) * 2, self.exit(x)


class Activated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(8, 24), nn.LayerNorm(24), nn.Linear(24, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(torch.relu(self.embed(x))))


class Stacked(nn.Module):
    """Post-LN as torch has it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layer = nn.Linear(8, 16), nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.embed(x))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (PostNorm, "reads the residual stream without a norm|normalizes and feeds"),
        (Tapped, "exit reads the residual stream without a norm"),
        (Activated, "relu writes into the residual stream"),
        (Stacked, "reads the residual stream without a norm|normalizes and feeds the residual stream itself"),
        (nn.Linear, "it has no LayerNorm"),
    ],
)
def test_what_is_no_pre_norm_stream_is_refused_with_the_reason(kind: type[nn.Module], reason: str) -> None:
    model = (kind(8, 8) if kind is nn.Linear else kind()).eval()
    with pytest.raises(ModelError, match=reason):
        rewrite(capture(model, (torch.randn(2, 5, 8),)), Rewrite(norm="rms"))


def test_streams_are_told_apart() -> None:
    graph = captured(Reader)
    (stream,) = find_streams(graph)
    assert len(stream.norms) == 5 and len(stream.producers) == 3 + 2 * 2 and not stream.reason


class Branches(nn.Module):
    """RepVGG in training form: 3 x 3 + 1 x 1 + identity, each with a batch norm."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Conv2d(8, 8, 3, padding=1, groups=groups, bias=False), nn.Conv2d(8, 8, 1, groups=groups)
        self.bns = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bns[0](self.wide(x)) + self.bns[1](self.narrow(x)) + self.bns[2](x)) + x


@pytest.mark.parametrize("groups", [1, 4])
def test_parallel_convolutions_become_one(groups: int) -> None:
    torch.manual_seed(0)
    model = Branches(groups).eval()
    for bn in model.bns:
        bn.running_mean.normal_()
        bn.running_var.uniform_(0.5, 2)
    made, record = check(model, torch.randn(4, 8, 9, 7), Rewrite())
    assert targets(made) == [ATEN.conv2d.default, ATEN.relu.default, ATEN.add.Tensor] and record.layers


def test_linear_maps_behind_one_another_become_one_only_where_it_pays() -> None:
    torch.manual_seed(1)
    linear = nn.Sequential(nn.Linear(12, 40), nn.Linear(40, 10, bias=False), nn.ReLU(), nn.Linear(10, 4), nn.Linear(4, 30))
    made, record = check(linear.eval(), torch.randn(5, 12), Rewrite())
    assert targets(made).count(ATEN.linear.default) == 3 and record.layers == {"1": "multiplied with 0 before it"}
    convs = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 8, 1), nn.ReLU(),  # a kernel, then 1 x 1
        nn.Conv2d(8, 32, 1, bias=False), nn.Conv2d(32, 8, 3, padding=1), nn.ReLU(),  # 1 x 1 without bias, then a padded kernel
        nn.Conv2d(8, 32, 1), nn.Conv2d(32, 8, 3, padding=1),  # with a bias that the padding would not see
    )  # fmt: skip
    made, _ = check(convs.eval(), torch.randn(2, 3, 12, 12), Rewrite())
    assert targets(made).count(ATEN.conv2d.default) == 4


class Written(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = x * torch.sigmoid(x)
        return x * F.relu6(x + 3) / 6


def test_written_out_activations_become_one_operator() -> None:
    made, _ = check(Written(), torch.randn(3, 5) * 4, Rewrite())
    assert targets(made) == [ATEN.silu.default, ATEN.hardswish.default]


def test_a_rewritten_transformer_is_compressed_like_any_other() -> None:
    model, x = build(Vision), inputs(Vision, 64)
    blocks = [Block("rewrite", Rewrite(norm="rms")), Block("lowrank", LowRank(rank=0.8)), Block("ptq", PTQ(samples=64))]
    made = apply(model, blocks, Data(calibration=x))
    wanted = model(x).detach()
    assert [p["kind"] for p in made.record["passes"]] == ["rewrite", "lowrank", "ptq"]
    assert (made.simulation(x) - wanted).norm() < 0.5 * wanted.norm()
    one = made.program.run(x[:1])[0]
    assert torch.allclose(torch.as_tensor(one), made.simulation(x[:1]), atol=0.05 * float(wanted.abs().max()))
    norms = [u for u in made.record["unquantized"] if u[1] == "rms_norm"]
    assert len(norms) == 5
