"""Turns the report's data into its page."""

from __future__ import annotations

from base64 import b64encode
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from spray.report import pictures, words
from spray.report.data import Artifact, ModelResult, ReportData, match_truth
from spray.report.lights import LEVEL
from spray.report.plots import plots

if TYPE_CHECKING:
    from jinja2 import Environment

_HERE = Path(__file__).parent
_SMALL = 64  # pixels: up to this size a picture is enlarged without smoothing
_CONTROLS = ("original", "fine_tune", "fine_tuned", "never_poisoned", "ceiling")
_SCRIPTS = ("report.js", "scatter.js")
_LISTED = 20_000  # samples of an artifact in the page at most
_RANKED = 2_000  # rows of the ranking that can be downloaded

_PAGE = 4_800_000
"""Characters that a page may take; thumbnails get what is left."""
_GALLERIES = 1_000_000  # of them from which on the pictures of galleries lose a little in compression
_TEXT = 250_000  # of them for tables, texts, style and script
_LEAST = 500_000  # for the plots, whatever else there is


def render(data: ReportData) -> str:
    """Return the report: one HTML page with no reference to anything outside it.

    Names of classes and files are taken as hostile: they are escaped wherever they stand, and the page's
    content security policy runs no script but the one whose hash it names.
    """
    script = "\n".join((_HERE / name).read_text(encoding="utf-8") for name in _SCRIPTS)
    tiles = _tiles(data, {})
    if sum(map(len, tiles.values())) > _GALLERIES:
        tiles = _tiles(data, {"lossless": 0})
    lists = [_sample_list(artifact) for artifact in data.found]
    taken = sum(map(len, tiles.values())) + sum(len(name) + 12 for part in lists for name in part["names"])
    made = environment()
    made.filters["strip"] = lambda tile: tiles[id(tile)]
    page = made.get_template("report.html.j2").render(
        data=data,
        matches=[(truth, match_truth(truth, data.found)) for truth in data.truths],
        original=_model(data.models, "original"),
        control=_model(data.models, "fine_tuned") or _model(data.models, "fine_tune"),
        best=_model(data.models, data.chosen.method) if data.chosen else best_correction(data.models),
        lists=lists,
        ranks=_ranks(data),
        level=LEVEL,
        plots=plots(data.embeddings or (), data.class_names, max(_LEAST, _PAGE - _TEXT - taken)),
        scale=pictures.scale_uri(),
        style=Markup((_HERE / "report.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash=b64encode(sha256(script.encode()).digest()).decode(),
    )
    # File names that are no valid UTF-8 reach Python as lone surrogates, which no page can hold.
    return page.encode("utf-8", "replace").decode()


def environment() -> Environment:
    """Return what templates of pages are rendered with: everything escaped, numbers and pictures as filters."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in (
        "percent",
        "interval",
        "p_value",
        "number",
        "plural",
        "duration",
        "one_line",
        "clipped",
        "size",
        "status_name",
        "left_name",
        "left_sentence",
        "why_rejected",
    ):
        made.filters[name] = getattr(words, name)
    for name in ("model_name", "model_role", "verdict_name", "verdict_meaning"):
        made.filters[name] = getattr(words, name)
    made.filters["strip"] = lambda tile: pictures.triptych_uri(tile.image, tile.relevance, None)
    made.filters["picture"] = pictures.picture_uri
    made.filters["is_small"] = lambda pixels: max(pixels.shape[-2:]) <= _SMALL
    return made


def best_correction(models: tuple[ModelResult, ...] | None) -> ModelResult | None:
    """Return the corrected model with the highest accuracy on attacked images; controls do not count."""
    corrected = [model for model in models or () if model.name not in _CONTROLS and model.attacked]
    return max(corrected, key=lambda model: model.attacked.value if model.attacked else 0.0, default=None)


def _model(models: tuple[ModelResult, ...] | None, name: str) -> ModelResult | None:
    return next((model for model in models or () if model.name == name), None)


def _tiles(data: ReportData, options: dict[str, Any]) -> dict[int, str]:
    """Return the picture of each sample in a gallery, by the identity of its tile."""
    return {
        id(tile): pictures.triptych_uri(tile.image, tile.relevance, artifact.limit, **options)
        for artifact in data.found
        for group in artifact.galleries
        for tile in group.tiles
    }


def _ranks(data: ReportData) -> dict[str, Any]:
    """Return the rows of the ranking as they can be downloaded, classes before clusters."""
    rows = [
        (what, row)
        for what in ("class", "cluster")
        for row in (data.classes if what == "class" else data.clusters) or ()
    ]
    columns = (
        "row",
        "rank",
        "class_index",
        "class",
        "cluster",
        "samples",
        "separability",
        "score",
        "p_value",
        "q_value",
    )
    return {
        "name": "ranking",
        "columns": (*columns, "artifact"),
        "rows": [
            (
                *(what, row.rank, row.class_index, row.class_name, row.cluster, row.size),
                *(_short(value) for value in (row.separability, row.score, row.p_value, row.q_value)),
                int(row.found),
            )
            for what, row in rows[:_RANKED]
        ],
    }


def _short(value: float | None) -> float | None:
    """Return a number with the digits that mean something."""
    return None if value is None else float(f"{value:.6g}")


def _sample_list(artifact: Artifact) -> dict[str, Any]:
    """Return an artifact's samples as they can be downloaded; of very many the best, the rest is in `artifacts/`."""
    order = list(range(len(artifact.samples)))
    if len(artifact.samples) > _LISTED:
        best = sorted(order, key=lambda i: -artifact.scores[i]) if artifact.scores else order
        order = sorted(best[:_LISTED])
    return {
        "artifact": artifact.id,
        "class_index": artifact.class_index,
        "class_name": artifact.class_name,
        "verdict": artifact.verdict,
        "samples": [artifact.samples[i] for i in order],
        "names": [artifact.sample_names[i] for i in order],
        "scores": [float(f"{artifact.scores[i]:.6g}") for i in order] if artifact.scores else None,
    }
