"""One contract for every registered picture of an embedding."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from spray.analysis import projection
from spray.analysis.projection import PROJECTIONS, project
from spray.errors import UserError


@pytest.fixture(params=PROJECTIONS.names())
def method(request: pytest.FixtureRequest) -> str:
    return request.param


def groups(n: int = 120) -> tuple[np.ndarray, np.ndarray]:
    """Rows of three groups, as the columns of a spectral embedding tell them apart."""
    rng = np.random.default_rng(0)
    truth = np.arange(n) % 3
    return np.eye(3)[truth] @ rng.normal(size=(3, 6)) + rng.normal(scale=0.05, size=(n, 6)), truth


def kept_apart(plane: np.ndarray, truth: np.ndarray) -> float:
    """The share of samples whose nearest neighbour is of their group."""
    nearest = NearestNeighbors(n_neighbors=2).fit(plane).kneighbors(plane)[1][:, 1]
    return float((truth[nearest] == truth).mean())


def test_keeps_groups_apart_and_gives_the_same_again(method: str) -> None:
    vectors, truth = groups()
    before, threads = vectors.copy(), torch.get_num_threads()
    np.random.seed(3)
    expected = np.random.random()
    np.random.seed(3)
    plane = project(vectors, method, seed=1)
    assert np.random.random() == expected
    assert torch.get_num_threads() == threads
    assert plane.shape == (120, 2)
    assert plane.dtype == np.float32
    assert np.isfinite(plane).all()
    assert kept_apart(plane, truth) > 0.95
    assert plane.tobytes() == project(vectors, method, seed=1).tobytes()
    np.testing.assert_array_equal(vectors, before)


@pytest.mark.parametrize("n", [1, 2, 4, 5, 6, 20])
@pytest.mark.filterwarnings("ignore:n_neighbors is larger")
def test_takes_few_samples(method: str, n: int) -> None:
    plane = project(np.random.default_rng(0).normal(size=(n, min(n, 4))), method)
    assert plane.shape == (n, 2)
    assert np.isfinite(plane).all()


def test_takes_duplicates_and_nothing_but_zeros(method: str) -> None:
    for vectors in (np.repeat(np.eye(4), 8, axis=0), np.zeros((20, 3))):
        assert np.isfinite(project(vectors, method)).all()


def test_of_many_rows_a_part_is_laid_out_and_that_is_said(
    method: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    vectors, truth = groups()
    monkeypatch.setitem(projection.FULL, method, 60)
    with caplog.at_level(logging.WARNING, "spray"):
        plane = project(vectors, method)
    assert f"{method} lays out 60 of 120 rows" in caplog.text
    assert kept_apart(plane, truth) > 0.95
    assert len(np.unique(plane, axis=0)) == 120
    assert plane.tobytes() == project(vectors, method).tobytes()


def test_every_picture_has_a_limit(method: str) -> None:
    assert method in projection.FULL


def test_refuses_what_is_not_finite_and_what_there_is_not(method: str) -> None:
    with pytest.raises(ValueError, match="NaN or infinity"):
        project(np.full((20, 3), np.nan), method)
    with pytest.raises(UserError, match="unknown projection 'umapp'"):
        project(np.zeros((20, 3)), "umapp")
