"""Stability of clusters under resampling: against sets, planted clusters and arbitrary cuts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from spray.analysis import resampling
from spray.analysis.resampling import add_recovery, kmeans_clusterer, recovery, resampled_labelings, subsets
from spray.analysis.scoring import Candidate, View, find_candidates
from spray.analysis.views import view_labelings
from spray.errors import UserError
from spray.pipelines.config import SprayConfig
from spray.pipelines.validate import check_ranking

N = 240


def blob(n: int = N, d: int = 12, seed: int = 0) -> np.ndarray:
    """A normal cloud, no part of which is a cluster."""
    return np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)


def planted(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A cloud with a part of it moved away, and which samples those are."""
    X, member = blob(seed=seed), np.arange(N) % 6 == 0
    X[member, :3] += 9
    return X, member


def candidate(cluster: str, member: np.ndarray) -> Candidate:
    return Candidate(0, cluster, member, 1.0, int(member.sum()), len(member))


def stability_of(X: np.ndarray, member: np.ndarray, k: int, seed: int = 0) -> float:
    """Of a cluster that k-means is said to have found."""
    x = candidate(f"kmeans-{k:02d}/0", member)
    add_recovery([x], X, {f"kmeans-{k:02d}": kmeans_clusterer(k, seed)}, seed=seed)
    return x.evidence["resampling"]


def test_subsets_are_shares_without_repetition() -> None:
    drawn = subsets(100, draws=6, share=0.7, seed=2)
    assert [len(each) for each in drawn] == [70] * 6
    assert all((np.diff(each) > 0).all() for each in drawn)
    assert len({each.tobytes() for each in drawn}) == 6
    assert all((a == b).all() for a, b in zip(drawn, subsets(100, 6, 0.7, 2), strict=True))
    assert any((a != b).any() for a, b in zip(drawn, subsets(100, 6, 0.7, 3), strict=True))


def test_large_classes_have_fewer_subsets_or_none() -> None:
    counts = [len(subsets(n)) for n in (1000, 3750, 6000, 12_500, 13_000)]
    assert counts == [10, 10, 6, 3, 0]
    assert subsets(100, draws=0) == []


def test_recovery_is_the_mean_best_jaccard_index_of_the_samples_drawn() -> None:
    rng = np.random.default_rng(0)
    member = rng.random(60) < 0.3
    drawn = [np.sort(rng.permutation(60)[:45]) for _ in range(5)]
    labelings, best = [], []
    for subset in drawn:
        labels = np.full(60, -1)
        labels[subset] = rng.integers(-1, 4, len(subset))
        labelings.append(labels)
        own = set(np.flatnonzero(member)) & set(subset)
        others = [set(np.flatnonzero(labels == label)) for label in range(4)]
        best.append(max(len(own & other) / len(own | other) for other in others if other))
    assert recovery(member, drawn, labelings) == pytest.approx(np.mean(best))


def test_recovery_ignores_subsets_without_the_cluster() -> None:
    member = np.arange(10) < 2
    drawn = [np.arange(2, 8), np.arange(0, 8)]
    labelings = [np.where(np.arange(10) < 8, 0, -1), np.where(member, 0, np.where(np.arange(10) < 8, 1, -1))]
    assert recovery(member, drawn, labelings) == 1
    assert recovery(member, drawn, [np.full(10, -1), np.full(10, -1)]) == 0
    assert recovery(member, [], []) == 0


def test_samples_that_were_not_drawn_or_have_no_features_are_noise() -> None:
    X = blob()
    X[:5] = 0
    drawn = subsets(N, 3)
    for subset, found in zip(drawn, resampled_labelings(X, {"k": kmeans_clusterer(3)}, drawn), strict=True):
        assert np.array_equal(np.flatnonzero(found["k"] >= 0), np.setdiff1d(subset, np.arange(5)))
        assert set(found["k"]) == {-1, 0, 1, 2}


@pytest.mark.parametrize("seed", range(3))
def test_a_cluster_of_its_own_is_found_again_and_a_cut_of_a_blob_is_not(seed: int) -> None:
    X, member = planted(seed)
    separated = stability_of(X, member, 2, seed)
    assert separated > 0.97
    cloud = blob(seed=seed)
    # Half of a round cloud, along a direction that nothing in it prefers.
    assert stability_of(cloud, cloud[:, 0] > 0, 2, seed) < 0.75
    # What k-means itself makes of it is not found again either.
    view = View(cloud, view_labelings("x", cloud, [6], seed=seed))
    found = find_candidates(0, view, seed)
    add_recovery(found, cloud, {"x-kmeans-06": kmeans_clusterer(6, seed)}, seed=seed)
    assert np.mean([x.evidence["resampling"] for x in found]) < separated - 0.2


def test_the_same_seed_gives_the_same_stability() -> None:
    cloud = blob()
    first = [stability_of(cloud, cloud[:, 0] > 0.5, 4) for _ in range(2)]
    assert first[0] == first[1]
    assert stability_of(cloud, cloud[:, 0] > 0.5, 4, seed=7) != first[0]


def test_only_clusterings_that_can_be_made_again_get_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    X, member = planted()
    known, foreign = candidate("kmeans-02/1", member), candidate("theirs/1", member)
    add_recovery([known, foreign], X, {"kmeans-02": kmeans_clusterer(2), "kmeans-09": kmeans_clusterer(9)})
    assert known.evidence["resampling"] > 0.97
    assert foreign.evidence == {}
    monkeypatch.setattr(resampling, "MOST", N)
    later = candidate("kmeans-02/1", member)
    add_recovery([later], X, {"kmeans-02": kmeans_clusterer(2)})
    assert later.evidence == {}


def ranking(layers: tuple[str, ...] = (), **options: object) -> SprayConfig:
    """A configuration with options of the ranking and stored layers."""
    config = SprayConfig()
    config.attribution.method, config.attribution.layer = "lrp", list(layers) or None
    for key, value in options.items():
        setattr(config.rank, key, value)
    return config


def test_evidence_that_lacks_what_it_needs_is_refused(tmp_path: Path) -> None:
    check_ranking(ranking(evidence=["resampling", "stability"]))
    check_ranking(ranking(("inner",), evidence=["held_out"], held_out="inner"))
    (tmp_path / "attributions.h5").touch()
    check_ranking(ranking(evidence=["held_out"], held_out=str(tmp_path)))
    with pytest.raises(UserError, match=r"rank\.draws=2; it needs at least 3"):
        check_ranking(ranking(evidence=["resampling"], draws=2))
    with pytest.raises(UserError, match=r"rank\.held_out=gone .* one of inner, .* run_dir"):
        check_ranking(ranking(("inner",), evidence=["held_out"], held_out="gone"))
    of_clusters = ranking(("inner",), evidence=["held_out"], held_out="inner")
    of_clusters.analysis.source = "inner"
    with pytest.raises(UserError, match=r"no part in the clusters: a layer that attribution\.layer"):
        check_ranking(of_clusters)
