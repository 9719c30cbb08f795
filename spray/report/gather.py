"""Reads a run directory into the report's data; whatever is not there is "not run"."""

from __future__ import annotations

import csv
import json
import shlex
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
    ModelResult,
    RankRow,
    ReportData,
    Share,
    StageRow,
    Truth,
)
from spray.report.words import PROVENANCE, number
from spray.storage import read_json
from spray.store.analyses import open_analysis

_CLASSES = 4  # embeddings shown at most
_GALLERIES = 4  # artifacts shown with galleries at most
_POINTS = 1600  # points with thumbnails on the whole page
_POINTS_OF_CLASS = 1000
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
    truth: Truth | None = None,
) -> ReportData:
    """Collect what the report shows.

    Parameters
    ----------
    run_dir : Path
        A run directory; every file in it may be missing.
    dataset : ImageDataset
        The training samples of the run.
    test : ImageDataset, optional
        Its test samples; the report only says which of them could not be read.
    title, model : str
        What was studied.
    truth : Truth, optional
        The planted artifact, where there is one.
    """
    run_dir = Path(run_dir)
    ranking, verification = _read(run_dir / "ranking.json"), _read(run_dir / "verification.json")
    found = _read(run_dir / "artifacts.json")
    run = _read(run_dir / "run.json") or {}
    models = None if verification is None else verification.get("models", {})
    artifacts = None if found is None else _artifacts(run_dir, dataset, found.get("artifacts", []), models or {})
    confirmed = [artifact for artifact in artifacts or () if artifact.passed]
    return ReportData(
        title=title,
        model=model,
        n_train=len(dataset),
        n_classes=len(dataset.classes),
        artifacts=artifacts,
        models=None if models is None else tuple(_model(name, row) for name, row in models.items()),
        truth=truth,
        embeddings=_embeddings(run_dir / "analysis.h5", dataset, confirmed, ranking),
        classes=_ranks(ranking, "classes", confirmed),
        clusters=_ranks(ranking, "clusters", confirmed),
        caveats=(*_own_caveats(confirmed, models), *_CAVEATS),
        provenance=tuple(_provenance(run, dataset)),
        versions=tuple((name, str(version)) for name, version in run.get("versions", {}).items() if version),
        stages=tuple(_stages(run)),
        skipped_samples=(*_unreadable(dataset, test), *_quarantined(run_dir / "quarantined.csv")),
    )


def _unreadable(dataset: ImageDataset, test: ImageDataset | None) -> Iterator[str]:
    for part, which in ((dataset, ""), (test, "test image ")):
        for name, why in getattr(part, "unreadable", ()):
            yield f"{which}{name}: {why}"


def _quarantined(path: Path) -> Iterator[str]:
    """Say which samples have a row of zeros instead of a heatmap, and why."""
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if row["sample_index"]:  # the others had been left out from the start
                    yield f"{row['name']} (sample {row['sample_index']}): {row['reason']}"


def _read(path: Path) -> Any:
    return read_json(path) if path.is_file() else None


def _artifacts(
    run_dir: Path, dataset: ImageDataset, rows: Sequence[Mapping[str, Any]], models: Mapping[str, Any]
) -> tuple[Artifact, ...]:
    shown = [row["id"] for row in rows if row.get("verdict") in PASSED][:_GALLERIES]
    return tuple(_artifact(run_dir, dataset, row, models, row["id"] in shown) for row in rows)


def _artifact(
    run_dir: Path,
    dataset: ImageDataset,
    row: Mapping[str, Any],
    models: Mapping[str, Any],
    with_gallery: bool,
) -> Artifact:
    samples = tuple(int(sample) for sample in row.get("samples", ()))
    groups: tuple[Gallery, ...] = ()
    limit = None
    attributions, scores = run_dir / "attributions.h5", run_dir / str(row.get("scores"))
    if with_gallery and attributions.is_file():
        read = evidence.read_scores(scores) if scores.is_file() else {}
        groups, limit = evidence.galleries(dataset, attributions, samples, row["class_index"], read)
    effects = {name: entry.get("artifacts", {}).get(row["id"]) for name, entry in models.items()}
    return Artifact(
        id=str(row["id"]),
        class_index=row["class_index"],
        class_name=row["class_name"],
        verdict=row.get("verdict", "no_effect"),
        cluster=None if row.get("cluster") is None else str(row["cluster"]),
        **{name: _finite(row.get(name)) for name in ("flip_rate", "control_flip_rate", "p_value", "logit_gain")},
        **{name: _finite(row.get(name)) for name in ("removal_cost", "removal_p_value")},
        n_tested=row.get("n_tested"),
        samples=samples,
        sample_names=tuple(dataset.names[sample] for sample in samples),
        pattern=_picture(run_dir, row.get("pattern"), "RGBA"),
        mask=_picture(run_dir, row.get("mask"), "L"),
        galleries=groups,
        limit=limit,
        effects=tuple(_model(name, effect) for name, effect in effects.items() if effect),
    )


def _picture(run_dir: Path, name: str | None, mode: str) -> np.ndarray | None:
    from PIL import Image

    if name is None or not (run_dir / name).is_file():
        return None
    with Image.open(run_dir / name) as picture:
        return np.asarray(picture.convert(mode))


def _model(name: str, row: Mapping[str, Any]) -> ModelResult:
    planted = row.get("planted") or {}
    return ModelResult(
        name=name,
        n=row.get("n"),
        clean=_share(row, "clean_accuracy"),
        attacked=_share(row, "attacked_accuracy"),
        attacked_to_class=_share(row, "attacked_to_class"),
        artifact_relevance=_share(row, "artifact_relevance"),
        worst_class=_share(row, "worst_class_accuracy"),
        planted_attacked=_share(planted, "attacked_accuracy"),
        planted_to_class=_share(planted, "attacked_to_class"),
    )


def _share(row: Mapping[str, Any], name: str) -> Share | None:
    value = _finite(row.get(name))
    low, high = row.get(f"{name}_interval") or (None, None)
    return None if value is None else Share(value, low, high)


def _finite(value: Any) -> float | None:
    return float(value) if value is not None and np.isfinite(value) else None


def _ranks(ranking: Any, kind: str, confirmed: Sequence[Artifact]) -> tuple[RankRow, ...] | None:
    if ranking is None:
        return None
    classes = {artifact.class_index for artifact in confirmed}
    clusters = {(artifact.class_index, artifact.cluster) for artifact in confirmed}
    rows = []
    for place, row in enumerate(ranking.get(kind, []), start=1):
        cluster = None if row.get("cluster") is None else str(row["cluster"])
        index = row["class_index"]
        rows.append(
            RankRow(
                rank=row.get("rank", place),
                class_name=row["class_name"],
                size=row.get("n", row.get("size", 0)),
                separability=_finite(row.get("separability")),
                p_value=_finite(row.get("p_value")),
                cluster=cluster,
                found=index in classes if cluster is None else (index, cluster) in clusters,
            )
        )
    return tuple(rows)


def _embeddings(
    path: Path, dataset: ImageDataset, confirmed: Sequence[Artifact], ranking: Any
) -> tuple[Embedding, ...] | None:
    """Return the classes of the artifacts and the first of the ranking, in the clustering that counts."""
    if not path.is_file():
        return None
    wanted: dict[int, str | None] = {}
    for artifact in confirmed:
        wanted.setdefault(artifact.class_index, artifact.cluster)
    if ranking and ranking.get("classes"):
        first = ranking["classes"][0]["class_index"]
        rows = (row["cluster"] for row in ranking.get("clusters", []) if row["class_index"] == first)
        wanted.setdefault(first, next(rows, None))
    with open_analysis(path, len(dataset)) as analysis:
        if not wanted:
            wanted = dict.fromkeys(analysis.classes[:1])
        shown = [(index, cluster) for index, cluster in wanted.items() if index in analysis.classes][:_CLASSES]
        most = min(_POINTS_OF_CLASS, _POINTS // max(1, len(shown)))
        plots = []
        for index, cluster in shown:
            members = {s for artifact in confirmed if artifact.class_index == index for s in artifact.samples}
            clustering = None if cluster is None else str(cluster).rpartition("/")[0]
            plots.append(evidence.embedding(dataset, analysis.group(index), index, clustering, members, most))
    return tuple(plot for plot in plots if plot is not None)


def _own_caveats(confirmed: Sequence[Artifact], models: Mapping[str, Any] | None) -> Iterator[str]:
    """Yield what this run in particular leaves open."""
    for artifact in confirmed:
        if artifact.n_tested is not None and artifact.n_tested < 50:
            yield f"The effect of {artifact.id} was tested on {artifact.n_tested} images only."
    if confirmed and not any(name in (models or {}) for name in ("fine_tune", "fine_tuned")):
        yield "There is no plain fine-tuning to compare with: a gain may come from more training alone."


def _provenance(run: Mapping[str, Any], dataset: ImageDataset) -> Iterator[tuple[str, str]]:
    command = run.get("command")
    if command:
        yield "Command", command if isinstance(command, str) else shlex.join(map(str, command))
    started = [entry["started"] for entry in run.get("stages", {}).values() if entry.get("started")]
    if started:
        yield "Started", min(started)
    for key, name in PROVENANCE.items():
        if run.get(key) is not None:
            yield name, str(run[key])
    for name, hashed in (run.get("inputs") or {"dataset.train": dataset.fingerprint}).items():
        yield f"Content of {name}", str(hashed)


def _stages(run: Mapping[str, Any]) -> Iterator[StageRow]:
    """Yield the stages that came to something; the report is this page itself."""
    for name, entry in run.get("stages", {}).items():
        if name != "report":
            facts = tuple((key.replace("_", " "), _fact(value)) for key, value in (entry.get("facts") or {}).items())
            yield StageRow(name, str(entry.get("status", "unknown")), entry.get("seconds"), facts)


def _fact(value: Any) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return number(value)
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 160 else text[:159] + "…"
