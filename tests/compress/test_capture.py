"""Capture: the flat graph computes what the eager model computes, and bad models are refused in one sentence."""

from __future__ import annotations

import copy

import pytest
import torch
from float_models import SHAPES, Functional, Modules, PreActivation, Waves, build
from torch import Tensor, nn

from edgekit.compress.canonical import ATEN
from edgekit.compress.capture import capture
from edgekit.compress.placing import on_device
from edgekit.compress.ptq import PTQ
from edgekit.compress.steps import apply
from edgekit.data import Data
from edgekit.errors import ModelError
from edgekit.recipe import Block


@pytest.mark.parametrize("kind", SHAPES)
def test_graph_equals_eager_at_any_batch_size(kind: type[nn.Module]) -> None:
    model, x = build(kind)
    graph = capture(model, (x[:1],))
    assert graph.dynamic_batch
    with torch.no_grad():
        for n in (1, 2, 5):
            torch.testing.assert_close(graph.module(x[:n]), model(x[:n]), rtol=1e-5, atol=1e-5)


class ClassToken(nn.Module):
    """As people write it: ``len(x)`` is a plain number, which fixes the batch of an exported graph."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token, self.head = nn.Conv2d(1, 8, 2, 2), nn.Parameter(torch.randn(1, 1, 8)), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(torch.cat([self.token.expand(len(x), -1, -1), x], 1).mean(1))  # type: ignore[no-any-return]


def test_a_model_that_takes_the_length_of_its_batch() -> None:
    model, x = ClassToken().eval(), torch.randn(3, 1, 8, 8)
    graph = capture(model, (x,))
    assert not graph.dynamic_batch
    with torch.no_grad():
        torch.testing.assert_close(graph.module(x[1:2]), model(x[1:2]))
        made = apply(model, [Block("ptq", PTQ())], Data(x.repeat(8, 1, 1, 1)))
        assert (made.simulation(x) - made.program.run(x)[0]).abs().max() < 0.05


class TiedHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
        self.head.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.words(x).mean(1))  # type: ignore[no-any-return]


def test_tied_weights_are_not_said_to_be_unused() -> None:
    assert not capture(TiedHead(), (torch.randint(0, 20, (3, 5)),)).unused


@pytest.mark.parametrize("kind", [Modules, Functional, Waves, PreActivation])
def test_batch_norm_and_dropout_are_gone(kind: type[nn.Module]) -> None:
    model, x = build(kind)
    targets = {str(n.target) for n in capture(model, (x[:1],)).module.graph.nodes}
    assert not any("batch_norm" in t or "dropout" in t or "conv1d" in t for t in targets)


def test_the_model_is_not_changed() -> None:
    model, x = build(Modules)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    capture(model, (x[:1],))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_names_are_those_of_the_source_and_lines_are_known() -> None:
    model, x = build(Functional)
    graph = capture(model, (x[:1],))
    names = set(graph.names.values())
    assert {"a", "b", "fc", "add"} <= names
    assert len(names) == len(graph.names)
    assert graph.sources["b"].startswith("float_models.py:")


def test_symmetric_padding_goes_into_the_conv() -> None:
    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(nn.functional.pad(x, (2, 2, 1, 1)))

    model, x = Padded().eval(), torch.randn(2, 3, 8, 8)
    graph = capture(model, (x,))
    (conv,) = [n for n in graph.module.graph.nodes if n.target == ATEN.conv2d.default]
    assert list(conv.args[4]) == [2, 3]
    torch.testing.assert_close(graph.module(x), model(x))


def test_shared_weights_are_not_folded_twice() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(x)) + self.conv(x)

    torch.manual_seed(0)
    model, x = Shared().eval(), torch.randn(2, 3, 8, 8)
    model.bn.running_mean.normal_()
    torch.testing.assert_close(capture(model, (x,)).module(x), model(x), rtol=1e-5, atol=1e-5)


def test_nan_weights_are_named() -> None:
    model, x = build(Modules)
    model.features[3].weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"features\.3\.weight holds 1 NaN"):
        capture(model, (x[:1],))


def test_a_branch_on_data_is_explained() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.sum() > 0 else x

    with pytest.raises(ModelError, match=r"test_capture\.py:\d+: .*a branch that depends on the values.*torch\.where"):
        capture(Branch(), (torch.randn(1, 4),))


def test_a_dictionary_is_refused() -> None:
    class Answers(nn.Module):
        def forward(self, x: Tensor) -> dict[str, object]:
            return {"y": x * 2, "n": 3}

    with pytest.raises(ModelError, match="return one tensor or a tuple of tensors"):
        capture(Answers(), (torch.randn(1, 4),))


def test_a_graph_makes_its_own_tensors_on_the_device_it_is_put_on() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(9, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.table(torch.arange(x.shape[1], device=x.device))  # type: ignore[no-any-return]

    graph, x = capture(Positions().eval(), (torch.randn(2, 5, 4),)), torch.randn(3, 5, 4)
    wanted = graph.module(x)
    made = [n.kwargs["device"] for n in graph.module.graph.nodes if "device" in n.kwargs]
    assert made == [torch.device("cpu")]
    elsewhere = on_device(copy.deepcopy(graph.module), "meta")
    made = [n.kwargs["device"] for n in elsewhere.graph.nodes if "device" in n.kwargs]
    assert made == [torch.device("meta")] and elsewhere(x.to("meta")).device.type == "meta"
    assert torch.equal(on_device(graph.module, "cpu")(x), wanted)
