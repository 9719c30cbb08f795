"""Planted artifacts: one contract for every kind, the choice of samples, and mistakes in `dataset.plant`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from spray.data.arrays import ArrayDataset
from spray.data.planting import DEFAULTS, KINDS, PLACES, Plant, class_index, planted, planted_truth
from spray.errors import UserError

CLASSES = ("ant", "bee", "cow")
SHAPE = (3, 32, 32)


def plant(**options: Any) -> Plant:
    made = Plant.from_config({"kind": "tag", "class": "bee"} | options, CLASSES, SHAPE)
    assert made is not None
    return made


def dataset(n: int = 120, shape: tuple[int, int, int] = SHAPE) -> ArrayDataset:
    rng = np.random.default_rng(0)
    return ArrayDataset(rng.integers(0, 256, (n, *shape), dtype=np.uint8), np.arange(n) % 3, CLASSES)


@pytest.fixture(params=KINDS.names())
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("shape", [SHAPE, (1, 28, 28), (3, 24, 40)])
def test_marks_in_range_only_where_it_says(kind: str, shape: tuple[int, int, int]) -> None:
    images = torch.rand(6, *shape, generator=torch.Generator().manual_seed(0))
    before = images.clone()
    made = Plant.from_config({"kind": kind, "class": 0}, CLASSES, shape)
    marked, opacity = made.mark(images, list(range(6)))
    assert torch.equal(images, before)
    assert marked.shape == images.shape
    assert marked.dtype == images.dtype
    assert opacity.shape == (6, *shape[1:])
    assert 0 <= opacity.min() <= opacity.max() <= 1
    assert 0 <= marked.min() <= marked.max() <= 1
    untouched = (opacity == 0)[:, None].expand_as(images)
    assert torch.equal(marked[untouched], images[untouched])
    assert (opacity > 0).flatten(1).any(dim=1).all()
    # Fully opaque pixels show nothing of what was there.
    again, _ = made.mark(1 - images, list(range(6)))
    opaque = (opacity == 1)[:, None].expand_as(images)
    torch.testing.assert_close(marked[opaque], again[opaque])


def test_seed_and_key_decide_and_nothing_else(kind: str) -> None:
    images = torch.rand(8, *SHAPE)
    keys = [f"k{i}" for i in range(8)]
    state = torch.random.get_rng_state()
    marked, opacity = plant(kind=kind).mark(images, keys)
    assert torch.equal(torch.random.get_rng_state(), state)
    reverse, _ = plant(kind=kind).mark(images.flip(0), keys[::-1])
    torch.testing.assert_close(reverse.flip(0), marked)
    single, _ = plant(kind=kind).mark(images[3:4], keys[3:4])
    torch.testing.assert_close(single[0], marked[3])
    assert not torch.equal(plant(kind=kind, seed=1).mark(images, keys)[1], opacity)


def test_color_size_and_jitter_count(kind: str) -> None:
    images, keys = torch.zeros(10, *SHAPE), list(range(10))
    base, opacity = plant(kind=kind, jitter=0, color=[0.2, 0.5, 0.9]).mark(images, keys)
    assert torch.equal(opacity, opacity[:1].expand_as(opacity)), "without jitter all are alike"
    for channel, value in enumerate((0.2, 0.5, 0.9)):
        assert base[:, channel].max() == pytest.approx(value)
    _, larger = plant(kind=kind, jitter=0, size=9).mark(images, keys)
    assert larger.sum() > opacity.sum()
    _, jittered = plant(kind=kind, jitter=3).mark(images, keys)
    assert not torch.equal(jittered, jittered[:1].expand_as(jittered))


def test_grey_images_get_the_luminance(kind: str) -> None:
    made = Plant.from_config({"kind": kind, "class": 0, "color": [1.0, 0.5, 0.0]}, CLASSES, (1, 28, 28))
    marked, _ = made.mark(torch.zeros(1, 1, 28, 28), [0])
    assert float(marked.max()) == pytest.approx(0.2125 + 0.5 * 0.7154, abs=1e-5)


@pytest.mark.parametrize("place", [place for place in PLACES if place != "random"])
@pytest.mark.parametrize("jitter", [0, 2, 16])
def test_squares_lie_whole_in_the_image_within_the_jitter(place: str, jitter: int) -> None:
    made = plant(kind="box", place=place, jitter=jitter, size=6)
    _, opacity = made.mark(torch.zeros(200, *SHAPE), list(range(200)))
    tops = opacity.amax(dim=2).argmax(dim=1)
    lefts = opacity.amax(dim=1).argmax(dim=1)
    assert (opacity.sum(dim=(1, 2)) == 36).all()
    home = {"top": 1, "left": 1, "bottom": 25, "right": 25, "center": 13}
    vertical, _, horizontal = place.partition("_")
    for found, usual in ((tops, home[vertical]), (lefts, home[horizontal or "center"])):
        assert found.min() == max(0, usual - jitter)
        assert found.max() == min(26, usual + jitter)
    if jitter:
        assert len(set(zip(tops.tolist(), lefts.tolist(), strict=True))) > 10


@pytest.mark.parametrize("jitter", [0, 3])
@pytest.mark.parametrize("shape", [(1, 12, 12), (3, 11, 14)])
def test_a_random_place_is_uniform_over_all_positions(shape: tuple[int, int, int], jitter: int) -> None:
    options = {"kind": "box", "class": 0, "place": "random", "size": 5, "jitter": jitter}
    made = Plant.from_config(options, CLASSES, shape)
    assert made is not None
    n, height, width = 4000, shape[1] - 4, shape[2] - 4
    _, opacity = made.mark(torch.zeros(n, *shape), list(range(n)))
    assert (opacity.sum(dim=(1, 2)) == 25).all()
    tops = opacity.amax(dim=2).argmax(dim=1).numpy()
    lefts = opacity.amax(dim=1).argmax(dim=1).numpy()
    counts = np.bincount(tops * width + lefts, minlength=height * width)
    assert len(counts) == height * width, "no square leaves the image"
    assert chisquare(counts).pvalue > 0.001


def test_a_frame_is_as_thick_as_its_size_give_or_take_the_jitter() -> None:
    _, opacity = plant(kind="frame", size=3, jitter=1).mark(torch.zeros(60, *SHAPE), list(range(60)))
    thickness = opacity[:, :, 16].sum(dim=1) / 2
    assert set(thickness.tolist()) == {2, 3, 4}
    for image, t in zip(opacity, thickness.int().tolist(), strict=True):
        assert image.sum() == 32**2 - (32 - 2 * t) ** 2


def test_a_tag_has_a_dark_cross_on_its_color() -> None:
    content, opacity = KINDS.get("tag")(SHAPE, plant(jitter=0, color=[1, 1, 1]), np.random.default_rng(0))
    stamp = content[0, 1:7, 1:7]
    assert opacity[1:7, 1:7].all()
    expected = [
        [1, 1, 1, 1, 1, 1],
        [1, 0, 1, 1, 0, 1],
        [1, 1, 0, 0, 1, 1],
        [1, 1, 0, 0, 1, 1],
        [1, 0, 1, 1, 0, 1],
        [1, 1, 1, 1, 1, 1],
    ]
    assert stamp.tolist() == expected


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.25, 1.0])
def test_the_chosen_are_of_the_class_and_as_many_as_the_rate_says(rate: float) -> None:
    labels = np.random.default_rng(0).integers(0, 3, 400)
    chosen = plant(rate=rate).chosen(labels)
    assert len(chosen) == round(rate * (labels == 1).sum())
    assert (labels[chosen] == 1).all()
    assert (np.diff(chosen) > 0).all()
    np.testing.assert_array_equal(chosen, plant(rate=rate, jitter=5, kind="box").chosen(labels))
    if 0 < rate < 1:
        assert not np.array_equal(chosen, plant(rate=rate, seed=1).chosen(labels))


def test_only_the_chosen_training_images_change() -> None:
    clean = dataset()
    options = {"kind": "tag", "class": "bee", "rate": 0.3}
    marked, truth = planted(clean, options), planted_truth(options, clean)
    indices = np.arange(120)
    changed = (marked.batch(indices) != clean.batch(indices)).flatten(1).any(dim=1).numpy()
    np.testing.assert_array_equal(np.flatnonzero(changed), truth.samples)
    assert len(truth.samples) == 12
    assert (clean.labels[truth.samples] == 1).all()
    assert (truth.class_index, truth.class_name, truth.kind, truth.rate) == (1, "bee", "tag", 0.3)
    np.testing.assert_array_equal(marked.labels, clean.labels)
    assert (marked.classes, marked.image_shape, len(marked)) == (clean.classes, clean.image_shape, 120)
    assert list(marked.names) == list(clean.names)


def test_the_order_and_size_of_batches_do_not_matter() -> None:
    marked = planted(dataset(), {"kind": "tag", "class": 1, "rate": 0.5})
    whole = marked.batch(np.arange(120))
    order = np.random.default_rng(1).permutation(120)
    assert torch.equal(marked.batch(order), whole[torch.from_numpy(order)])
    assert torch.equal(torch.cat([marked.batch(part) for part in np.array_split(np.arange(120), 17)]), whole)
    assert torch.equal(marked.batch(np.array([4, 4, 1])), whole[[4, 4, 1]])


def test_the_fingerprint_follows_every_option() -> None:
    clean = dataset()
    options = {"kind": "tag", "class": 1, "rate": 0.5}
    changes = [{}, {"rate": 0.4}, {"seed": 1}, {"class": 2}, {"size": 7}, {"jitter": 1}, {"kind": "box"}]
    changes += [{"place": "center"}, {"color": [0, 0, 0]}]
    prints = [planted(clean, options | change).fingerprint for change in changes]
    assert len({clean.fingerprint, *prints}) == len(changes) + 1
    assert planted(clean, options).fingerprint == prints[0]


@pytest.mark.parametrize("options", [None, {}, {"kind": "none"}, {"kind": None}, {"kind": "tag", "rate": 0}])
def test_nothing_is_planted_where_nothing_is_asked_for(options: dict | None) -> None:
    clean = dataset()
    assert planted(clean, options) is clean
    assert planted_truth(options, clean) is None


def test_defaults_are_used_and_every_default_kind_exists() -> None:
    made = Plant.from_config({"kind": "frame"}, CLASSES, SHAPE)
    assert (made.target, made.rate, made.size, made.place) == (0, 0.25, 6, "top_left")
    assert DEFAULTS["kind"] in KINDS.names()
    assert KINDS.names() == ["box", "frame", "tag"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "tga"}, "'tga' (did you mean 'tag'?); allowed: box, frame, tag"),
        ({"classs": 1}, "dataset.plant has no key 'classs'; allowed: kind, class, rate"),
        (
            {"class": "wasp"},
            "dataset.plant.class=wasp is no class; allowed: an index from 0 to 2 or one of ant, bee, cow",
        ),
        ({"class": 3}, "dataset.plant.class=3 is no class"),
        ({"class": -1}, "dataset.plant.class=-1 is no class"),
        ({"class": "--1"}, "is no class"),
        ({"class": "²"}, "is no class"),
        ({"class": None}, "is no class"),
        ({"class": 1.5}, "is no class"),
        ({"rate": 1.1}, "dataset.plant.rate=1.1 is not a number from 0.0 to 1.0"),
        ({"rate": -0.1}, "dataset.plant.rate=-0.1"),
        ({"rate": "much"}, "dataset.plant.rate=much"),
        ({"rate": float("nan")}, "dataset.plant.rate=nan"),
        ({"seed": None}, "dataset.plant.seed=None"),
        ({"seed": -1}, "dataset.plant.seed=-1"),
        ({"size": 0}, "dataset.plant.size=0 is not a number from 1 to 16"),
        ({"size": 17}, "dataset.plant.size=17"),
        ({"jitter": -1}, "dataset.plant.jitter=-1"),
        ({"place": "left"}, "dataset.plant.place=left is unknown; allowed: top_left, top_right"),
        ({"color": [1, 2, 0]}, "dataset.plant.color=[1, 2, 0] must be three numbers in [0, 1]"),
        ({"color": [1, 1]}, "must be three numbers"),
        ({"color": "red"}, "must be three numbers"),
        ({"color": "111"}, "must be three numbers"),
        ({"color": [None, 0, 0]}, "must be three numbers"),
        ({"color": ["a", 0, 0]}, "must be three numbers"),
        ({"color": 0.5}, "must be three numbers"),
        ({"color": None}, "must be three numbers"),
    ],
)
def test_mistakes_are_told_in_one_line(options: dict, words: str) -> None:
    with pytest.raises(UserError) as error:
        Plant.from_config({"kind": "tag"} | options, CLASSES, SHAPE)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_classes_go_by_name_first_and_long_lists_are_cut() -> None:
    assert class_index("bee", CLASSES, "x") == class_index(1, CLASSES, "x") == class_index("1", CLASSES, "x") == 1
    assert class_index(2, ("2", "1", "0"), "x") == 0
    with pytest.raises(UserError, match=r"c19, …$"):
        class_index("none", [f"c{i}" for i in range(30)], "x")


def test_a_dataset_that_hands_out_its_own_memory_is_not_changed() -> None:
    class Shared(ArrayDataset):
        def batch(self, indices: np.ndarray) -> torch.Tensor:
            return self.pixels

    clean = Shared(dataset().images, dataset().labels, CLASSES)
    clean.pixels = torch.rand(120, *SHAPE)
    before = clean.pixels.clone()
    marked = planted(clean, {"kind": "box", "class": 0, "rate": 1.0})
    assert not torch.equal(marked.batch(np.arange(120)), before)
    assert torch.equal(clean.pixels, before)
