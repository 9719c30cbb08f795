"""Trackers: what a run found, written once more for TensorBoard or MLflow (`tracker=tensorboard`).

They are given what the files of the run directory hold, when the stages are done; no stage knows of them. What they
write is put aside and written anew when results changed, and left as it is when none did.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from spray import figures
from spray.errors import UserError
from spray.pipelines.record import digest
from spray.report.evidence import read_images
from spray.report.pictures import thumbnail
from spray.report.record import Results
from spray.storage import read_json, write_json
from spray.store import open_attributions
from spray.store.analyses import open_analysis

if TYPE_CHECKING:
    from spray.pipelines.config import SprayConfig
    from spray.pipelines.context import Context

NONE = "none"
PACKAGES = {"tensorboard": ("tensorboard",), "mlflow": ("mlflow", "sqlalchemy", "alembic")}
"""The packages that each tracker needs; an extra of its name installs them."""
WRITTEN = ".written.json"
MOST_CLASSES, MOST_POINTS, MOST_IMAGES = 8, 1000, 8
SPRITE = 32
"""Longer side of the thumbnails in the embedding projector."""


@dataclass(frozen=True)
class Embedded:
    """Points of one class for the embedding projector.

    Attributes
    ----------
    name : str
        The class's.
    points : ndarray
        (n, d).
    rows : list of list of str
        What is known of each: sample, file, cluster.
    thumbnails : ndarray of uint8
        (n, h, w, 3).
    """

    name: str
    points: np.ndarray
    rows: list[list[str]]
    thumbnails: np.ndarray


@dataclass
class Tracked:
    """What trackers are given.

    Attributes
    ----------
    scalars : dict
        Group (`run` or a model's name) to name to values by step.
    images : dict
        Name to picture, uint8 (H, W, 3).
    embeddings : list of Embedded
    settings : dict
        The configuration, flat.
    files : list of Path
        Results that may be kept beside the numbers.
    """

    scalars: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    images: dict[str, np.ndarray] = field(default_factory=dict)
    embeddings: list[Embedded] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)


def check(config: SprayConfig) -> None:
    """Check `tracker`.

    Raises
    ------
    UserError
        If there is no such tracker, or its package isn't installed.
    """
    name = config.tracker
    if name != NONE and name not in PACKAGES:
        raise UserError(f"tracker={name} is unknown; allowed: {', '.join((NONE, *PACKAGES))}")
    if missing := [package for package in PACKAGES.get(name, ()) if find_spec(package) is None]:
        raise UserError(f"tracker={name} needs the package {missing[0]}: pip install 'spray-xai[{name}]'")


def track(context: Context) -> Path | None:
    """Write what the run directory holds for the configured tracker; return the folder, None without a tracker."""
    name = context.config.tracker
    if name == NONE:
        return None
    from spray.pipelines.trackers import WRITERS

    folder = context.run_dir / name
    results = Results(context.run_dir)
    state = digest(
        {key: [entry.get("status"), entry.get("key"), entry.get("finished")] for key, entry in results.stages.items()}
    )
    if _written(folder) == state:
        return folder
    # Event files can't be changed in their middle: all is written anew.
    if folder.is_dir() and (_written(folder) is not None or not any(folder.iterdir())):
        shutil.rmtree(folder)
    elif folder.exists():
        raise UserError(f"{folder} is in the way: tracker={name} writes there, and it holds something else")
    folder.mkdir(parents=True)
    write_json(folder / WRITTEN, "unfinished")
    WRITERS[name](collect(context, results), folder)
    write_json(folder / WRITTEN, state)
    return folder


def _written(folder: Path) -> Any:
    try:
        return read_json(folder / WRITTEN)
    except (OSError, ValueError):
        return None


def collect(context: Context, results: Results) -> Tracked:
    """Read the results that count."""
    tracked = Tracked(scalars=dict(_scalars(results)), settings=dict(_settings(results)))
    pictures = sorted((results.run_dir / "artifacts").glob("*/*.png")) if results.path("isolate") else []
    for path in pictures:
        tracked.images[f"artifacts/{path.parent.name}/{path.stem}"] = _picture(path)
    ranking = results.read("rank") or {}
    classes = [row["class_index"] for row in ranking.get("classes", ())][:MOST_CLASSES]
    best = {row["class_index"]: str(row["cluster"]) for row in reversed(ranking.get("clusters", ()))}
    if results.path("attribute") and results.path("analyze"):
        for c in classes or range(min(MOST_CLASSES, len(context.train.classes))):
            tracked.images |= dict(_heatmaps(context, c, best.get(c)))
            tracked.embeddings += _embedded(context, c, best.get(c))
    files = ("report.html", "run.json", "ranking.json", "artifacts.json", "verification.json")
    tracked.files = [results.run_dir / name for name in files if (results.run_dir / name).is_file()]
    return tracked


def _scalars(results: Results) -> Iterator[tuple[str, dict[str, list[float]]]]:
    of_run: dict[str, list[float]] = {}
    for stage, entry in results.stages.items():
        if entry.get("status") != "done":
            continue
        of_run |= {f"{stage}/{name}": values for name, values in _numbers(entry.get("facts") or {})}
        if entry.get("seconds") is not None:
            of_run[f"seconds/{stage}"] = [float(entry["seconds"])]
    for row in (results.read("rank") or {}).get("classes", ()):
        of_run |= {f"ranking/{row['class_name']}/{name}": values for name, values in _numbers(row)}
    for row in (results.read("isolate") or {}).get("artifacts", ()):
        of_run |= {f"artifacts/{row['id']}/{name}": values for name, values in _numbers(row) if name != "samples"}
    yield "run", of_run
    for model, row in (results.read("verify") or {}).get("models", {}).items():
        yield str(model), {f"verification/{name}": values for name, values in _numbers(row)}


def _numbers(values: Mapping[str, Any]) -> Iterator[tuple[str, list[float]]]:
    """Yield what is a number, or a list of them, one for each step; not intervals and indices."""
    for name, value in values.items():
        if name.endswith(("_interval", "_index")):
            continue
        steps = value if isinstance(value, list) else [value]
        if steps and all(isinstance(step, int | float) and math.isfinite(step) for step in steps):
            yield name, [float(step) for step in steps]


def _settings(results: Results) -> Iterator[tuple[str, Any]]:
    import yaml

    path = results.run_dir / ".hydra" / "config.yaml"
    waiting: list[tuple[str, Any]] = [("", yaml.safe_load(path.read_text(encoding="utf-8")))] if path.is_file() else []
    while waiting:
        name, value = waiting.pop(0)
        if isinstance(value, dict):
            waiting += [(f"{name}.{key}".lstrip("."), part) for key, part in value.items()]
        elif name:
            yield name, value


def _picture(path: Path) -> np.ndarray:
    from PIL import Image

    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def _members(context: Context, c: int, cluster: str | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a class's samples, their points, and their labels in the clustering of its best cluster."""
    with open_analysis(context.run_dir / "analysis.h5", len(context.train)) as analysis:
        if c not in analysis.classes:
            return np.zeros(0, np.int64), np.zeros((0, 2)), np.zeros(0, np.int64)
        group = analysis.group(c)
        clustering = (cluster or "").rpartition("/")[0]
        # Clusterings of further views are elsewhere.
        clustering = clustering if clustering in group.clusterings else (group.clusterings or [""])[0]
        labels = group.labels(clustering) if clustering else np.zeros(len(group), np.int64)
        name = "spectral" if "spectral" in group.embeddings else (group.embeddings or [""])[0]
        points = group.embedding(name) if name else np.zeros((len(group), 2), np.float32)
        return group.index, points, labels


def _heatmaps(context: Context, c: int, cluster: str | None) -> Iterator[tuple[str, np.ndarray]]:
    """Yield image, heatmap and overlay of some samples of each cluster of a class, on one scale."""
    index, _, labels = _members(context, c, cluster)
    chosen = {int(label): index[labels == label][:MOST_IMAGES] for label in np.unique(labels)}
    wanted = sorted({int(sample) for part in chosen.values() for sample in part})
    if not wanted:
        return
    with open_attributions(context.run_dir / "attributions.h5", shape=(len(context.train), *[None] * 3)) as file:
        maps = [np.nan_to_num(figures.relevance_map(R)) for R in file.attribution[np.asarray(wanted)]]
    size = context.train.image_shape[1:]
    relevance = {sample: figures.fitted(R, size) for sample, R in zip(wanted, maps, strict=True)}
    limit = figures.shared_limit(list(relevance.values()))
    images = dict(zip(wanted, read_images(context.train, wanted), strict=True))
    for label, part in chosen.items():
        rows = [figures.triptych(images[int(s)], relevance[int(s)], limit) for s in part]
        yield f"heatmaps/{context.train.classes[c]}/cluster {label}", np.concatenate(rows)


def _embedded(context: Context, c: int, cluster: str | None) -> Iterator[Embedded]:
    """Yield the points of a class, if it has three or more, which is what the projector can show."""
    index, points, labels = _members(context, c, cluster)
    if len(index) < 3:
        return
    kept = np.unique(np.linspace(0, len(index) - 1, min(MOST_POINTS, len(index))).astype(int))
    pixels = np.stack([thumbnail(image, SPRITE) for image in read_images(context.train, index[kept])])
    rows = [[str(index[i]), str(context.train.names[index[i]]), str(labels[i])] for i in kept]
    yield Embedded(context.train.classes[c], points[kept], rows, pixels)
