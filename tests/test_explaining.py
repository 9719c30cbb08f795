"""What is looked at again: the samples that the best explanation was recognized in, and what not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from spray.isolation.artifact import Artifact
from spray.isolation.choice import PARTS, WHOLE, Trial
from spray.isolation.evidence import Evidence
from spray.isolation.growing import Scorer
from spray.pipelines import explaining
from spray.pipelines.candidates import Attempt, Recognized, Start
from spray.pipelines.explaining import LOOKS, RAW, Explainer
from spray.pipelines.samples import Members, Samples

N, FEWER = 100, 20
SCORER = Scorer(np.zeros(1), 0.0, 0.5)
EVIDENCE = Evidence(torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4), torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 4))


class OfClass(Samples):
    """Images of a single class."""

    def __init__(self) -> None:
        pass

    def of_class(self, c: int) -> Members:
        return Members(np.arange(N), np.zeros((N, 1)), np.ones(N, dtype=bool))


class Looking(Explainer):
    """Tells what it was asked to try again, finds one thing after the other, and each in some samples less."""

    def __init__(self, *finds: Trial) -> None:
        self.finds, self.fewer = finds, FEWER
        self.samples = OfClass()
        self.asked: list[tuple[np.ndarray, tuple[str, ...]]] = []

    def _recognized(self, artifact: Artifact, start: Start, own: Members, c: int) -> Recognized:
        return recognized(int(start.carries.sum()) - self.fewer)

    def _attempt(
        self, start: Start, c: int, rng: Any, unusual: bool, names: Any = (), matched: bool = False
    ) -> Attempt:
        self.asked.append((start.carries, tuple(names)))
        return Attempt(start, EVIDENCE, [self.finds[len(self.asked) - 1]])


def trial(isolator: str, left: float, likeness: float = 0.9, separation: float = 0.95, rows: int = 1) -> Trial:
    """An explanation of a cluster that is told by an area of 0.95, which leaves so much of that; of some of 4 rows."""
    piece = Artifact(torch.ones(4, 4), torch.ones(3, 4, 4), torch.zeros(1, 2, dtype=torch.int64), 1.0, 1, True)
    piece.mask[rows:] = 0
    return Trial(isolator, piece, likeness, 0.9, separation, 0.95, 0.5 + 0.45 * left)


def first(n: int) -> np.ndarray:
    """The first n samples."""
    return np.arange(N) < n


def recognized(n: int) -> Recognized:
    """Something that is recognized in the first n samples."""
    return Recognized(SCORER, np.zeros(N), first(n), SCORER)


def again(looking: Looking, best: Trial, before: int = 40, after: int = 80) -> Attempt | None:
    """Look again after an explanation of some samples that is recognized in others."""
    attempt = Attempt(Start(SCORER, np.zeros(N), first(before)), EVIDENCE, [best])
    return looking._looked_again(attempt, recognized(after), 0, np.random.default_rng(0))


@pytest.mark.parametrize(("isolator", "names"), [("uncolored", (*PARTS, "donated")), ("change", WHOLE)])
def test_it_is_looked_at_again_what_an_explanation_was_recognized_in(isolator: str, names: tuple[str, ...]) -> None:
    looking = Looking(trial("local", 0.2))
    found = again(looking, trial(isolator, 0.9))
    assert found is not None
    assert found.trials == list(looking.finds)
    [(carries, asked)] = looking.asked
    assert carries.sum() == 80
    assert asked == names


@pytest.mark.parametrize(
    ("best", "before", "after"),
    [
        # It accounts for the cluster already; resembles nothing; the same samples; too few of either kind.
        (trial("uncolored", 0.2), 40, 80),
        (trial("change", 0.9, likeness=0.4), 40, 80),
        (trial("uncolored", 0.9), 76, 80),
        (trial("uncolored", 0.9), 40, RAW - 1),
        (trial("uncolored", 0.9), 40, N - RAW + 1),
    ],
)
def test_what_is_not_looked_at_again(best: Trial, before: int, after: int) -> None:
    looking = Looking(trial("local", 0.2))
    assert again(looking, best, before, after) is None
    assert looking.asked == []


WEAKER = (trial("faded", 0.35), trial("faded", 0.2, separation=0.85), trial("faded", 0.2, rows=2))


@pytest.mark.parametrize("finds", WEAKER)
def test_natural_kinds_account_for_what_they_are_recognized_in_but_not_as_well(finds: Trial) -> None:
    looking = Looking(*[finds] * LOOKS)
    assert again(looking, trial("change", 0.9)) is None
    assert len(looking.asked) == LOOKS


@pytest.mark.parametrize("finds", WEAKER)
def test_what_comes_nearer_is_looked_at_once_more(finds: Trial) -> None:
    """From what it is recognized in then; all of these are changes of the whole image, as the first was."""
    looking = Looking(finds, trial("shade", 0.1))
    found = again(looking, trial("change", 0.9))
    assert found is not None
    assert found.trials == [looking.finds[1]]
    assert [int(carries.sum()) for carries, _ in looking.asked] == [80, 80 - FEWER]
    assert all(names == WHOLE for _, names in looking.asked)


@pytest.mark.parametrize("left", [0.35, 0.5])
def test_what_accounts_for_its_samples_but_leaves_much_is_looked_at_again(left: float) -> None:
    looking = Looking(trial("colored", 0.1))
    best = trial("uncolored", left)
    assert best.accounts
    found = again(looking, best)
    assert found is not None
    assert found.trials == list(looking.finds)


@pytest.mark.parametrize(("likeness", "looks"), [(0.6, 1), (0.4, 0)])
def test_a_shade_that_came_near_without_leading_is_looked_at_again(
    likeness: float, looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Isolated from samples of a kind it makes few others like them, but tells the others that have it."""
    monkeypatch.setattr(explaining, "refitted", lambda trial, evidence: trial.artifact)
    lead, near = trial("change", 0.9), trial("shading", 0.6, likeness=likeness)
    start = Start(SCORER, np.zeros(N), first(40))
    attempts = [Attempt(start, EVIDENCE, [lead, near]), Attempt(start, EVIDENCE, [trial("local", 0.9)])]
    looking = Looking(trial("shade", 0.1))
    looking.fewer = -30
    found = looking._shaded(attempts, attempts[0], 0, np.random.default_rng(0))
    assert (found is not None) == bool(looks)
    assert [int(carries.sum()) for carries, _ in looking.asked] == [70] * looks
    # What leads is looked at anyway.
    led = Attempt(start, EVIDENCE, [near])
    assert Looking()._shaded([led], led, 0, np.random.default_rng(0)) is None


def test_what_stays_the_same_is_not_looked_at_once_more() -> None:
    looking = Looking(*[trial("faded", 0.35)] * LOOKS)
    looking.fewer = 5
    assert again(looking, trial("change", 0.9)) is None
    assert len(looking.asked) == 1
