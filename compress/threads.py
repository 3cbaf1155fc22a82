"""Threads of a training step: small layers are slower with several, many times so where other processes hold the cores."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from edgekit.compress.canonical import ATEN, arguments
from edgekit.compress.capture import Graph, tensor_of

__all__ = ["macs_of_sample", "one_thread_if_small"]

_WEIGHTED = (ATEN.conv2d.default, ATEN.linear.default)
_SMALL = 1 << 25
"""Multiply-accumulates of a batch, some milliseconds of one core."""


def macs_of_sample(graph: Graph) -> int:
    """Multiply-accumulates of all convolutions and linear layers with stored weights, for one sample."""
    total = 0
    for node in graph.module.graph.nodes:
        if node.target not in _WEIGHTED:
            continue
        weight = arguments(node)[1]
        if weight.op == "get_attr":
            total += math.prod(node.meta["val"].shape[1:]) * tensor_of(graph.module, weight)[0].numel()
    return int(total)


@contextmanager
def one_thread_if_small(graph: Graph, batch: int) -> Iterator[None]:
    """One thread meanwhile where a batch is little work; the rule looks at the model only, so it is the same everywhere."""
    threads = torch.get_num_threads()
    if macs_of_sample(graph) * batch < _SMALL:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
