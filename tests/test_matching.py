"""Others that are like the samples of a cluster in their covariates."""

from __future__ import annotations

import numpy as np
import pytest

from spray.isolation.matching import EACH, FEWEST, alike


def test_the_nearest_others_in_units_of_the_spread() -> None:
    rng = np.random.default_rng(0)
    outside = np.stack([np.linspace(-5, 5, 201), 1000 * rng.random(201)], axis=1)
    inside = np.array([[2.0, 500.0], [3.0, 500.0]] * 10)
    chosen = alike(inside, outside)
    assert len(chosen) >= FEWEST
    assert (np.diff(chosen) > 0).all()
    # The second covariate has large units only: the first one counts as much.
    assert abs(outside[chosen, 0] - 2.5).mean() < abs(outside[:, 0] - 2.5).mean() / 2


def test_a_confounder_is_balanced() -> None:
    rng = np.random.default_rng(1)
    inside, outside = rng.normal(1.5, 0.5, (40, 2)), rng.normal(0, 1, (400, 2))
    chosen = outside[alike(inside, outside)]
    assert abs(chosen.mean(axis=0) - 1.5).mean() < 0.5 * abs(outside.mean(axis=0) - 1.5).mean()


@pytest.mark.parametrize("n", [1, 20, 500])
def test_each_once_and_enough_of_them(n: int) -> None:
    rng = np.random.default_rng(2)
    inside, outside = rng.random((3, 2)), rng.random((n, 2))
    chosen = alike(inside, outside)
    assert len(chosen) == len(set(chosen.tolist())) >= min(n, FEWEST)
    assert set(
        np.linalg.norm((inside[0] - outside) / np.concatenate([inside, outside]).std(0), axis=1).argsort()[:EACH]
    ) <= set(chosen.tolist())
