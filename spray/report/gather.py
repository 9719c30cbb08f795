"""Reads a run directory into the report's data; whatever is not there, or does not count, is "not run"."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spray.data.base import ImageDataset
from spray.report import evidence
from spray.report.data import (
    PASSED,
    Artifact,
    Embedding,
    Gallery,
    KindOfSample,
    RankRow,
    ReportData,
    Truth,
)
from spray.report.embeddings import POINTS, Wanted, embeddings
from spray.report.lights import lights
from spray.report.record import Results, facts, skipped, tables
from spray.report.verified import chosen, finite, further_checks, model_result, rate_interval, rechecks

_GALLERIES = 4  # artifacts shown with galleries at most
_FIRST_CANDIDATE = 1  # scores of rejected candidates that points can be coloured by, for each class
_OF_ARTIFACT = frozenset(
    (
        *("id", "class_index", "class_name", "cluster", "samples", "verdict", "kind", "opacity", "logit_gain"),
        *("flip_rate", "control_flip_rate", "p_value", "n_tested", "removal_cost", "removal_p_value"),
        *("mask", "pattern", "scores", "test_scores", "unusual"),
    )
)
_CAVEATS = (
    "Tidy clusters and high separability do not mean a right finding: they say where to look, and the causal "
    "test with its control decides.",
    "A finding says that the model relies on something; whether that is unintended is for someone who knows "
    "the data to judge.",
    "Spread-out artifacts such as blur or a change of brightness are hard to see in relevance. Nothing found "
    "is no proof that there is nothing.",
    "The isolated pattern is an estimate: the accuracy under it can be better or worse than under the real artifact.",
    "Intervals hold for the sampling of test images only; another seed of the training can give another model.",
)


def gather(
    run_dir: Path,
    dataset: ImageDataset,
    test: ImageDataset | None = None,
    *,
    title: str,
    model: str,
    truths: Sequence[Truth] = (),
    points: int = POINTS,
) -> ReportData:
    """Collect what the report shows.

    Parameters
    ----------
    run_dir : Path
        A run directory; every file in it may be missing, and only those of finished stages count.
    dataset : ImageDataset
        The training samples of the run.
    test : ImageDataset, optional
        Its test samples; the report only says how many there are and which could not be read.
    title, model : str
        What was studied.
    truths : sequence of Truth
        What was planted, where something was.
    points : int
        Most points in the embeddings altogether.
    """
    results = Results(run_dir)
    ranking, found, verification = (results.read(stage) for stage in ("rank", "isolate", "verify"))
    models = None if verification is None else verification.get("models", {})
    artifacts = None if found is None else _artifacts(results, dataset, found.get("artifacts", []), models or {})
    confirmed = [artifact for artifact in artifacts or () if artifact.passed]
    classes = _ranks(ranking, "classes", confirmed)
    analysis = results.path("analyze")
    plots: tuple[Embedding, ...] | None = None
    without: tuple[str, ...] = ()
    if analysis is not None:
        # Clusterings of further views are written by the stage that ranks.
        further = results.run_dir / "candidates.h5" if ranking is not None else None
        wanted = _wanted(results, dataset, confirmed, artifacts or (), ranking)
        further = further if further is not None and further.is_file() else None
        plots, without = embeddings(dataset, analysis, further, results.path("attribute"), wanted, points)
    too_small = results.stages.get("analyze", {}).get("facts", {}).get("too_small") or ()
    return ReportData(
        title=title,
        model=model,
        n_train=len(dataset),
        n_classes=len(dataset.classes),
        class_names=tuple(dataset.classes),
        n_test=None if test is None else len(test),
        artifacts=artifacts,
        lights=lights(dataset.classes, artifacts, classes, too_small),
        models=None if models is None else tuple(model_result(name, row) for name, row in models.items()),
        chosen=chosen(verification or {}),
        rechecks=rechecks(verification or {}),
        checks=tuple(further_checks(verification or {})),
        truths=tuple(truths),
        embeddings=plots,
        without_plot=without,
        classes=classes,
        clusters=_ranks(ranking, "clusters", confirmed),
        untested=_untested(dataset, artifacts),
        caveats=(*_own_caveats(confirmed, models), *_CAVEATS),
        provenance=tuple(results.provenance(dataset)),
        versions=results.versions(),
        config=results.config(),
        stages=tuple(results.stage_rows()),
        outputs=results.outputs(),
        skipped_samples=skipped(dataset, test, results.quarantined()),
    )


def _artifacts(
    results: Results, dataset: ImageDataset, rows: Sequence[Mapping[str, Any]], models: Mapping[str, Any]
) -> tuple[Artifact, ...]:
    shown = [row["id"] for row in rows if row.get("verdict") in PASSED][:_GALLERIES]
    return tuple(_artifact(results, dataset, row, models, row["id"] in shown) for row in rows)


def _artifact(
    results: Results,
    dataset: ImageDataset,
    row: Mapping[str, Any],
    models: Mapping[str, Any],
    with_gallery: bool,
) -> Artifact:
    run_dir, samples = results.run_dir, tuple(int(sample) for sample in row.get("samples", ()))
    groups: tuple[Gallery, ...] = ()
    limit = None
    attributions = results.path("attribute")
    scores = _scores(run_dir, row) if row.get("verdict") in PASSED else {}
    if with_gallery and attributions is not None:
        groups, limit = evidence.galleries(dataset, attributions, samples, row["class_index"], scores)
    effects = {name: entry.get("artifacts", {}).get(row["id"]) for name, entry in models.items()}
    bias = _bias(row.get("sample_bias")) if row.get("verdict") == "sample_bias" else None
    return Artifact(
        id=str(row["id"]),
        class_index=row["class_index"],
        class_name=row["class_name"],
        verdict=row.get("verdict", "no_effect"),
        cluster=None if row.get("cluster") is None else str(row["cluster"]),
        flip_rate=finite(row.get("flip_rate")),
        control_flip_rate=finite(row.get("control_flip_rate")),
        flip_rate_interval=rate_interval(row, "flip_rate"),
        control_flip_rate_interval=rate_interval(row, "control_flip_rate"),
        p_value=finite(row.get("p_value")),
        logit_gain=finite(row.get("logit_gain")),
        removal_cost=finite(row.get("removal_cost")),
        removal_p_value=finite(row.get("removal_p_value")),
        n_tested=row.get("n_tested"),
        kind=None if row.get("kind") is None else str(row["kind"]),
        unusual=row["unusual"] if isinstance(row.get("unusual"), bool) else None,
        opacity=finite(row.get("opacity")) if isinstance(row.get("opacity"), int | float) else None,
        bias=bias,
        further=facts(row, _OF_ARTIFACT | ({"sample_bias"} if bias else frozenset())),
        tables=tables(row),
        samples=samples,
        sample_names=tuple(dataset.names[sample] for sample in samples),
        scores=tuple(scores[sample] for sample in samples) if all(s in scores for s in samples) else (),
        pattern=_picture(run_dir, row.get("pattern"), "RGBA"),
        mask=_picture(run_dir, row.get("mask"), "L"),
        galleries=groups,
        limit=limit,
        effects=tuple(model_result(name, effect) for name, effect in effects.items() if effect),
    )


def _bias(known: Any) -> KindOfSample | None:
    if not isinstance(known, Mapping):
        return None
    accuracy, rest_accuracy, p_value = (finite(known.get(key)) for key in ("accuracy", "rest_accuracy", "p_value"))
    if accuracy is None or rest_accuracy is None:
        return None
    return KindOfSample(accuracy, rest_accuracy, p_value, known.get("held_out") is True)


def _scores(run_dir: Path, row: Mapping[str, Any]) -> dict[int, float]:
    path = run_dir / str(row.get("scores"))
    return evidence.read_scores(path) if path.is_file() else {}


def _wanted(
    results: Results,
    dataset: ImageDataset,
    confirmed: Sequence[Artifact],
    artifacts: Sequence[Artifact],
    ranking: Any,
) -> dict[int, Wanted]:
    """Return what is to be shown of each class: those of the artifacts first, then by the ranking."""
    wanted: dict[int, Wanted] = {}
    for artifact in confirmed:
        plot = wanted.setdefault(artifact.class_index, Wanted(_clustering(artifact.cluster)))
        plot.members |= set(artifact.samples)
    for row in (ranking or {}).get("classes", []):
        wanted.setdefault(row["class_index"], Wanted())
    for row in (ranking or {}).get("clusters", []):
        plot = wanted.setdefault(row["class_index"], Wanted())
        plot.clustering = plot.clustering or _clustering(row.get("cluster"))
    rejected: dict[int, int] = {}
    for artifact in (*confirmed, *(artifact for artifact in artifacts if not artifact.passed)):
        rejected[artifact.class_index] = rejected.get(artifact.class_index, 0) + (not artifact.passed)
        if artifact.passed or rejected[artifact.class_index] <= _FIRST_CANDIDATE:
            scores = _scores(results.run_dir, {"scores": f"artifacts/{artifact.id}/scores.csv"})
            if scores:
                of_class = np.flatnonzero(dataset.labels == artifact.class_index).tolist()
                plot = wanted.setdefault(artifact.class_index, Wanted())
                plot.scores[f"artifact score of {artifact.id}"] = {i: scores[i] for i in of_class if i in scores}
    return wanted


def _clustering(cluster: Any) -> str | None:
    return None if cluster is None else str(cluster).rpartition("/")[0]


def _picture(run_dir: Path, name: str | None, mode: str) -> np.ndarray | None:
    from PIL import Image

    if name is None or not (run_dir / name).is_file():
        return None
    with Image.open(run_dir / name) as picture:
        return np.asarray(picture.convert(mode))


def _ranks(ranking: Any, kind: str, confirmed: Sequence[Artifact]) -> tuple[RankRow, ...] | None:
    if ranking is None:
        return None
    classes = {artifact.class_index for artifact in confirmed}
    clusters = {(artifact.class_index, artifact.cluster) for artifact in confirmed}
    best = {row["class_index"]: finite(row.get("score")) for row in ranking.get("classes", [])}
    rows = []
    for place, row in enumerate(ranking.get(kind, []), start=1):
        cluster = None if row.get("cluster") is None else str(row["cluster"])
        index = row["class_index"]
        others = [score for other, score in best.items() if other != index and score is not None]
        evidence_of = ((key, finite(value)) for key, value in (row.get("evidence") or {}).items())
        rows.append(
            RankRow(
                rank=row.get("rank", place),
                class_name=row["class_name"],
                size=row.get("n", row.get("size", 0)),
                separability=finite(row.get("separability")),
                p_value=finite(row.get("p_value")),
                cluster=cluster,
                found=index in classes if cluster is None else (index, cluster) in clusters,
                class_index=index,
                q_value=finite(row.get("q_value")),
                score=finite(row.get("score")),
                null=(min(others), float(np.median(others)), max(others)) if others else None,
                evidence=tuple((key, value) for key, value in evidence_of if value is not None),
            )
        )
    return tuple(rows)


def _untested(dataset: ImageDataset, artifacts: Sequence[Artifact] | None) -> tuple[str, ...]:
    """Return the classes of which no candidate was put to the test; none where nothing was isolated yet."""
    if artifacts is None:
        return ()
    tested = {artifact.class_index for artifact in artifacts}
    return tuple(name for index, name in enumerate(dataset.classes) if index not in tested)


def _own_caveats(confirmed: Sequence[Artifact], models: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield what this run in particular leaves open."""
    for artifact in confirmed:
        if artifact.n_tested is not None and artifact.n_tested < 50:
            yield f"The effect of {artifact.id} was tested on {artifact.n_tested} images only."
    if confirmed and models and not any(name in models for name in ("fine_tune", "fine_tuned")):
        yield "There is no plain fine-tuning to compare with: a gain may come from more training alone."
