"""One contract for every registered clustering."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from scipy.sparse.csgraph import connected_components
from sklearn.metrics import adjusted_rand_score

from spray.analysis import CLUSTERINGS, cluster, clustering
from spray.analysis.clustering import connected_graph, nearest_of, spectral_rows
from spray.errors import UserError

OPTIONS: dict[str, dict] = {
    "kmeans": {"n_clusters": 3},
    "agglomerative": {"n_clusters": 3},
    "dbscan": {"eps": 2.0},
    "hdbscan": {"min_cluster_size": 10},
}


def three_groups(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    truth = np.repeat([0, 1, 2], [30, 40, 50])
    order = rng.permutation(120)
    centers = np.array([[0.0, 0], [20, 0], [0, 20]])
    return (centers[truth] + rng.normal(scale=0.5, size=(120, 2)))[order], truth[order]


def same_partition(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a[:, None] == a, b[:, None] == b)


@pytest.fixture(params=CLUSTERINGS.names())
def method(request: pytest.FixtureRequest) -> str:
    return request.param


def test_every_registered_clustering_is_tested(method: str) -> None:
    assert method in OPTIONS, "add options that suit three groups of 30 to 50 samples"


def test_finds_three_groups(method: str) -> None:
    X, truth = three_groups()
    labels = cluster(X, method, **OPTIONS[method])
    assert labels.shape == (120,)
    assert labels.dtype == np.int64
    kept = labels != -1
    assert kept.mean() > 0.9
    assert same_partition(labels[kept], truth[kept])
    assert set(labels[kept]) == {0, 1, 2}


def test_is_deterministic_and_leaves_input_and_random_state_alone(method: str) -> None:
    X = np.random.default_rng(1).normal(size=(150, 4))
    before = X.copy()
    np.random.seed(3)
    expected = np.random.random()
    np.random.seed(3)
    first = cluster(X, method, **OPTIONS[method])
    assert np.random.random() == expected
    np.testing.assert_array_equal(first, cluster(X, method, **OPTIONS[method]))
    np.testing.assert_array_equal(X, before)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_takes_fewer_samples_than_clusters(method: str, n: int) -> None:
    labels = cluster(np.arange(2.0 * n).reshape(n, 2), method)
    assert labels.shape == (n,)
    assert set(labels) <= {-1, *range(n)}


@pytest.mark.filterwarnings("error")
def test_takes_duplicates(method: str) -> None:
    labels = cluster(np.repeat([[0.0, 0.0], [5.0, 5.0]], 20, axis=0), method)
    assert labels.shape == (40,)
    assert not set(labels[:20]) & set(labels[20:])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_refuses_what_is_not_finite(method: str, bad: float) -> None:
    X = np.zeros((10, 2))
    X[4, 1] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        cluster(X, method)


@pytest.mark.parametrize("method", ["dbscan", "hdbscan"])
def test_lone_samples_are_noise(method: str) -> None:
    X, _ = three_groups()
    X = np.concatenate([X, [[300.0, 300.0], [-400.0, 100.0]]])
    np.testing.assert_array_equal(cluster(X, method, **OPTIONS[method])[-2:], -1)


def test_the_number_of_clusters_is_the_one_asked_for() -> None:
    X = np.random.default_rng(2).normal(size=(100, 3))
    for method in ("kmeans", "agglomerative"):
        for k in (2, 5):
            assert set(cluster(X, method, n_clusters=k)) == set(range(k))


def test_the_contract_of_the_python_api() -> None:
    X, truth = three_groups()
    assert same_partition(cluster(X, method="kmeans", n_clusters=3), truth)
    with pytest.raises(UserError, match=r"unknown clustering 'kmean' \(did you mean 'kmeans'\?\); allowed: .*dbscan"):
        cluster(X, "kmean")


def test_spectral_rows_have_unit_length_and_only_the_first_columns() -> None:
    embedding = np.array([[3.0, 4.0, 9.0], [0.0, 0.0, 1.0], [-1e-9, 0.0, 5.0]])
    np.testing.assert_allclose(spectral_rows(embedding, 2), [[0.6, 0.8], [0, 0], [-1, 0]])


def test_dbscan_chooses_a_radius_that_fits_the_samples() -> None:
    for scale in (1e-3, 1.0, 1e3):
        X, truth = three_groups()
        labels = cluster(scale * X, "dbscan")
        kept = labels != -1
        assert kept.mean() > 0.8
        assert adjusted_rand_score(truth[kept], labels[kept]) > 0.8


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("kmeans", {"n_clusters": 0}, "n_clusters=0"),
        ("agglomerative", {"n_clusters": 0}, "n_clusters=0"),
        ("agglomerative", {"n_neighbors": 0}, "n_neighbors=0"),
        ("dbscan", {"eps": 0.0}, "eps=0.0 is out of range; it has to be above 0"),
        ("dbscan", {"min_samples": 0}, "min_samples=0"),
        ("hdbscan", {"min_cluster_size": 1}, "min_cluster_size=1"),
        ("hdbscan", {"min_samples": 0}, "min_samples=0"),
    ],
)
def test_options_out_of_range_are_told(method: str, options: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        cluster(three_groups()[0], method, **options)


def test_many_rows_are_clustered_by_a_part_of_them_and_that_is_said(
    method: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    X, truth = three_groups()
    with caplog.at_level(logging.WARNING, "spray"):
        cluster(X, method, **OPTIONS[method])
        assert caplog.text == ""
        monkeypatch.setitem(clustering.FULL, method, 90)
        labels = cluster(X, method, **OPTIONS[method])
    assert f"{method} clusters 90 of 120 rows" in caplog.text
    kept = labels != -1
    assert kept.mean() > 0.9
    assert same_partition(labels[kept], truth[kept])
    np.testing.assert_array_equal(labels, cluster(X, method, **OPTIONS[method]))


def test_what_costs_the_square_of_the_rows_has_a_limit(method: str) -> None:
    assert method == "kmeans" or clustering.FULL[method] <= 50_000


def test_k_means_of_very_many_rows_agrees_with_that_of_few(monkeypatch: pytest.MonkeyPatch) -> None:
    X, truth = three_groups()
    monkeypatch.setattr(clustering, "MINI_BATCH", 100)
    labels = cluster(X, "kmeans", n_clusters=3)
    assert same_partition(labels, truth)
    np.testing.assert_array_equal(labels, cluster(X, "kmeans", n_clusters=3))


@pytest.mark.filterwarnings("error")
def test_agglomerative_along_neighbours_agrees_with_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    X, truth = three_groups()
    near = np.random.default_rng(0).normal(size=(200, 3)) * [4, 1, 1]
    expected = cluster(near, "agglomerative", n_clusters=2)
    monkeypatch.setattr(clustering, "DENSE_WARD", 50)
    assert same_partition(cluster(X, "agglomerative", n_clusters=3), truth)
    assert adjusted_rand_score(expected, cluster(near, "agglomerative", n_clusters=2)) > 0.5
    assert set(cluster(X, "agglomerative", n_clusters=5)) == set(range(5))


@pytest.mark.parametrize("n_parts", [1, 2, 30])
def test_parts_of_a_neighbour_graph_are_joined_by_few_edges(n_parts: int) -> None:
    rng = np.random.default_rng(0)
    X = np.concatenate([rng.normal(size=(15, 3)) + 1000 * rng.normal(size=3) for _ in range(n_parts)])
    graph = connected_graph(X, 5)
    assert connected_components(graph, directed=False)[0] == 1
    assert (graph != graph.T).nnz == 0
    part = np.arange(len(X)) // 15
    rows, columns = graph.nonzero()
    assert (part[rows] != part[columns]).sum() <= 2 * 3 * n_parts
    duplicated = connected_graph(np.repeat(X, 9, axis=0), 5)
    assert connected_components(duplicated, directed=False)[0] == 1


def test_nearest_of_equals_a_loop() -> None:
    rng = np.random.default_rng(0)
    known, rows = rng.normal(size=(20, 3)), rng.normal(size=(50, 3))
    expected = [int(((known - row) ** 2).sum(axis=1).argmin()) for row in rows]
    assert nearest_of(known, rows).tolist() == expected
