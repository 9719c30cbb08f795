"""One contract for every registered clustering."""

from __future__ import annotations

import numpy as np
import pytest

from spray.analysis import CLUSTERINGS, cluster
from spray.analysis.clustering import spectral_rows
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
