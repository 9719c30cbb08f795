"""Heatmaps, overlays and galleries."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from spray import figures


def test_zero_is_white_positive_is_red_and_negative_is_blue():
    colours = figures.heatmap_rgb(np.array([[0.0, 2.0, -2.0]])).astype(int)
    assert colours.shape == (1, 3, 3)
    assert colours[0, 0].tolist() == [255, 255, 255]
    red, blue = colours[0, 1], colours[0, 2]
    assert red[0] > 2 * red[2]
    assert blue[2] > 2 * blue[0]


def test_lightness_falls_with_the_size_of_the_relevance_on_both_sides():
    ramp = np.linspace(-1, 1, 41)[None]
    lightness = figures.heatmap_rgb(ramp)[0] @ np.array([0.299, 0.587, 0.114])
    assert (np.diff(lightness[:21]) > 0).all()
    assert (np.diff(lightness[20:]) < 0).all()


def test_channels_are_summed_and_limit_fixes_the_scale():
    relevance = np.stack([np.full((2, 2), 3.0), np.full((2, 2), -1.0)])
    assert (figures.heatmap_rgb(relevance) == figures.heatmap_rgb(np.full((2, 2), 2.0))).all()
    half = figures.heatmap_rgb(np.array([[1.0]]), limit=2.0)
    assert (half == figures.heatmap_rgb(np.array([[5.0, 10.0]]))[:, :1]).all()
    beyond = figures.heatmap_rgb(np.array([[9.0]]), limit=2.0)
    assert (beyond == figures.heatmap_rgb(np.array([[2.0]]), limit=2.0)).all()


def test_all_zero_relevance_is_white_and_leaves_the_image_visible():
    zero = np.zeros((4, 4))
    assert (figures.heatmap_rgb(zero) == 255).all()
    image = np.linspace(0, 1, 16).reshape(1, 4, 4)
    shown = figures.overlay(image, zero)
    assert shown[..., 0].ravel().tolist() == sorted(shown[..., 0].ravel().tolist())
    assert shown[0, 0, 0] < shown[3, 3, 0]


def test_overlay_colours_only_where_there_is_relevance():
    relevance = np.zeros((4, 4))
    relevance[1, 2] = 1.0
    shown = figures.overlay(np.full((3, 4, 4), 0.5), relevance).astype(int)
    coloured = np.ptp(shown, axis=-1) > 20
    assert coloured.sum() == 1
    assert coloured[1, 2]


def test_overlay_names_sizes_that_disagree():
    with pytest.raises(ValueError, match="must agree"):
        figures.overlay(np.zeros((3, 4, 4)), np.zeros((5, 5)))


def test_grey_image_is_repeated_to_three_channels():
    pixels = figures.image_rgb(np.array([[[0.0, 0.5, 1.0]]]))
    assert pixels[0].tolist() == [[0, 0, 0], [128, 128, 128], [255, 255, 255]]


@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 32), (3, 100)])
def test_gallery_shows_each_sample_three_times_at_a_visible_size(channels, size):
    rng = np.random.default_rng(0)
    images = rng.random((3, channels, size, size))
    relevances = rng.normal(size=(3, channels, size, size))
    sheet = figures.gallery(images, relevances, ["a", "b", "a very long name / " * 20], columns=2)
    factor = -(-96 // size)
    assert sheet.dtype == np.uint8
    assert sheet.shape[1] >= 2 * 3 * factor * size
    first = sheet[14 : 14 + factor * size, 14 : 14 + factor * size]
    assert (first[::factor, ::factor] == figures.image_rgb(images[0])).all()


def test_gallery_refuses_captions_that_do_not_match():
    with pytest.raises(ValueError, match="2 images, 2 relevances, 1 captions"):
        figures.gallery(np.zeros((2, 1, 4, 4)), np.zeros((2, 4, 4)), ["one"])


def test_shared_limit_ignores_one_hot_pixel():
    relevances = np.ones((4, 50, 50))
    relevances[0, 0, 0] = 1000.0
    assert figures.shared_limit(relevances) == pytest.approx(1.0)


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1), (5, 7, 3), (5, 7, 4)])
def test_png_keeps_pixels(shape):
    array = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    decoded = np.asarray(Image.open(BytesIO(figures.to_png(array))))
    assert (decoded.reshape(shape) == array).all()
    as_float = np.asarray(Image.open(BytesIO(figures.to_png(array / 255.0))))
    assert (as_float.reshape(shape) == array).all()


def test_png_refuses_channel_first():
    with pytest.raises(ValueError, match="must have shape"):
        figures.to_png(np.zeros((3, 8, 8)))
