"""Simulated moments: a change that was fitted roughly becomes the one that was made."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from spray.isolation.changed import Changed, isolate_change
from spray.isolation.evidence import Evidence
from spray.isolation.moments import refined
from spray.isolation.statistics import statistics
from spray.isolation.two_samples import told_apart
from tests.worlds import World, scenes


def found(world: World) -> Changed:
    change = isolate_change(world.evidence)
    assert change is not None
    return change


@pytest.mark.parametrize(
    ("kind", "gain", "offset", "noise"),
    [("noise", 0.7, 0.15, 0.3 / 12**0.5), ("brightness", 0.7, 0.3, 0.0)],
)
def test_parameters_come_nearer_to_what_was_planted(kind: str, gain: float, offset: float, noise: float) -> None:
    world = World(kind=kind, strength=0.3)
    start = found(world)
    off = replace(start, gain=start.gain + 0.08, offset=start.offset - 0.03, noise=0.8 * start.noise)
    closer = refined(off, world.evidence)
    torch.testing.assert_close(closer.gain, torch.full((3,), gain), atol=0.04, rtol=0)
    torch.testing.assert_close(closer.offset, torch.full((3,), offset), atol=0.02, rtol=0)
    assert closer.noise == pytest.approx(noise, abs=0.006)


def test_no_classifier_of_statistics_tells_what_it_makes_from_the_cluster() -> None:
    world = World(kind="noise", strength=0.3)
    rest, draws = world.other[1::2], np.arange(len(world.other[1::2]))
    start = found(world)
    start = replace(start, noise=0.85 * start.noise)
    seen = statistics(world.images).double().numpy()

    def told(change: Changed) -> float:
        return told_apart(seen, statistics(change.insert(rest, draws)).double().numpy(), 0)

    assert told(start) > 0.95
    assert told(refined(start, world.evidence)) < 0.75


def test_a_fifth_of_others_among_the_cluster_moves_it_little() -> None:
    world = World(kind="noise", strength=0.3)
    n = len(world.images)
    images = torch.cat([world.images[: n - n // 5], scenes(n // 5, 9)])
    evidence = Evidence(images, world.evidence.relevance, world.other, world.evidence.other_relevance)
    closer = refined(found(world), evidence)
    torch.testing.assert_close(closer.gain, torch.full((3,), 0.7), atol=0.08, rtol=0)
    assert closer.noise == pytest.approx(0.3 / 12**0.5, abs=0.02)


def test_what_is_right_stays_and_nothing_else_is_touched() -> None:
    world = World(kind="brightness", strength=0.3)
    start = replace(found(world), gain=torch.full((3,), 0.7), offset=torch.full((3,), 0.3))
    before, weights = start.gain.clone(), start.weights.clone()
    closer = refined(start, world.evidence)
    torch.testing.assert_close(closer.gain, start.gain, atol=0.02, rtol=0)
    assert torch.equal(start.gain, before)
    assert torch.equal(closer.weights, weights)
    assert (closer.noise, closer.blur) == (0.0, 0.0)
