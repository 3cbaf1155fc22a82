"""Linformer on attention found in a graph: exact where it has to be, cheaper by what the cost model says, refused elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers_styles import Generator, PreNorm, build, inputs

from edgekit.compress.capture import capture
from edgekit.compress.lowrank import LowRank, factorize
from edgekit.compress.lowrank.attention import attention_cost
from edgekit.compress.lowrank.linformer import neighbours, shorten
from edgekit.compress.lowrank.step import graph_cost, lowrank
from edgekit.compress.ptq import PTQ
from edgekit.compress.repair import Repair
from edgekit.compress.steps import apply
from edgekit.data import Data
from edgekit.errors import InputError
from edgekit.recipe import Block

WIDTH, TOKENS = 24, 20


class Written(nn.Module):
    """Attention as products and a softmax, heads by reshape."""

    def __init__(self, divide: bool = False, masked: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.divide = divide
        self.register_buffer("mask", torch.zeros(TOKENS, TOKENS) if masked else None)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).reshape(*x.shape[:2], 4, 6).transpose(1, 2) for p in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2)
        scores = scores / 6**0.5 if self.divide else scores * 6**-0.5
        scores = scores if self.mask is None else scores + self.mask
        return self.out((torch.softmax(scores, -1) @ v).transpose(1, 2).reshape(x.shape))  # type: ignore[no-any-return]


def made(kind: str) -> nn.Module:
    torch.manual_seed(0)
    blocks = {"fused": lambda: PreNorm(WIDTH, 4), "product": Written, "quotient": lambda: Written(divide=True)}
    return nn.Sequential(blocks[kind](), nn.LayerNorm(WIDTH)).eval()


def test_rows_are_means_of_neighbours() -> None:
    found = neighbours(3, 7)
    assert [row.nonzero().flatten().tolist() for row in found] == [[0, 1, 2], [3, 4], [5, 6]]
    assert torch.allclose(found.sum(1), torch.ones(3))


@pytest.mark.parametrize("kind", ["fused", "product", "quotient"])
def test_equal_neighbours_lose_nothing_and_the_saving_is_the_cost_models(kind: str) -> None:
    """Each token five times: a softmax over five equal keys and one over their mean agree."""
    model, k = made(kind), TOKENS // 5
    x = torch.randn(3, k, WIDTH).repeat_interleave(5, 1)
    graph = capture(model, (x[:2],))
    short, changed, left = shorten(graph, k)
    assert list(changed.values()) == [f"keys and values of 20 tokens projected to {k}, as means of neighbours until trained"]
    assert not left and set(short.names.values()) >= {f"{n}.{what}" for n in changed for what in ("keys", "values")}
    torch.testing.assert_close(short.module(x), model(x), rtol=0, atol=1e-5)
    y = torch.randn(3, TOKENS, WIDTH)
    assert float((short.module(y) - model(y)).abs().max()) > 1e-3
    cost = attention_cost(TOKENS, WIDTH, 1, 1, k)
    assert graph_cost(graph)["macs"] - graph_cost(short)["macs"] == cost.dense - cost.linformer
    assert graph_cost(short)["params"] - graph_cost(graph)["params"] == 2 * k * TOKENS


def test_what_does_not_pay_or_cannot_be_done_is_left_alone() -> None:
    x = torch.randn(2, TOKENS, WIDTH)
    for model, sample, tokens, reason in (
        (made("fused"), x, 10, "projecting to 10 costs less from 21 tokens on; it has 20"),
        (Written(masked=True).eval(), x, 4, "its scores have a mask, which does not fit projected keys"),
        (build(Generator), inputs(Generator)[:2], 2, "its scores have a mask, which does not fit projected keys"),
    ):
        graph = capture(model, (sample,))
        short, changed, left = shorten(graph, tokens)
        assert not changed and set(left.values()) == {reason}
        assert graph_cost(short) == graph_cost(graph)
    with pytest.raises(InputError, match="linformer: the model has no attention"):
        lowrank(capture(nn.Linear(12, 12), (torch.randn(2, 12),)), LowRank(linformer=4), Data(calibration=torch.randn(8, 12)))
    with pytest.raises(InputError, match="linformer works on the captured graph"):
        factorize(nn.Linear(12, 12), 4, linformer=4)


@pytest.mark.slow
def test_it_is_trained_by_repair_and_quantized_like_any_layer() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.block, self.head = nn.Linear(12, WIDTH), PreNorm(WIDTH, 4), nn.Linear(WIDTH, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.block(F.relu(self.embed(x))).mean(1))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, x = Net().eval(), torch.randn(128, TOKENS, 12)
    low = Block("lowrank", LowRank(rank="macs:0.6", linformer=4, samples=64))
    data = Data(calibration=x, training=(x, torch.zeros(len(x)).long()))
    found = apply(model, [low, Block("repair", Repair(epochs=6, learning_rate=3e-3)), Block("ptq", PTQ(samples=64))], data)
    first, second, _ = found.record["passes"]
    assert 0.5 * first["macs before"] < first["macs after"] <= 0.6 * first["macs before"]
    assert "projected to 4" in first["layers"]["block.attention.scaled_dot_product_attention"]
    assert second["loss after"] < second["loss before"]
    layers = {layer.name: layer for layer in found.program.layers}
    keys = layers["block.attention.scaled_dot_product_attention.keys"]
    assert keys.op == "qlinear" and keys.weight_bits == 8 and tuple(keys.args["weight"].shape) == (4, TOKENS)
    torch.testing.assert_close(found.program.run(x[:8])[0], found.simulation(x[:8]), rtol=0, atol=0.1)
