"""In how many clusterings a cluster is found again, against a loop over all pairs."""

from __future__ import annotations

import numpy as np
import pytest

from spray.pipelines.clusters import FOUND_AGAIN, agreement, jaccard


@pytest.mark.parametrize("seed", range(5))
def test_agreement_counts_clusterings(seed: int) -> None:
    rng = np.random.default_rng(seed)
    samples = np.sort(rng.choice(1000, 60, replace=False))
    kind = rng.integers(0, 3, 60)
    members, names = [], []
    for k in range(6):
        labels = np.where(rng.random(60) < 0.1, rng.integers(0, 3, 60), kind)
        for label in np.unique(labels):
            members.append(samples[labels == label])
            names.append(f"view-kmeans-{k:02d}/{label}")
    expected = [
        len({n.rpartition("/")[0] for m, n in zip(members, names, strict=True) if jaccard(m, one) >= FOUND_AGAIN})
        for one in members
    ]
    assert agreement(members, names).tolist() == expected
    assert 1 <= min(expected) < max(expected) <= 6


def test_a_cluster_alone_agrees_with_itself() -> None:
    assert agreement([np.array([3, 5])], ["kmeans-02/0"]).tolist() == [1]
