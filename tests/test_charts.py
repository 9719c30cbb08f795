"""Figures for papers: which there are, that they show what they should, that their bytes stay the same."""

from __future__ import annotations

import dataclasses
import io
import logging

import numpy as np
import pytest
import test_report as pages
from PIL import Image

from spray.report import charts
from spray.report.data import ReportData

ALL = ("ranking", "spectrum", "embedding", "artifacts", "causal_effects", "accuracies")


def test_every_figure_in_both_formats_with_the_same_bytes_each_time():
    made = charts.draw(pages.found())
    assert set(made) == {f"{name}.{kind}" for name in ALL for kind in ("png", "pdf")}
    assert charts.draw(pages.found()) == made
    for name, data in made.items():
        if name.endswith("png"):
            picture = Image.open(io.BytesIO(data))
            assert min(picture.size) > 200
            assert np.asarray(picture.convert("L")).std() > 5, f"{name} isn't empty"
        else:
            assert data.startswith(b"%PDF")
            assert b"CreationDate" not in data


def test_only_figures_that_there_is_something_for():
    assert charts.draw(pages.partial()) == {}
    clean = charts.draw(pages.clean(), ["png"])
    assert set(clean) == {f"{name}.png" for name in ("ranking", "spectrum", "embedding", "causal_effects")}
    assert charts.draw(pages.found(), []) == {}


def test_hostile_names_are_drawn_as_text(caplog):
    name = pages.HOSTILE + " $\\frac{1}{0}$ \n\x07"
    with caplog.at_level(logging.WARNING):
        made = charts.draw(pages.found(name, name), ["png", "pdf"])
    assert len(made) == 2 * len(ALL)
    assert not caplog.records


def rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


def pixels(data: bytes, colour: str) -> np.ndarray:
    """Return where a PNG has a colour: the columns."""
    image = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    return np.flatnonzero((np.abs(image - rgb(colour)).max(axis=-1) < 12).any(axis=0))


def test_causal_effects_stand_where_their_rates_are():
    """The attack at 87.4 % is far to the right of the control at 2.1 %: their distance tells the axis' scale."""
    data = pages.found()
    one = dataclasses.replace(data, artifacts=data.artifacts[:1])
    two = dataclasses.replace(
        data, artifacts=(dataclasses.replace(data.artifacts[0], flip_rate=0.021 + (0.874 - 0.021) / 2),)
    )
    at = []
    for variant in (one, two):
        picture = charts.draw(variant, ["png"])["causal_effects.png"]
        # The legend has marks of both colours too, at its own places, which are the same in both.
        at.append(pixels(picture, charts.VERMILLION).max())
        control = pixels(picture, charts.BLUE)
    left = control[control < control.min() + 40].mean()
    assert (at[1] - left) / (at[0] - left) == pytest.approx(0.5, abs=0.02)


def test_heatmaps_of_an_artifact_share_a_scale_that_is_symmetric():
    data = pages.found()
    only, limit = data.artifacts[0], 0.2
    grey = np.full((3, 32, 32), 0.5)
    tiles = [
        dataclasses.replace(only.galleries[0].tiles[0], image=grey, relevance=np.full((32, 32), value))
        for value in (limit, -limit, limit / 2)
    ]
    galleries = (dataclasses.replace(only.galleries[0], tiles=tuple(tiles)),)
    shown = dataclasses.replace(data, artifacts=(dataclasses.replace(only, galleries=galleries, limit=limit),))
    picture = np.asarray(Image.open(io.BytesIO(charts.draw(shown, ["png"])["artifacts.png"])).convert("RGB"))
    body = picture.reshape(-1, 3).astype(int)
    # The ends of ColorBrewer's RdBu for +limit and -limit, and what is half-way to its red for half of it.
    areas = [(np.abs(body - colour).max(axis=1) < 6).sum() for colour in ((103, 0, 31), (5, 48, 97), (229, 131, 104))]
    assert min(areas) > 2000
    assert max(areas) < 1.1 * min(areas)


def test_a_class_without_scores_is_drawn_by_its_separability():
    row = dataclasses.replace(pages.found().classes[0], score=None)
    data = ReportData("t", "m", 1, 1, classes=(row,))
    assert set(charts.draw(data, ["png"])) == {"ranking.png"}
