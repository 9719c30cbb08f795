"""A network that cheats in two classes, by two artifacts: every correction handles both at once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from cheating import NORMALIZER, SIDE, N, World, pictures, tagged
from torch import nn

from spray.correction import CORRECTIONS, Finding
from spray.correction.base import CONTROL
from spray.data.arrays import ArrayDataset
from spray.training import predict, train


def second_tag(images: np.ndarray, which: np.ndarray) -> np.ndarray:
    images = images.copy()
    images[which, :, 1:4, 6:9] = 255
    return images


class TwoWorld(World):
    """Half of class 2 has a white square in the upper left, half of class 0 one in the upper right."""

    def __init__(self) -> None:
        super().__init__()
        others = np.flatnonzero(self.train.labels == 0)[::2]
        images = second_tag(self.train.images, others)
        self.train = ArrayDataset(images, self.train.labels, ("a", "b", "c"))
        with torch.random.fork_rng():
            torch.manual_seed(1)
            for layer in (self.model[1], self.model[3]):
                layer.reset_parameters()
        options = {"epochs": 6, "batch_size": 32, "learning_rate": 0.005, "weight_decay": 0.0, "seed": 0}
        train(self.model, self.train, NORMALIZER, **options)
        mask = torch.zeros(SIDE, SIDE)
        mask[1:4, 6:9] = 1
        artifact = replace(self.finding.artifact, mask=mask, pattern=mask[None].clone())
        self.findings = [self.finding, Finding(artifact, 0, others)]
        clean, self.labels = pictures(1)
        every = np.arange(N)
        self.attacks = [(tagged(clean, every), 2), (second_tag(clean, every), 0)]

    def turned(self, model: nn.Module) -> list[float]:
        """Share of the other classes' images with each artifact that are predicted as its class."""
        shares = []
        for images, target in self.attacks:
            data = ArrayDataset(images, self.labels, ("a", "b", "c"))
            predicted = predict(model, data, NORMALIZER).argmax(dim=1).numpy()
            shares.append(float((predicted[self.labels != target] == target).mean()))
        return shares


@pytest.fixture(scope="module")
def world() -> TwoWorld:
    return TwoWorld()


@pytest.fixture(scope="module")
def shared() -> dict:
    return {}


@pytest.fixture(scope="module")
def control(world: TwoWorld) -> list[float]:
    return world.turned(CORRECTIONS.get(CONTROL)(world.problem(findings=world.findings)))


# It is given nothing of the artifacts.
BLIND = {"lrp_guided"}


@pytest.mark.parametrize("name", sorted({*CORRECTIONS.names()} - {CONTROL} - BLIND))
def test_both_lose_their_effect(world: TwoWorld, control: list[float], shared: dict, name: str) -> None:
    assert min(control) > 0.6
    model = CORRECTIONS.get(name)(world.problem(findings=world.findings, shared=shared))
    for after, before in zip(world.turned(model), control, strict=True):
        assert after < 0.7 * before
    assert world.accuracy(model, world.clean) > world.accuracy(world.model, world.clean) - 0.06
