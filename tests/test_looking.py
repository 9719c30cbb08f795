"""What `rank` reads of the images: drawn once for all classes; each is compared with those of other classes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from spray.analysis import repeated
from spray.pipelines import looking
from spray.pipelines.looking import draw_images, repeated_in_class

SIDE = 8


class Images:
    """Images whose pixels all say which sample they are, and how often any was read."""

    image_shape = (1, SIDE, SIDE)

    def __init__(self, labels: np.ndarray) -> None:
        self.labels, self.read = labels, 0

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: np.ndarray) -> torch.Tensor:
        self.read += len(indices)
        return torch.from_numpy(indices.astype(np.float32))[:, None, None, None].expand(-1, 1, SIDE, SIDE)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """The samples of other classes that each class is compared with."""
    found: list[np.ndarray] = []

    def repeated_content(images: np.ndarray, maps: np.ndarray, others: np.ndarray, device: Any) -> list[Any]:
        found.append(others[:, 0, 0, 0].astype(int))
        return []

    monkeypatch.setattr(looking, "repeated_content", repeated_content)
    return found


def context_of(labels: np.ndarray, seed: int = 0) -> Any:
    return SimpleNamespace(train=Images(labels), config=SimpleNamespace(seed=seed), device="cpu")


def search(context: Any, drawn: looking.Drawn, c: int) -> None:
    index = np.flatnonzero(context.train.labels == c)
    maps: Any = SimpleNamespace(attribution=np.zeros((len(context.train), 1, SIDE, SIDE), np.float16))
    repeated_in_class(context, c, index, maps, drawn)


def test_images_to_compare_with_are_read_once_for_all_classes(seen: list[np.ndarray]) -> None:
    labels = np.arange(3000) % 10
    context = context_of(labels)
    drawn = draw_images(context)
    for c in range(10):
        search(context, drawn, c)
    assert context.train.read == 2 * repeated.OTHERS + len(labels)
    for c, others in enumerate(seen):
        assert len(others) >= repeated.OTHERS
        assert (labels[others] != c).all()
        assert set(labels[others]) == set(range(10)) - {c}


def test_a_class_of_most_samples_is_compared_with_all_others_there_are(seen: list[np.ndarray]) -> None:
    labels = np.where(np.arange(3000) % 5 == 0, np.arange(3000) % 2, 0)
    context = context_of(labels)
    drawn = draw_images(context)
    search(context, drawn, 0)
    assert len(drawn.index) - (labels[drawn.index] == 0).sum() < repeated.OTHERS
    assert set(seen[0]) == set(np.flatnonzero(labels == 1))


def test_a_small_set_is_read_whole_and_the_draw_has_a_seed(seen: list[np.ndarray]) -> None:
    labels = np.arange(60) % 2
    context = context_of(labels)
    search(context, draw_images(context), 1)
    assert set(seen[0]) == set(np.flatnonzero(labels == 0))
    assert context.train.read == 60 + 30
    many = np.zeros(5000, int)
    first, again, other = (draw_images(context_of(many, seed)).index for seed in (0, 0, 1))
    assert (first == again).all()
    assert (first != other).any()
    assert (np.diff(first) > 0).all()
