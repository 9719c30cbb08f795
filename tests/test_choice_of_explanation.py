"""Which explanation of a cluster is chosen, by which evidence, and what that costs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from spray.isolation import choice
from spray.isolation.artifact import Artifact
from spray.isolation.changed import Changed, isolate_change
from spray.isolation.choice import ISOLATORS, Trial, natural_changes, tried
from spray.isolation.evidence import Evidence
from spray.isolation.matted import Donated
from spray.isolation.statistics import discriminant, statistics
from spray.pipelines.isolated import load_artifact, save_artifact
from tests.worlds import SIDE, World, scenes

KINDS = {
    "tag": ({"kind": "tag"}, {"near"}),
    "frame": ({"kind": "frame", "size": 3, "jitter": 1}, {"colored"}),
    "watermark": ({"kind": "watermark"}, {"blended"}),
    "vignette": ({"kind": "vignette"}, {"shade"}),
    "brightness": ({"kind": "brightness"}, {"faded", "change"}),
    "tint": ({"kind": "tint"}, {"change", "veil", "faded"}),
}


def a_piece(of: float = 0.25) -> Artifact:
    """An artifact of constant content that covers a share of the image."""
    mask = (torch.arange(100).reshape(10, 10) < 100 * of).float()
    return Artifact(mask, torch.ones(3, 10, 10), torch.zeros(1, 2, dtype=torch.int64), 1.0, 1, True)


@pytest.mark.parametrize("kind", KINDS)
def test_the_right_explanation_wins_and_survives_the_disk(kind: str, tmp_path: Path) -> None:
    options, expected = KINDS[kind]
    world = World(**options)
    marked = statistics(world.images)
    w, b = discriminant(marked, statistics(world.other))

    def predict(images: Tensor) -> Tensor:
        score = statistics(images) @ w + b
        return torch.stack([0.5 - score, score - 0.5], dim=1)

    weights = w.numpy()
    trials = tried(
        world.evidence, 1, lambda x: statistics(x).numpy(), lambda f: f @ weights + b, predict, scenes(40, 8), 0
    )
    assert trials[0].isolator in expected
    artifact = trials[0].artifact
    save_artifact(tmp_path / "artifact.npz", artifact)
    again = load_artifact(tmp_path / "artifact.npz")
    assert type(again) is type(artifact)
    some = scenes(6, 7)
    assert torch.equal(again.insert(some, np.arange(6)), artifact.insert(some, np.arange(6)))
    assert torch.equal(again.score(some), artifact.score(some))
    changed, opacity = again.add(some, np.arange(6))
    assert torch.equal(changed, again.insert(some, np.arange(6)))
    assert opacity.shape == (6, 1, SIDE, SIDE)
    assert ((changed == some).all(dim=1, keepdim=True) | (opacity > 0)).all()
    assert 0 <= changed.min() <= changed.max() <= 1


def test_natural_changes_are_those_of_groups_of_the_rest() -> None:
    world = World(kind="brightness")
    rest = world.other.clone()
    rest[::2] = 0.5 * rest[::2]
    evidence = Evidence(world.images, world.evidence.relevance, rest, world.evidence.other_relevance)
    change = isolate_change(evidence)
    assert change is not None
    trial = Trial("change", change, 1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.1)
    found = natural_changes(trial, evidence, 0)
    assert found
    assert any(float(c.gain.mean()) < 0.8 for c in found if isinstance(c, Changed))
    # What a model that learnt one of them takes for it is no control of it, unless it may be natural itself.
    dark = min((c for c in found if isinstance(c, Changed)), key=lambda c: float(c.gain.mean()))
    gains = [
        [float(c.gain.mean()) for c in natural_changes(replace(trial, artifact=dark, still_apart=still), evidence, 0)]
        for still in (0.5, 0.9)
    ]
    assert float(dark.gain.mean()) not in gains[0]
    assert float(dark.gain.mean()) in gains[1]
    local = Trial(
        "local",
        Artifact(torch.ones(2, 2), torch.ones(3, 2, 2), torch.zeros(1, 2, dtype=torch.int64), 1.0, 1, True),
        1.0,
        1.0,
        1.0,
        1.0,
        0.5,
        0.5,
        0.1,
    )
    assert natural_changes(local, evidence, 0) == []


def test_isolators_are_in_order_of_simplicity() -> None:
    assert list(ISOLATORS)[:2] == ["near", "local"]
    assert list(ISOLATORS)[-1] == "donated"
    assert choice.separation(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0])) == pytest.approx(0.875)


def test_what_shares_dark_ground_and_a_mark_is_explained_by_the_mark_near_the_relevance() -> None:
    world = World(kind="box", size=6, place="bottom_right", jitter=1)
    dark, ground = 0.05 * world.clean[:24], 0.05 * scenes(48, 12)
    images, opacity = world.plant.mark(dark, [f"{i}" for i in range(24)])
    maps = world.evidence.relevance[:24] - world.opacity[:24] + opacity
    evidence = Evidence(images, maps, world.other, world.evidence.other_relevance)
    whole, near = ISOLATORS["local"](evidence), ISOLATORS["near"](evidence)
    assert near is not None
    found = near.found(images)[:, 0] > 0.5
    assert float((found & (opacity > 0.5)).sum() / (found | (opacity > 0.5)).sum()) > 0.9
    # Connected constant pixels alone take the ground along.
    assert whole is None or whole.mask.sum() > 2 * near.mask.sum()
    # On ground that is as dark without the mark, both see the mark alone.
    like = Evidence(images, maps, ground, world.evidence.other_relevance[:48])
    for name in ("near", "local"):
        alone = ISOLATORS[name](like)
        assert alone is not None
        assert float(alone.mask.sum()) == pytest.approx(36, abs=8)


def test_an_explanation_has_to_be_found_in_what_it_explains() -> None:
    trial = Trial("local", a_piece(), likeness=1.0, explained=1.0, separation=0.9, apart=0.95, still_apart=0.5)
    assert trial.accounts
    assert not replace(trial, separation=0.5).accounts


@pytest.mark.parametrize(
    ("isolator", "likeness", "still", "expected"),
    [
        *(("change", 0.7, 0.9, False), ("change", 0.9, 0.9, True), ("change", 0.7, 0.6, False)),
        *(("local", 0.3, 0.9, True), ("colored", 0.3, 0.9, False), ("colored", 0.5, 0.9, True)),
    ],
)
def test_what_is_not_the_same_piece_has_to_make_the_rest_look_like_the_cluster(
    isolator: str, likeness: float, still: float, expected: bool
) -> None:
    assert Trial(isolator, a_piece(), likeness, 1.0, 1.0, 1.0, still, 0.9, 0.1).explains is expected


@pytest.mark.parametrize(
    ("isolator", "before", "after", "expected"),
    [
        *(("local", 0.95, 0.6, True), ("local", 0.95, 0.95, False), ("local", 0.7, 0.7, True)),
        *(("local", 0.95, 0.77, True), ("shade", 0.95, 0.77, False), ("colored", 0.95, 0.77, False)),
        *(("turned", 0.95, 0.77, False), ("turned", 0.95, 0.7, True), ("local", 0.7, 0.85, False)),
        *(
            ("colored", 0.95, 0.6, True),
            ("shade", 0.95, 0.6, True),
            ("shade", 0.95, 0.85, False),
            ("shade", 0.7, 0.5, False),
        ),
    ],
)
def test_natural_kinds_are_told_from_artifacts_by_what_is_left(
    isolator: str, before: float, after: float, expected: bool
) -> None:
    assert Trial(isolator, a_piece(), 1.0, 1.0, 1.0, before, after, 0.9, 0.1).unnatural is expected


def test_what_takes_the_place_of_most_of_an_image_accounts_for_nothing() -> None:
    def trial(artifact: Artifact) -> Trial:
        return Trial("veil", artifact, 1.0, 1.0, 1.0, 0.95, 0.6)

    assert trial(a_piece(0.5)).accounts
    assert not trial(a_piece(0.6)).accounts
    strong, weak = (isolate_change(World(kind="tint", strength=strength).evidence) for strength in (0.8, 0.4))
    assert strong is not None
    assert weak is not None
    assert not trial(strong).accounts
    assert trial(weak).accounts


def test_effects_are_measured_where_they_decide_and_the_choice_is_the_same() -> None:
    rng = np.random.default_rng(0)
    names = list(ISOLATORS)[:10]
    for _ in range(200):
        numbers = rng.uniform(0, 1, (len(names), 4))
        trials = [Trial(name, a_piece(), *row, 0.95, 0.9) for name, row in zip(names, numbers[:, :3], strict=True)]
        effects = {name: rng.uniform(0, 1, 2) for name in names}
        asked: list[str] = []

        def effect(trial: Trial, effects=effects, asked=asked) -> Trial:
            asked.append(trial.isolator)
            return replace(trial, flip_rate=effects[trial.isolator][0], control_flip_rate=effects[trial.isolator][1])

        found = choice._ordered(trials, effect)
        best = max(map(effect, list(trials)), key=choice._value)
        asked_for_choice = asked[: -len(trials)]
        assert found[0] == best
        assert sorted(trial.isolator for trial in found) == sorted(names)
        assert {trial.isolator for trial in found if trial.flip_rate is not None} == set(asked_for_choice)
        assert len(asked_for_choice) <= len(names)


def test_without_a_chance_of_a_verdict_no_predictions_are_made() -> None:
    world = World(kind="tag")
    half = world.clean[: len(world.clean) // 2]
    natural = Evidence(half, torch.ones(len(half), SIDE, SIDE), world.other, torch.ones(len(world.other), SIDE, SIDE))

    def predict(images: Tensor) -> Tensor:
        raise AssertionError("predictions were made")

    parts = (natural, 1, lambda x: statistics(x).numpy(), lambda f: f[:, 0], predict, scenes(40, 8), 0)
    assert all(trial.flip_rate is None for trial in tried(*parts, unusual=False))
    with pytest.raises(AssertionError, match="were made"):
        tried(*parts, unusual=True)


def test_cut_outs_account_for_a_cluster_if_they_have_donors() -> None:
    piece = a_piece(0.15)
    parts = (piece.mask, piece.pattern, piece.shifts, 1.0, 1, False)
    donated = Donated(*parts, torch.ones(2, 3, 10, 10), piece.mask.expand(2, -1, -1))
    for artifact, expected in ((donated, True), (Artifact(*parts), False)):
        assert Trial("donated", artifact, 1.0, 1.0, 1.0, 0.95, 0.7).accounts is expected
        assert not Trial("donated", artifact, 1.0, 1.0, 1.0, 0.95, 0.85).accounts
        assert not Trial("donated", artifact, 0.5, 1.0, 1.0, 0.95, 0.7).accounts
        assert not Trial("donated", artifact, 0.7, 1.0, 1.0, 0.95, 0.7).accounts
        # Where hardly a difference is left, each of which shows another one, it need not be as like.
        assert Trial("donated", artifact, 0.7, 1.0, 1.0, 0.95, 0.65).accounts is expected
        assert not Trial("donated", artifact, 0.5, 1.0, 1.0, 0.95, 0.65).accounts


def test_cut_outs_of_much_of_an_image_account_for_nothing() -> None:
    for share, expected in ((0.15, True), (0.25, False)):
        piece = a_piece(share)
        parts = (piece.mask, piece.pattern, piece.shifts, 1.0, 1)
        donors = torch.ones(2, 3, 10, 10), piece.mask.expand(2, -1, -1)
        assert Trial("donated", Donated(*parts, False, *donors), 1.0, 1.0, 1.0, 0.95, 0.6).accounts is expected
        assert Trial("colored", Donated(*parts, True, *donors), 1.0, 1.0, 1.0, 0.95, 0.6).accounts


def test_cut_outs_of_most_of_a_class_hold_what_makes_it() -> None:
    piece = a_piece(0.15)
    parts = (piece.mask, piece.pattern, piece.shifts, 1.0, 1, False)
    donated = Donated(*parts, torch.ones(2, 3, 10, 10), piece.mask.expand(2, -1, -1))
    for artifact, expected in ((donated, False), (piece, True)):
        trial = Trial("donated", artifact, 1.0, 1.0, 1.0, 0.95, 0.6)
        assert trial.unnatural_in(0.4)
        assert trial.unnatural_in(0.45) is expected
        assert not replace(trial, still_apart=0.95).unnatural_in(0.1)


def test_a_ground_of_one_colour_that_is_repeated_is_no_piece_of_an_image() -> None:
    """Black images of one class are the very same as well."""
    piece = a_piece()
    for isolator, artifact, expected in (
        ("near", piece, True),
        ("scattered", piece, True),
        ("colored", piece, False),
        ("local", replace(piece, constant=False), False),
    ):
        assert Trial(isolator, artifact, 1.0, 1.0, 1.0, 0.95, 0.9).same_piece is expected


@pytest.mark.parametrize("isolator", ["near", "colored", "change", "turned"])
def test_what_makes_images_look_less_like_the_samples_accounts_for_nothing(isolator: str) -> None:
    trial = Trial(isolator, a_piece(), 1.0, -0.1, 1.0, 0.95, 0.6)
    assert trial.accounts
    assert not replace(trial, explained=-0.3).accounts


@pytest.mark.parametrize("mark", ["local", "none"])
def test_what_is_never_turned_is_simpler_than_what_is(mark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    for name in ("local", "turned"):
        isolator = ISOLATORS[name]
        monkeypatch.setitem(ISOLATORS, name, lambda e, name=name, f=isolator: asked.append(name) or f(e))
    world = World(kind="tag", size=6) if mark == "local" else World(kind="noise")
    w, b = discriminant(statistics(world.images), statistics(world.other))
    tried(
        world.evidence,
        1,
        lambda x: statistics(x).numpy(),
        lambda f: f @ w.numpy() + b,
        lambda x: torch.zeros(len(x), 2),
        scenes(8, 8),
        0,
        False,
        ("local", "turned"),
    )
    assert asked == (["local"] if mark == "local" else ["local", "turned"])


def test_cut_outs_that_account_for_a_cluster_have_no_handicap() -> None:
    piece = a_piece(0.15)
    donated = Donated(
        piece.mask, piece.pattern, piece.shifts, 1.0, 1, False, torch.ones(2, 3, 10, 10), piece.mask.expand(2, -1, -1)
    )
    for separation, handicap in ((1.0, 0.0), (0.7, choice.CUT_OUT)):
        varying, constant = (Trial("donated", one, 1.0, 1.0, separation, 0.95, 0.7) for one in (donated, piece))
        assert constant.evidence - varying.evidence == pytest.approx(handicap)
