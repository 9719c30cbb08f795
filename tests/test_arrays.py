"""ArrayDataset: values, order, fingerprint, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spray.data.arrays import ArrayDataset


def make(seed: int = 0, **changes: object) -> ArrayDataset:
    rng = np.random.default_rng(seed)
    parts: dict = {
        "images": rng.integers(0, 256, (12, 3, 4, 5), dtype=np.uint8),
        "labels": [0, 1] * 6,
        "classes": ("a", "b"),
    }
    return ArrayDataset(**(parts | changes))


def test_batch_is_float_in_unit_range_in_the_asked_order() -> None:
    data = make()
    pixels = data.batch(np.array([3, 0, 3]))
    assert pixels.dtype == torch.float32
    assert pixels.shape == (3, 3, 4, 5)
    expected = data.images[[3, 0, 3]].astype(np.float64) / 255
    np.testing.assert_allclose(pixels.numpy(), expected, atol=1e-7)
    extremes = ArrayDataset(np.array([[[[0, 255]]]], dtype=np.uint8), [0], ("a",)).batch(np.array([0]))
    assert extremes.flatten().tolist() == [0.0, 1.0]


def test_changing_a_batch_leaves_the_dataset_alone() -> None:
    data = make()
    before = data.images.copy()
    data.batch(np.arange(12)).zero_()
    np.testing.assert_array_equal(data.images, before)


def test_describes_itself() -> None:
    data = make()
    assert len(data) == 12
    assert data.image_shape == (3, 4, 5)
    assert data.labels.dtype == np.int64
    assert data.classes == ("a", "b")
    assert list(data.names[:2]) == ["00", "01"]
    assert list(make(names=[f"n{i}" for i in range(12)]).names[:2]) == ["n0", "n1"]


def test_fingerprint_follows_pixels_labels_classes_and_shape() -> None:
    same = make()
    others = [
        make(seed=1),
        make(labels=[1, 0] * 6),
        make(classes=("a", "c")),
        make(images=same.images.reshape(12, 3, 5, 4)),
    ]
    assert make().fingerprint == same.fingerprint
    prints = {data.fingerprint for data in [same, *others]}
    assert len(prints) == 5


@pytest.mark.parametrize(
    "changes",
    [
        {"images": np.zeros((12, 3, 4, 5), dtype=np.float32)},
        {"images": np.zeros((12, 4, 5), dtype=np.uint8)},
        {"labels": [0] * 11},
        {"labels": [2] * 12},
        {"labels": [-1] * 12},
        {"names": ["x"]},
    ],
)
def test_refuses_what_does_not_fit(changes: dict) -> None:
    with pytest.raises(ValueError, match=r"must|need"):
        make(**changes)
