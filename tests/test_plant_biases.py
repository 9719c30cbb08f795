"""Biases that are no artifact: wrong labels, a missing kind of sample; alone, and together with artifacts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from spray.data.arrays import ArrayDataset
from spray.data.plant_biases import MEASURES, of_kind
from spray.data.planting import Plant, plant_all, read_plants
from spray.errors import UserError

CLASSES = ("ant", "bee", "cow")
N = 150


def dataset(n: int = N, seed: int = 0, channels: int = 3) -> ArrayDataset:
    """Return images of which each has brightness, contrast and colour of its own."""
    rng = np.random.default_rng(seed)
    level, spread, hue = (rng.random((n, 1, 1, 1)) for _ in range(3))
    noise = rng.random((n, 1, 12, 12)) - 0.5
    color = (rng.random((n, channels, 1, 1)) - 0.5) * hue * 0.3
    pixels = (255 * (0.3 + 0.4 * level + 0.3 * spread * noise + color)).clip(0, 255).astype(np.uint8)
    names = [f"{CLASSES[i % 3]}/{'old' if i % 2 else 'new'}-{i:03d}.png" for i in range(n)]
    return ArrayDataset(pixels, np.arange(n) % 3, CLASSES, names)


def build(*options: dict[str, Any], clean: ArrayDataset | None = None) -> Any:
    clean = clean or dataset()
    return plant_all(clean, read_plants(options[0], options[1:], clean.classes, clean.image_shape))


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5])
def test_labels_of_a_part_of_all_samples_are_replaced(rate: float) -> None:
    clean = dataset()
    biased, (truth,) = build({"kind": "mislabel", "class": "all", "rate": rate})
    changed = np.flatnonzero(biased.labels != clean.labels)
    np.testing.assert_array_equal(changed, truth.samples)
    assert np.bincount(clean.labels[changed], minlength=3).tolist() == [round(rate * 50)] * 3
    assert truth.facts == {
        "labels_before": clean.labels[changed].tolist(),
        "labels": biased.labels[changed].tolist(),
    }
    assert torch.equal(biased.batch(np.arange(N)), clean.batch(np.arange(N)))
    assert list(biased.names) == list(clean.names)
    assert (biased.fingerprint == clean.fingerprint) == (rate == 0)
    again, _ = build({"kind": "mislabel", "class": "all", "rate": rate})
    np.testing.assert_array_equal(again.labels, biased.labels)
    assert again.fingerprint == biased.fingerprint


def test_without_a_wish_every_wrong_class_is_as_likely() -> None:
    clean = ArrayDataset(np.zeros((4000, 1, 4, 4), np.uint8), np.arange(4000) % 4, ("a", "b", "c", "d"))
    biased, (truth,) = build({"kind": "mislabel", "class": "c", "rate": 0.9, "size": 1, "jitter": 0}, clean=clean)
    counts = np.bincount(biased.labels[truth.samples], minlength=4)
    assert counts[2] == 0
    assert counts.sum() == 900
    assert chisquare(counts[[0, 1, 3]]).pvalue > 0.001


def test_labels_go_to_the_class_that_is_asked_for() -> None:
    clean = dataset()
    biased, (truth,) = build({"kind": "mislabel", "class": "ant", "to": "cow", "rate": 0.3})
    assert len(truth.samples) == 15
    assert (clean.labels[truth.samples] == 0).all()
    assert (biased.labels[truth.samples] == 2).all()
    every, (whole,) = build({"kind": "mislabel", "class": "all", "to": "cow", "rate": 0.3})
    assert np.bincount(clean.labels[whole.samples], minlength=3).tolist() == [15, 15, 0]
    assert np.bincount(every.labels).tolist() == [35, 35, 80]


def test_a_class_without_samples_is_refused() -> None:
    with pytest.raises(UserError, match=r"^dataset\.plant\.rate=1\.0 leaves no training image of class 'ant'; every"):
        build({"kind": "mislabel", "class": "ant", "rate": 1.0})
    with pytest.raises(UserError, match=r"^dataset\.plants\[0\]\.rate=1\.0 leaves no training image of class 'bee'"):
        build({"kind": "none"}, {"kind": "missing", "class": "bee", "rate": 1.0})


def brightness(images: np.ndarray) -> np.ndarray:
    return np.tensordot(images.mean(axis=(2, 3)), [0.2125, 0.7154, 0.0721], 1)


def contrast(images: np.ndarray) -> np.ndarray:
    return np.tensordot(images, [0.2125, 0.7154, 0.0721], (1, 0)).std(axis=(1, 2))


def color(images: np.ndarray) -> np.ndarray:
    return np.ptp(images, axis=1).mean(axis=(1, 2))


OWN = {
    "dark": lambda x: -brightness(x),
    "bright": brightness,
    "flat": lambda x: -contrast(x),
    "busy": contrast,
    "grey": lambda x: -color(x),
    "colorful": color,
}
"""What those that are missing have most of."""


@pytest.mark.parametrize("which", MEASURES)
def test_those_that_are_most_of_a_kind_are_left_out(which: str) -> None:
    clean, test = dataset(), dataset(300, seed=1)
    plants = read_plants({"kind": "missing", "class": "bee", "which": which, "rate": 0.2}, [], CLASSES, (3, 12, 12))
    biased, (truth,) = plant_all(clean, plants)
    bees = np.flatnonzero(clean.labels == 1)
    values = OWN[which](clean.batch(bees).double().numpy())
    out = bees[np.argsort(values)[-10:]]
    assert sorted(truth.facts["left_out"]) == sorted(clean.names[i] for i in out)
    kept = np.setdiff1d(np.arange(N), out)
    assert list(biased.names) == [clean.names[i] for i in kept]
    np.testing.assert_array_equal(biased.labels, clean.labels[kept])
    assert torch.equal(biased.batch(np.arange(140)), clean.batch(kept))
    assert len(truth.samples) == 0
    # In the test set they are told by the same property.
    found = of_kind(test, plants[0], truth.facts)
    bees = np.flatnonzero(test.labels == 1)
    expected = bees[OWN[which](test.batch(bees).double().numpy()) >= values.max() - np.ptp(np.sort(values)[-10:])]
    np.testing.assert_array_equal(found, expected)
    assert 0 < len(found) < len(bees)


def test_samples_are_told_by_their_names() -> None:
    options = {"kind": "missing", "class": "bee", "which": "name:bee/old-*", "rate": 1.0}
    clean = dataset()
    biased, (truth,) = build(options)
    old = [name for name in clean.names if name.startswith("bee/old")]
    assert truth.facts["left_out"] == old
    assert set(biased.names) == set(clean.names) - set(old)
    plants = read_plants(options, [], CLASSES, (3, 12, 12))
    test = dataset(60, seed=1)
    expected = [i for i, name in enumerate(test.names) if name.startswith("bee/old")]
    assert of_kind(test, plants[0], truth.facts).tolist() == expected
    half, (some,) = build(options | {"rate": 0.4, "class": "all", "which": "name:*old*"})
    assert len(some.facts["left_out"]) == 30
    assert np.bincount(half.labels).tolist() == [40, 40, 40]
    with pytest.raises(UserError, match=r"plant\.which=name:x\* leaves nothing out: no sample of the class has such a"):
        build(options | {"which": "name:x*"})


def test_nothing_is_missing_at_rate_0() -> None:
    clean = dataset()
    biased, (truth,) = build({"kind": "missing", "rate": 0.0}, clean=clean)
    assert biased is clean
    assert truth.facts["left_out"] == []
    plant = read_plants({"kind": "missing", "rate": 0.0}, [], CLASSES, (3, 12, 12))[0]
    assert of_kind(dataset(60, 1), plant, truth.facts).tolist() == []


def test_grey_images_have_a_brightness_too() -> None:
    clean = dataset(channels=1)
    _, (truth,) = build({"kind": "missing", "class": "ant", "which": "dark", "rate": 0.1}, clean=clean)
    ants = np.flatnonzero(clean.labels == 0)
    darkest = ants[np.argsort(clean.images[ants].mean(axis=(1, 2, 3)))[:5]]
    assert sorted(truth.facts["left_out"]) == sorted(clean.names[i] for i in darkest)


BOX = {"kind": "box", "class": "bee", "rate": 0.4, "size": 3, "jitter": 0, "color": [0, 0, 0]}


def test_each_acts_on_what_those_before_it_left() -> None:
    clean = dataset()
    to_bee = {"kind": "mislabel", "class": "ant", "to": "bee", "rate": 0.5}
    # Mislabelled first: the artifact goes to a share of all that are said to be bees.
    _, (wrong, box) = build(to_bee, BOX)
    assert len(box.samples) == 30
    assert 0 < len(set(box.samples) & set(wrong.samples)) < 25
    # The other way round, only bees have it.
    _, (box, wrong) = build(BOX, to_bee)
    assert len(box.samples) == 20
    assert (clean.labels[box.samples] == 1).all()
    # A black box over the image makes it darker: half of it, and those are missing.
    blackened = BOX | {"size": 6, "place": "center"}
    left, (box, missing) = build(blackened, {"kind": "missing", "class": "bee", "which": "dark", "rate": 0.4})
    before, (first, _) = build({"kind": "missing", "class": "bee", "which": "dark", "rate": 0.4}, blackened)
    assert len(box.samples) < len(set(first.plant.chosen(clean.labels))) == 20
    assert len(left) == len(before) == N - 20
    assert missing.facts["left_out"] != first.facts["left_out"]


def test_the_truth_counts_in_the_set_that_is_used() -> None:
    options = (
        BOX,
        {"kind": "mislabel", "class": "cow", "rate": 0.2},
        {"kind": "missing", "which": "busy", "rate": 0.3},
    )
    clean = dataset()
    biased, (box, wrong, missing) = build(*options[:2], options[2] | {"class": "all"})
    # Three in ten of each class, as labelled.
    assert N - len(biased) == len(missing.facts["left_out"]) == 45
    by_name = {name: i for i, name in enumerate(clean.names)}
    origin = np.array([by_name[name] for name in biased.names])
    changed = (biased.batch(np.arange(len(biased))) != clean.batch(origin)).flatten(1).any(dim=1).numpy()
    np.testing.assert_array_equal(np.flatnonzero(changed), box.samples)
    np.testing.assert_array_equal(np.flatnonzero(biased.labels != clean.labels[origin]), wrong.samples)
    assert wrong.facts["labels"] == biased.labels[wrong.samples].tolist()
    assert wrong.facts["labels_before"] == clean.labels[origin[wrong.samples]].tolist()
    assert 0 < len(box.samples) < 20
    masks = box.masks()
    assert masks.shape == (len(box.samples), 12, 12)
    touched = (biased.batch(box.samples) != clean.batch(origin[box.samples])).any(dim=1)
    assert bool((touched <= (masks > 0)).all())
    assert (masks.sum(dim=(1, 2)) == 9).all()
    assert torch.equal(box.masks(1, 3), masks[1:3])
    assert not wrong.has_masks
    with pytest.raises(ValueError, match="has no masks"):
        wrong.masks()


def test_a_bias_is_not_drawn() -> None:
    made = Plant.from_config({"kind": "mislabel"}, CLASSES, (3, 12, 12))
    assert not made.is_drawn
    with pytest.raises(ValueError, match="mislabel is not drawn on images"):
        made.mark(torch.zeros(1, 3, 12, 12), [0])
