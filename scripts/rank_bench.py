"""What the ranking finds and what it calls wrongly: calibration, power and ablation, on the runs of `rank_cells.py`.

    python scripts/rank_cells.py --out outputs/rank --jobs 2
    python scripts/rank_bench.py --out outputs/rank --jobs 2

Clusters and evidence of each run are kept in its folder (`clusters.json`), so that the tables, which follow from them
in seconds, can be made again with other weights. The score was built looking at the seeds `TUNING`; the tables are of
the other seeds, `REPORTED`. A run relies on its artifact if the true artifact on test images of the other classes costs
five points of accuracy or more.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import rank_tables
from rank_cells import LAYERS, SETS, Cell, cells, context_of

VERSION = 1
"""Raised when the clusters or their evidence are computed in another way."""
VIEWS: dict[str, tuple[Any, ...]] = {
    "place": ("sum", "pool", "normalize_sum"),
    "scaled": ("sum", "pool", "normalize_sum"),
    "peak": ("sum", {"peak": 9}, "normalize_sum"),
}
COUNTS = (2, 3, 4, 5, 6, 7, 8)
LOOKED_AT = 6


def clusters_of(cell: Cell, out: Path) -> dict[str, Any]:
    """Return all clusters of a run with their evidence, computed once."""
    path = out / cell.name / "clusters.json"
    if path.is_file():
        kept = json.loads(path.read_text())
        if kept["version"] == VERSION:
            return kept
    import h5py
    import torch
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(1)
    record = json.loads((out / cell.name / "cell.json").read_text())
    context = context_of(cell, out)
    with h5py.File(out / cell.name / "attributions.h5") as file:
        relevance = file["attribution"][:].astype(np.float32)
        logits, layer = file["prediction"][:], file[f"layer/{LAYERS[0]}"][:].astype(np.float32)
    truth = np.zeros(len(relevance), dtype=bool)
    truth[record["samples"]] = True
    rows: list[dict[str, Any]] = []
    with threadpool_limits(1):
        for c in range(len(context.train.classes)):
            index = np.flatnonzero(context.train.labels == c)
            images = context.train.batch(index).numpy()
            rows += _class_rows(c, relevance[index], images, logits[index], layer[index], truth[index])
    result = {"version": VERSION, **record, "n_classes": len(context.train.classes), "rows": rows}
    path.with_suffix(".part").write_text(json.dumps(result))
    path.with_suffix(".part").rename(path)
    return result


def scaled(features: np.ndarray) -> np.ndarray:
    """Return features in units of their usual deviation in the class, so that relevance at unusual places counts."""
    middle = np.median(features, axis=0)
    deviation = 1.4826 * np.median(np.abs(features - middle), axis=0) + 0.05 * np.abs(features).mean()
    return np.clip((features - middle) / deviation, -10, 10).astype(np.float32)


def labelings(features: np.ndarray, seed: int = 0) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the spectral embedding and its clusterings, as the stage makes them."""
    from spray.analysis import cluster, spectral_embedding
    from spray.analysis.clustering import spectral_rows

    _, vectors = spectral_embedding(features, 10, 32, seed)
    found = {f"kmeans-{k:02d}": cluster(spectral_rows(vectors, k), "kmeans", n_clusters=k, seed=seed) for k in COUNTS}
    return vectors, found


def _class_rows(
    c: int, relevance: np.ndarray, images: np.ndarray, logits: np.ndarray, layer: np.ndarray, truth: np.ndarray
) -> list[dict[str, Any]]:
    from spray.analysis.content import relevance_peaks, shared_content
    from spray.analysis.preprocessing import Preprocessing
    from spray.analysis.ranking import cross_fitted_separability, principal_components
    from spray.analysis.scoring import View, concentration, distinct_samples, find_candidates, most_separable

    maps = relevance[:, 0]
    peaks = relevance_peaks(maps)
    held_out = principal_components(layer / np.maximum(np.abs(layer).sum(axis=1, keepdims=True), 1e-30))
    margin = logits[:, c] - np.delete(logits, c, axis=1).max(axis=1)
    sharpness = concentration(maps)
    rows = []
    for view, steps in VIEWS.items():
        features = Preprocessing(steps).features(lambda: [relevance], len(relevance)).values
        features = scaled(features) if view == "scaled" else features
        vectors, found = labelings(features)
        candidates = find_candidates(c, View(features, found), 0, distinct_samples(features))
        for x in most_separable(candidates, LOOKED_AT):
            x.evidence["content"] = shared_content(images, maps, x.member, peaks)
            x.evidence["held_out"] = float(np.log1p(cross_fitted_separability(held_out, x.member)))
        for x in candidates:
            for name, values in (("confidence", margin), ("concentration", sharpness)):
                x.evidence[name] = float((values[x.member].mean() - values[~x.member].mean()) / max(values.std(), 1e-9))
            rows.append(
                {
                    **_facts(f"{view}-{x.cluster}", view, c, x.member, truth),
                    "tau": x.separability,
                    "distinct": x.distinct,
                    "n": x.n,
                    "auroc": _auroc(x.projection, truth),
                    "evidence": x.evidence,
                }
            )
        if view == "place":
            rows += _baselines(c, vectors, found, truth)
    return rows


def _baselines(c: int, vectors: np.ndarray, found: dict[str, np.ndarray], truth: np.ndarray) -> list[dict[str, Any]]:
    """Return the clusters with the scores to compare with: in-sample τ, size, silhouette; and CoRelAy's clusters."""
    from sklearn.metrics import silhouette_samples

    from spray.analysis import cluster, separability
    from spray.analysis.fisher import RIDGE

    rows = []
    corelay = {f"kmeans-{k:02d}": cluster(vectors, "kmeans", n_clusters=k, seed=0) for k in COUNTS}
    for view, sets in (("plain", found), ("corelay", corelay)):
        for name, labels in sets.items():
            widths = silhouette_samples(vectors, labels) if view == "plain" and len(np.unique(labels)) > 1 else None
            for label in np.unique(labels):
                member = labels == label
                if not 8 <= member.sum() <= 0.5 * len(member):
                    continue
                within = vectors - np.where(member[:, None], vectors[member].mean(0), vectors[~member].mean(0))
                w = np.linalg.pinv(within.T @ within) @ (vectors[member].mean(0) - vectors[~member].mean(0))
                rows.append(
                    {
                        **_facts(f"{view}-{name}/{label}", view, c, member, truth),
                        "tau": min(separability(vectors, member.astype(int)), 1 / RIDGE),
                        "silhouette": None if widths is None else float(widths[member].mean()),
                        "auroc": _auroc(vectors @ w, truth),
                    }
                )
    return rows


def _facts(name: str, view: str, c: int, member: np.ndarray, truth: np.ndarray) -> dict[str, Any]:
    hits = int((member & truth).sum())
    return {"cluster": name, "view": view, "c": c, "size": int(member.sum()), "hits": hits, "planted": int(truth.sum())}


def _auroc(score: np.ndarray | None, truth: np.ndarray) -> float | None:
    from scipy.stats import rankdata

    if score is None or not 0 < truth.sum() < len(truth):
        return None
    ranks = rankdata(np.nan_to_num(score, nan=0.0))
    n = int(truth.sum())
    return float((ranks[truth].sum() - n * (n + 1) / 2) / (n * (len(truth) - n)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/rank"))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--tuning", action="store_true", help="tables of the seeds that the score was built with")
    parser.add_argument("--structureless", type=int, default=400, help="draws of classes without structure")
    options = parser.parse_args()
    there = [cell for cell in cells(list(SETS)) if (options.out / cell.name / "cell.json").is_file()]
    print(f"{len(there)} of {len(list(cells(list(SETS))))} runs are there", file=sys.stderr, flush=True)
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        results = list(pool.map(clusters_of, there, [options.out] * len(there)))
    print(rank_tables.tables(results, options.tuning, options.structureless, options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
