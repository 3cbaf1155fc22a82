"""Metrics against hand-made numbers and torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgekit.errors import DataError
from edgekit.metrics import HUGE, accuracy, difference, metric_name, score, sqnr_db, top1_agreement


def test_difference_counts_in_lsb() -> None:
    gap = difference([0.5, 1.0, 1.5, 2.0], [0.5, 0.5, 1.5, 1.75], lsb=0.25)
    assert (gap.largest, gap.mean, gap.share, gap.elements) == (2.0, 0.75, 0.5, 4)


def test_a_nan_never_passes_for_equal() -> None:
    assert difference([np.nan, 1.0], [0.0, 1.0]).largest == HUGE
    assert difference([np.inf], [0.0]).largest == HUGE
    assert difference([np.nan, np.inf], [np.nan, np.inf]).largest == 0.0


def test_shapes_must_agree() -> None:
    with pytest.raises(DataError, match=r"\(2,\) and \(3,\)"):
        difference([0, 0], [0, 0, 0])


@given(st.integers(1, 40), st.floats(0.1, 10))
def test_sqnr_of_known_noise(db: int, amplitude: float) -> None:
    signal = amplitude * np.ones(8)
    noisy = signal * (1 + 10 ** (-db / 20))
    assert sqnr_db(signal, noisy) == pytest.approx(db, abs=1e-6)


def test_sqnr_ends() -> None:
    assert sqnr_db([1.0, 2.0], [1.0, 2.0]) is None
    assert sqnr_db([1.0], [np.inf]) == -999.0
    silent = sqnr_db([0.0, 0.0], [1.0, 0.0])
    assert silent is not None and silent <= -999.0


def test_accuracy_and_agreement_match_torch() -> None:
    a, b, y = torch.randn(200, 7), torch.randn(200, 7), torch.randint(0, 7, (200,))
    assert accuracy(a.numpy(), y.numpy()) == pytest.approx(100 * (a.argmax(1) == y).float().mean().item())
    assert top1_agreement(a.numpy(), b.numpy()) == pytest.approx(100 * (a.argmax(1) == b.argmax(1)).float().mean().item())
    assert top1_agreement(np.zeros((5, 1)), np.ones((5, 1))) is None
    assert accuracy(a.numpy(), y.numpy()[:, None]) == accuracy(a.numpy(), y.numpy())


def test_dense_predictions_count_every_position() -> None:
    outputs = np.zeros((2, 3, 4, 4))
    outputs[:, 1] = 1
    labels = np.ones((2, 4, 4), dtype=np.int64)
    labels[0, 0, 0] = 2
    assert accuracy(outputs, labels) == pytest.approx(100 * 31 / 32)


def test_score_says_what_is_wrong() -> None:
    with pytest.raises(DataError, match="integer classes"):
        score("accuracy", np.zeros((3, 2)), np.zeros(3))
    with pytest.raises(DataError, match="'f1'"):
        score("f1", np.zeros((3, 2)), np.zeros(3))

    def broken(outputs: torch.Tensor, labels: torch.Tensor) -> float:
        return float("nan")

    with pytest.raises(DataError, match="broken returned nan"):
        score(broken, np.zeros((3, 2)), np.zeros(3))
    assert metric_name(broken) == "broken" and metric_name("accuracy") == "accuracy"


def test_score_takes_a_function() -> None:
    def minus_error(outputs: torch.Tensor, labels: torch.Tensor) -> float:
        return -float((outputs - labels).abs().mean())

    assert score(minus_error, np.full((4, 1), 2.0, np.float32), np.zeros((4, 1), np.float32)) == -2.0
