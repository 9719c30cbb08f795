"""In how many clusterings a cluster is found again, against a loop over all pairs; and which are looked at."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from spray.pipelines import isolate
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


def test_clusters_that_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """In turns by rank and by agreement; the largest in which the same is repeated too, wherever it stands."""
    samples = {f"{view}/{i}": np.arange(10) + 10 * i + start for view, start in (("a", 0), ("b", 0)) for i in range(4)}
    # Found by one clustering alone, which ranks first; and repeated ones, which rank last.
    samples = {"own/0": np.arange(500, 510)} | samples
    samples |= {"repeated-01/0": np.arange(600, 604), "repeated-02/0": np.arange(700, 720)}
    rows = [
        {"class_index": 1, "cluster": name, "rank": rank, "evidence": {"repeated": 1.0} if "repeated" in name else {}}
        for rank, name in enumerate(samples, start=1)
    ]

    @contextmanager
    def ranked(*_: Any) -> Iterator[Any]:
        yield SimpleNamespace(rows=rows, members=lambda row: samples[row["cluster"]])

    monkeypatch.setattr(isolate, "ranked_clusters", ranked)

    def chosen(**options: int) -> list[str]:
        config = SimpleNamespace(isolate=SimpleNamespace(**options))
        return [row["cluster"] for row, _ in isolate._choose(SimpleNamespace(config=config, run_dir=None, train=[]))]

    assert chosen(per_class=1, candidates=9) == ["own/0", "repeated-02/0"]
    assert chosen(per_class=2, candidates=9) == ["own/0", "repeated-02/0", "a/0"]
    assert chosen(per_class=4, candidates=9) == ["own/0", "a/1", "repeated-02/0", "a/0", "a/2"]
    assert chosen(per_class=4, candidates=2) == ["own/0", "a/1"]
