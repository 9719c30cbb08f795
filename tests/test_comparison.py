"""Clusters of two models on the same samples: measures against their definitions, the rule on planted truth."""

from __future__ import annotations

from fractions import Fraction
from math import comb

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from spray.analysis import cluster, spectral_embedding
from spray.analysis.clustering import spectral_rows
from spray.analysis.comparison import (
    Compared,
    Side,
    best_overlap,
    cohesion,
    compare,
    distinct_clusters,
    likeness,
    strategies,
)
from spray.analysis.comparison_rule import ONLY, SHARED, UNDECIDED, Overlap, normal_tail, rule, verdict

NOTHING = Overlap("", 0, 0, 0.0, 1.0)


def side(X: np.ndarray, counts: tuple[int, ...] = (2, 3, 4)) -> Side:
    """Cluster features as the analyze stage does."""
    _, vectors = spectral_embedding(X)
    return Side(X, {f"kmeans-{k}": cluster(spectral_rows(vectors, k), n_clusters=k) for k in counts}, X)


def cloud(rng: np.random.Generator, n: int, d: int = 12) -> np.ndarray:
    """Draw from a normal distribution with a random covariance: no clusters."""
    return rng.standard_normal((n, d)) @ (rng.standard_normal((d, d)) * np.linspace(2, 0.3, d))


def mask(n: int, *members: int) -> np.ndarray:
    found = np.zeros(n, bool)
    found[list(members)] = True
    return found


def row(member: np.ndarray, found: str = SHARED, cluster: str = "k/0", separability: float = 1.0) -> Compared:
    return Compared(cluster, member, NOTHING, (separability, 0.0), (1.0, 0.0), None, None, None, found)


def test_cohesion_is_the_share_of_the_weight_inside_corrected_for_chance():
    rng = np.random.default_rng(0)
    weights = np.triu(rng.integers(0, 3, (30, 30)), 1).astype(float)
    weights += weights.T
    member = rng.random(30) < 0.4
    inside = sum(weights[i, j] for i in range(30) for j in range(30) if member[i] and member[j])
    touching = sum(weights[i, j] for i in range(30) for j in range(30) if member[i])
    chance = (member.sum() - 1) / 29
    assert cohesion(csr_matrix(weights), member) == pytest.approx((inside / touching - chance) / (1 - chance))


def test_cohesion_of_what_stands_alone_of_any_set_and_of_none():
    block = np.kron(np.eye(2), np.ones((10, 10))) - np.eye(20)
    assert cohesion(csr_matrix(block), np.arange(20) < 10) == pytest.approx(1)
    full = csr_matrix(np.ones((40, 40)) - np.eye(40))
    # Where every sample is a neighbour of every other, any set has what chance gives.
    assert cohesion(full, np.arange(40) < 13) == pytest.approx(0)
    assert cohesion(full, np.ones(40, bool)) == 0
    assert cohesion(full, np.zeros(40, bool)) == 0


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5])
def test_normal_tail_is_what_a_normal_sample_has(share):
    n = 200_000
    draws = np.sort(np.random.default_rng(1).standard_normal(n))
    size = round(share * n)
    top, rest = draws[n - size :], draws[: n - size]
    between = size * top.mean() ** 2 + (n - size) * rest.mean() ** 2 - n * draws.mean() ** 2
    within = ((top - top.mean()) ** 2).sum() + ((rest - rest.mean()) ** 2).sum()
    assert normal_tail(size, n) == pytest.approx(between / within, rel=0.02)


def test_best_overlap_and_its_p_value_by_counting():
    member = mask(20, *range(6))
    others = [("a/0", mask(20, 0, 1, 2, 3, 8)), ("a/1", mask(20, 4, *range(9, 19))), ("b/0", mask(20, 19))]
    found = best_overlap(member, others)
    assert (found.cluster, found.size, found.both) == ("a/0", 5, 4)
    assert found.jaccard == pytest.approx(4 / 7)
    # At least 4 of 5 drawn from 20 are among the 6.
    chance = Fraction(sum(comb(6, k) * comb(14, 5 - k) for k in (4, 5)), comb(20, 5))
    assert found.p_value == pytest.approx(3 * float(chance))
    assert best_overlap(member, []) == NOTHING
    assert best_overlap(mask(20, 7), others) == NOTHING


def test_likeness_of_a_difference_that_is_half_there():
    rng = np.random.default_rng(2)
    member = np.arange(50) < 20
    # Sums of these are exact.
    base, difference = rng.integers(8, 16, 9) / 8, rng.integers(-9, 9, 9) / 8
    a = base + member[:, None] * difference
    cosine, contrast_cosine, retention = likeness(a, base + 0.5 * member[:, None] * difference, member)
    assert retention == pytest.approx(0.5)
    assert contrast_cosine == pytest.approx(1)
    u, v = base + difference, base + 0.5 * difference
    assert cosine == pytest.approx(u @ v / np.sqrt((u @ u) * (v @ v)))
    assert likeness(a, base - member[:, None] * difference, member)[2] == pytest.approx(-1)
    assert likeness(a, np.tile(base, (50, 1)), member)[1:] == (None, pytest.approx(0))
    assert likeness(None, a, member) == likeness(a, a[:, :4], member) == (None, None, None)


def test_clusters_that_are_compared():
    labels = np.repeat([0, 1, 2, -1], [30, 20, 5, 5])
    names = [name for name, _ in distinct_clusters({"a": labels, "b": np.where(labels == 1, 4, -1)})]
    # 0 has half of the samples, 2 too few, 4 is the same as 1.
    assert names == ["a/0", "a/1"]
    assert distinct_clusters({"a": np.repeat([0, 1], [31, 7])}) == []


@pytest.mark.parametrize(
    ("jaccard", "p", "separability", "cohesion_", "expected"),
    [
        (0.1, 1.0, (8.0, 0.5), (0.9, 0.1), ONLY),
        (0.1, 1.0, (8.0, 2.0), (0.9, 0.5), ONLY),
        (0.1, 1.0, (8.0, 2.1), (0.9, 0.1), UNDECIDED),
        # A cut through a cloud, or one that doesn't hold together, is no strategy that could be missing.
        (0.1, 1.0, (2.9, 0.0), (0.9, 0.0), UNDECIDED),
        (0.1, 1.0, (8.0, 0.0), (0.4, 0.0), UNDECIDED),
        # The other model holds the same samples together.
        (0.1, 1.0, (8.0, 1.0), (0.9, 0.6), UNDECIDED),
        (0.6, 1e-9, (8.0, 0.5), (0.9, 0.1), UNDECIDED),
        (0.6, 1e-9, (8.0, 2.1), (0.9, 0.1), SHARED),
        (0.6, 0.05, (8.0, 2.1), (0.9, 0.1), UNDECIDED),
        (0.1, 1.0, (5.0, 2.6), (0.9, 0.6), SHARED),
        (0.1, 1.0, (5.0, 2.6), (0.9, 0.5), UNDECIDED),
        (0.1, 1.0, (5.0, 2.4), (0.9, 0.6), UNDECIDED),
        # Much less than in its own model, but clear all the same.
        (0.1, 1.0, (90.0, 3.0), (0.9, 0.5), SHARED),
        (0.1, 1.0, (90.0, 2.9), (0.9, 0.5), ONLY),
        (0.1, 1.0, (90.0, 3.0), (0.9, 0.4), ONLY),
        (0.0, 1.0, (0.0, 0.0), (0.0, 0.0), SHARED),
    ],
)
def test_rule(jaccard, p, separability, cohesion_, expected):
    assert verdict(Overlap("k/0", 9, 9, jaccard, p), separability, cohesion_, 0.1, tail=1.0) == expected


def test_rule_where_the_means_say_otherwise():
    clear = (8.0, 0.5), (0.9, 0.1)
    said = {retention: verdict(NOTHING, *clear, retention, tail=1.0) for retention in (None, -0.5, 0.34, 0.36, 1.2)}
    assert said == {None: ONLY, -0.5: ONLY, 0.34: ONLY, 0.36: UNDECIDED, 1.2: UNDECIDED}


def test_rule_in_words_names_every_number():
    said = rule()
    words = " ".join(said["text"])
    for key in ("smallest", "enough_same", "level", "real", "clear"):
        assert f"{said[key]:g}" in words
    for key in ("largest", "kept", "lost", "held", "faded"):
        assert f"{said[key]:.0%}" in words


@pytest.mark.parametrize("share", [0.1, 0.25])
def test_a_strategy_of_one_model_is_found_and_nothing_else(share):
    rng = np.random.default_rng(3)
    n = 240
    marked = np.arange(n) < share * n
    A, B = cloud(rng, n), cloud(rng, n)
    A = A + marked[:, None] * 6 * np.eye(12)[0] * A.std()
    a, b = side(A), side(B)
    found = [r for r in compare(a, b) if r.verdict == ONLY]
    assert len(strategies(found)) == 1
    best = strategies(found)[0][0].member
    assert (best & marked).sum() >= 0.9 * max(best.sum(), marked.sum())
    assert all(r.verdict != ONLY for r in compare(b, a))


def test_a_strategy_of_both_models_is_shared_whatever_it_looks_like():
    rng = np.random.default_rng(4)
    n = 240
    marked = np.arange(n) < 40
    A, B = cloud(rng, n), cloud(rng, n, d=9)
    a = side(A + marked[:, None] * 6 * np.eye(12)[0] * A.std())
    b = side(B - marked[:, None] * 5 * np.eye(9)[4] * B.std())
    for rows in (compare(a, b), compare(b, a)):
        first = max(rows, key=lambda r: r.clear)
        assert (first.member & marked).sum() >= 0.9 * max(first.member.sum(), 40)
        assert first.verdict == SHARED
        assert first.retention is None
        assert all(r.verdict != ONLY for r in rows)


def test_two_clouds_without_clusters_have_no_strategies_of_their_own():
    # The hardest case: what k-means makes of one cloud has nothing to do with the other one.
    called = compared = 0
    for seed in range(12):
        rng = np.random.default_rng([5, seed])
        rows = compare(side(cloud(rng, 120)), side(cloud(rng, 120)))
        called += sum(r.verdict == ONLY for r in rows)
        compared += len(rows)
    assert compared > 60
    assert called <= 0.01 * compared


def test_the_same_model_shares_everything_that_is_clear():
    rng = np.random.default_rng(6)
    X = cloud(rng, 200) + np.repeat(np.eye(12)[:4] * 15, 50, axis=0)
    rows = compare(side(X), side(X + rng.standard_normal(X.shape) * 0.3))
    assert [r.verdict for r in rows if r.clear >= 1] == [SHARED] * sum(r.clear >= 1 for r in rows)
    assert any(r.clear >= 1 for r in rows)


def test_what_is_not_lost_may_be_weaker():
    member = mask(40, *range(10))
    tail = normal_tail(10, 40)
    cases = [(9, 2, 0.9, SHARED), (9, 2, 0.9, UNDECIDED), (9, 2, 0.9, ONLY), (9, 3, 0.9, SHARED), (2, 0, 0.9, SHARED)]
    found = [
        Compared("k/0", member, NOTHING, (own * tail, other * tail), (held, 0.1), None, None, None, said)
        for own, other, held, said in [*cases, (9, 2, 0.4, SHARED)]
    ]
    assert [r.weaker for r in found] == [True, True, False, False, False, False]


def test_samples_have_to_be_the_same():
    rng = np.random.default_rng(7)
    with pytest.raises(ValueError, match="same samples"):
        compare(side(cloud(rng, 40)), side(cloud(rng, 41)))
    with pytest.raises(ValueError, match="same samples"):
        compare(Side(np.zeros((9, 2)), {"k": np.zeros(8, int)}), Side(np.zeros((9, 2)), {}))


def test_groups_that_are_too_small_give_nothing():
    X = np.random.default_rng(8).standard_normal((12, 3))
    assert compare(Side(X, {"k": np.arange(12) % 2}), Side(X, {})) == []


def test_clusters_of_the_same_samples_are_one_strategy():
    n = 40
    whole, most, part = mask(n, *range(10)), mask(n, *range(8)), mask(n, *range(4))
    other = mask(n, *range(20, 30))
    found = strategies([row(whole), row(other), row(most), row(part)])
    assert [[r.member.sum() for r in group] for group in found] == [[10, 8], [10], [4]]
    # A part of what the other model lacks as a whole is no strategy of its own.
    found = strategies([row(whole, ONLY), row(part, ONLY), row(most, UNDECIDED)])
    assert [[r.member.sum() for r in group] for group in found] == [[10, 4], [8]]
