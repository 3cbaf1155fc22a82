"""Data sources stream the same samples whatever they are stored in, and bad ones are named."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from edgekit.data import Data, batches, fingerprint, first_sample
from edgekit.errors import DataError

X = torch.arange(10 * 3).reshape(10, 3).float()
Y = torch.arange(10)


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(X, Y, strict=True)


SOURCES = {
    "tensors": (X, Y),
    "arrays": [X.numpy(), Y.numpy()],
    "dataset": TensorDataset(X, Y),
    "stream": Stream(),
    "loader": DataLoader(TensorDataset(X, Y), batch_size=7),
    "function": lambda: iter([(X[:9], Y[:9]), (X[9:], Y[9:])]),
    "generator": lambda: ((X[i : i + 1], Y[i : i + 1]) for i in range(10)),
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_kind_of_source_gives_the_same_samples(name: str) -> None:
    for size in (1, 4, 32):
        found = list(batches(SOURCES[name], size))
        assert all(len(x) == len(y) <= size for x, y in found)
        assert torch.equal(torch.cat([x for x, _ in found]), X)
        assert torch.equal(torch.cat([y for _, y in found]), Y)
    (only,) = zip(*batches(SOURCES[name], 4, inputs=1), strict=True)
    assert torch.equal(torch.cat(only), X)


@pytest.mark.parametrize("name", SOURCES)
def test_a_few_samples_are_spread_where_the_length_is_known(name: str) -> None:
    """Sorted data would otherwise calibrate on its first classes."""
    spread = name in ("tensors", "arrays", "dataset")
    for samples, wanted in ((3, [0, 3, 6] if spread else [0, 1, 2]), (10, [*range(10)]), (99, [*range(10)])):
        for size in (2, 32):
            found = list(batches(SOURCES[name], size, samples=samples))
            assert torch.cat([y for _, y in found]).tolist() == wanted and all(len(x) <= size for x, _ in found)
            assert torch.equal(torch.cat([x for x, _ in found]), X[wanted])
    assert len(list(batches(X, 4, samples=8))) == 2 and next(batches(X, 4, samples=1))[0].tolist() == [X[0].tolist()]


def test_a_stream_is_never_held_whole() -> None:
    made = 0

    def endless() -> Iterator[Tensor]:
        nonlocal made
        while True:
            made += 1
            yield torch.zeros(8, 2)

    iterator = batches(endless, 8)
    for _ in range(5):
        next(iterator)
    assert made == 5
    assert first_sample(endless)[0].shape == (1, 2)


FAULTS: dict[str, tuple[Any, str]] = {
    "empty tensor": (X[:0], "is empty"),
    "empty loader": (DataLoader(TensorDataset(X[:0])), "is empty"),
    "empty function": (lambda: [], "is empty"),
    "float64": (X.double(), "float64; convert them to float32"),
    "float64 array": (np.zeros((2, 3)), "float64; convert them to float32"),
    "half": (X.half(), "float16"),
    "nan": (torch.where(X == 12, torch.nan, X), "sample 4 has NaN or Inf"),
    "inf in a stream": (lambda: [X, X, X / 0], "sample 20 has NaN or Inf"),
    "lengths": ((X, Y[:3]), "10, 3 samples"),
    "lengths in a batch": (lambda: [(X, Y[:3])], "must have the same number"),
    "number": (3, "found int; expected a Tensor"),
    "list of numbers": ([1, 2], "found list; expected a Tensor"),
    "strings": (lambda: ["abc"], "a batch holds str"),
    "scalar": (torch.tensor(1.0), "is empty"),
    "nothing in a batch": (lambda: [()], "without tensors"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_bad_data_is_named(name: str) -> None:
    source, words = FAULTS[name]
    with pytest.raises(DataError, match=words) as caught:
        list(batches(source, 8, what="calibration"))
    assert str(caught.value).startswith("calibration: ")


def test_the_fingerprint_is_of_the_values_only() -> None:
    base = fingerprint(Data(X, (X, Y)))
    assert base == fingerprint(Data(X.numpy(), (X.clone(), Y)))
    shuffled = Data(X, None, DataLoader(TensorDataset(X, Y), 3, shuffle=True))
    assert fingerprint(shuffled) == fingerprint(shuffled)
    changed = X.clone()
    changed[9, 2] += 1e-6
    others = [
        Data(changed, (X, Y)),
        Data(X, (X, Y.flip(0))),
        Data(X),
        Data(X, (X, Y), X),
        Data(X, (X, Y), metric=lambda outputs, y: 0.0),
    ]
    assert len({base, *map(fingerprint, others)}) == 6
