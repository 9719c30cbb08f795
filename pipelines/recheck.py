"""What became of an artifact's cluster in another model: whether its samples still stand out, and whether it acts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from spray.pipelines.clusters import jaccard, ranked_clusters
from spray.pipelines.isolated import load_findings
from spray.storage import read_json

SAME = 0.5
"""Least Jaccard index of two sets of samples that are taken for the same."""
LEVEL = 0.05
"""A cluster is significant if the rate of false discoveries among all clusters (else its p-value) is at most this."""
FALLEN = 0.5
"""A cluster whose separability fell below this share of what it was no longer stands out, unless it is significant."""
GONE, NO_EFFECT, LEFT = "gone", "no_effect", "left"


def recheck(before: Path, after: Path, n: int) -> dict[str, dict[str, Any]]:
    """Compare the clusters of a run's proven artifacts with those that another model's run has in their place.

    Parameters
    ----------
    before, after : Path
        Run directories of two models on the same data, up to the stage `isolate`.
    n : int
        Number of training samples.

    Returns
    -------
    dict
        For each artifact of `before` its `verdict`: `left` if a proven artifact of `after` has the same samples, else
        `no_effect` if a cluster still stands out that has them, else `gone`; and `before` and `after`: of the cluster
        that has most in common with its samples the `cluster` (name), `size`, `share` (of the samples, in it),
        `purity` (of it, these samples), `jaccard`, `separability`, `p_value` and `q_value`; None where the class has
        none.
    """
    rows = {row["id"]: row for row in read_json(before / "artifacts.json")["artifacts"]}
    still = [finding for _, finding in load_findings(after)]
    found = {}
    for name, finding in load_findings(before):
        c, samples = finding.class_index, finding.samples
        clusters = [nearest_cluster(folder, c, samples, n) for folder in (before, after)]
        acts = [other for other in still if other.class_index == c and jaccard(other.samples, samples) >= SAME]
        found[name] = {
            "class_index": c,
            "class_name": rows[name]["class_name"],
            "verdict": LEFT if acts else NO_EFFECT if stands_out(*clusters) else GONE,
            "before": clusters[0],
            "after": clusters[1],
        }
    return found


def nearest_cluster(run_dir: Path, class_index: int, samples: np.ndarray, n: int) -> dict[str, Any] | None:
    """Return the ranked cluster of a class that has most in common with some samples, by the Jaccard index."""
    best: dict[str, Any] | None = None
    with ranked_clusters(run_dir, n) as clusters:
        for row in clusters.rows:
            if row["class_index"] != class_index:
                continue
            members = clusters.members(row)
            common, index = len(np.intersect1d(members, samples)), jaccard(members, samples)
            if best is None or index > best["jaccard"]:
                best = {
                    "cluster": row["cluster"],
                    "size": len(members),
                    "share": common / max(1, len(samples)),
                    "purity": common / max(1, len(members)),
                    "jaccard": index,
                    **{key: row.get(key) for key in ("separability", "p_value", "q_value")},
                }
    return best


def stands_out(before: dict[str, Any] | None, after: dict[str, Any] | None) -> bool:
    """Return whether a cluster has the samples that it was sought for, and is significant or about as separable."""
    if after is None or after["jaccard"] < SAME:
        return False
    chance = after["p_value"] if after["q_value"] is None else after["q_value"]
    as_separable = before is not None and after["separability"] >= FALLEN * before["separability"]
    return bool(chance <= LEVEL or as_separable)
