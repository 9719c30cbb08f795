"""Accuracies, their intervals and the share of relevance, each against a computation of its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from spray.verification import (
    Group,
    attack_metrics,
    clean_metrics,
    group_metrics,
    relevance_inside,
    tcav_metrics,
    wilson_interval,
)


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


def test_worst_group_is_the_least_of_all_classes_with_and_without() -> None:
    rng = np.random.default_rng(1)
    labels, carries, right = rng.integers(0, 3, 300), rng.random(300) < 0.2, rng.random(300) < 0.8
    right[(labels == 1) & carries] = False
    right[np.flatnonzero((labels == 1) & carries)[0]] = True
    groups = [Group(c, w, False, right[(labels == c) & (carries == w)]) for c in range(3) for w in (False, True)]
    counted = {
        (c, bool(w)): sum(bool(r) for y, m, r in zip(labels, carries, right, strict=True) if (y, m) == (c, w))
        / sum((y, m) == (c, w) for y, m in zip(labels, carries, strict=True))
        for c in range(3)
        for w in (False, True)
    }
    metrics = group_metrics(groups)
    n = int(((labels == 1) & carries).sum())
    assert min(counted, key=lambda key: counted[key]) == (1, True)
    assert metrics["worst_group_accuracy"] == pytest.approx(counted[1, True]) == pytest.approx(1 / n)
    assert metrics["worst_group_accuracy_interval"] == wilson_interval(1, n)
    assert metrics["worst_group"] == {"class_index": 1, "with_artifact": True, "added": False, "n": n}


def test_groups_without_images_do_not_count() -> None:
    empty, half = Group(0, True, True, np.zeros(0, dtype=bool)), Group(0, False, False, np.array([True, False]))
    assert group_metrics([empty, half])["worst_group_accuracy"] == 0.5
    nothing = group_metrics([empty])
    assert (nothing["worst_group_accuracy"], nothing["worst_group"]) == (None, None)
    assert nothing["worst_group_accuracy_interval"] == [0.0, 1.0]


def test_tcav_counts_signs_and_sensitivity_averages_sizes() -> None:
    derivatives = np.array([2.0, -1.0, 3.0, 0.0, 0.0, -4.0, 5.0, 1.0])
    metrics = tcav_metrics(derivatives)
    assert metrics["tcav"] == (4 + 0.5 * 2) / 8
    assert metrics["tcav_interval"] == wilson_interval(5, 8)
    sizes = [2, 1, 3, 0, 0, 4, 5, 1]
    assert metrics["tcav_sensitivity"] == pytest.approx(2.0)
    expected = stats.norm.interval(0.95, loc=2.0, scale=stats.sem(sizes))
    assert metrics["tcav_sensitivity_interval"] == pytest.approx(expected)
    # It has no upper bound, as a share would have.
    assert metrics["tcav_sensitivity_interval"][1] > 1
    assert metrics["n_tcav"] == 8
    none = tcav_metrics(np.array([]))
    assert (none["tcav"], none["tcav_sensitivity"], none["n_tcav"]) == (None, None, 0)
    assert (none["tcav_interval"], none["tcav_sensitivity_interval"]) == ([0.0, 1.0], [0.0, None])
    assert tcav_metrics(np.zeros(7))["tcav"] == 0.5
