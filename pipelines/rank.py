"""The fourth stage: classes and clusters ranked by how separable they are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np
from threadpoolctl import threadpool_limits

from spray.analysis import separability
from spray.analysis.fisher import RIDGE
from spray.analysis.ranking import (
    cross_fitted_separability,
    outlier_p_value,
    principal_components,
    structureless_p_value,
)
from spray.pipelines.analyze import class_features
from spray.pipelines.context import Context
from spray.pipelines.stage import Stage
from spray.storage import write_json
from spray.store import Attributions, open_attributions

SMALLEST = 8
"""Clusters with fewer samples are not scored."""

LARGEST = 0.5
"""Nor are those with a larger share of their class: an artifact's samples are the smaller part."""


@dataclass
class Row:
    """A scored cluster."""

    class_index: int
    clustering: str
    label: int
    size: int
    n: int
    score: float


def run(context: Context) -> dict[str, Any]:
    """Write `ranking.json`."""
    classes = context.train.classes
    rows: list[Row] = []
    shape = (len(context.train), None, None, None)
    with (
        h5py.File(context.run_dir / "analysis.h5") as analysis,
        open_attributions(context.run_dir / "attributions.h5", shape=shape) as attributions,
        # On matrices this small more threads only wait for each other, for long where other jobs want the cores.
        threadpool_limits(1),
    ):
        for c in context.progress(range(len(classes)), len(classes), "classes ranked"):
            group = analysis[f"{c:08d}"]
            if len(group["index"]) < SMALLEST / LARGEST:
                continue  # no cluster of so small a class can be scored
            rows += _score_class(context, c, group, _scorer(context, group, attributions))
    # A class is as separable as the best of its clusters.
    best = {c: max((row.score for row in rows if row.class_index == c), default=0.0) for c in range(len(classes))}
    clusters = [_cluster_row(context, row, best) for row in rows]
    class_rows = _ranked([_class_row(context, c, best, clusters) for c in best])
    write_json(
        context.run_dir / "ranking.json",
        {"classes": class_rows, "clusters": _ranked(clusters), "score": context.config.rank.score},
    )
    context.log.info(
        "most separable class: %r, %.1f (p = %.2g)",
        class_rows[0]["class_name"],
        class_rows[0]["separability"],
        class_rows[0]["p_value"],
    )
    return {"clusters": len(clusters)}


def _scorer(context: Context, group: h5py.Group, attributions: Attributions) -> Callable[[np.ndarray], float]:
    """Return the function that scores a cluster, given as a mask over the class's samples."""
    if context.config.rank.score == "fisher":
        embedding = group["embedding/spectral"][:]
        # Parts of a graph that do not hang together have no spread within: that is no number JSON could hold.
        return lambda member: min(separability(embedding, member.astype(int)), 1 / RIDGE)
    features = class_features(attributions, group["index"][:], context.config.analysis.grid)
    seed = context.config.seed
    X = principal_components(features, seed=seed)
    return lambda member: cross_fitted_separability(X, member, seed)


def _score_class(context: Context, c: int, group: h5py.Group, score: Callable[[np.ndarray], float]) -> list[Row]:
    rows, seen = [], {}
    for name in group["cluster"]:
        labels = group[f"cluster/{name}"][:]
        for label in np.unique(labels[labels >= 0]):
            member = labels == label
            size, n = int(member.sum()), len(member)
            if size < SMALLEST or size > LARGEST * n:
                continue
            key = member.tobytes()
            if key not in seen:
                seen[key] = score(member)
            rows.append(Row(c, name, int(label), size, n, seen[key]))
    return rows


def _cluster_row(context: Context, row: Row, best: dict[int, float]) -> dict[str, Any]:
    """Return a cluster's row; its p-value is the larger one of two, since both explanations have to be refuted.

    They are: a class without structure, and a natural kind of images such as other classes have too.
    """
    others = [score for c, score in best.items() if c != row.class_index]
    p_value = outlier_p_value(row.score, others)
    if context.config.rank.score != "fisher":
        p_value = max(p_value, structureless_p_value(row.score, row.n, row.size))
    return {
        "class_index": row.class_index,
        "class_name": context.train.classes[row.class_index],
        "cluster": f"{row.clustering}/{row.label}",
        "size": row.size,
        "separability": row.score,
        "p_value": p_value,
    }


def _class_row(context: Context, c: int, best: dict[int, float], clusters: list[dict[str, Any]]) -> dict[str, Any]:
    others = [score for other, score in best.items() if other != c]
    structure = min((row["p_value"] for row in clusters if row["class_index"] == c), default=1.0)
    return {
        "class_index": c,
        "class_name": context.train.classes[c],
        "n": int((context.train.labels == c).sum()),
        "separability": best[c],
        "p_value": max(outlier_p_value(best[c], others), structure) if best[c] > 0 else 1.0,
    }


def _ranked(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = sorted(rows, key=lambda row: (-row["separability"], row["class_index"], row.get("cluster", "")))
    return [{**row, "rank": rank} for rank, row in enumerate(rows, start=1)]


STAGE = Stage(
    name="rank",
    needs=("attribute", "analyze"),
    settings=("rank", "seed", "analysis.grid"),
    outputs=("ranking.json",),
    run=run,
)
