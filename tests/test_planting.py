"""Planted artifacts: where they go, which samples get them, several at once, and mistakes in `dataset.plant`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from spray.data.arrays import ArrayDataset
from spray.data.planting import (
    DEFAULTS,
    KINDS,
    PLACES,
    Plant,
    class_index,
    plant_all,
    planted,
    planted_truth,
    read_plants,
)
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
    shown, opacity = plant(jitter=0, color=[1, 1, 1]).mark(torch.full((1, *SHAPE), 0.5), [0])
    stamp = shown[0, 0, 1:7, 1:7]
    assert opacity[0, 1:7, 1:7].all()
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
    changes += [{"place": "center"}, {"color": [0, 0, 0]}, {"color": "random"}, {"strength": 0.5}, {"class": "all"}]
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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "tga"}, "'tga' (did you mean 'tag'?); allowed: background, band_aid, blur, box"),
        ({"classs": 1}, "dataset.plant has no key 'classs'; allowed: kind, class, rate"),
        (
            {"class": "wasp"},
            "dataset.plant.class=wasp is no class; allowed: all, an index from 0 to 2 or one of ant, bee, cow",
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
        ({"color": "None"}, "must be three numbers"),
        ({"color": []}, "dataset.plant.color=[] must be three numbers in [0, 1]: red, green, blue; or random, or null"),
        ({"strength": 0}, "dataset.plant.strength=0 would change nothing; give a number above 0, up to 1"),
        ({"strength": 1.5}, "dataset.plant.strength=1.5 is not a number from 0.0 to 1.0"),
        ({"strength": "much"}, "dataset.plant.strength=much"),
        ({"to": "wasp"}, "dataset.plant.to=wasp is no class; allowed: an index from 0 to 2 or one of ant, bee, cow"),
        ({"to": "all"}, "dataset.plant.to=all is no class"),
        ({"kind": "mislabel", "class": 1, "to": "bee"}, "dataset.plant.to=bee is the class itself; give another one"),
        (
            {"which": "ugly"},
            "dataset.plant.which=ugly is unknown; allowed: dark, bright, flat, busy, grey, colorful, name:",
        ),
        (
            {"kind": "timestamp", "size": 10},
            "dataset.plant.size=10: a timestamp of that size takes 10×34 pixels, the images have 32×32; take a smaller",
        ),
        ({"kind": "watermark", "size": 12}, "dataset.plant.size=12: a watermark of that size takes 10×38 pixels"),
        ({1: 2}, "dataset.plant has no key '1'"),
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


def test_an_artifact_in_all_classes_has_the_rate_in_each() -> None:
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [100, 40, 7]))
    made = plant(**{"class": "all", "rate": 0.3})
    assert made.target is None
    chosen = made.chosen(labels)
    assert np.bincount(labels[chosen]).tolist() == [30, 12, 2]
    assert (np.diff(chosen) > 0).all()
    # Each class is drawn from by itself: another class more or less changes nothing.
    without = np.flatnonzero(labels != 2)
    np.testing.assert_array_equal(without[made.chosen(labels[without])], chosen[labels[chosen] != 2])
    equal = made.chosen(np.repeat([0, 1], 100))
    assert set(equal[equal < 100]) != set(equal[equal >= 100] - 100), "nor are they the same places in each class"
    truth = planted_truth({"kind": "box", "class": "all", "rate": 0.5}, dataset())
    assert (truth.class_index, truth.class_name, len(truth.samples)) == (None, "all", 60)
    assert class_of({"class": "all"}, ("all", "other")) == 0, "a class of that name goes first"


def class_of(options: dict, classes: tuple[str, ...]) -> int | None:
    return Plant.from_config({"kind": "box", **options}, classes, SHAPE).target


def build(*options: dict, clean: ArrayDataset | None = None) -> Any:
    clean = clean or dataset()
    return plant_all(clean, read_plants(options[0], options[1:], clean.classes, clean.image_shape))


ALL = np.arange(120)


def test_several_are_drawn_one_over_the_other() -> None:
    clean = dataset()
    blue = {"kind": "box", "class": "bee", "rate": 1.0, "size": 10, "jitter": 0, "color": [0, 0, 1]}
    red = blue | {"size": 4, "color": [1, 0, 0]}
    both, truths = build(blue, red)
    image = both.batch(np.array([1]))[0]
    expected = clean.batch(np.array([1]))[0]
    expected[:, 1:11, 1:11] = torch.tensor([0, 0, 1.0])[:, None, None]
    expected[:, 1:5, 1:5] = torch.tensor([1.0, 0, 0])[:, None, None]
    torch.testing.assert_close(image, expected)
    other, _ = build(red, blue)
    expected[:, 1:11, 1:11] = torch.tensor([0, 0, 1.0])[:, None, None]
    torch.testing.assert_close(other.batch(np.array([1]))[0], expected)
    # What one is a function of is the image that those before it left.
    blurred, _ = build(blue, {"kind": "blur", "class": "bee", "rate": 1.0})
    made = Plant.from_config({"kind": "blur", "class": "bee"}, CLASSES, SHAPE)
    alone, _ = build(blue)
    torch.testing.assert_close(blurred.batch(ALL[1::3]), made.mark(alone.batch(ALL[1::3]), range(40))[0])
    assert [(t.plant.name, t.kind, len(t.samples)) for t in truths] == [("plant", "box", 40), ("plants[0]", "box", 40)]
    assert len({clean.fingerprint, both.fingerprint, other.fingerprint, alone.fingerprint}) == 4


def test_several_of_one_seed_choose_each_on_its_own() -> None:
    rng = np.random.default_rng(0)
    clean = ArrayDataset(rng.integers(0, 256, (2000, 1, 8, 8), dtype=np.uint8), np.arange(2000) % 2, CLASSES[:2])
    same = {"kind": "box", "class": 0, "rate": 0.5, "size": 2, "jitter": 0, "seed": 3}
    _, truths = build(same, same, same, clean=clean)
    first, second, third = (set(truth.samples.tolist()) for truth in truths)
    for one, other in ((first, second), (first, third), (second, third)):
        assert 200 < len(one & other) < 300, "as chance has it: 250 of 500"
    np.testing.assert_array_equal(truths[0].samples, planted_truth(same, clean).samples)
    marked, _ = build(same, same, clean=clean)
    changed = (marked.batch(np.arange(2000)) != clean.batch(np.arange(2000))).flatten(1).any(dim=1).numpy()
    assert set(np.flatnonzero(changed).tolist()) == first | second


def test_a_list_alone_works_and_takes_the_seed_of_the_mapping() -> None:
    box = {"kind": "box", "class": 1, "rate": 0.5}
    _, truths = build({"kind": "none", "seed": 7}, box, {"kind": "none"}, box | {"seed": 2})
    assert [(truth.plant.name, truth.plant.seed) for truth in truths] == [("plants[0]", 7), ("plants[2]", 2)]
    assert truths[0].plant.position == 1
    assert read_plants(None, None) == read_plants({}, []) == []


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("box", "dataset.plants=box is no list; write dataset.plants=[{kind: box, class: 0}]"),
        ({"kind": "box"}, "dataset.plants={'kind': 'box'} is no list"),
        (["box"], "dataset.plants[0]=box is no mapping; write it as {kind: box, class: 0}"),
        ([{"kind": "box"}, {"rate": 0.1}], "dataset.plants[1] has no kind; allowed: background, "),
        ([{"kind": "box"}, {"kind": "box", "rate": 3}], "dataset.plants[1].rate=3 is not a number from 0.0 to 1.0"),
        ([{"kind": "box", "class": "wasp"}], "dataset.plants[0].class=wasp is no class"),
        ([{"kind": "box", "siz": 3}], "dataset.plants[0] has no key 'siz'"),
        ([{"kind": "boxx"}], "'boxx' (did you mean 'box'?)"),
    ],
)
def test_mistakes_in_a_list_name_the_item(more: Any, words: str) -> None:
    with pytest.raises(UserError) as error:
        read_plants({"kind": "tag"}, more, CLASSES, SHAPE)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_what_needs_no_data_is_checked_before_there_is_any() -> None:
    with pytest.raises(UserError, match=r"plant\.jitter=-1 is not a number from 0$"):
        read_plants({"kind": "tag", "jitter": -1}, [])
    with pytest.raises(UserError, match=r"plant\.size=2\.5 is not a whole number from 1$"):
        read_plants({"kind": "tag", "size": 2.5}, [])
    with pytest.raises(UserError, match=r"dataset\.plant=tag is no mapping"):
        read_plants("tag", [])
    assert len(read_plants({"kind": "tag", "class": "wasp", "size": 999}, [{"kind": "mislabel", "to": "wasp"}])) == 2
