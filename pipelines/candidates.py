"""What isolation hands on: samples to start from, explanations that were tried, and candidates with their effect."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spray.isolation.artifact import Artifact
from spray.isolation.causal import Effect
from spray.isolation.choice import Trial
from spray.isolation.evidence import Evidence
from spray.isolation.growing import Scorer
from spray.isolation.sample_bias import SampleBias


@dataclass
class Candidate:
    """An isolated candidate and what was measured on it.

    `samples` are those of its class whose score is above `threshold`, of the ones in `own_scores`; `ranked` says
    whether the ranking finds its cluster unusual, `unusual` whether that or its artifact does.
    """

    class_index: int
    cluster: str
    artifact: Artifact
    samples: np.ndarray
    own_scores: dict[int, float]
    threshold: float
    first: Scorer
    second: Scorer
    trials: list[Trial]
    effect: Effect
    bias: SampleBias
    unusual: bool
    ranked: bool
    verdict: str = "no_effect"
    p_value: float = 1.0
    removal_p_value: float = 1.0

    @property
    def strength(self) -> tuple[bool, float]:
        """What candidates are ordered by: a verdict first, then by how much more they flip than the control."""
        return self.verdict != "no_effect", self.effect.flip_rate - self.effect.control_flip_rate

    @property
    def explained(self) -> float:
        """How well its artifact explains it: the evidence for the best trial."""
        return self.trials[0].evidence


@dataclass(frozen=True)
class Start:
    """Samples of a class that an artifact may be isolated from.

    Attributes
    ----------
    scorer : Scorer
        Tells them from the rest.
    scores : ndarray
        (n,), of the class's samples, each by a fit without it.
    carries : ndarray of bool
        (n,): which they are.
    """

    scorer: Scorer
    scores: np.ndarray
    carries: np.ndarray


@dataclass(frozen=True)
class Recognized(Start):
    """Samples in which an artifact was recognized, by `second`: a score of `scorer` and the match; scores are its."""

    second: Scorer


@dataclass(frozen=True)
class Attempt:
    """The explanations that were tried from some samples, the best first."""

    start: Start
    evidence: Evidence
    trials: list[Trial]
