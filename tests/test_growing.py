"""Growing a cluster to all samples like it: on features whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from spray.isolation.growing import FREE, boundary, grow, inner_features, recognize, split


def cloud(seed: int, n: int, d: int, shift: float) -> np.ndarray:
    features = np.random.default_rng(seed).normal(0, 1, (n, d))
    features[:, : 3 + d // 50] += shift
    return features


@pytest.mark.parametrize("d", [5, 60, 700])
def test_an_impure_half_of_the_carriers_grows_to_all_of_them(d: int) -> None:
    carriers, rest, null = cloud(0, 60, d, 6.0), cloud(1, 240, d, 0.0), cloud(2, 200, d, 0.0)
    features, truth = np.concatenate([carriers, rest]), np.arange(300) < 60
    member = np.zeros(300, dtype=bool)
    member[:36] = True
    member[290:] = True
    scorer, scores, carries = grow(features, member, null, 0)
    assert (carries & truth).sum() / carries.sum() >= 0.95
    assert (carries & truth).sum() / truth.sum() >= 0.95
    assert np.median(scores[truth]) == pytest.approx(1, abs=0.15)
    assert np.median(scores[~truth]) == pytest.approx(0, abs=0.1)
    assert (scorer(null) > scorer.threshold).mean() <= 0.02
    assert (scorer(cloud(3, 100, d, 6.0)) > scorer.threshold).mean() >= 0.95


def test_scores_of_samples_come_from_fits_without_them() -> None:
    # Noise with more features than samples: fitted on all, everything separates; held out, nothing does.
    features, null = cloud(0, 100, 400, 0.0), cloud(1, 100, 400, 0.0)
    member = np.arange(100) < 30
    fitted = grow(features, member, null, 0, rounds=0)[0](features)
    assert (fitted[member][:, None] > fitted[~member]).mean() > 0.9
    scores = grow(features, member, null, 0, rounds=1)[1]
    assert 0.3 < (scores[member][:, None] > scores[~member]).mean() < 0.7


def test_the_seed_decides() -> None:
    features, null = cloud(0, 80, 10, 0.5), cloud(1, 50, 10, 0.0)
    member = np.arange(80) < 30
    first, second = (grow(features, member, null, 7, FREE)[1] for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_a_single_turn_leaves_the_cluster_as_it_is() -> None:
    # Three groups: the cluster is one of two that are alike; grown it takes the other one in.
    features = np.concatenate([cloud(0, 40, 12, 4.0), cloud(1, 40, 12, 3.5), cloud(2, 200, 12, 0.0)])
    member = np.arange(280) < 40
    null = cloud(3, 200, 12, 0.0)
    kept = grow(features, member, null, 0, rounds=1)[0]
    assert np.median(kept(features)[:40]) == pytest.approx(1, abs=0.1)
    assert grow(features, member, null, 0)[2][40:80].mean() > 0.9


def test_the_split_lies_in_the_gap() -> None:
    rng = np.random.default_rng(0)
    for n in (10, 60, 200):
        scores = np.concatenate([rng.normal(0, 0.1, 300), rng.normal(1, 0.1, n)])
        assert 0.25 < split(scores, np.arange(300 + n) >= 300) < 0.75
    assert split(np.ones(10), np.arange(10) < 5) == 1


@pytest.mark.parametrize("d", [5, 60, 700])
def test_what_was_added_is_recognized_whatever_else_a_cluster_has_in_common(d: int) -> None:
    rng = np.random.default_rng(3)
    rest, carriers, null = (rng.normal(0, 1, (n, d)) for n in (240, 60, 200))
    carriers[:, : 3 + d // 50] += 6.0
    carriers[:30, -1] += 5.0  # of half of the carriers, and that half is the cluster
    features, truth = np.concatenate([carriers, rest]), np.arange(300) < 60
    carries = np.arange(300) < 30
    origin = np.flatnonzero(~truth)[:150]
    added = features[origin].copy()
    added[:, : 3 + d // 50] += 6.0
    scorer, scores, added_scores = recognize(features, carries, added, origin, null, 0)
    found = scores > scorer.threshold
    assert (found & truth).sum() / found.sum() >= 0.95
    assert (found & truth).sum() / truth.sum() >= 0.95
    assert np.median(added_scores) == pytest.approx(1)
    assert np.median(scores[~truth]) == pytest.approx(0, abs=0.1)
    assert (scorer(null) > scorer.threshold).mean() <= 0.02


def test_copies_are_judged_by_fits_without_them_and_their_origins() -> None:
    # Noise with more features than samples, and copies that differ from it by noise: nothing is to be recognized.
    features, null = cloud(0, 100, 400, 0.0), cloud(1, 100, 400, 0.0)
    origin = np.arange(20, 100)
    added = features[origin] + np.random.default_rng(5).normal(0, 1, (80, 400))
    scorer, scores, added_scores = recognize(features, np.arange(100) < 20, added, origin, null, 0)
    assert (scorer(added)[:, None] > scorer(features[origin])).mean() > 0.8
    assert 0.3 < (added_scores[:, None] > scores[20:]).mean() < 0.7


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("width", [0.05, 0.15, 0.3])
def test_the_boundary_is_where_both_are_as_likely(share: float, width: float) -> None:
    from scipy.optimize import brentq
    from scipy.stats import norm

    rng = np.random.default_rng(0)
    n = round(2000 * share)
    scores = np.concatenate([rng.normal(1, width, n), rng.normal(0, 0.2, 2000 - n)])
    added = rng.normal(1, width, 300)
    # Half of the carriers are known at first, with as many that are none.
    carries = np.zeros(2000, dtype=bool)
    carries[: n // 2] = carries[-n // 2 :] = True
    expected = brentq(lambda s: share * norm.pdf(s, 1, width) - (1 - share) * norm.pdf(s, 0, 0.2), 0.05, 0.999)
    assert boundary(scores, added, carries) == pytest.approx(expected, abs=0.06)


def test_samples_that_show_a_part_of_it_are_recognized_as_well() -> None:
    rng = np.random.default_rng(3)
    # Most match it exactly, the others as far as something hides it.
    with_it = np.where(rng.random(100) < 0.85, rng.normal(1.0, 0.02, 100), rng.uniform(0.4, 0.9, 100))
    added = np.where(rng.random(200) < 0.85, rng.normal(1.0, 0.02, 200), rng.uniform(0.4, 0.9, 200))
    scores = np.concatenate([with_it, rng.normal(0.0, 0.1, 400)])
    carries = np.arange(500) < 100
    found = scores > boundary(scores, added, carries)
    assert found[:100].mean() > 0.95
    assert found[100:].mean() < 0.01


def test_where_scores_have_a_valley_it_is_the_boundary() -> None:
    """A tenth of the rest reaches half as high; what the artifact was added to may hide it."""
    rng = np.random.default_rng(4)
    rest = np.concatenate([rng.normal(0, 0.08, 320), rng.uniform(0.25, 0.55, 40)])
    scores = np.concatenate([rng.normal(1.05, 0.13, 90).clip(0.7), rest])
    added = np.concatenate([rng.normal(1, 0.2, 220), rng.uniform(0, 0.6, 30)])
    found = boundary(scores, added, np.arange(len(scores)) < 90)
    assert 0.5 < found < 0.72
    wide = np.concatenate([rng.normal(1, 0.25, 400), rng.normal(0, 0.25, 400)])
    halfway = boundary(wide, rng.normal(1, 0.25, 300), np.arange(800) < 400)
    assert halfway == pytest.approx(0.5, abs=0.06)


def test_without_a_difference_there_is_a_boundary_all_the_same() -> None:
    scores = np.zeros(50)
    assert np.isfinite(boundary(scores, np.zeros(20), np.arange(50) < 10))
    assert np.isfinite(boundary(scores, np.full(20, -1.0), np.arange(50) < 10))


def test_inner_features_are_means_and_maxima_of_channels() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()
    x = torch.randn(2, 3, 8, 8)
    inner = model[1](model[0](x)).detach()
    found = inner_features(model, ["1", "3:in"], x)
    expected = torch.cat([inner.mean(dim=(2, 3)), inner.amax(dim=(2, 3)), inner.flatten(1)], dim=1)
    torch.testing.assert_close(found, expected)
    assert not model._forward_hooks
