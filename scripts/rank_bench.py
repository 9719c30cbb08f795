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
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import rank_tables
from rank_cells import LAYERS, SETS, Cell, cells, context_of

VERSION = 1
"""Raised when the clusters or their evidence are computed in another way."""
PLACE = ("sum", "pool", "normalize_sum")
"""Steps of the analysis by default; the ranking adds views of its own."""
KINDS = ("normal", "correlated", "decaying", "heavy")
"""Of draws without structure: a round normal cloud, smooth noise, variances that fall as 1/k², Student's t(5)."""
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


def repeated_of(cell: Cell, out: Path) -> list[dict[str, Any]]:
    """Return what is repeated in the images of each class of a run, as rows like those of clusters, computed once."""
    path = out / cell.name / "repeated.json"
    if path.is_file():
        kept = json.loads(path.read_text())
        if kept["version"] == VERSION:
            return kept["rows"]
    import h5py
    import torch
    from threadpoolctl import threadpool_limits

    from spray.analysis import repeated
    from spray.analysis.content import spread_evenly
    from spray.analysis.preprocessing import Preprocessing
    from spray.analysis.scoring import content_candidate, distinct_samples

    torch.set_num_threads(1)
    context = context_of(cell, out)
    with h5py.File(out / cell.name / "attributions.h5") as file:
        relevance = file["attribution"][:].astype(np.float32)
    truth = np.zeros(len(relevance), dtype=bool)
    truth[json.loads((out / cell.name / "cell.json").read_text())["samples"]] = True
    rows: list[dict[str, Any]] = []
    with threadpool_limits(1):
        for c in range(len(context.train.classes)):
            index = np.flatnonzero(context.train.labels == c)
            maps = relevance[index]
            others = spread_evenly(np.flatnonzero(context.train.labels != c), repeated.OTHERS)
            images, elsewhere = (context.train.batch(which).numpy() for which in (index, others))
            features = Preprocessing(PLACE).features(partial(list, (maps,)), len(maps)).values
            first = distinct_samples(features)
            for number, found in enumerate(repeated.repeated_content(images, maps[:, 0], elsewhere), start=1):
                x = content_candidate(c, f"repeated-{number:02d}/0", features, found, first)
                if x is not None:
                    facts = _facts(x.cluster, "repeated", c, x.member, truth[index])
                    numbers = {"tau": x.separability, "distinct": x.distinct, "n": x.n, "evidence": x.evidence}
                    rows.append({**facts, **numbers, "auroc": _auroc(x.projection, truth[index])})
    path.with_suffix(".part").write_text(json.dumps({"version": VERSION, "rows": rows}))
    path.with_suffix(".part").rename(path)
    return rows


def resampled_of(cell: Cell, out: Path) -> dict[str, float]:
    """Return how well the clusters that are looked at are found again in parts of their class, computed once."""
    path = out / cell.name / "resampled.json"
    if path.is_file():
        return dict(json.loads(path.read_text()))
    import h5py
    import torch
    from threadpoolctl import threadpool_limits

    from spray.analysis import cluster, spectral_embedding
    from spray.analysis.clustering import spectral_rows
    from spray.analysis.preprocessing import Preprocessing
    from spray.analysis.resampling import add_recovery, kmeans_clusterer
    from spray.analysis.scoring import Candidate
    from spray.analysis.views import STEPS, view_features

    torch.set_num_threads(1)
    rows = clusters_of(cell, out)["rows"]
    with h5py.File(out / cell.name / "attributions.h5") as file:
        relevance, labels = file["attribution"][:].astype(np.float32), file["label"][:]
    found: dict[str, float] = {}
    again = {f"kmeans-{k:02d}": kmeans_clusterer(k) for k in COUNTS}
    with threadpool_limits(1):
        for c, view in ((c, view) for c in np.unique(labels) for view in ("place", *STEPS)):
            own = sorted((r for r in rows if r["c"] == c and r["view"] == view), key=lambda r: -r["tau"])[:LOOKED_AT]
            maps = relevance[labels == c]
            if view == "place":
                features = Preprocessing(PLACE).features(partial(list, (maps,)), len(maps)).values
            else:
                features = view_features(view, partial(list, (maps,)), len(maps))
            _, vectors = spectral_embedding(features, 10, 32)
            chosen = {}
            for row in own:
                name, label = row["cluster"].removeprefix(f"{view}-").split("/")
                k = int(name[-2:])
                member = cluster(spectral_rows(vectors, k), "kmeans", n_clusters=k, seed=0) == int(label)
                assert member.sum() == row["size"]
                chosen[row["cluster"]] = Candidate(int(c), f"{name}/{label}", member, row["tau"], 0, 0)
            add_recovery(list(chosen.values()), features, again)
            found |= {f"{c}/{name}": x.evidence["resampling"] for name, x in chosen.items() if x.evidence}
    path.with_suffix(".part").write_text(json.dumps(found))
    path.with_suffix(".part").rename(path)
    return found


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
    from spray.analysis.views import STEPS, view_features

    maps = relevance[:, 0]
    peaks = relevance_peaks(maps)
    held_out = principal_components(layer / np.maximum(np.abs(layer).sum(axis=1, keepdims=True), 1e-30))
    margin = logits[:, c] - np.delete(logits, c, axis=1).max(axis=1)
    sharpness = concentration(maps)
    rows = []
    views = {"place": Preprocessing(PLACE).features(lambda: [relevance], len(relevance)).values}
    views |= {view: view_features(view, lambda: [relevance], len(relevance)) for view in STEPS}
    for view, features in views.items():
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


def structureless(kind: str, number: int, out: Path) -> dict[str, Any]:
    """Return the clusters of eight classes of 100 to 500 draws without any structure, computed once."""
    path = out / "structureless" / f"{kind}-{number}.json"
    if path.is_file():
        return json.loads(path.read_text())
    from scipy.ndimage import gaussian_filter

    from spray.analysis.scoring import View, distinct_samples, find_candidates
    from spray.analysis.views import scaled

    rng, rows = np.random.default_rng([number, KINDS.index(kind)]), []
    for c in range(8):
        n = int(rng.integers(100, 500))
        X = rng.normal(size=(n, 64))
        if kind == "correlated":
            X = gaussian_filter(rng.normal(size=(n, 16, 16)), (0, 2, 2)).reshape(n, -1)
        elif kind == "decaying":
            X *= np.arange(1, 65) ** -1.0
        elif kind == "heavy":
            X *= np.arange(1, 65) ** -0.5 / np.sqrt(rng.chisquare(5, size=(n, 1)) / 5)
        for view, features in (("place", X.astype(np.float32)), ("scaled", scaled(X))):
            _, found = labelings(features)
            for x in find_candidates(c, View(features, found), 0, distinct_samples(features)):
                facts = _facts(f"{view}-{x.cluster}", view, c, x.member, np.zeros(n, dtype=bool))
                rows.append({**facts, "tau": x.separability, "distinct": x.distinct, "n": x.n, "evidence": x.evidence})
    name = f"structureless, {kind}"
    result = {"dataset": name, "seed": number, "rate": 0, "target": None, "n_classes": 8, "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result))
    return result


def twin_loss(cell: Cell, out: Path) -> float | None:
    """Return the accuracy that the cell's artifact costs the clean model of its seed; None if that is not there."""
    import torch

    from spray.data.planting import planted_truth

    twin = Cell(cell.dataset, cell.seed)
    path = out / cell.name / "twin.json"
    if path.is_file():
        return float(json.loads(path.read_text()))
    if not (out / twin.name / "cell.json").is_file():
        return None
    torch.set_num_threads(1)
    context, clean = context_of(cell, out), context_of(twin, out)
    truth = planted_truth(context.config.dataset.plant, context.train)
    assert truth is not None
    others = np.flatnonzero(context.test.labels != truth.class_index)
    pixels, labels = context.test.batch(others), context.test.labels[others]
    marked, _ = truth.plant.mark(pixels, [f"test:{i}" for i in others])
    before, after = (
        float((clean.predict_pixels(clean.model, part).argmax(1).numpy() == labels).mean()) for part in (pixels, marked)
    )
    path.write_text(json.dumps(before - after))
    return before - after


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/rank"))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--tuning", action="store_true", help="tables of the seeds that the score was built with")
    parser.add_argument("--ready", action="store_true", help="only of runs whose clusters are there already")
    parser.add_argument("--structureless", type=int, default=8, help="runs of each kind of eight structureless classes")
    options = parser.parse_args()
    need = "clusters.json" if options.ready else "cell.json"
    there = [cell for cell in cells(list(SETS)) if (options.out / cell.name / need).is_file()]
    print(f"{len(there)} of {len(list(cells(list(SETS))))} runs are there", file=sys.stderr, flush=True)
    draws = [(kind, number) for kind in KINDS for number in range(options.structureless)]
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        results = list(pool.map(clusters_of, there, [options.out] * len(there)))
        if not options.ready:
            needed = [
                i
                for i, run in enumerate(results)
                if (rank_tables.relies(run) or not run["rate"]) and rank_tables.tuned(run) == options.tuning
            ]
            again = pool.map(resampled_of, [there[i] for i in needed], [options.out] * len(needed))
            for i, found in zip(needed, again, strict=True):
                for row in results[i]["rows"]:
                    if (value := found.get(f"{row['c']}/{row['cluster']}")) is not None:
                        row["evidence"]["resampling"] = value
        for result, rows in zip(results, pool.map(repeated_of, there, [options.out] * len(there)), strict=True):
            result["rows"] += rows
        nothing = list(pool.map(structureless, *zip(*draws, strict=True), [options.out] * len(draws))) if draws else []
        relying = [i for i, run in enumerate(results) if rank_tables.relies(run)]
        if not options.ready:
            losses = pool.map(twin_loss, [there[i] for i in relying], [options.out] * len(relying))
            for i, loss in zip(relying, losses, strict=True):
                results[i]["twin_loss"] = loss
    print(rank_tables.tables(results, options.tuning, nothing))
    return 0


if __name__ == "__main__":
    sys.exit(main())
