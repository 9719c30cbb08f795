"""Accuracies, their intervals and the share of relevance, each against a computation of its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from spray.verification import attack_metrics, clean_metrics, relevance_inside, wilson_interval


@settings(deadline=None, derandomize=True)
@given(data=st.data(), n=st.integers(1, 5000), level=st.sampled_from([0.9, 0.95, 0.99]))
def test_wilson_equals_scipy(data: st.DataObject, n: int, level: float) -> None:
    hits = data.draw(st.integers(0, n))
    expected = stats.binomtest(hits, n).proportion_ci(level, method="wilson")
    low, high = wilson_interval(hits, n, level)
    assert low == pytest.approx(expected.low, abs=1e-12)
    assert high == pytest.approx(expected.high, abs=1e-12)
    assert 0 <= low <= hits / n <= high <= 1 or hits in (0, n)


def test_wilson_solves_the_score_equation() -> None:
    for end in wilson_interval(37, 90):
        assert abs(37 / 90 - end) == pytest.approx(stats.norm.isf(0.025) * np.sqrt(end * (1 - end) / 90))


def test_nothing_is_known_of_no_samples() -> None:
    assert wilson_interval(0, 0) == [0.0, 1.0]


def logits_of(predictions: list[int], classes: int = 4) -> torch.Tensor:
    return torch.eye(classes)[torch.tensor(predictions)] + 0.1 * torch.rand(len(predictions), classes)


def test_clean_metrics_count() -> None:
    labels = np.array([0, 0, 0, 1, 1, 1, 1, 3, 3, 3])
    logits = logits_of([0, 0, 1, 1, 1, 2, 0, 3, 3, 3])
    metrics = clean_metrics(logits, labels)
    assert metrics["clean_accuracy"] == 0.7
    assert metrics["worst_class_accuracy"] == 0.5
    assert metrics["n"] == 10
    assert metrics["clean_accuracy_interval"] == wilson_interval(7, 10)
    assert metrics["worst_class_accuracy_interval"] == wilson_interval(2, 4)
    assert set(metrics) == {
        "clean_accuracy",
        "clean_accuracy_interval",
        "worst_class_accuracy",
        "worst_class_accuracy_interval",
        "n",
    }


def test_attack_metrics_count() -> None:
    labels = np.array([0, 0, 1, 1, 3, 3])
    share = torch.tensor([0.2, 0.4, 0.6])
    metrics = attack_metrics(logits_of([0, 2, 2, 2, 1, 3]), labels, 2, share)
    assert metrics["attacked_accuracy"] == pytest.approx(2 / 6)
    assert metrics["attacked_to_class"] == pytest.approx(3 / 6)
    assert metrics["attacked_to_class_interval"] == wilson_interval(3, 6)
    assert metrics["attacked_accuracy_interval"] == wilson_interval(2, 6)
    assert metrics["n_attacked"] == 6
    expected = stats.norm.interval(0.95, loc=0.4, scale=stats.sem([0.2, 0.4, 0.6]))
    assert metrics["artifact_relevance"] == pytest.approx(0.4)
    assert metrics["artifact_relevance_interval"] == pytest.approx(expected)


def test_intervals_stay_in_the_unit_range_and_hold_unknown_shares() -> None:
    labels = np.array([0, 1])
    wide = attack_metrics(logits_of([0, 1]), labels, 2, torch.tensor([0.0, 1.0]))
    assert wide["artifact_relevance_interval"] == [0.0, 1.0]
    for share, mean in ((torch.tensor([]), None), (torch.tensor([0.5]), 0.5)):
        metrics = attack_metrics(logits_of([0, 1]), labels, 2, share)
        assert metrics["artifact_relevance"] == mean
        assert metrics["artifact_relevance_interval"] == [0.0, 1.0]
    none = attack_metrics(torch.empty(0, 4), np.array([], dtype=int), 2, torch.tensor([]))
    assert none["attacked_accuracy"] is None
    assert none["attacked_accuracy_interval"] == [0.0, 1.0]


def test_relevance_inside_equals_the_formula_in_loops() -> None:
    rng = np.random.default_rng(0)
    relevance, mask = rng.normal(size=(4, 3, 5, 6)), rng.random((4, 1, 5, 6))
    expected = []
    for R, M in zip(relevance, mask, strict=True):
        inside = sum(abs(R[c, y, x] * M[0, y, x]) for c in range(3) for y in range(5) for x in range(6))
        expected.append(inside / np.abs(R).sum())
    np.testing.assert_allclose(relevance_inside(torch.from_numpy(relevance), torch.from_numpy(mask)), expected)


def test_relevance_inside_extremes() -> None:
    relevance = torch.zeros(3, 2, 4, 4)
    relevance[0, 0, 1, 1], relevance[0, 1, 1, 1] = 1.0, -1.0
    relevance[1, 0, 3, 3] = -2.0
    mask = torch.zeros(3, 1, 4, 4)
    mask[:, :, :2, :2] = 1
    # Relevance of both signs does not cancel; a map without any has none inside.
    assert relevance_inside(relevance, mask).tolist() == [1.0, 0.0, 0.0]
    assert relevance_inside(1e30 * relevance, torch.ones(3, 1, 4, 4)).tolist() == [1.0, 1.0, 0.0]
