"""A trained binary encoder in plain operators: what :mod:`edgekit.compress.ptq.binary_units` makes 1-bit operators of."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgekit.compress.binary.bipft import (
    BinaryEmbedding,
    BinaryEncoder,
    BinaryEncoderLayer,
    BinaryLinear,
    BinaryPooler,
    binary_weight,
)
from edgekit.compress.binary.encoder import Layer

__all__ = ["baked"]


class _SignedLinear(nn.Module):
    """A baked :class:`BinaryLinear`: sign of the input, weights of one size."""

    def __init__(self, layer: BinaryLinear) -> None:
        super().__init__()
        size = layer.step()
        centred = layer.weight.detach() - layer.weight.detach().mean()
        self.weight = nn.Parameter(torch.where(centred >= 0, size, -size), requires_grad=False)
        self.bias = nn.Parameter(layer.whole_bias().detach(), requires_grad=False)
        self.threshold = nn.Parameter(layer.input.threshold(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.where(x >= self.threshold, 1.0, -1.0), self.weight, self.bias)


class _SignedLayer(nn.Module):
    """A baked :class:`BinaryEncoderLayer`."""

    def __init__(self, layer: BinaryEncoderLayer) -> None:
        super().__init__()
        self.heads, self.rank = layer.heads, layer.rank
        for name in ("query", "key", "value", "project", "up", "down"):
            self.add_module(name, _SignedLinear(getattr(layer, name)))
        self.norm1, self.norm2 = layer.norm1, layer.norm2
        query: Any = layer.query
        width = query.weight.shape[1] // layer.heads
        alpha = {n: float(getattr(layer, f"of_{n}").size().detach()) for n in ("query", "key", "value", "chance")}
        self.of_scores, self.of_context = alpha["query"] * alpha["key"] / width**0.5, alpha["chance"] * alpha["value"]
        self.chance, self.size, self.root = float(layer.of_chance.threshold()), alpha["chance"], width**0.5
        if self.rank:
            self.main, self.rest = layer.main, layer.rest

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (Layer.split(self, m(x)) for m in (self.query, self.key, self.value))  # type: ignore[arg-type, operator]
        signs = [torch.where(t >= 0.0, 1.0, -1.0) for t in (q, k, v)]
        scores = torch.matmul(signs[0], signs[1].transpose(-1, -2)) * self.of_scores
        if self.rank:
            lost, value = BinaryEncoderLayer.estimates(self, x)  # type: ignore[arg-type]
            scores = scores + lost / self.root
        chances = torch.softmax(scores, -1)
        context = torch.matmul(torch.where(chances >= self.chance, 1.0, 0.0), signs[2]) * self.of_context
        if self.rank:
            kept = torch.where(chances >= self.chance, self.size, 0.0)
            context = context + torch.matmul(kept, value)
        x = self.norm1(x + self.project(context.transpose(1, 2).flatten(2)))  # type: ignore[operator]
        y: Tensor = self.norm2(x + self.down(F.gelu(self.up(x))))  # type: ignore[operator]
        return y


class _Baked(nn.Module):
    def __init__(self, student: BinaryEncoder) -> None:
        super().__init__()
        self.embeddings = student.embeddings
        table = self.embeddings.input
        if isinstance(table, BinaryLinear):
            self.embeddings.input = _SignedLinear(table)
        elif isinstance(table, BinaryEmbedding):
            two = nn.Embedding(*table.weight.shape)
            two.weight = nn.Parameter(binary_weight(table.weight, rows=True).detach(), requires_grad=False)
            self.embeddings.input = two
        self.layers = nn.ModuleList(_SignedLayer(layer) for layer in student.layers)  # type: ignore[arg-type]
        self.pooler: nn.Module | None = student.pooler
        if isinstance(student.pooler, BinaryPooler):
            student.pooler.dense = _SignedLinear(student.pooler.dense)
        self.head = student.head

    def forward(self, x: Tensor) -> Any:
        y = self.embeddings(x)
        for layer in self.layers:
            y = layer(y)
        pooled = y.mean(1) if self.pooler is None else self.pooler(y[:, 0])
        return (y, pooled) if self.head is None else self.head(pooled)


def baked(student: BinaryEncoder) -> nn.Module:
    """The trained encoder as plain operators, in eval mode; ``edgekit.run_model`` with ``ptq`` makes 1-bit operators of it.

    Word embeddings keep their two values a row, as float: there is no 1-bit look-up.
    """
    return _Baked(copy.deepcopy(student)).eval()
