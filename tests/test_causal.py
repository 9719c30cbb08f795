"""The causal test on predictors whose answers are known exactly, and its statistics against scipy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from spray.isolation import causal
from spray.isolation.candidate import Artifact
from spray.isolation.causal import Effect, holm, removal_cost, verdict
from spray.isolation.sample_bias import SampleBias, sample_bias
from spray.verification import wilson_interval

SIDE = 12


def artifact(value: float = 1.0, constant: bool = True) -> Artifact:
    mask = torch.zeros(SIDE, SIDE)
    mask[2:6, 2:6] = 1
    return Artifact(mask, torch.full((1, SIDE, SIDE), value), torch.zeros(1, 2, dtype=torch.int64), 0.5, 1, constant)


def region(images: Tensor) -> Tensor:
    return images[:, 0, 2:6, 2:6].mean(dim=(1, 2))


def by_region(images: Tensor) -> Tensor:
    """Class 1 where the mean of the artifact's place exceeds what the corner says, else class 0."""
    return torch.stack([images[:, 0, 11, 11], region(images), torch.full((len(images),), -9.0)], dim=1)


def pictures(places: list[float], corners: list[float]) -> Tensor:
    images = torch.full((len(places), 1, SIDE, SIDE), 0.1)
    for image, place, corner in zip(images, places, corners, strict=True):
        image[0, 2:6, 2:6], image[0, 11, 11] = place, corner
    return images


def effect(**changes: object) -> Effect:
    parts: dict = {
        "predict": by_region,
        "artifact": artifact(0.9),
        "target": 1,
        "others": pictures([0.0] * 10, [0.5] * 6 + [0.95] * 4),
        "carriers": pictures([0.9] * 8, [0.4] * 8),
        "donors": pictures([0.2] * 5, [0.4] * 5),
        "seed": 0,
    }
    return causal.measure_effect(**(parts | changes))


def test_rates_gains_and_costs_are_exactly_those_of_the_predictor() -> None:
    result = effect()
    # The artifact makes 0.9 of the place, which flips the six corners of 0.5; the control's 0.2 flips none.
    assert result.flip_rate == pytest.approx(0.6)
    assert result.control_flip_rate == 0
    assert result.logit_gain == pytest.approx(0.7, abs=1e-5)
    assert result.n == 10
    assert result.p_value == pytest.approx(stats.binomtest(6, 6, alternative="greater").pvalue)
    # In-painted from what is around them, 0.9 becomes 0.1 in carriers and 0.2 becomes 0.1 in donors.
    assert result.removal_cost == pytest.approx(0.7, abs=1e-4)
    assert result.removal_p_value == pytest.approx(
        stats.mannwhitneyu([0.8] * 8, [0.1] * 5, alternative="greater").pvalue
    )


def test_removing_what_costs_its_own_samples_gains() -> None:
    """Class 0 asks for a dark place: what makes it bright there is another class's."""
    result = effect(target=0, others=pictures([0.9] * 10, [0.2] * 10))
    assert result.removal_cost == pytest.approx(-0.7, abs=1e-4)
    assert result.removal_gain_p_value == pytest.approx(
        stats.mannwhitneyu([-0.8] * 8, [-0.1] * 5, alternative="less").pvalue
    )
    assert result.removal_p_value > 0.99
    assert effect().removal_gain_p_value > 0.99


def test_images_already_predicted_as_the_class_are_left_out() -> None:
    others = pictures([0.0, 0.6, 0.7, 0.0], [0.5, 0.5, 0.5, 0.95])
    result = effect(others=others)
    assert result.n == 2
    assert result.flip_rate == 0.5


def test_the_p_value_is_mcnemars_on_discordant_pairs() -> None:
    # Control content of 0.6 flips the corners below 0.6 as well: concordant pairs say nothing.
    others = pictures([0.0] * 30, [0.5] * 10 + [0.7] * 12 + [0.95] * 8)
    result = effect(others=others, donors=pictures([0.6] * 5, [0.65] * 5))
    assert result.flip_rate == pytest.approx(22 / 30)
    assert result.control_flip_rate == pytest.approx(10 / 30)
    assert result.p_value == pytest.approx(stats.binomtest(12, 12, alternative="greater").pvalue)


def test_discordant_pairs_of_both_kinds() -> None:
    def two_sided(images: Tensor) -> Tensor:
        # Bright corners ask for a bright place, dark corners for a dark one.
        bright = images[:, 0, 11, 11] > 0.5
        wants = torch.where(bright, region(images) - 0.7, 0.3 - region(images))
        return torch.stack([torch.zeros(len(images)), wants], dim=1)

    others = pictures([0.5] * 30, [1.0] * 21 + [0.0] * 9)
    result = effect(predict=two_sided, others=others)
    assert (result.flip_rate, result.control_flip_rate) == (pytest.approx(0.7), pytest.approx(0.3))
    assert result.p_value == pytest.approx(stats.binomtest(21, 30, alternative="greater").pvalue)
    other_way = effect(predict=two_sided, others=pictures([0.5] * 30, [1.0] * 9 + [0.0] * 21))
    assert other_way.p_value == pytest.approx(stats.binomtest(9, 30, alternative="greater").pvalue)


def test_an_artifact_no_better_than_its_control_has_no_effect() -> None:
    result = effect(donors=pictures([0.9] * 5, [0.95] * 5))
    assert result.flip_rate == result.control_flip_rate == pytest.approx(0.6)
    assert result.p_value == 1
    assert result.logit_gain == pytest.approx(0, abs=1e-6)
    assert verdict(result, True, result.p_value, result.removal_p_value) == "no_effect"


def test_a_model_that_looks_elsewhere_is_not_moved() -> None:
    def elsewhere(images: Tensor) -> Tensor:
        return torch.stack([images[:, 0, 11, 11], images[:, 0, 0, 0]], dim=1)

    result = effect(predict=elsewhere)
    assert result.flip_rate == result.control_flip_rate == result.logit_gain == result.removal_cost == 0
    assert result.p_value == 1
    assert 0 <= result.removal_p_value <= 1
    assert verdict(result, True, 1.0, result.removal_p_value) == "no_effect"


def test_removal_that_helps_has_a_negative_cost() -> None:
    def dislikes(images: Tensor) -> Tensor:
        return torch.stack([torch.zeros(len(images)), -region(images) - 1], dim=1)

    result = effect(predict=dislikes)
    assert result.removal_cost == pytest.approx(-0.7, abs=1e-5)
    assert result.removal_p_value > 0.99


def test_removal_happens_where_the_artifact_is_in_each_image() -> None:
    found = artifact(0.9)
    moved = pictures([0.1], [0.4])
    moved[0, 0, 3:7, 1:5] = 0.9
    seen: list[Tensor] = []

    def predict(images: Tensor) -> Tensor:
        seen.append(images)
        return torch.zeros(len(images), 2)

    removal_cost(predict, found, 1, moved, torch.full((1, SIDE, SIDE), 0.3))
    # In-painted from its surroundings, which are 0.1.
    torch.testing.assert_close(seen[1][0, 0, 3:7, 1:5], torch.full((4, 4), 0.1), atol=1e-4, rtol=0)
    outside = torch.ones(SIDE, SIDE, dtype=torch.bool)
    outside[3:7, 1:5] = False
    assert torch.equal(seen[1][0, 0][outside], moved[0, 0][outside])


def test_where_only_the_place_is_shared_the_content_is_that_of_carriers() -> None:
    carriers = pictures([0.2, 0.9], [0.4, 0.4])
    others = pictures([0.0] * 200, [0.5] * 200)
    result = effect(artifact=artifact(0.0, constant=False), carriers=carriers, others=others)
    # Every image gets the content of one of the two carriers, only one of which flips.
    assert 0.4 < result.flip_rate < 0.6
    assert result.control_flip_rate == 0


def test_the_seed_decides_and_nothing_else_is_touched() -> None:
    donors = pictures([0.1, 0.3, 0.6, 0.9], [0.4] * 4)
    parts = {"donors": donors, "others": pictures([0.0] * 40, [0.5] * 40)}
    before = torch.random.get_rng_state()
    first = effect(**parts)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert effect(**parts) == first
    assert len({effect(**parts, seed=seed).control_flip_rate for seed in range(6)}) > 1


def test_nothing_to_test_on() -> None:
    nothing = Effect(0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0)
    empty = pictures([], [])
    assert effect(others=pictures([0.9], [0.1])) == nothing
    assert effect(others=empty) == nothing
    assert effect(donors=empty) == nothing
    assert effect(carriers=empty) == nothing


def make(flip: float = 0.6, control: float = 0.1, gain: float = 1.0, cost: float = 1.0) -> Effect:
    return Effect(flip, control, gain, 0.0, cost, 0.0, 100)


@pytest.mark.parametrize(
    ("found", "constant", "p", "removal_p", "expected"),
    [
        (make(), True, 0.001, 0.001, "clever_hans"),
        (make(), True, 0.001, 0.5, "backdoor"),
        (make(cost=-1.0), True, 0.001, 0.001, "backdoor"),
        (make(flip=0.49), True, 0.001, 0.5, "no_effect"),
        (make(flip=0.5), True, 0.001, 0.5, "backdoor"),
        (make(flip=0.25), True, 0.001, 0.001, "clever_hans"),
        (make(), True, 0.01, 0.001, "no_effect"),
        (make(), True, 0.5, 0.001, "no_effect"),
        (make(gain=0.0), True, 0.001, 0.001, "no_effect"),
        (make(gain=-1.0), True, 0.001, 0.001, "no_effect"),
        (make(flip=0.15, control=0.1), True, 0.001, 0.001, "no_effect"),
        (make(flip=0.28, control=0.1), True, 0.001, 0.001, "clever_hans"),
        (make(flip=0.28, control=0.1), False, 0.001, 0.001, "no_effect"),
        (make(flip=0.38, control=0.1), False, 0.001, 0.001, "no_effect"),
        (make(flip=0.42, control=0.1), False, 0.001, 0.001, "clever_hans"),
        (make(flip=0.1, control=0.6), True, 0.001, 0.001, "no_effect"),
    ],
)
def test_verdicts(found: Effect, constant: bool, p: float, removal_p: float, expected: str) -> None:
    assert verdict(found, constant, p, removal_p) == expected


def slow_holm(p_values: list[float]) -> list[float]:
    m, corrected = len(p_values), [0.0] * len(p_values)
    ranked = sorted(range(m), key=lambda i: p_values[i])
    largest = 0.0
    for position, i in enumerate(ranked):
        largest = max(largest, min(1.0, (m - position) * p_values[i]))
        corrected[i] = largest
    return corrected


def test_holm_equals_a_slow_version_and_a_known_example() -> None:
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    rng = np.random.default_rng(0)
    for m in (1, 2, 5, 20):
        for _ in range(20):
            p_values = np.round(rng.random(m) ** 3, 2).tolist()
            np.testing.assert_allclose(holm(p_values), slow_holm(p_values))
    assert holm([]).shape == (0,)
    assert holm([0.4]).tolist() == [0.4]


def test_holm_keeps_the_error_of_the_family() -> None:
    rng = np.random.default_rng(1)
    false_alarms = sum(bool((holm(rng.random(12)) < 0.05).any()) for _ in range(2000))
    assert stats.binomtest(false_alarms, 2000, 0.05, alternative="greater").pvalue > 0.01
    assert false_alarms > 50


def test_the_removal_cost_is_that_of_carriers_beyond_that_of_the_control() -> None:
    donors = pictures([0.1, 0.3, 0.6, 0.8], [0.4] * 4)
    carriers = pictures([0.9] * 8, [0.4] * 8)
    typical = donors.median(dim=0).values
    costs = [removal_cost(by_region, artifact(0.9), 1, images, typical) for images in (carriers, donors)]
    assert abs(float(costs[1].mean())) > 0.01
    result = effect(donors=donors, carriers=carriers, seed=3)
    assert result.removal_cost == pytest.approx(float(costs[0].mean() - costs[1].mean()), abs=1e-6)
    expected = stats.mannwhitneyu(costs[0], costs[1], alternative="greater").pvalue
    assert result.removal_p_value == pytest.approx(float(expected))


def test_intervals_hold_what_they_say() -> None:
    result = effect(others=pictures([0.0] * 60, [0.5] * 36 + [0.95] * 24))
    assert result.flip_rate_interval[0] < 0.6 < result.flip_rate_interval[1]
    assert result.effect_interval[0] < result.flip_rate - result.control_flip_rate < result.effect_interval[1]
    # Every image gains the same: the interval of the mean is a point.
    assert result.logit_gain_interval == pytest.approx([0.7, 0.7], abs=1e-4)
    assert result.removal_cost_interval == pytest.approx([0.7, 0.7], abs=1e-3)


def test_bootstrap_intervals_are_as_wide_as_theory_says() -> None:
    values = torch.from_numpy(np.random.default_rng(0).normal(3, 2, 400))
    low, high = causal.bootstrap(0, values)
    assert high - low == pytest.approx(2 * 1.96 * float(values.std()) / 20, rel=0.1)
    others = torch.from_numpy(np.random.default_rng(1).normal(1, 2, 400))
    low, high = causal.bootstrap(0, values, others)
    assert low < float(values.mean() - others.mean()) < high
    assert high - low == pytest.approx(2 * 1.96 * np.hypot(float(values.std()), float(others.std())) / 20, rel=0.1)


def test_elsewhere_the_same_content_moves_a_model_that_looks_at_a_place_less() -> None:
    result = effect(others=pictures([0.0] * 60, [0.5] * 60))
    assert result.flip_rate == 1
    assert result.elsewhere_flip_rate == 0
    assert result.elsewhere_flip_rate_interval == wilson_interval(0, 60)
    # Two of eight holes elsewhere hide the corner, whose 0.4 becomes 0.1, to the class's gain; the others nothing.
    assert result.n_removed == 8
    assert result.removal_cost_elsewhere == pytest.approx(-0.3 * 2 / 8, abs=1e-3)
    low, high = result.removal_cost_elsewhere_interval or (0, 0)
    assert -0.301 < low < result.removal_cost_elsewhere < high < 0.001


def test_natural_changes_are_the_control_where_they_are_given() -> None:
    # The control is as strong as the artifact where it is the artifact.
    result = effect(controls=[artifact(0.9)])
    assert result.control_flip_rate == result.flip_rate == pytest.approx(0.6)
    weaker = effect(controls=[artifact(0.3)])
    assert weaker.control_flip_rate == 0


def test_what_raises_all_logits_alike_is_no_gain() -> None:
    logits = torch.tensor([[1.0, 4.0, 2.0], [0.0, 0.0, 3.0]])
    torch.testing.assert_close(causal.margin(logits, 1), torch.tensor([2.0, -3.0]))
    torch.testing.assert_close(causal.margin(logits + 5, 1), causal.margin(logits, 1))


def bias(separation: float = 0.97, accuracy: float = 0.5, rest: float = 0.9, p: float = 0.001) -> SampleBias:
    return SampleBias(separation, accuracy, rest, p)


@pytest.mark.parametrize(
    ("found", "kind", "expected"),
    [
        (make(flip=0.1), bias(), "sample_bias"),
        (make(flip=0.1), bias(separation=0.8), "no_effect"),
        (make(flip=0.1), bias(accuracy=0.7), "no_effect"),
        (make(flip=0.1), bias(p=0.02), "no_effect"),
        (make(flip=0.1), None, "no_effect"),
        # What moves other classes is an artifact, however the model does on its samples.
        (make(), bias(), "clever_hans"),
    ],
)
def test_a_kind_of_sample_that_the_model_fails_on_is_a_bias(
    found: Effect, kind: SampleBias | None, expected: str
) -> None:
    assert verdict(found, True, 0.001, 0.001, kind) == expected


def test_sample_bias_counts_the_models_mistakes() -> None:
    carries = np.arange(100) < 20
    right = np.ones(100, dtype=bool)
    right[:12] = right[95:] = False
    found = sample_bias(carries + np.linspace(0, 0.1, 100), carries, right)
    assert (found.separation, found.accuracy, found.rest_accuracy) == (1, 0.4, pytest.approx(0.9375))
    assert found.p_value == pytest.approx(float(stats.fisher_exact([[8, 12], [75, 5]], alternative="less")[1]))


def test_what_changed_the_whole_image_is_undone_and_compared_with_the_image_itself() -> None:
    """The samples without it do not come in: undone there it would be another change."""
    from spray.isolation.changed import Changed

    grey = torch.full((1, 4, 4), 0.5)
    parts = (torch.ones(4, 4), grey, torch.zeros(1, 2, dtype=torch.int64), 1.0, 1, True)
    lighter = Changed(*parts, torch.tensor([0.5]), torch.tensor([0.5]), 0.0, 0.0, torch.zeros(1), 0.0)

    def bright(images: torch.Tensor) -> torch.Tensor:
        mean = images.mean(dim=(1, 2, 3))
        return torch.stack([10 * (0.6 - mean), 10 * (mean - 0.6)], dim=1)

    rng = np.random.default_rng(0)
    natural = torch.from_numpy(rng.uniform(0.1, 0.5, (30, 1, 1, 1)).astype("f4")).expand(-1, 1, 4, 4)
    carriers = 0.5 * natural[:15] + 0.5
    results = [
        causal.measure_effect(bright, lighter, 1, natural, carriers, donors, 0)
        for donors in (natural[15:], natural[15:] * 0 + 0.9)
    ]
    expected = float((causal.margin(bright(carriers), 1) - causal.margin(bright(natural[:15]), 1)).mean())
    for result in results:
        assert result.removal_cost == pytest.approx(expected, rel=1e-4)
        assert result.removal_p_value < 1e-3


def test_a_change_of_the_whole_image_that_its_own_samples_do_without_is_no_backdoor() -> None:
    found = Effect(0.8, 0.1, 2.0, 0.001, 0.0, 0.5, 100)
    assert verdict(found, True, 0.001, 0.5) == "backdoor"
    assert verdict(found, True, 0.001, 0.5, trigger=False) == "no_effect"
    assert verdict(replace(found, removal_cost=1.0), True, 0.001, 0.001, trigger=False) == "clever_hans"


def test_what_accounts_for_its_cluster_has_to_move_little_but_more_than_chance() -> None:
    found = replace(effect(), flip_rate=0.04, control_flip_rate=0.01, logit_gain=1.0, removal_cost=1.0)
    assert verdict(found, True, 0.001, 0.001) == "no_effect"
    assert verdict(found, True, 0.001, 0.001, accounts=True) == "clever_hans"
    assert verdict(replace(found, flip_rate=0.025), True, 0.001, 0.001, accounts=True) == "no_effect"
    # Both tests and the gain are asked for as of any other.
    assert verdict(found, True, 0.02, 0.001, accounts=True) == "no_effect"
    assert verdict(found, True, 0.001, 0.02, accounts=True) == "no_effect"
    loss = replace(found, logit_gain=-1.0, logit_gain_interval=(-1.5, -0.5))
    assert verdict(loss, True, 0.001, 0.001, accounts=True) == "no_effect"
    assert verdict(found, True, 0.001, 0.001, unusual=False, accounts=True) == "no_effect"


def test_a_mean_gain_that_may_be_none_does_not_undo_a_verdict_and_a_certain_loss_does() -> None:
    found = Effect(0.4, 0.2, -0.4, 0.001, 1.0, 0.001, 500, logit_gain_interval=[-1.0, 0.1])
    assert verdict(found, True, 0.001, 0.001) == "clever_hans"
    assert verdict(replace(found, logit_gain_interval=[-1.0, -0.1]), True, 0.001, 0.001) == "no_effect"
    assert verdict(replace(found, logit_gain_interval=None), True, 0.001, 0.001) == "no_effect"
