"""The clusters that the ranking lists, with their samples, from whichever file has them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.sparse import csr_array

from spray.storage import read_json
from spray.store.analyses import Analysis, open_analysis

FOUND_AGAIN = 0.75
"""Least Jaccard index of two clusters that are one found twice."""


@dataclass(frozen=True)
class RankedClusters:
    """Rows of `ranking.json`, best first, and the files that their clusters are in."""

    rows: list[dict[str, Any]]
    analysis: Analysis
    further: Analysis

    def members(self, row: dict[str, Any]) -> np.ndarray:
        """Return the samples of a row's cluster, ascending."""
        name, _, label = row["cluster"].rpartition("/")
        group = self.analysis.group(row["class_index"])
        if name not in group.clusterings:
            group = self.further.group(row["class_index"])
        return group.index[group.labels(name) == int(label)]


@contextmanager
def ranked_clusters(run_dir: Path, n_samples: int) -> Iterator[RankedClusters]:
    """Open what `rank` left in a run directory."""
    rows = read_json(run_dir / "ranking.json")["clusters"]
    with (
        open_analysis(run_dir / "analysis.h5", n_samples) as analysis,
        open_analysis(run_dir / "candidates.h5", n_samples) as further,
    ):
        yield RankedClusters(rows, analysis, further)


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Return the Jaccard index of two sets of indices."""
    both = len(np.intersect1d(a, b))
    union = len(a) + len(b) - both
    return both / union if union else 1.0


def agreement(members: Sequence[np.ndarray], names: Sequence[str]) -> np.ndarray:
    """Return in how many clusterings each cluster is found again, int (n,), its own among them.

    What is a kind of its own comes out of clusterings into few and into many, of heatmaps normalised in one way and
    another; other clusters shift with each. The ranking's evidence `stability` asks it of the clusterings of one view.

    Parameters
    ----------
    members : sequence of ndarray of int
        The samples of each of n clusters.
    names : sequence of str
        Theirs: a clustering's, a slash and a number.
    """
    samples, column = np.unique(np.concatenate(members), return_inverse=True)
    row = np.repeat(np.arange(len(members)), [len(each) for each in members])
    shape = (len(members), len(samples))
    holds = csr_array((np.ones(len(row), dtype=np.int64), (row, column)), shape=shape)
    both = (holds @ holds.T).toarray()
    size = both.diagonal()
    found = both >= FOUND_AGAIN * (size[:, None] + size - both)
    clusterings, number = np.unique([name.rpartition("/")[0] for name in names], return_inverse=True)
    return np.stack([found[:, number == k].any(axis=1) for k in range(len(clusterings))], axis=1).sum(axis=1)
