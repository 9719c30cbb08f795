"""Figures for papers, drawn from the report's data: PNG and PDF whose bytes depend on nothing but what they show."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

from spray import figures
from spray.analysis.spectral import eigengap
from spray.report.data import Artifact, Embedding, ModelResult, RankRow, ReportData, Share
from spray.report.lights import LEVEL
from spray.report.words import clipped, model_name, one_line, p_value, verdict_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = ("png", "pdf")
"""Formats that figures may have."""

# Okabe and Ito, "Color Universal Design", 2008: told apart by people with any common kind of colour blindness.
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILLION, PURPLE = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#F0E442",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)
_GROUPS = (BLUE, ORANGE, GREEN, PURPLE, SKY, YELLOW, VERMILLION, BLACK)
_GREY = "#8a8a8a"
_WIDTH = 7.0  # inches: of a text of two columns
_ROWS, _PANELS, _ARTIFACTS, _EXAMPLES = 20, 6, 4, 4
_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "figure.dpi": 100,
    "savefig.dpi": 300,
    # Text stays text that can be searched and edited.
    "pdf.fonttype": 42,
    # Names of classes and files may hold dollar signs.
    "text.parse_math": False,
    "text.usetex": False,
}


def draw(data: ReportData, formats: Collection[str] = FORMATS) -> dict[str, bytes]:
    """Return the figures that the data has something for, by file name.

    Parameters
    ----------
    data : ReportData
        What the report shows.
    formats : collection of str
        Some of `FORMATS`.

    Returns
    -------
    dict of str to bytes
        `ranking`, `spectrum`, `embedding`, `artifacts`, `causal_effects` and `accuracies`, each in every format.
    """
    if not formats:
        return {}
    with _style():
        made = {name: make(data) for name, make in _FIGURES.items()}
        return {
            f"{name}.{kind}": _saved(figure, kind)
            for name, figure in made.items()
            if figure is not None
            for kind in formats
        }


@contextmanager
def _style() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        # Letters that the font lacks are drawn as boxes.
        warnings.filterwarnings("ignore", message="Glyph", category=UserWarning)
        log = logging.getLogger("matplotlib.font_manager")
        before = log.level
        log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            log.setLevel(before)


def _saved(figure: Figure, kind: str) -> bytes:
    buffer = BytesIO()
    none = {"png": ("Software",), "pdf": ("CreationDate", "ModDate", "Creator", "Producer")}[kind]
    figure.savefig(buffer, format=kind, metadata=dict.fromkeys(none))
    return buffer.getvalue()


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _short(name: str, most: int = 26) -> str:
    return clipped(one_line(name.encode("utf-8", "replace").decode()), most)


def ranking(data: ReportData) -> Figure | None:
    """Draw each class's score beside what the best clusters of the other classes score."""
    rows = [row for row in (data.classes or ())[:_ROWS] if row.score is not None or row.separability is not None]
    if not rows:
        return None
    figure = _figure(_WIDTH * 0.62, 0.75 + 0.2 * len(rows))
    ax = figure.subplots()
    scored = all(row.score is not None for row in rows)
    for place, row in enumerate(rows):
        _ranked(ax, place, row, scored)
    _named_rows(ax, [f"{_short(row.class_name)}" for row in rows])
    ax.set_xlabel("score of the best cluster" if scored else "separability of the best cluster")
    for place, row in enumerate(rows):
        said = f"q {p_value(row.q_value)}" if row.q_value is not None else f"p {p_value(row.p_value)}"
        weight = "bold" if row.q_value is not None and row.q_value <= LEVEL else "normal"
        ax.annotate(said, (1.02, place), xycoords=("axes fraction", "data"), va="center", fontsize=7, weight=weight)
    handles = [
        ax.plot([], [], "o", color=VERMILLION, label="artifact found")[0],
        ax.plot([], [], "o", color=BLUE, label="none found")[0],
        ax.plot([], [], color="#d0d0d0", lw=5, label="range and median of other classes")[0],
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=3)
    return figure


def _ranked(ax: Any, place: int, row: RankRow, scored: bool) -> None:
    if scored and row.null:
        low, middle, high = row.null
        ax.plot([low, high], [place, place], color="#d0d0d0", lw=5, solid_capstyle="butt", zorder=1)
        ax.plot([middle], [place], "|", color="#707070", ms=7, zorder=2)
    ax.plot([row.score if scored else row.separability], [place], "o", color=VERMILLION if row.found else BLUE, ms=5)


def spectrum(data: ReportData) -> Figure | None:
    """Draw the smallest eigenvalues of the first classes, all on one scale, with the gap marked."""
    shown = [plot for plot in data.embeddings or () if len(plot.eigenvalues) > 2][:_PANELS]
    if not shown:
        return None
    figure, axes = _panels(len(shown), 1.55, sharey=True)
    for ax, plot in zip(axes, shown, strict=True):
        values = plot.eigenvalues
        k = min(eigengap(values), len(values) - 1)
        ax.axhspan(values[k - 1], values[k], color=GREEN, alpha=0.18, lw=0)
        ax.axvline(k + 0.5, color=GREEN, lw=0.8, ls="--")
        ax.plot(np.arange(1, len(values) + 1), values, "o", color=BLACK, ms=2.4)
        ax.set_title(f"{_short(plot.class_name)}: gap after {k}", loc="left")
    _outer_labels(axes, "number", "eigenvalue")
    return figure


def embedding(data: ReportData) -> Figure | None:
    """Draw the first classes' samples in the plane, coloured by cluster, those of an artifact ringed."""
    shown = list(data.embeddings or ())[:_PANELS]
    if not shown:
        return None
    figure, axes = _panels(len(shown), 2.2)
    for ax, plot in zip(axes, shown, strict=True):
        _points(ax, plot)
    if any(plot.members.any() for plot in shown):
        ring = axes[0].plot([], [], "o", mfc="none", mec=BLACK, ms=5, mew=0.7, label="sample of an artifact")[0]
        figure.legend(handles=[ring], loc="outside upper left")
    return figure


def _points(ax: Any, plot: Embedding) -> None:
    size = 12 if len(plot.points) <= 600 else 5
    for label in np.unique(plot.clusters):
        of = plot.clusters == label
        colour = _GREY if label < 0 else _GROUPS[label % len(_GROUPS)]
        # As a picture in the PDF too: ten thousand circles are slow to open.
        ax.scatter(*plot.points[of].T, s=size, color=colour, lw=0, alpha=0.8, rasterized=True)
    if plot.members.any():
        ring = {"s": 2.6 * size, "facecolors": "none", "edgecolors": BLACK, "lw": 0.5, "rasterized": True}
        ax.scatter(*plot.points[plot.members].T, **ring)
    ax.set(xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set_visible(True)
    ax.set_title(f"{_short(plot.class_name)}, {plot.kind}, {_short(plot.clustering)}", loc="left", fontsize=7)


def artifacts(data: ReportData) -> Figure | None:
    """Draw pattern, mask and samples with heatmap and overlay of each artifact, each artifact on one scale."""
    shown = [artifact for artifact in data.found if artifact.galleries][:_ARTIFACTS]
    if not shown:
        return None
    height = 0.95
    figure = _figure(_WIDTH, 0.45 + 3 * height * len(shown))
    parts = figure.subfigures(len(shown), 1, squeeze=False)[:, 0]
    for part, artifact in zip(parts, shown, strict=True):
        _artifact(part, artifact)
    return figure


def _artifact(part: Any, artifact: Artifact) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    chosen = [tile for group in artifact.galleries[:1] for tile in group.tiles[:_EXAMPLES]]
    near = [tile for group in artifact.galleries[1:] if group.title.startswith("Near") for tile in group.tiles[:2]]
    # As many columns for each artifact, so that their pictures are of one size.
    axes = part.subplots(3, 1 + _EXAMPLES + 2, squeeze=False)
    limit = artifact.limit or 0.0
    for ax in axes.ravel():
        ax.set(xticks=[], yticks=[])
        ax.set_axis_off()
    for ax, picture, title in ((axes[0, 0], artifact.pattern, "pattern"), (axes[1, 0], artifact.mask, "mask")):
        if picture is not None:
            ax.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            ax.set_title(title, fontsize=7)
            _framed(ax)
    for column, tile in enumerate((*chosen, *near), start=1):
        views = (
            figures.image_rgb(tile.image),
            figures.heatmap_rgb(tile.relevance, limit),
            figures.overlay(tile.image, tile.relevance, limit),
        )
        for row, view in enumerate(views):
            axes[row, column].imshow(view, interpolation="nearest")
            _framed(axes[row, column])
        axes[0, column].set_title("near miss" if column > len(chosen) else "member", fontsize=7)
    colours = ListedColormap(figures.heatmap_rgb(np.linspace(-1, 1, 257)[None], 1.0)[0] / 255.0)
    scale = ScalarMappable(Normalize(-limit or -1, limit or 1), colours)
    bar = part.colorbar(scale, ax=list(axes[:, -1]), shrink=0.6, pad=0.02, ticks=[-limit, 0, limit])
    bar.ax.set_yticklabels([f"\u2212{limit:.2g}", "0", f"{limit:.2g}"])
    bar.set_label("relevance")
    part.suptitle(
        f"{artifact.id}: {verdict_name(artifact.verdict)} in {_short(artifact.class_name)}; image, relevance, overlay",
        x=0.01,
        ha="left",
        fontsize=8,
    )


def _framed(ax: Any) -> None:
    ax.set_axis_on()
    for spine in ax.spines.values():
        spine.set(visible=True, color="#b0b0b0", linewidth=0.5)


def causal_effects(data: ReportData) -> Figure | None:
    """Draw for every candidate how many images it turns into its class, beside its control, with 95 % intervals."""
    shown = [artifact for artifact in data.artifacts or () if artifact.flips][:_ROWS]
    if not shown:
        return None
    figure = _figure(_WIDTH * 0.7, 0.85 + 0.24 * len(shown))
    ax = figure.subplots()
    for place, artifact in enumerate(shown):
        _share(ax, artifact.flips, place - 0.14, VERMILLION if artifact.passed else _GREY, "o")
        _share(ax, artifact.control_flips, place + 0.14, BLUE, "s")
    _named_rows(ax, [f"{artifact.id}  {_short(artifact.class_name)}" for artifact in shown])
    _percent_axis(ax, "images of other classes that turn into the class, %")
    handles = [
        _handle(ax, VERMILLION, "o", "artifact added, passed"),
        _handle(ax, _GREY, "o", "added, did not pass"),
        _handle(ax, BLUE, "s", "control patch"),
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=3)
    return figure


def accuracies(data: ReportData) -> Figure | None:
    """Draw every model's accuracy on clean images and under the artifact, with 95 % intervals."""
    shown = [model for model in data.models or () if model.clean][:_ROWS]
    if not shown:
        return None
    kinds: tuple[tuple[str, str, str, Callable[[ModelResult], Share | None]], ...] = (
        ("clean images", BLUE, "s", lambda model: model.clean),
        ("isolated artifact added", VERMILLION, "o", lambda model: model.attacked),
        ("planted artifact added", ORANGE, "D", lambda model: model.planted_attacked),
    )
    drawn = [kind for kind in kinds if any(kind[3](model) for model in shown)]
    figure = _figure(_WIDTH * 0.7, 0.85 + 0.34 * len(shown))
    ax = figure.subplots()
    for place, model in enumerate(shown):
        for number, (_, colour, mark, of) in enumerate(drawn):
            _share(ax, of(model), place + 0.22 * (number - (len(drawn) - 1) / 2), colour, mark)
    _named_rows(ax, [_short(model_name(model.name)) for model in shown])
    _percent_axis(ax, "accuracy on test images, %")
    handles = [_handle(ax, colour, mark, label) for label, colour, mark, _ in drawn]
    figure.legend(handles=handles, loc="outside upper left", ncols=3)
    return figure


def _share(ax: Any, share: Share | None, place: float, colour: str, mark: str) -> None:
    if share is None:
        return
    if share.low is not None and share.high is not None:
        ax.plot([100 * share.low, 100 * share.high], [place, place], color=colour, lw=1.2, solid_capstyle="butt")
    ax.plot([100 * share.value], [place], mark, color=colour, ms=4)


def _handle(ax: Any, colour: str, mark: str, label: str) -> Any:
    return ax.plot([], [], mark, color=colour, ms=4, label=label)[0]


def _percent_axis(ax: Any, label: str) -> None:
    ax.set_xlim(-2, 102)
    ax.set_xlabel(label)
    ax.grid(axis="x", color="#e4e4e4", lw=0.6)
    ax.set_axisbelow(True)


def _named_rows(ax: Any, names: list[str]) -> None:
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)


def _panels(count: int, height: float, **options: Any) -> tuple[Figure, list[Any]]:
    columns = min(3, count)
    rows = -(-count // columns)
    figure = _figure(_WIDTH * columns / 3, height * rows + 0.2)
    axes = figure.subplots(rows, columns, squeeze=False, **options).ravel()
    for ax in axes[count:]:
        ax.remove()
    return figure, list(axes[:count])


def _outer_labels(axes: list[Any], x: str, y: str) -> None:
    columns = min(3, len(axes))
    for number, ax in enumerate(axes):
        if number + columns >= len(axes):
            ax.set_xlabel(x)
        if number % columns == 0:
            ax.set_ylabel(y)


_FIGURES: dict[str, Callable[[ReportData], Figure | None]] = {
    "ranking": ranking,
    "spectrum": spectrum,
    "embedding": embedding,
    "artifacts": artifacts,
    "causal_effects": causal_effects,
    "accuracies": accuracies,
}
