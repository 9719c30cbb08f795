"""What the report shows, as plain data: no files, no configuration, no models.

None stands for "not run" or "not known"; an empty tuple for "run, and nothing found".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PASSED = ("backdoor", "clever_hans", "sample_bias")  # verdicts that the causal test confirmed


@dataclass(frozen=True)
class Share:
    """A share in [0, 1] and, where known, its 95 % interval."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class ModelResult:
    """How one model does on clean test images and on test images with an artifact added."""

    name: str
    n: int | None = None
    clean: Share | None = None
    attacked: Share | None = None
    attacked_to_class: Share | None = None
    artifact_relevance: Share | None = None
    worst_class: Share | None = None
    planted_attacked: Share | None = None
    planted_to_class: Share | None = None


@dataclass(frozen=True, eq=False)
class Tile:
    """One sample of a gallery: image (C, H, W) in [0, 1] and relevance (H, W)."""

    name: str
    index: int
    image: np.ndarray
    relevance: np.ndarray
    score: float | None = None


@dataclass(frozen=True, eq=False)
class Gallery:
    """Samples chosen by one criterion, which `note` states."""

    title: str
    note: str
    tiles: tuple[Tile, ...]


@dataclass(frozen=True, eq=False)
class Artifact:
    """A candidate and how it did in the causal test.

    `pattern` and `mask` are pictures: uint8 (H, W, 4) and (H, W). `effects` holds one result for each model
    where the candidate itself was added to the test images.
    """

    id: str
    class_index: int
    class_name: str
    verdict: str
    cluster: str | None = None
    flip_rate: float | None = None
    control_flip_rate: float | None = None
    p_value: float | None = None
    logit_gain: float | None = None
    n_tested: int | None = None
    removal_cost: float | None = None
    removal_p_value: float | None = None
    samples: tuple[int, ...] = ()
    sample_names: tuple[str, ...] = ()
    pattern: np.ndarray | None = None
    mask: np.ndarray | None = None
    galleries: tuple[Gallery, ...] = ()
    limit: float | None = None
    effects: tuple[ModelResult, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the causal test confirmed the candidate."""
        return self.verdict in PASSED


@dataclass(frozen=True)
class Truth:
    """The artifact that the dataset's configuration planted, known beforehand."""

    class_index: int
    class_name: str
    kind: str
    rate: float
    samples: frozenset[int]


@dataclass(frozen=True)
class Match:
    """How a finding agrees with the planted truth."""

    artifact: Artifact | None
    n_hits: int = 0

    def precision(self) -> float:
        """Return the share of the found samples that carry the planted artifact."""
        return self.n_hits / len(self.artifact.samples) if self.artifact and self.artifact.samples else 0.0

    def recall(self, truth: Truth) -> float:
        """Return the share of the planted samples that were found."""
        return self.n_hits / len(truth.samples) if truth.samples else 0.0


@dataclass(frozen=True)
class RankRow:
    """One row of the ranking: a class, or a cluster of one."""

    rank: int
    class_name: str
    size: int
    separability: float | None
    p_value: float | None
    cluster: str | None = None
    found: bool = False


@dataclass(frozen=True, eq=False)
class Embedding:
    """The samples of one class in two dimensions.

    Attributes
    ----------
    points : ndarray, shape (n, 2)
    clusters : ndarray of int, shape (n,)
        Labels of `clustering`; -1 is noise.
    members : ndarray of bool, shape (n,)
        Which samples belong to an artifact.
    indices, names : length n
        Training-sample indices and their names.
    thumbnails : ndarray of uint8, shape (n, h, w, 3)
    eigenvalues : ndarray, shape (m,)
        Of the Laplacian, ascending.
    total : int
        Samples of the class, of which n are shown.
    """

    class_index: int
    class_name: str
    kind: str
    clustering: str
    points: np.ndarray
    clusters: np.ndarray
    members: np.ndarray
    indices: np.ndarray
    names: tuple[str, ...]
    thumbnails: np.ndarray
    eigenvalues: np.ndarray
    total: int


@dataclass(frozen=True)
class StageRow:
    """One stage of the run: what became of it and what it reported."""

    name: str
    status: str
    seconds: float | None = None
    facts: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, eq=False)
class ReportData:
    """Everything on the page, in the order of the page."""

    title: str
    model: str
    n_train: int
    n_classes: int
    artifacts: tuple[Artifact, ...] | None = None
    models: tuple[ModelResult, ...] | None = None
    truth: Truth | None = None
    embeddings: tuple[Embedding, ...] | None = None
    classes: tuple[RankRow, ...] | None = None
    clusters: tuple[RankRow, ...] | None = None
    caveats: tuple[str, ...] = ()
    provenance: tuple[tuple[str, str], ...] = ()
    versions: tuple[tuple[str, str], ...] = ()
    stages: tuple[StageRow, ...] = ()
    skipped_samples: tuple[str, ...] = ()

    @property
    def found(self) -> tuple[Artifact, ...]:
        """The artifacts that passed the causal test."""
        return tuple(artifact for artifact in self.artifacts or () if artifact.passed)

    @property
    def rejected(self) -> tuple[Artifact, ...]:
        """The candidates that did not."""
        return tuple(artifact for artifact in self.artifacts or () if not artifact.passed)


def match_truth(truth: Truth, found: Sequence[Artifact]) -> Match:
    """Return the finding in the planted class that shares most samples with the truth, if there is one."""
    matches = [
        Match(artifact, len(truth.samples.intersection(artifact.samples)))
        for artifact in found
        if artifact.class_index == truth.class_index
    ]
    return max(matches, key=lambda match: match.n_hits, default=Match(None))
