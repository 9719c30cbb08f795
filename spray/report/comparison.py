"""The page of a comparison: the strategies of two models on the same samples, side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markupsafe import Markup

from spray import figures
from spray.report import pictures
from spray.report.render import environment

_HERE = Path(__file__).parent
_GAP = 228  # grey between pictures that stand side by side
_ENLARGED = 64  # pixels: smaller means of heatmaps are drawn at least so large


@dataclass(frozen=True)
class Model:
    """One of the two models: what it is called on the page, and where its results are."""

    name: str
    where: str
    provenance: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, eq=False)
class Example:
    """A sample: image (C, H, W) in [0, 1] and its relevance (H, W) in the cluster's own model and in the other."""

    name: str
    index: int
    image: np.ndarray
    relevances: tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, eq=False)
class Evidence:
    """What is shown of a strategy.

    Attributes
    ----------
    members, rest : tuple of ndarray
        Mean heatmaps (h, w) in the cluster's own model and in the other.
    limits : tuple of float
        The relevance that is shown as full colour, for each model.
    examples, others : tuple of Example
        Members, and samples of the same group that aren't.
    example_limits : tuple of float
        As `limits`, for the heatmaps of single samples.
    """

    members: tuple[np.ndarray, np.ndarray]
    rest: tuple[np.ndarray, np.ndarray]
    limits: tuple[float, float]
    examples: tuple[Example, ...]
    others: tuple[Example, ...]
    example_limits: tuple[float, float]


@dataclass(frozen=True, eq=False)
class Strategy:
    """Clusters of one model that hold mostly the same samples, represented by the first of them.

    `own` is 0 for a strategy of this model, 1 for one of the other; pairs hold the own model's value first. `weaker`
    says that the other model keeps little of one that isn't its own model's only.
    """

    own: int
    group_name: str
    cluster: str
    also: tuple[str, ...]
    size: int
    n: int
    verdict: str
    counterpart: str
    counterpart_size: int
    jaccard: float
    p_value: float
    separability: tuple[float, float]
    cohesion: tuple[float, float]
    kept: float
    held: float
    cosine: float | None
    contrast_cosine: float | None
    retention: float | None
    weaker: bool = False
    evidence: Evidence | None = None


@dataclass(frozen=True, eq=False)
class ComparisonData:
    """Everything on the page, in the order of the page."""

    title: str
    models: tuple[Model, Model]
    n_samples: int
    n_classes: int
    strategies: tuple[Strategy, ...]
    rule: tuple[str, ...]
    caveats: tuple[str, ...]
    note: str = ""

    def of(self, own: int, verdict: str) -> tuple[Strategy, ...]:
        """Return the strategies of one model that got a verdict."""
        return tuple(s for s in self.strategies if s.own == own and s.verdict == verdict)


def render_comparison(data: ComparisonData) -> str:
    """Return the page: HTML with no reference to anything outside of it, and no script.

    Names of classes, files, clusters and folders are taken as hostile: they are escaped wherever they stand.
    """
    made = environment()
    made.filters["mean_map"] = _mean_map
    made.filters["side_by_side"] = _side_by_side
    page = made.get_template("comparison.html.j2").render(
        data=data,
        scale=pictures.scale_uri(),
        style=Markup((_HERE / "report.css").read_text() + (_HERE / "comparison.css").read_text()),
    )
    # File names that are no valid UTF-8 reach Python as lone surrogates, which no page can hold.
    return page.encode("utf-8", "replace").decode()


def _mean_map(relevance: np.ndarray, limit: float) -> str:
    """Return a mean heatmap (h, w) as a data URI, its pixels enlarged so that they can be seen."""
    return pictures.picture_uri(figures.enlarge(figures.heatmap_rgb(relevance, limit), _ENLARGED))


def _side_by_side(example: Example, limits: tuple[float, float]) -> str:
    """Return image, heatmap in the own model and heatmap in the other as one picture's data URI."""
    parts = [figures.image_rgb(example.image)]
    height, width = parts[0].shape[:2]
    gap = np.full((height, max(1, width // 24), 3), _GAP, dtype=np.uint8)
    for relevance, limit in zip(example.relevances, limits, strict=True):
        parts += [gap, figures.heatmap_rgb(relevance, limit)]
    return pictures.strip_uri(np.concatenate(parts, axis=1), max(example.image.shape[1:]))
