"""What the page's script is given of each class: points, labels and scores packed, thumbnails as one picture."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from spray.analysis.spectral import eigengap
from spray.report import pictures
from spray.report.data import Embedding
from spray.report.words import clipped

_NAMES = 700_000  # characters of all names on the page; beyond, each is clipped
_SHORTEST = 40
_CLASS_NAME = 200

WIDTH, HEIGHT = 300, 180
"""Of the chart of eigenvalues, in its own units."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 34, 6, 10, 26


@dataclass(frozen=True)
class EigenChart:
    """The eigenvalues of a class as they are drawn: dots (x, y, value), the gap's two heights and place, ticks."""

    dots: tuple[tuple[float, float, float], ...]
    groups: int
    gap_x: float
    gap: tuple[float, float]
    ticks: tuple[tuple[float, float], ...]
    counts: tuple[tuple[float, int], ...]


@dataclass(frozen=True, eq=False)
class Plot:
    """A class's embedding with the data for the script and its chart of eigenvalues."""

    embedding: Embedding
    points: dict[str, Any]
    chart: EigenChart | None


def plots(embeddings: Sequence[Embedding], class_names: Sequence[str], room: int) -> list[Plot]:
    """Return the plots of all classes, in at most about `room` characters where thumbnails can be made small enough.

    Parameters
    ----------
    embeddings : sequence of Embedding
        Of the classes.
    class_names : sequence of str
        All classes, for the predictions.
    room : int
        Characters that all of it may take.
    """
    names = _names(embeddings)
    packed = [_points(e, part, class_names) for e, part in zip(embeddings, names, strict=True)]
    taken = sum(len(value) for points in packed for value in _strings(points))
    size, quality = pictures.sprite_quality([e.thumbnails for e in embeddings], room - taken)
    made = []
    for embedding, points in zip(embeddings, packed, strict=True):
        uri, columns, width, height = pictures.sprite(embedding.thumbnails, size, quality)
        points |= {"sprite": uri, "columns": columns, "width": width, "height": height}
        made.append(Plot(embedding, points, eigen_chart(embedding.eigenvalues)))
    return made


def _points(embedding: Embedding, names: dict[str, Any], class_names: Sequence[str]) -> dict[str, Any]:
    """Return points in [0, 65535] and what they are coloured by, as base64 of little-endian numbers."""
    low, high = embedding.points.min(axis=0), embedding.points.max(axis=0)
    unit = (embedding.points - low) / np.where(high > low, high - low, 1.0)
    grid = np.rint(65535 * unit)
    ordered = [embedding.clustering, *(name for name in embedding.clusterings if name != embedding.clustering)]
    predictions = embedding.predictions
    # Names of classes are needed for those that are predicted only.
    predicted = [] if predictions is None else np.unique(predictions).tolist()
    return {
        "class": clipped(embedding.class_name, _CLASS_NAME),
        "own": embedding.class_index,
        "x": _packed(grid[:, 0], "<u2"),
        "y": _packed(grid[:, 1], "<u2"),
        "index": _packed(embedding.indices, "<u4"),
        "member": _packed(embedding.members, "u1"),
        "clusterings": [[name, _packed(embedding.clusterings[name], "i1")] for name in ordered],
        "scores": [[name, _packed(values, "<f4")] for name, values in embedding.scores.items()],
        "prediction": None if predictions is None else _packed(predictions, "<u2"),
        "predicted": {str(c): clipped(class_names[c], _CLASS_NAME) for c in predicted if c < len(class_names)},
        "names": names,
    }


def _packed(values: np.ndarray, dtype: str) -> str:
    return b64encode(np.ascontiguousarray(values, dtype=dtype).tobytes()).decode()


def _strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for part in parts for text in _strings(part)]


def _names(embeddings: Sequence[Embedding]) -> list[dict[str, Any]]:
    """Return the names of each class's samples, without their common beginning; clipped where they are too long."""
    total = sum(len(name) for e in embeddings for name in e.names)
    count = sum(len(e.names) for e in embeddings)
    most = None if total <= _NAMES else max(_SHORTEST, _NAMES // max(1, count))
    made = []
    for embedding in embeddings:
        names = [name if most is None else clipped(name, most) for name in embedding.names]
        start = _beginning(min(names), max(names))
        made.append({"start": start, "rest": [name[len(start) :] for name in names]})
    return made


def _beginning(a: str, b: str) -> str:
    """Return what both begin with; of the least and the greatest of many names, what all begin with."""
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return a[:same]


def eigen_chart(eigenvalues: np.ndarray) -> EigenChart | None:
    """Return where the chart's parts are; None for fewer than two eigenvalues."""
    count = len(eigenvalues)
    if count < 2:
        return None
    top = _round_up(float(eigenvalues.max()))
    x = _LEFT + (WIDTH - _LEFT - _RIGHT) * (np.arange(count) + 0.5) / count
    heights = HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * np.clip(eigenvalues, 0, top) / top
    groups = min(eigengap(eigenvalues), count - 1)
    ticks = [top * part for part in (0.0, 0.5, 1.0)]
    shown = sorted({1, *range(5 if count <= 20 else 10, count + 1, 5 if count <= 20 else 10)})
    return EigenChart(
        dots=tuple(
            (round(float(a), 1), round(float(b), 1), float(v)) for a, b, v in zip(x, heights, eigenvalues, strict=True)
        ),
        groups=groups,
        gap_x=round(float(x[groups - 1] + x[groups]) / 2, 1),
        gap=(round(float(heights[groups]), 1), round(float(heights[groups - 1]), 1)),
        ticks=tuple((round(HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * t / top, 1), t) for t in ticks),
        counts=tuple((round(float(x[n - 1]), 1), n) for n in shown),
    )


def _round_up(value: float) -> float:
    """Return the next larger of 1, 2, 4, 5 or 10 times a power of ten; 1 for nothing positive."""
    if value <= 0:
        return 1.0
    power = 10.0 ** np.floor(np.log10(value))
    return float(next(step * power for step in (1, 2, 4, 5, 10) if step * power >= value * (1 - 1e-9)))
