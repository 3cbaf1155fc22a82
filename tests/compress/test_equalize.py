"""Cross-layer equalization keeps the function and helps per-tensor weights."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from float_models import SHAPES, build
from torch import nn

from edgekit.compress.capture import Graph, capture, tensor_of
from edgekit.compress.ptq import PTQ
from edgekit.compress.ptq.equalize import equalize, find_pairs
from edgekit.compress.ptq.quantize import quantize
from edgekit.compress.ptq.simulate import simulate
from edgekit.data import Data


def uneven(seed: int = 0) -> tuple[nn.Sequential, torch.Tensor]:
    """conv, ReLU, depthwise, ReLU, max pool, grouped conv, ReLU, mean, two linears; channel ranges differ by up to 1000."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 1, groups=2, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 5),
    ).eval()  # fmt: skip
    layers = [m for m in model if isinstance(m, nn.Conv2d | nn.Linear)]
    for a, b in pairwise(layers):
        factor = 10 ** torch.empty(a.weight.shape[0]).uniform_(-1.5, 1.5)
        a.weight.data.mul_(factor.view(-1, *[1] * (a.weight.dim() - 1)))
        if a.bias is not None:
            a.bias.data.mul_(factor)
        groups = b.groups if isinstance(b, nn.Conv2d) else 1
        view = b.weight.data.view(groups, -1, b.weight.shape[1], b.weight[0, 0].numel())
        view.div_(factor.view(groups, 1, -1, 1))
    return model, torch.randn(64, 3, 12, 12)


def ranges(graph: Graph) -> list[tuple[torch.Tensor, torch.Tensor]]:
    found = []
    for a, b in find_pairs(graph.module):
        first, second = tensor_of(graph.module, a.args[1]), tensor_of(graph.module, b.args[1])
        groups = b.args[6] if len(b.args) > 6 else 1
        seen = second.view(groups, -1, second.shape[1], second[0, 0].numel()).abs().amax((1, 3)).flatten()
        found.append((first.abs().flatten(1).amax(1), seen))
    return found


def test_every_link_of_a_chain_is_found_and_evened_out() -> None:
    model, x = uneven()
    graph = capture(model, (x[:1],))
    assert len(find_pairs(graph.module)) == 4
    equalized, names = equalize(graph)
    assert names == ("0", "2", "5", "9", "11")
    for a, b in ranges(equalized):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0)


@pytest.mark.parametrize("kind", SHAPES)
def test_the_function_is_the_same(kind: type[nn.Module]) -> None:
    model, x = build(kind)
    graph = capture(model, (x[:1],))
    before = {k: v.clone() for k, v in graph.module.state_dict().items()}
    equalized, _ = equalize(graph)
    with torch.no_grad():
        torch.testing.assert_close(equalized.module(x), model(x), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in graph.module.state_dict().items()), "the given graph is left alone"


def test_the_function_of_an_uneven_chain_is_the_same() -> None:
    model, x = uneven()
    equalized, _ = equalize(capture(model, (x[:1],)))
    with torch.no_grad():
        torch.testing.assert_close(equalized.module(x), model(x), rtol=1e-4, atol=1e-5)


def test_relu6_and_shared_reads_are_left_alone() -> None:
    chain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU6(), nn.Conv2d(4, 4, 1)).eval()
    assert find_pairs(capture(chain, (torch.randn(1, 3, 8, 8),)).module) == []

    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.relu(self.a(x))
            return self.b(y) + y

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 3, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.a(torch.relu(self.a(x)))

    for kind in (Branch, Tied):
        assert find_pairs(capture(kind().eval(), (torch.randn(1, 3, 8, 8),)).module) == []


def test_per_tensor_weights_need_it() -> None:
    model, x = uneven()
    errors = []
    for flag in (False, True):
        graph, plan = quantize(capture(model, (x[:1],)), PTQ(per_channel=False, equalize=flag, observer="minmax"), Data(x))
        with torch.no_grad():
            real = model(x)
            errors.append(float((simulate(graph, plan)(x) - real).square().mean() / real.var()))
    assert errors[1] < 0.1 * errors[0]
