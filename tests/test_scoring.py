"""Candidates, their evidence and the verdicts: against loops, planted truth and draws without any structure."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from spray.analysis import cluster, spectral_embedding
from spray.analysis.clustering import spectral_rows
from spray.analysis.ranking import cross_fitted_separability, outlier_p_value, principal_components
from spray.analysis.scoring import (
    LARGEST,
    PRIOR,
    SMALLEST,
    WEIGHTS,
    Candidate,
    View,
    concentration,
    distinct_samples,
    find_candidates,
    judge,
    most_separable,
    stability,
)


def cloud(n: int, d: int = 20, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d)) * np.linspace(1, 2, d)


def labelings(X: np.ndarray, counts: tuple[int, ...] = (2, 3, 4, 6)) -> dict[str, np.ndarray]:
    _, vectors = spectral_embedding(X, 10, 16)
    return {f"kmeans-{k:02d}": cluster(spectral_rows(vectors, k), "kmeans", n_clusters=k) for k in counts}


def candidate(c: int, tau: float, size: int = 40, n: int = 200, **evidence: float) -> Candidate:
    return Candidate(c, f"kmeans-02/{c}", np.arange(n) < size, tau, size, n, None, evidence)


def test_candidates_are_the_clusters_of_a_suitable_size_once_each() -> None:
    X = cloud(100)
    labels = np.repeat([0, 1, 2, -1], [SMALLEST, SMALLEST - 1, 60, 100 - 60 - 2 * SMALLEST + 1])
    found = find_candidates(3, View(X, {"a": labels, "b": np.where(labels == 0, 5, -1), "c": np.zeros(100, int)}))
    assert {(x.class_index, x.cluster, x.size, x.n) for x in found} == {(3, "a/0", SMALLEST, 100), (3, "a/2", 60, 100)}
    assert find_candidates(0, View(X, {"all": np.zeros(100, int)})) == []
    assert LARGEST * 100 >= 60


def test_separability_is_cross_fitted_on_principal_components() -> None:
    X = cloud(120, 50)
    X[:30, 0] += 9
    member = np.arange(120) < 30
    found = find_candidates(0, View(X, {"a": member.astype(int)}), seed=4)
    own = next(x for x in found if x.size == 30)
    assert own.separability == pytest.approx(cross_fitted_separability(principal_components(X, seed=4), member, 4))
    assert own.projection is not None
    assert (own.projection[member] > 0).mean() > 0.9
    scored = find_candidates(0, View(X, {"a": member.astype(int)}), score=lambda m: float(m.sum()))
    assert {x.separability for x in scored} == {30.0} | ({90.0} if LARGEST * 120 >= 90 else set())


def test_held_out_features_are_evidence_of_their_own() -> None:
    X = cloud(150)
    member = np.arange(150) < 40
    moved = cloud(150, 12, seed=8)
    moved[member, 0] += 6
    for held_out, expected in ((moved, True), (cloud(150, 12, seed=9), False)):
        found = find_candidates(0, View(X, {"a": member.astype(int)}), held_out=held_out)
        own = next(x for x in found if x.size == 40)
        assert (own.evidence["held_out"] > 0.5) == expected


def test_near_duplicates_count_once() -> None:
    rng = np.random.default_rng(0)
    X = cloud(100)
    doubled = np.concatenate([X, X[:20] + 1e-4 * rng.normal(size=(20, 20)), X[:20]])
    first = distinct_samples(doubled)
    assert first.sum() == 100
    assert first[:100].all()
    assert distinct_samples(X).all()
    assert distinct_samples(np.ones((30, 4))).sum() < 30
    assert distinct_samples(X[:2]).all()
    assert np.array_equal(distinct_samples(1e-5 * doubled + 3), first)
    # Sixteen copies of three images are three samples: no cluster that counts.
    copies = np.concatenate([cloud(80), np.repeat(cloud(3, seed=5) + 9, 16, axis=0)])
    labels = np.repeat([0, 1], [80, 48])
    assert [
        x for x in find_candidates(0, View(copies, {"a": labels}), first=distinct_samples(copies)) if x.size == 48
    ] == []


def test_stability_is_the_mean_of_the_best_jaccard_indices() -> None:
    rng = np.random.default_rng(1)
    sets = {f"c{k}": rng.integers(-1, k, 60) for k in (2, 4, 7)}
    member = sets["c4"] == 1
    own, best = set(np.flatnonzero(member)), []
    for name in ("c2", "c7"):
        others = [set(np.flatnonzero(sets[name] == label)) for label in range(7)]
        best.append(max(len(own & other) / len(own | other) for other in others if other))
    x = Candidate(0, "c4/1", member, 1.0, 10, 60)
    assert stability(x, sets) == pytest.approx(np.mean(best))
    assert stability(x, {"c4": sets["c4"]}) == 0
    assert stability(x, {"c4": sets["c4"], "same": np.where(member, 3, 0)}) == 1


def test_concentration_is_between_one_pixel_and_all() -> None:
    maps = np.zeros((3, 4, 5))
    maps[0, 1, 1] = -7
    maps[1] = 2
    assert concentration(maps) == pytest.approx([0, -np.log(20), -np.log(20)])


def test_scores_add_up_and_nothing_speaks_against() -> None:
    x = candidate(0, 2.0, content=1.5, confidence=-3.0)
    assert x.score() == pytest.approx(np.log(2))
    assert x.score(["content", "confidence", "stability"]) == pytest.approx(np.log(2) + WEIGHTS["content"] * 1.5)
    assert np.isfinite(candidate(0, 0.0).score(["content"]))
    assert candidate(0, 3.0).score() > candidate(0, 2.0).score() > candidate(0, 0.0).score()


def test_the_most_separable_come_first() -> None:
    some = [candidate(0, tau) for tau in (1.0, 5.0, 3.0)]
    assert [x.separability for x in most_separable(some, 2)] == [5.0, 3.0]


def test_verdicts_are_the_larger_of_two_p_values() -> None:
    taus = [9.0, 2.0, 2.5, 1.8, 2.2]
    found = [candidate(c, tau) for c, tau in enumerate(taus)]
    of_class, of_cluster = judge(found, range(6))
    natural = outlier_p_value(np.log(9), np.log(taus[1:]), *PRIOR)
    assert of_class[0].p_value == of_cluster[0].p_value == pytest.approx(natural)
    assert of_class[5].p_value == 1
    assert min(of_class, key=lambda c: of_class[c].p_value) == 0
    # What a cloud's tail reaches as well is not surprising, however small it is in the other classes.
    weak = [candidate(0, 0.3), *(candidate(c, 0.001) for c in range(1, 5))]
    assert judge(weak, range(5))[0][0].p_value > 0.5
    assert judge(weak, range(5), against_structureless=False)[0][0].p_value < 0.01


def test_a_class_is_as_surprising_as_its_best_cluster_and_false_discoveries_count_all() -> None:
    found = [candidate(c, tau) for c, tau in ((0, 9.0), (0, 8.0), (1, 2.0), (2, 2.2), (3, 1.9))]
    of_class, of_cluster = judge(found, range(4))
    assert of_class[0].score == max(v.score for v in of_cluster[:2])
    for verdicts in (list(of_class.values()), of_cluster):
        p = np.array([v.p_value for v in verdicts])
        np.testing.assert_allclose([v.q_value for v in verdicts], stats.false_discovery_control(p))
    by = judge(found, range(4), correction="benjamini_yekutieli")[1]
    assert all(b.q_value >= a.q_value for a, b in zip(of_cluster, by, strict=True))
    nothing, none = judge([], range(3))
    assert none == []
    assert [v.p_value for v in nothing.values()] == [1, 1, 1]


def test_two_classes_are_judged_without_a_comparison() -> None:
    of_class, _ = judge([candidate(0, 8.0), candidate(1, 0.01)], range(2))
    assert of_class[0].p_value < 1e-6
    assert of_class[1].p_value > 0.5


def test_classes_without_structure_are_not_called() -> None:
    """Ten runs of six classes each: clusters sought and scored as in the pipeline."""
    p_values = []
    for run in range(10):
        found = []
        for c in range(6):
            X = cloud(150, seed=100 * run + c)
            found += find_candidates(c, View(X, labelings(X)))
        p_values += [v.p_value for v in judge(found, range(6))[0].values()]
    assert stats.binomtest(int((np.array(p_values) <= 0.05).sum()), 60, 0.05, alternative="greater").pvalue > 0.05


def test_a_planted_cluster_is_first() -> None:
    found, planted = [], np.arange(200) < 30
    for c in range(6):
        X = cloud(200, seed=c)
        if c == 2:
            X[planted, :3] += 7
        found += find_candidates(c, View(X, labelings(X)))
    of_class, of_cluster = judge(found, range(6))
    assert max(of_class, key=lambda c: of_class[c].score) == 2
    assert of_class[2].q_value < 0.05
    first = found[int(np.argmax([v.score for v in of_cluster]))]
    assert (first.member == planted).mean() > 0.97
