"""The cost model against torch's own count of a layer that is built each way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from edgekit.compress.lowrank.attention import attention_cost
from edgekit.errors import InputError


class Layer(nn.Module):
    """Attention and feed-forward products; projections of rank r if given, keys and values shortened to k tokens if given."""

    def __init__(self, n: int, d: int, f: int, r: int = 0, k: int = 0) -> None:
        super().__init__()

        def linear(i: int, o: int) -> nn.Module:
            return nn.Sequential(nn.Linear(i, r), nn.Linear(r, o)) if r else nn.Linear(i, o)

        self.q, self.k, self.v, self.o = (linear(d, d) for _ in range(4))
        self.up, self.down = linear(d, f), linear(f, d)
        self.shorten = nn.ModuleList(nn.Linear(n, k, bias=False) for _ in range(2)) if k else None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.shorten is not None:
            k, v = (s(t.transpose(1, 2)).transpose(1, 2) for s, t in zip(self.shorten, (k, v), strict=True))
        y = self.o(torch.softmax(q @ k.transpose(1, 2), -1) @ v)
        return self.down(self.up(y))


@pytest.mark.parametrize(("n", "d", "f", "r", "k"), [(24, 16, 48, 5, 6), (7, 32, 64, 8, 3)])
def test_costs_are_those_that_torch_counts(n: int, d: int, f: int, r: int, k: int) -> None:
    cost = attention_cost(n, d, f, r, k)
    for kind, options in (("dense", {}), ("lowrank", {"r": r}), ("linformer", {"k": k})):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            Layer(n, d, f, **options)(torch.randn(1, n, d))
        assert getattr(cost, kind) == counter.get_total_flops() // 2


def test_the_crossover_is_where_linformer_becomes_cheaper() -> None:
    found = attention_cost(1, 768, 3072, 256, 128).crossover
    before, after = (attention_cost(n, 768, 3072, 256, 128) for n in (found - 1, found))
    assert before.linformer >= before.lowrank and after.linformer < after.lowrank
    assert (
        attention_cost(64, 768, 3072, 256, 128).best == "lowrank"
        and attention_cost(9000, 768, 3072, 256, 128).best == "linformer"
    )
    with pytest.raises(InputError):
        attention_cost(0, 1, 1, 1, 1)
