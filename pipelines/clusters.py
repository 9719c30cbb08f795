"""The clusters that the ranking lists, with their samples, from whichever file has them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spray.storage import read_json
from spray.store.analyses import Analysis, open_analysis


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
