"""A small network that cheats, and the data that taught it to: what tests of corrections start from."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

from spray.correction import Problem
from spray.correction.base import Finding
from spray.data.arrays import ArrayDataset
from spray.data.base import Normalizer
from spray.isolation.candidate import Artifact
from spray.training import predict, train

NORMALIZER = Normalizer([0.3], [0.3])
SIDE = 10
N = 480
WIDTH = 64


def pictures(seed: int, n: int = N) -> tuple[np.ndarray, np.ndarray]:
    """Three classes told apart, with some effort, by which part of the lower half is brighter."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    images = rng.normal(90, 45, (n, 1, SIDE, SIDE))
    for c in range(3):
        images[labels == c, :, 5:, 3 * c : 3 * c + 4] += 20
    return images.clip(0, 200).astype(np.uint8), labels


def tagged(images: np.ndarray, which: np.ndarray) -> np.ndarray:
    images = images.copy()
    images[which, :, 1:4, 1:4] = 255
    return images


class World:
    """A network that was trained on data whose class 2 has a white square in half of its images."""

    def __init__(self) -> None:
        images, labels = pictures(0)
        self.samples = np.flatnonzero(labels == 2)[::2]
        self.train = ArrayDataset(tagged(images, self.samples), labels, ("a", "b", "c"))
        images, self.labels = pictures(1)
        self.clean = ArrayDataset(images, self.labels, ("a", "b", "c"))
        self.attacked = ArrayDataset(tagged(images, np.arange(N)), self.labels, ("a", "b", "c"))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.model = nn.Sequential(nn.Flatten(), nn.Linear(SIDE**2, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 3))
        options = {"epochs": 6, "batch_size": 32, "learning_rate": 0.005, "weight_decay": 0.0, "seed": 0}
        train(self.model, self.train, NORMALIZER, **options)
        mask = torch.zeros(SIDE, SIDE)
        mask[1:4, 1:4] = 1
        artifact = Artifact(mask, mask[None].clone(), torch.zeros(4, 2, dtype=torch.int64), 0.5, 1, True)
        self.finding = Finding(artifact, 2, self.samples)

    def problem(self, **changes: object) -> Problem:
        parts: dict = {
            "model": copy.deepcopy(self.model),
            "train": self.train,
            "normalizer": NORMALIZER,
            "findings": [self.finding],
            "epochs": 6,
            "batch_size": 32,
            "learning_rate": 0.005,
            "seed": 0,
            "device": torch.device("cpu"),
        }
        return Problem(**(parts | changes))

    def to_class(self, model: nn.Module) -> float:
        """Share of the other classes' images with the square that are predicted as its class."""
        predicted = predict(model, self.attacked, NORMALIZER).argmax(dim=1).numpy()
        return float((predicted[self.labels != 2] == 2).mean())

    def accuracy(self, model: nn.Module, data: ArrayDataset) -> float:
        return float((predict(model, data, NORMALIZER).argmax(dim=1).numpy() == self.labels).mean())
