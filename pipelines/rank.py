"""The fourth stage: classes and clusters ranked by how separable they are, with p-values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import h5py
import numpy as np
from threadpoolctl import threadpool_limits

from spray.analysis import separability
from spray.analysis.fisher import RIDGE
from spray.analysis.resampling import add_recovery
from spray.analysis.scoring import (
    SMALLEST,
    Candidate,
    Verdict,
    View,
    content_candidate,
    distinct_samples,
    find_candidates,
    judge,
    most_separable,
)
from spray.analysis.views import view_features, view_labelings
from spray.pipelines.again import clusterers_of, held_out_features
from spray.pipelines.analysis_options import preprocessing_of, source_array
from spray.pipelines.analyze import read_features
from spray.pipelines.context import Context
from spray.pipelines.looking import Drawn, draw_images, look_at, repeated_in_class
from spray.pipelines.stage import Stage
from spray.storage import hdf5_writer, write_json
from spray.store import Attributions, open_attributions
from spray.store.analyses import AnalysisGroup, open_analysis

CANDIDATES = "candidates.h5"
"""Clusterings of further views of the heatmaps, laid out as in `analysis.h5`."""


def run(context: Context) -> dict[str, Any]:
    """Write `ranking.json`."""
    classes, options = context.train.classes, context.config.rank
    found: list[Candidate] = []
    shape = (len(context.train), None, None, None)
    with (
        open_analysis(context.run_dir / "analysis.h5", len(context.train)) as analysis,
        open_attributions(context.run_dir / "attributions.h5", shape=shape) as attributions,
        hdf5_writer(context.run_dir / CANDIDATES) as further,
        # On matrices this small more threads only wait for each other, for long where other jobs want the cores.
        threadpool_limits(1),
    ):
        searched = options.score != "fisher" and "repeated" in options.evidence and bool(analysis.classes)
        drawn = draw_images(context) if searched else None
        for c in context.progress(analysis.classes, len(analysis.classes), "classes ranked"):
            found += _candidates(context, c, analysis.group(c), attributions, further, drawn)
    kinds = () if options.score == "fisher" else tuple(options.evidence)
    of_class, of_cluster = judge(found, range(len(classes)), kinds, options.correction, options.score != "fisher")
    class_rows = [_class_row(context, c, verdict, found) for c, verdict in of_class.items()]
    cluster_rows = [_cluster_row(context, candidate, v) for candidate, v in zip(found, of_cluster, strict=True)]
    rows = {"classes": _ranked(class_rows), "clusters": _ranked(cluster_rows)}
    write_json(
        context.run_dir / "ranking.json",
        rows | {"score": options.score, "evidence": list(kinds), "correction": options.correction},
    )
    first = rows["classes"][0]
    context.log.info(
        "first class: %r, separability %.1f (p = %.2g, q = %.2g)",
        first["class_name"],
        first["separability"],
        first["p_value"],
        first["q_value"],
    )
    return {"clusters": len(cluster_rows)}


def _candidates(
    context: Context, c: int, group: AnalysisGroup, attributions: Attributions, further: h5py.File, drawn: Drawn | None
) -> list[Candidate]:
    """Return a class's clusters with the evidence that is asked for; write those of further views."""
    options, seed = context.config.rank, context.config.seed
    labelings = {name: group.labels(name) for name in group.clusterings}
    if options.score == "fisher":
        embedding = group.embedding()
        # Parts of a graph that do not hang together have no spread within: that is no number JSON could hold.
        return find_candidates(
            c,
            View(embedding, labelings),
            score=lambda member: min(separability(embedding, member.astype(int)), 1 / RIDGE),
        )
    analysis = context.config.analysis
    features = read_features(attributions, group.index, preprocessing_of(analysis), source_array(analysis)).values
    views = [View(features, labelings), *_further_views(context, group, attributions, further)]
    first, found, chosen = distinct_samples(features), [], []
    other = held_out_features(context, group.index, attributions) if "held_out" in options.evidence else None
    # A class of very few samples has no further views.
    for view, clusterers in zip(views, clusterers_of(context), strict=False):
        of_view = find_candidates(c, view, seed, first, other)
        separable = most_separable(of_view, options.looked_at)
        again = options.draws, analysis.n_neighbors, analysis.n_components, seed
        metric = analysis.metric if view is views[0] else "euclidean"
        add_recovery(separable, view.features, clusterers, *again, metric)
        found += of_view
        chosen += separable
    if "confidence" in options.evidence:
        _add_confidence(found, c, np.asarray(attributions.prediction[group.index]))
    if {"content", "concentration"} & set(options.evidence) and chosen:
        look_at(context, chosen, group.index, attributions)
    if drawn is not None:
        found += _repeated(context, c, group, attributions, features, first, further, drawn)
    return found


def _repeated(
    context: Context,
    c: int,
    group: AnalysisGroup,
    attributions: Attributions,
    features: np.ndarray,
    first: np.ndarray,
    further: h5py.File,
    drawn: Drawn,
) -> list[Candidate]:
    """Return groups of a class's samples that have a part of their images in common; write them as clusterings."""
    found = []
    for number, repeated in enumerate(repeated_in_class(context, c, group.index, attributions, drawn), start=1):
        name = f"repeated-{number:02d}"
        candidate = content_candidate(c, f"{name}/0", features, repeated, first, context.config.seed)
        if candidate is not None:
            found.append(candidate)
            labels = np.where(repeated.member, 0, -1).astype(np.int32)
            further[group.name].create_dataset(f"cluster/{name}", data=labels, fletcher32=True)
    return found


def _further_views(
    context: Context, group: AnalysisGroup, attributions: Attributions, further: h5py.File
) -> list[View]:
    """Compare a class's heatmaps in the views of `rank.views`; write the clusterings as `analysis.h5` has them."""
    options, n = context.config.analysis, len(group)
    found = []
    for name in context.config.rank.views if n >= SMALLEST else ():
        features = view_features(name, partial(_heatmaps, attributions, group.index), n, options.grid)
        sets = view_labelings(
            name, features, options.n_clusters, options.n_neighbors, options.n_components, context.config.seed
        )
        found.append(View(features, sets))
    at = further.create_group(group.name)
    at.create_dataset("index", data=group.index.astype(np.uint32), fletcher32=n > 0)
    for view in found:
        for clustering, labels in view.labelings.items():
            at.create_dataset(f"cluster/{clustering}", data=labels.astype(np.int32), fletcher32=True)
    return found


def _heatmaps(attributions: Attributions, index: np.ndarray) -> Iterator[np.ndarray]:
    for _, part in attributions.batches(index):
        yield part.astype(np.float32, copy=False)


def _add_confidence(found: Sequence[Candidate], c: int, logits: np.ndarray) -> None:
    """Add by how much surer of the class the model is in a cluster than in the rest, in standard deviations."""
    margin = logits[:, c] - np.delete(logits, c, axis=1).max(axis=1, initial=-np.inf)
    spread = float(margin.std())
    if np.isfinite(spread) and spread > 0:
        for x in found:
            x.evidence["confidence"] = float(margin[x.member].mean() - margin[~x.member].mean()) / spread


def _cluster_row(context: Context, candidate: Candidate, verdict: Verdict) -> dict[str, Any]:
    return {
        "class_index": candidate.class_index,
        "class_name": context.train.classes[candidate.class_index],
        "cluster": candidate.cluster,
        "size": candidate.size,
        "separability": candidate.separability,
        "p_value": verdict.p_value,
        "q_value": verdict.q_value,
        "score": verdict.score,
        "evidence": dict(candidate.evidence),
    }


def _class_row(context: Context, c: int, verdict: Verdict, found: Sequence[Candidate]) -> dict[str, Any]:
    return {
        "class_index": c,
        "class_name": context.train.classes[c],
        "n": int((context.train.labels == c).sum()),
        "separability": max((x.separability for x in found if x.class_index == c), default=0.0),
        "p_value": verdict.p_value,
        "q_value": verdict.q_value,
        "score": verdict.score,
    }


def _ranked(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = sorted(rows, key=lambda row: (-row["score"], row["class_index"], row.get("cluster", "")))
    return [{**row, "rank": rank} for rank, row in enumerate(rows, start=1)]


STAGE = Stage(
    name="rank",
    needs=("attribute", "analyze"),
    settings=("rank", "seed", "analysis"),
    outputs=("ranking.json", CANDIDATES),
    run=run,
)
