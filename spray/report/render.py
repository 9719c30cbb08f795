"""Turns the report's data into its page."""

from __future__ import annotations

from base64 import b64encode
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from spray.report import pictures, words
from spray.report.data import Embedding, ModelResult, ReportData, match_truth

if TYPE_CHECKING:
    from jinja2 import Environment

_HERE = Path(__file__).parent
_SMALL = 64  # pixels: up to this size a picture is enlarged without smoothing
_CONTROLS = ("original", "fine_tune", "fine_tuned", "never_poisoned")


def render(data: ReportData) -> str:
    """Return the report: one HTML page with no reference to anything outside it.

    Names of classes and files are taken as hostile: they are escaped wherever they stand, and the page's
    content security policy runs no script but the one whose hash it names.
    """
    script = (_HERE / "report.js").read_text()
    template = environment().get_template("report.html.j2")
    page = template.render(
        data=data,
        match=match_truth(data.truth, data.found) if data.truth else None,
        original=_model(data.models, "original"),
        control=_model(data.models, "fine_tuned") or _model(data.models, "fine_tune"),
        best=best_correction(data.models),
        plots=[_plot(embedding) for embedding in data.embeddings or ()],
        scale=pictures.scale_uri(),
        style=Markup((_HERE / "report.css").read_text()),
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
    for name in ("percent", "interval", "p_value", "number", "plural", "duration", "one_line"):
        made.filters[name] = getattr(words, name)
    for name in ("model_name", "model_role", "verdict_name", "verdict_meaning"):
        made.filters[name] = getattr(words, name)
    made.filters["triptych"] = lambda tile, limit: pictures.triptych_uri(tile.image, tile.relevance, limit)
    made.filters["picture"] = pictures.picture_uri
    made.filters["is_small"] = lambda pixels: max(pixels.shape[-2:]) <= _SMALL
    return made


def best_correction(models: tuple[ModelResult, ...] | None) -> ModelResult | None:
    """Return the corrected model with the highest accuracy on attacked images; controls do not count."""
    corrected = [model for model in models or () if model.name not in _CONTROLS and model.attacked]
    return max(corrected, key=lambda model: model.attacked.value if model.attacked else 0.0, default=None)


def eigengap(eigenvalues: np.ndarray) -> int:
    """Return the number of groups that the largest gap between ascending eigenvalues suggests."""
    return int(np.argmax(np.diff(eigenvalues))) + 1 if len(eigenvalues) > 1 else 1


def _model(models: tuple[ModelResult, ...] | None, name: str) -> ModelResult | None:
    return next((model for model in models or () if model.name == name), None)


def _plot(embedding: Embedding) -> dict[str, Any]:
    """Return one class' points for the script and its eigenvalues for the chart."""
    low, high = embedding.points.min(axis=0), embedding.points.max(axis=0)
    unit = (embedding.points - low) / np.where(high > low, high - low, 1.0)
    uri, columns = pictures.sprite(embedding.thumbnails)
    labels, counts = np.unique(embedding.clusters, return_counts=True)
    points = {
        "x": np.round(unit[:, 0], 4).tolist(),
        "y": np.round(unit[:, 1], 4).tolist(),
        "cluster": embedding.clusters.tolist(),
        "member": embedding.members.astype(int).tolist(),
        "index": embedding.indices.tolist(),
        "name": list(embedding.names),
        "columns": columns,
        "width": embedding.thumbnails.shape[2],
        "height": embedding.thumbnails.shape[1],
    }
    return {
        "embedding": embedding,
        "points": points,
        "sprite": uri,
        "clusters": list(zip(labels.tolist(), counts.tolist(), strict=True)),
        "eigenvalues": _eigen_chart(embedding.eigenvalues),
        "groups": eigengap(embedding.eigenvalues),
    }


def _eigen_chart(eigenvalues: np.ndarray) -> list[tuple[float, float, float]]:
    """Return (x in %, y in %, value) of each eigenvalue's dot."""
    top = float(eigenvalues.max(initial=0.0)) or 1.0
    count = len(eigenvalues)
    return [
        (round(100 * (i + 0.5) / count, 2), round(92 - 84 * max(float(value), 0.0) / top, 2), float(value))
        for i, value in enumerate(eigenvalues)
    ]
