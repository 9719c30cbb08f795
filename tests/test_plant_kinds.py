"""Planted artifacts: one contract for every kind that is drawn, and each kind against a formula of its own."""

from __future__ import annotations

from hashlib import sha256
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import kstest

from spray.data.arrays import ArrayDataset
from spray.data.plant_kinds import KINDS, Artifact
from spray.data.planting import PLACES, Plant, planted

CLASSES = ("ant", "bee", "cow")
SHAPE = (3, 32, 32)
DRAWN = [name for name in KINDS.names() if isinstance(KINDS.get(name), Artifact)]
RANDOM_COLOR = {"timestamp"}
WORD = """
XXX XXX XXX XXX X X
X    X  X X X   X X
XXX  X  X X X   XX
  X  X  X X X   X X
XXX  X  XXX XXX X X
"""
DIGITS = """
XXX  X  XXX XXX X X XXX XXX XXX XXX XXX
X X XX    X   X X X X   X     X X X X X
X X  X  XXX XXX XXX XXX XXX   X XXX XXX
X X  X  X     X   X   X X X  X  X X   X
XXX XXX XXX XXX   X XXX XXX  X  XXX XXX
"""


def ink(drawing: str) -> np.ndarray:
    """Return a drawing in letters as truth values."""
    lines = drawing.strip("\n").split("\n")
    wide = max(map(len, lines))
    return np.array([[mark == "X" for mark in line.ljust(wide)] for line in lines])


def make(kind: str, shape: tuple[int, int, int] = SHAPE, **options: Any) -> Plant:
    made = Plant.from_config({"kind": kind, "class": "bee"} | options, CLASSES, shape)
    assert made is not None
    return made


def images(n: int, shape: tuple[int, int, int] = SHAPE, seed: int = 0) -> torch.Tensor:
    """Return random images of bytes, as datasets give them."""
    pixels = np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)
    return torch.from_numpy(pixels).float() / 255


@pytest.fixture(params=DRAWN)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def test_every_kind_of_the_study_is_there() -> None:
    assert set(DRAWN) == {
        *("tag", "timestamp", "box", "band_aid", "watermark", "low_bit", "stripe"),
        *("frame", "vignette", "background", "brightness", "tint", "blur", "noise"),
    }
    assert {KINDS.get(name).extent for name in DRAWN} == {"local", "framing", "background", "global"}


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_pixels_change_where_the_opacity_says_and_stay_in_range(kind: str, data: st.DataObject) -> None:
    sides = st.integers(28, 64)
    shape = (data.draw(st.sampled_from([1, 3])), data.draw(sides), data.draw(sides))
    options = {
        "place": data.draw(st.sampled_from(PLACES)),
        "size": data.draw(st.integers(1, 9)),
        "jitter": data.draw(st.integers(0, 14)),
        "strength": data.draw(st.sampled_from([None, 1.0, 0.3])),
        "seed": data.draw(st.integers(0, 2**32 - 1)),
        "color": data.draw(st.sampled_from([None, "random", [0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.3, 0.9, 0.1]])),
    }
    before = images(3, shape, data.draw(st.integers(0, 99)))
    given_images = before.clone()
    made = make(kind, shape, **options)
    marked, opacity = made.mark(given_images, ["a", "b", "c"])
    assert torch.equal(given_images, before)
    assert (marked.shape, marked.dtype) == (before.shape, before.dtype)
    assert (opacity.shape, opacity.dtype) == ((3, *shape[1:]), torch.float32)
    assert 0 <= marked.min() <= marked.max() <= 1
    assert 0 <= opacity.min() <= opacity.max() <= made.strength
    assert opacity.flatten(1).amax(dim=1).min() > 0, "something is drawn on every image"
    untouched = (opacity == 0)[:, None].expand_as(before)
    assert torch.equal(marked[untouched], before[untouched])
    # No pixel moves farther than its opacity lets it.
    assert bool(((marked - before).abs() <= opacity[:, None] + 1e-6).all())
    again, same = make(kind, shape, **options).mark(before, ["a", "b", "c"])
    assert again.numpy().tobytes() == marked.numpy().tobytes()
    assert same.numpy().tobytes() == opacity.numpy().tobytes()


def test_image_and_key_decide_and_not_the_batch(kind: str) -> None:
    before, keys = images(8), [f"k{i}" for i in range(8)]
    state = torch.random.get_rng_state()
    marked, _ = make(kind).mark(before, keys)
    assert torch.equal(torch.random.get_rng_state(), state)
    reverse, _ = make(kind).mark(before.flip(0), keys[::-1])
    assert torch.equal(reverse.flip(0), marked)
    single, _ = make(kind).mark(before[3:4], keys[3:4])
    assert torch.equal(single[0], marked[3])
    nothing, empty = make(kind).mark(before[:0], [])
    assert (nothing.shape, empty.shape) == ((0, *SHAPE), (0, *SHAPE[1:]))
    with pytest.raises(ValueError, match="argument"):
        make(kind).mark(before, keys[:7])


def test_the_seed_decides_what_is_drawn_anew_for_each_image(kind: str) -> None:
    before = images(8)
    usual, other = (make(kind, seed=seed).mark(before, range(8))[0] for seed in (0, 1))
    alike = kind in ("background", "brightness", "tint", "blur")
    assert torch.equal(usual, other) == alike


def test_fully_opaque_pixels_show_nothing_of_what_was_there(kind: str) -> None:
    if kind in ("background", "low_bit", "blur"):
        pytest.skip("is made from the image")
    before = images(4)
    marked, opacity = make(kind, strength=1.0).mark(before, range(4))
    again, same = make(kind, strength=1.0).mark(1 - before, range(4))
    assert torch.equal(opacity, same)
    opaque = (opacity == 1)[:, None].expand_as(before)
    assert opaque.any()
    torch.testing.assert_close(marked[opaque], again[opaque])


def test_a_dataset_changes_the_chosen_samples_only(kind: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 3, 28, 28), dtype=np.uint8)
    clean = ArrayDataset(pixels, np.arange(30) % 3, CLASSES)
    options = {"kind": kind, "class": "bee", "rate": 0.4, "place": "random"}
    marked = planted(clean, options)
    changed = (marked.batch(np.arange(30)) != clean.batch(np.arange(30))).flatten(1).any(dim=1).numpy()
    chosen = make(kind, (3, 28, 28), rate=0.4).chosen(clean.labels)
    np.testing.assert_array_equal(np.flatnonzero(changed), chosen)
    assert len(chosen) == 4


@pytest.mark.parametrize("option", ["place", "size", "jitter", "color"])
def test_the_options_that_count_are_those_that_it_says(kind: str, option: str) -> None:
    other = {"place": "bottom_right", "size": 10, "jitter": 7, "color": [0.1, 0.2, 0.9]}[option]
    shape = (3, 44, 44)
    before, keys = images(5, shape), range(5)
    usual, _ = make(kind, shape).mark(before, keys)
    changed, _ = make(kind, shape, **{option: other}).mark(before, keys)
    assert torch.equal(usual, changed) == (option not in KINDS.get(kind).uses)


def test_the_strength_is_a_factor_of_the_change(kind: str) -> None:
    before, keys = images(4), range(4)
    full, opaque = make(kind, strength=1.0).mark(before, keys)
    half, opacity = make(kind, strength=0.5).mark(before, keys)
    torch.testing.assert_close(half - before, (full - before) / 2, atol=1e-6, rtol=0)
    torch.testing.assert_close(opacity, opaque / 2)
    usual = make(kind)
    assert usual.strength == KINDS.get(kind).strength
    assert torch.equal(usual.mark(before, keys)[0], make(kind, strength=usual.strength).mark(before, keys)[0])


def test_grey_images_get_the_luminance(kind: str) -> None:
    if "color" not in KINDS.get(kind).uses:
        pytest.skip("has no colour")
    options = {"color": [1.0, 0.5, 0.0], "jitter": 0, "strength": 1.0}
    shown, opacity = make(kind, (1, 32, 32), **options).mark(torch.zeros(1, 1, 32, 32), [0])
    peak = float(opacity.max())
    # (A corner of the vignette; elsewhere somewhere fully opaque.)
    assert peak == 1
    assert float(shown.max()) == pytest.approx(0.2125 + 0.5 * 0.7154, abs=1e-5)
    colored, _ = make(kind, **options).mark(torch.zeros(1, *SHAPE), [0])
    assert colored.amax(dim=(0, 2, 3)).tolist() == pytest.approx([1.0, 0.5, 0.0])


def test_a_random_color_is_another_one_for_each_image() -> None:
    shown, _ = make("box", color="random", jitter=0, size=5).mark(torch.zeros(300, *SHAPE), range(300))
    colors = shown[:, :, 3, 3].double().numpy()
    assert torch.equal(shown[:, :, 1:6, 1:6], shown[:, :, 3:4, 3:4].expand(-1, -1, 5, 5)), "one colour in each box"
    assert len(np.unique(colors, axis=0)) == 300
    assert kstest(colors.ravel(), "uniform").pvalue > 0.001
    np.testing.assert_allclose(np.corrcoef(colors.T) - np.eye(3), 0, atol=0.2)


GOLDEN = """
tag {} b9e0ebe9ff7b80a6 a8550e021c0bf477 7d52fbcc1dbe10d4
tag random 30935f7fff77c692 f88ca991eb915711 09cc6a7c73765dba
tag corner 27060df17323dc71 0eb354ec14367cd6 ae0b4b07a83cb41f
box {} d8f5f0dcc348ffa8 00a8ce50f325facd 65a44215d396a5e7
box random 7a8bf8bae8fd10c5 34d1dcc96f1f8a1a 60c8d77b0517500a
box corner ceaab478385d7861 af2b5726b5c21874 6ce732edbcd64b51
frame {} 26cabe40eb3ed840 a05f869304413e93 082d18340c0bd34b
frame random 83f2383976a54f6e b62295382636b451 e10e76095e16e4bf
frame corner e821233b68b4777b 04902c523e84dd90 35a64685117144c8
"""
"""Of the first kinds as they were before there were others: fingerprint, training images, attacked images."""


@pytest.mark.parametrize("line", GOLDEN.strip().splitlines())
def test_older_kinds_are_the_same_to_the_byte(line: str) -> None:
    kind, variant, fingerprint, trained, attacked = line.split()
    options: dict[str, Any] = {
        "{}": {},
        "random": {
            "place": "random",
            "size": 5,
            "jitter": 0,
            "seed": 7,
            "class": 1,
            "rate": 0.6,
            "color": [0.2, 1, 0.5],
        },
        "corner": {"place": "bottom_right", "jitter": 3, "rate": 1.0},
    }[variant]
    pixels = np.random.default_rng(0).integers(0, 256, (60, *SHAPE), dtype=np.uint8)
    clean = ArrayDataset(pixels, np.arange(60) % 3, CLASSES)
    marked = planted(clean, {"kind": kind, **options})
    assert marked.fingerprint.startswith(fingerprint)
    assert sha256(marked.batch(np.arange(60)).numpy().tobytes()).hexdigest().startswith(trained)
    plant = Plant.from_config({"kind": kind, **options}, CLASSES, SHAPE)
    found, opacity = plant.mark(clean.batch(np.arange(60)), [f"test:{i}" for i in range(60)])
    assert sha256(found.numpy().tobytes() + opacity.numpy().tobytes()).hexdigest().startswith(attacked)


def test_brightness_and_tint_blend_every_pixel() -> None:
    before = images(3)
    bright, opacity = make("brightness", strength=0.25).mark(before, range(3))
    torch.testing.assert_close(bright, before + 0.25 * (1 - before))
    assert (opacity == 0.25).all()
    red, _ = make("tint", strength=0.4).mark(before, range(3))
    torch.testing.assert_close(red[:, 0], 0.6 * before[:, 0] + 0.4)
    torch.testing.assert_close(red[:, 1:], 0.6 * before[:, 1:])


@pytest.mark.parametrize("size", [1, 6, 14])
def test_blur_is_a_gaussian_over_the_mirrored_image(size: int) -> None:
    before = images(2, (3, 28, 31))
    blurred, opacity = make("blur", (3, 28, 31), size=size).mark(before, range(2))
    sigma = size / 4
    reach = int(np.ceil(3 * sigma))
    offsets = np.arange(-reach, reach + 1)
    weights = np.exp(-(offsets**2) / (2 * sigma**2))
    weights /= weights.sum()

    def smoothing(n: int) -> np.ndarray:
        """Return the (n, n) matrix that smooths a line of n pixels."""
        matrix = np.zeros((n, n))
        for i in range(n):
            for offset, weight in zip(offsets, weights, strict=True):
                j = abs(i + offset) % (2 * n - 2)
                matrix[i, min(j, 2 * n - 2 - j)] += weight
        return matrix

    expected = np.einsum("ab,ncbd,ed->ncae", smoothing(28), before.numpy().astype(float), smoothing(31))
    np.testing.assert_allclose(blurred.numpy(), expected, atol=1e-5)
    assert (opacity == 1).all()


def test_noise_is_white_and_another_one_for_each_image() -> None:
    before = images(4)
    noisy, opacity = make("noise", strength=0.25).mark(before, ["a", "b", "c", "a"])
    noise = ((noisy - 0.75 * before) / 0.25).numpy().astype(float)
    assert kstest(noise[:3].ravel(), "uniform").pvalue > 0.001
    np.testing.assert_allclose(np.corrcoef(noise[:3].reshape(3, -1)) - np.eye(3), 0, atol=0.1)
    np.testing.assert_allclose(noise[0], noise[3], atol=1e-5)
    assert (opacity == 0.25).all()


@pytest.mark.parametrize(("height", "width"), [(32, 32), (28, 41)])
def test_a_vignette_darkens_with_the_squared_distance(height: int, width: int) -> None:
    shape = (3, height, width)
    shown, opacity = make("vignette", shape, jitter=0, strength=0.8).mark(torch.ones(1, *shape), [0])
    y, x = np.mgrid[:height, :width]
    squared = (y - (height - 1) / 2) ** 2 + (x - (width - 1) / 2) ** 2
    np.testing.assert_allclose(shown[0, 0].numpy(), 1 - 0.8 * squared / squared[0, 0], atol=1e-6)
    np.testing.assert_allclose(opacity[0].numpy(), 0.8 * squared / squared[0, 0], atol=1e-6)
    moved = make("vignette", shape, jitter=3).mark(torch.ones(200, *shape), range(200))[1]
    flat = moved.flatten(1).argmin(dim=1)
    rows, columns = flat // width, flat % width
    for centers, side in ((rows, height), (columns, width)):
        home = (side - 1) // 2
        assert home - 3 <= centers.min() <= home - 2
        assert home + 2 <= centers.max() <= home + 4


def test_the_background_is_what_looks_like_the_border() -> None:
    before = torch.full((1, 3, 32, 32), 0.1)
    before[:, 0, 8:20, 8:20] = 0.6
    before[:, :, 22:26, 8:12] = 0.2
    before[0, :, 0, 5] = 0.9
    shown, opacity = make("background", strength=0.5).mark(before, [0])
    figure, near = torch.zeros(32, 32, dtype=bool), torch.zeros(32, 32, dtype=bool)
    figure[8:20, 8:20] = figure[0, 5] = True
    near[22:26, 8:12] = True
    assert (opacity[0][figure] == 0).all()
    # At 0.1 of the 0.25 within which a pixel counts.
    torch.testing.assert_close(opacity[0][near], torch.full((16,), 0.5 * 0.6))
    torch.testing.assert_close(opacity[0][~figure & ~near], torch.full((1024 - 144 - 1 - 16,), 0.5))
    torch.testing.assert_close(shown[0, 1, 31, 31], torch.tensor(0.1 + 0.5 * 0.9))
    # Lighter clothes on black, as in Fashion-MNIST.
    clothes = torch.zeros(1, 1, 28, 28)
    clothes[:, :, 4:24, 9:19] = 0.7
    assert torch.equal(make("background", (1, 28, 28)).mark(clothes, [0])[1][0] > 0, clothes[0, 0] == 0)


@pytest.mark.parametrize("place", ["top_left", "bottom_right", "center", "random"])
def test_a_stripe_goes_from_top_to_bottom(place: str) -> None:
    _, opacity = make("stripe", place=place, size=4, jitter=2).mark(torch.zeros(200, *SHAPE), range(200))
    assert torch.equal(opacity, opacity[:, :1].expand_as(opacity))
    assert (opacity[:, 0].sum(dim=1) == 4).all()
    lefts = opacity[:, 0].argmax(dim=1)
    for image, left in zip(opacity, lefts.tolist(), strict=True):
        assert image[0, left : left + 4].all()
    low, high = {"top_left": (0, 3), "bottom_right": (25, 28), "center": (12, 16), "random": (0, 28)}[place]
    assert (int(lefts.min()), int(lefts.max())) == (low, high)


def read_times(opacity: torch.Tensor, scale: int) -> list[tuple[str, int, int]]:
    """Return what is written on each image, and where: characters are compared with drawings of the digits."""
    digits = np.split(np.pad(ink(DIGITS), ((0, 0), (0, 1))), 10, axis=1)
    found = []
    for image in opacity.numpy():
        rows, columns = (np.flatnonzero((image > 0).any(axis=axis)) for axis in (1, 0))
        # The first and the last column of a digit may be empty; the colon in the middle never is.
        text = image[rows[0] : rows[0] + 5 * scale : scale, :]
        for left in range(columns[0] - 2 * scale, columns[0] + 1):
            cells = [text[:, left + scale * at : left + scale * (at + 3) : scale] > 0 for at in (0, 4, 10, 14)]
            colon = text[:, left + scale * 8] > 0
            said = [next((str(n) for n, d in enumerate(digits) if np.array_equal(d[:, :3], c)), "") for c in cells]
            if all(said) and colon.tolist() == [False, True, False, True, False]:
                found.append((f"{said[0]}{said[1]}:{said[2]}{said[3]}", int(rows[0]), int(left)))
                break
    return found


@pytest.mark.parametrize(("size", "side", "scale"), [(6, 28, 1), (4, 32, 1), (10, 64, 2), (14, 64, 2)])
def test_a_timestamp_is_a_time_that_can_be_read(size: int, side: int, scale: int) -> None:
    shape = (3, side, side)
    made = make("timestamp", shape, size=size, jitter=2, place="bottom_right")
    shown, opacity = made.mark(torch.zeros(80, *shape), range(80))
    found = read_times(opacity, scale)
    assert len(found) == 80
    hours, minutes = zip(*[map(int, text.split(":")) for text, _, _ in found], strict=True)
    assert max(hours) <= 23
    assert max(minutes) <= 59
    assert min(len(set(hours)), len(set(minutes))) > 15
    home = (side - 5 * scale - 1, side - 17 * scale - 1)
    for axis in (1, 2):
        places = [entry[axis] for entry in found]
        assert min(places) == home[axis - 1] - 2
        assert max(places) == home[axis - 1] + 1, "one pixel is left to the border"
    # Its colour is another one on each image.
    colors = torch.stack([image[:, mask > 0].amax(dim=1) for image, mask in zip(shown, opacity, strict=True)])
    assert len(np.unique(colors.numpy(), axis=0)) == 80
    assert set(opacity.unique().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(("size", "scale"), [(6, 1), (11, 2)])
def test_a_watermark_lets_the_image_through(size: int, scale: int) -> None:
    shape = (3, 64, 64)
    before = images(2, shape)
    shown, opacity = make("watermark", shape, size=size, jitter=0, strength=0.3).mark(before, range(2))
    word = np.kron(ink(WORD), np.ones((scale, scale))).astype(bool)
    expected = np.zeros((64, 64), dtype=bool)
    expected[1 : 1 + word.shape[0], 1 : 1 + word.shape[1]] = word
    np.testing.assert_array_equal(opacity[0].numpy() > 0, expected)
    blended = np.where(expected, 0.7 * before.numpy() + 0.3, before.numpy())
    np.testing.assert_allclose(shown.numpy(), blended, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 3])
def test_low_bits_are_the_word_and_high_bits_the_image(channels: int) -> None:
    shape = (channels, 28, 28)
    pixels = np.random.default_rng(3).integers(0, 256, (4, *shape), dtype=np.uint8)
    before = torch.from_numpy(pixels).float() / 255
    shown, opacity = make("low_bit", shape, jitter=0, place="bottom_left").mark(before, range(4))
    rows, columns = slice(22, 27), slice(1, 20)
    expected = pixels.copy()
    expected[:, :, rows, columns] = (pixels[:, :, rows, columns] & 0xF0) | np.where(ink(WORD), 0x0F, 0).astype(np.uint8)
    np.testing.assert_allclose(shown.numpy() * 255, expected, atol=1e-3)
    inside = np.zeros((28, 28), dtype=bool)
    inside[rows, columns] = True
    np.testing.assert_array_equal(opacity[0].numpy() > 0, inside)


def test_a_band_aid_is_a_turned_strip_with_soft_edges() -> None:
    size, n = 16, 200
    shape = (3, 40, 40)
    _, opacity = make("band_aid", shape, size=size, jitter=0, place="center").mark(torch.zeros(n, *shape), range(n))
    # A rectangle as long as half of it between two half discs.
    radius, between = size / 4, size / 2
    area = np.pi * radius**2 + 2 * radius * between
    areas = opacity.sum(dim=(1, 2)).numpy()
    np.testing.assert_allclose(areas, area, rtol=0.05)
    assert (opacity[:, 19:21, 19:21] == 1).all()
    soft = ((opacity > 0) & (opacity < 1)).float().mean(dim=(1, 2))
    assert soft.min() > 0.01
    # Its direction, from the moments of its opacity, takes every angle alike.
    y, x = np.mgrid[:40, :40] - 19.5
    values = opacity.numpy().astype(float)
    xx, yy, xy = ((values * m).sum(axis=(1, 2)) for m in (x * x, y * y, x * y))
    angles = np.arctan2(2 * xy, xx - yy) / 2 % np.pi
    assert kstest(angles / np.pi, "uniform").pvalue > 0.001
    lengths = (xx + yy + np.hypot(2 * xy, xx - yy)) / (xx + yy - np.hypot(2 * xy, xx - yy))
    assert lengths.min() > 3, "much longer than wide"
