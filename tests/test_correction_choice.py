"""The rule by which corrections are chosen: what may be lost, what that is worth, and what plays no part."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from cheating import NORMALIZER, World, tagged
from torch import nn

from spray.correction import CORRECTIONS, Options
from spray.correction.choice import Measure, Trial, Validation, choose, harms
from spray.correction.guards import costs, fallen
from spray.data.arrays import ArrayDataset
from spray.errors import UserError
from spray.training import train


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def test_a_loss_counts_beyond_its_limit_and_its_standard_error() -> None:
    before = np.ones(400, bool)
    for lost, expected in [(0, False), (2, False), (3, False), (4, True), (40, True)]:
        after = before.copy()
        after[:lost] = False
        error = np.sqrt((lost / 400 - (lost / 400) ** 2) / 400)
        assert (lost / 400 > 0.005 + error) == expected
        assert costs(before, after, 0.005) == expected
    # As many won as lost is no loss.
    half = np.arange(400) % 2 == 0
    assert not costs(half, ~half, 0.0)


def test_no_class_may_pay_for_the_others() -> None:
    labels = np.arange(480) % 8
    before = np.arange(480) % 16 < 12  # three quarters of each pair of classes
    after = before.copy()
    # Class 3 is lost; as many others are won, so that all together nothing is.
    after[labels == 3] = False
    won = np.flatnonzero(~before & (labels != 3))[: int(before[labels == 3].sum())]
    after[won] = True
    assert after.sum() == before.sum()
    assert not costs(before, after, 0.005)
    assert costs(before, after, 0.005, labels)
    assert fallen(before, after, labels) == [3]
    assert not fallen(before, after, labels, max_loss=1.0), "where all may be lost a class may be too"
    # A few images of sixty are chance: 10 points, of which two standard errors are 7.7.
    after = before.copy()
    after[np.flatnonzero(before & (labels == 3))[:6]] = False
    assert not fallen(before, after, labels)
    # Nor may a class be lost that the artifact is added to.
    plain = [Measure(before, 0.5, labels, [(labels, hits)]) for hits in (before, before & (labels != 3))]
    assert harms(plain[0], plain[1], 0.005)
    assert not harms(plain[1], plain[0], 0.005)


def test_a_class_that_had_too_many_images_may_come_down_to_the_others() -> None:
    labels = np.arange(300) % 3
    number = np.arange(300) // 3
    # Class 1 is seen in most images: 95 of its own are right, of the others 50 and 40.
    before = number < np.array([50, 95, 40])[labels]
    better = number < np.array([90, 60, 95])[labels]
    assert fallen(before, better, labels) == [1]
    assert not costs(before, better, 0.005, labels)
    # Not where it is worse than the worst class was, or where the others gain no more than chance.
    assert costs(before, number < np.array([90, 35, 95])[labels], 0.005, labels)
    assert costs(before, number < np.array([66, 79, 42])[labels], 0.005, labels)


def test_a_point_of_clean_accuracy_is_worth_two_with_the_artifact(world: World) -> None:
    for attacked, expected in ((0.519, 0), (0.521, 1)):
        trials = [Trial({"strength": 0}, measured(0.9, 0.5)), Trial({"strength": 1}, measured(0.89, attacked))]
        problem = world.problem(options=Options(max_loss=0.02))
        assert choose(problem, measured(0.9, 0.1), trials).setting == {"strength": expected}


def test_where_all_images_carry_an_artifact_all_that_are_held_back_are_measured(world: World) -> None:
    problem = world.problem()
    everywhere = replace(world.finding, scores=np.ones(len(problem.train)), threshold=0.5)
    split = Validation(replace(problem, findings=[replace(everywhere, samples=np.arange(len(problem.train)))]))
    assert split.clean.tolist() == split.held.tolist()
    assert 0 <= split.measure(world.model).right.mean() <= 1


def measured(right: float, attacked: float) -> Measure:
    return Measure(np.arange(1000) < 1000 * right, attacked)


def test_the_best_of_those_that_cost_nothing_until_one_costs(world: World) -> None:
    trials = [(0.9, 0.2), (0.899, 0.6), (0.9, 0.5), (0.5, 0.99), (0.9, 1.0)]
    made: list[int] = []

    def ask():
        for i, (right, attacked) in enumerate(trials):
            made.append(i)
            yield Trial({"strength": i}, measured(right, attacked))

    problem = world.problem()
    assert choose(problem, measured(0.9, 0.1), ask()).setting == {"strength": 1}
    assert made == [0, 1, 2, 3], "the fifth is not tried any more"
    assert [row["allowed"] for row in problem.facts["tried"]] == [True, True, True, False]
    assert problem.facts["within_limit"]
    everything = choose(problem, measured(0.9, 0.1), ask(), stop=False)
    assert everything.setting == {"strength": 4}
    # If all cost, the one that costs least, and it is said.
    costly = [Trial({"strength": i}, measured(right, 0.9)) for i, right in enumerate([0.5, 0.7, 0.6])]
    assert choose(problem, measured(0.9, 0.1), costly, stop=False).setting == {"strength": 1}
    assert not problem.facts["within_limit"]
    with pytest.raises(UserError, match="no layer"):
        choose(problem, measured(0.9, 0.1), [])


@pytest.mark.parametrize("name", ["rrr", "a_clarc", "group_balanced"])
def test_images_are_held_back_from_every_class_and_never_trained_on_in_a_trial(world: World, name: str) -> None:
    split = Validation(world.problem())
    assert np.array_equal(np.sort(np.concatenate([split.held, split.rest])), np.arange(480))
    assert np.bincount(world.train.labels[split.held]).tolist() == [32, 32, 32]
    assert not np.isin(split.clean, world.samples).any()
    seen: list[np.ndarray] = []

    def watch(model: nn.Module, dataset: object, *arguments: object, indices: np.ndarray, **options: object) -> None:
        seen.append(np.arange(480) if indices is None else indices)
        train(model, dataset, *arguments, indices=indices, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("spray.correction.fine_tuning.train", watch)
        CORRECTIONS.get(name)(world.problem(epochs=1))
    assert all(not np.isin(indices, split.held).any() for indices in seen[:-1])
    assert len(seen) >= 3, "control, strengths or a trial, and the whole in the end"
    assert len(seen[-1]) == 480


def test_the_truth_plays_no_part(world: World) -> None:
    # Test images are never asked for, and what is measured uses the isolated artifact.
    split = Validation(world.problem())
    measure = split.measure(world.model)
    assert len(measure.right) == len(split.clean)
    others = split.clean[world.train.labels[split.clean] != 2]
    with torch.no_grad():
        logits = world.model(
            NORMALIZER(ArrayDataset(tagged(world.train.images, others), world.train.labels, "abc").batch(others))
        )
    expected = (logits.argmax(1).numpy() == world.train.labels[others]).mean()
    assert measure.attacked == pytest.approx(expected)


def test_a_strength_that_is_set_is_not_searched(world: World) -> None:
    problem = world.problem(epochs=1, options=Options(strength={"rrr": 2.0}))
    CORRECTIONS.get("rrr")(problem)
    assert problem.facts == {"chosen": {"strength": 2.0}}
