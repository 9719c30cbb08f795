"""What is looked at a second time: the samples that a part of the image was recognized in, and what not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from spray.isolation.artifact import Artifact
from spray.isolation.choice import PARTS, Trial
from spray.isolation.growing import Scorer
from spray.pipelines.candidates import Attempt, Recognized, Start
from spray.pipelines.explaining import RAW, Explainer

N = 100
SCORER = Scorer(np.zeros(1), 0.0, 0.5)


class Looking(Explainer):
    """Tells what it was asked to try again."""

    def __init__(self) -> None:
        self.asked: list[tuple[np.ndarray, tuple[str, ...]]] = []

    def _attempt(
        self, start: Start, c: int, rng: Any, unusual: bool, names: Any = (), matched: bool = False
    ) -> Attempt:
        self.asked.append((start.carries, tuple(names)))
        return Attempt(start, None, [trial("local", 0.6)])  # type: ignore[arg-type]


def trial(isolator: str, left: float) -> Trial:
    """An explanation that makes the rest look like a cluster told by an area of 0.95, and leaves so much of that."""
    piece = Artifact(torch.ones(4, 4), torch.ones(3, 4, 4), torch.zeros(1, 2, dtype=torch.int64), 1.0, 1, True)
    piece.mask[2:] = 0
    return Trial(isolator, piece, 0.9, 0.9, 0.9, 0.95, 0.5 + 0.45 * left)


def first(n: int) -> np.ndarray:
    """The first n samples."""
    return np.arange(N) < n


@pytest.mark.parametrize(
    ("isolator", "left", "before", "recognized", "expected"),
    [
        ("uncolored", 0.9, 40, 80, True),
        # It accounts for the cluster already; natural kinds converge; the same samples; too few of either kind.
        ("uncolored", 0.2, 40, 80, False),
        ("change", 0.9, 40, 80, False),
        ("uncolored", 0.9, 76, 80, False),
        ("uncolored", 0.9, 40, RAW - 1, False),
        ("uncolored", 0.9, 40, N - RAW + 1, False),
    ],
)
def test_what_is_looked_at_a_second_time(
    isolator: str, left: float, before: int, recognized: int, expected: bool
) -> None:
    best = Attempt(Start(SCORER, np.zeros(N), first(before)), None, [trial(isolator, left)])  # type: ignore[arg-type]
    found = Recognized(SCORER, np.zeros(N), first(recognized), SCORER)
    looking = Looking()
    second = looking._second(best, found, 0, np.random.default_rng(0))
    assert (second is not None) is expected
    if expected:
        [(carries, names)] = looking.asked
        assert carries.sum() == recognized
        assert names == (*PARTS, "donated")
    else:
        assert looking.asked == []
