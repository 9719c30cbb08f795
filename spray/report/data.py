"""What the report shows, as plain data: no files, no configuration, no models.

None stands for "not run" or "not known"; an empty tuple for "run, and nothing found".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """How one model does on clean test images and on test images with an artifact added.

    `further` holds what else was measured, by name, as it is printed.
    """

    name: str
    n: int | None = None
    clean: Share | None = None
    attacked: Share | None = None
    attacked_to_class: Share | None = None
    artifact_relevance: Share | None = None
    worst_class: Share | None = None
    worst_group: Share | None = None
    tcav: Share | None = None
    planted_attacked: Share | None = None
    planted_to_class: Share | None = None
    further: tuple[tuple[str, str], ...] = ()


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


@dataclass(frozen=True)
class KindOfSample:
    """How the model does on a finding's samples as a kind of their own, and on the rest of their class, 0 to 1."""

    accuracy: float
    rest_accuracy: float
    p_value: float | None = None
    held_out: bool = False


@dataclass(frozen=True, eq=False)
class Artifact:
    """A candidate and how it did in the causal test.

    `pattern` and `mask` are pictures: uint8 (H, W, 4) and (H, W). `effects` holds one result for each model
    where the candidate itself was added to the test images; `further` and `tables` what else is known, as it is
    printed. `unusual` says whether its samples are something that other classes have nothing like: a candidate whose
    samples are not is no finding, whatever it moves. `bias` is known of a sample bias. `scores` has one number for
    each of `samples`, none where they are not known.
    """

    id: str
    class_index: int
    class_name: str
    verdict: str
    cluster: str | None = None
    flip_rate: float | None = None
    control_flip_rate: float | None = None
    flip_rate_interval: tuple[float, float] | None = None
    control_flip_rate_interval: tuple[float, float] | None = None
    p_value: float | None = None
    logit_gain: float | None = None
    n_tested: int | None = None
    removal_cost: float | None = None
    removal_p_value: float | None = None
    kind: str | None = None
    unusual: bool | None = None
    opacity: float | None = None
    bias: KindOfSample | None = None
    further: tuple[tuple[str, str], ...] = ()
    tables: tuple[Check, ...] = ()
    samples: tuple[int, ...] = ()
    sample_names: tuple[str, ...] = ()
    scores: tuple[float, ...] = ()
    pattern: np.ndarray | None = None
    mask: np.ndarray | None = None
    galleries: tuple[Gallery, ...] = ()
    limit: float | None = None
    effects: tuple[ModelResult, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the causal test confirmed the candidate."""
        return self.verdict in PASSED

    @property
    def flips(self) -> Share | None:
        """Share of other images that turn into the class when the artifact is added."""
        return None if self.flip_rate is None else Share(self.flip_rate, *(self.flip_rate_interval or ()))

    @property
    def control_flips(self) -> Share | None:
        """The same with a control patch."""
        rate = self.control_flip_rate
        return None if rate is None else Share(rate, *(self.control_flip_rate_interval or ()))


@dataclass(frozen=True)
class Truth:
    """What the dataset's configuration planted, known beforehand.

    Attributes
    ----------
    class_index, class_name : int and str, or None
        Where it was planted; None for all classes.
    kind : str
        Such as `tag`, `border`, `mislabel`.
    rate : float
        Share of the class's samples.
    samples : frozenset of int
        Training samples that carry it.
    is_artifact : bool
        Whether it is something in the images that could be isolated.
    """

    class_index: int | None
    class_name: str | None
    kind: str
    rate: float
    samples: frozenset[int]
    is_artifact: bool = True


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
    """One row of the ranking: a class, or a cluster of one.

    `null` is the range of the best scores of the other classes: least, median, greatest. A class that is like the
    others scores about as much as they do.
    """

    rank: int
    class_name: str
    size: int
    separability: float | None
    p_value: float | None
    cluster: str | None = None
    found: bool = False
    class_index: int | None = None
    q_value: float | None = None
    score: float | None = None
    null: tuple[float, float, float] | None = None
    evidence: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Light:
    """What is to be said of one class at a glance.

    `colour` is `red` (an artifact), `amber` (something to look at), `green` (nothing) or `none` (not judged).
    """

    class_index: int
    class_name: str
    colour: str
    reason: str


@dataclass(frozen=True, eq=False)
class Embedding:
    """The samples of one class in two dimensions.

    Attributes
    ----------
    kind : str
        What the plane is, such as UMAP.
    clustering : str
        The clustering that is shown first.
    points : ndarray, shape (n, 2)
    clusterings : mapping of str to ndarray of int, shape (n,)
        Labels of each clustering; -1 is noise.
    scores : mapping of str to ndarray of float, shape (n,)
        What samples can be coloured by, by name; NaN where it is not known.
    predictions : ndarray of int, shape (n,), or None
        The class that the model under study predicts.
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
    clusterings: Mapping[str, np.ndarray]
    scores: Mapping[str, np.ndarray]
    predictions: np.ndarray | None
    members: np.ndarray
    indices: np.ndarray
    names: tuple[str, ...]
    thumbnails: np.ndarray
    eigenvalues: np.ndarray
    total: int

    @property
    def clusters(self) -> np.ndarray:
        """Labels of the clustering that is shown first, int (n,)."""
        return self.clusterings[self.clustering]


@dataclass(frozen=True)
class StageRow:
    """One stage of the run: what became of it and what it reported.

    `status` is `done`, `failed`, `running` (it was cut short), `pending` (not reached), `stale` (out of date) or
    `not asked`; `error` says why.
    """

    name: str
    status: str
    seconds: float | None = None
    facts: tuple[tuple[str, str], ...] = ()
    started: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class OutputRow:
    """A file that the run wrote."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Chosen:
    """The correction that was chosen, why, and its accuracies on the images that it was not chosen on."""

    method: str
    why: str = ""
    clean: Share | None = None
    attacked: Share | None = None


@dataclass(frozen=True)
class ClusterThen:
    """The cluster that holds most of an artifact's samples in one model: which, and the share of them in it."""

    cluster: str
    size: int | None = None
    share: float | None = None
    separability: float | None = None


@dataclass(frozen=True)
class Recheck:
    """What is left of an artifact in the corrected model: `gone`, `no_effect` or `left`."""

    artifact: str
    class_name: str
    verdict: str
    before: ClusterThen | None = None
    after: ClusterThen | None = None


@dataclass(frozen=True)
class Check:
    """A further table of the verification, such as its rounds, as it is printed."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, eq=False)
class ReportData:
    """Everything on the page, in the order of the page."""

    title: str
    model: str
    n_train: int
    n_classes: int
    class_names: tuple[str, ...] = ()
    n_test: int | None = None
    artifacts: tuple[Artifact, ...] | None = None
    lights: tuple[Light, ...] = ()
    models: tuple[ModelResult, ...] | None = None
    chosen: Chosen | None = None
    rechecks: tuple[Recheck, ...] = ()
    checks: tuple[Check, ...] = ()
    truths: tuple[Truth, ...] = ()
    embeddings: tuple[Embedding, ...] | None = None
    without_plot: tuple[str, ...] = ()
    classes: tuple[RankRow, ...] | None = None
    clusters: tuple[RankRow, ...] | None = None
    untested: tuple[str, ...] = ()
    caveats: tuple[str, ...] = ()
    provenance: tuple[tuple[str, str], ...] = ()
    versions: tuple[tuple[str, str], ...] = ()
    config: str = ""
    stages: tuple[StageRow, ...] = ()
    outputs: tuple[OutputRow, ...] = ()
    skipped_samples: tuple[str, ...] = ()

    @property
    def found(self) -> tuple[Artifact, ...]:
        """The artifacts that passed the causal test."""
        return tuple(artifact for artifact in self.artifacts or () if artifact.passed)

    @property
    def rejected(self) -> tuple[Artifact, ...]:
        """The candidates that did not."""
        return tuple(artifact for artifact in self.artifacts or () if not artifact.passed)

    @property
    def failed(self) -> StageRow | None:
        """The stage that ended the run, if one did."""
        return next((stage for stage in self.stages if stage.status == "failed"), None)

    @property
    def missing(self) -> tuple[StageRow, ...]:
        """The stages without a result that counts."""
        return tuple(stage for stage in self.stages if stage.status != "done")


def match_truth(truth: Truth, found: Sequence[Artifact]) -> Match:
    """Return the finding that shares most samples with the truth, in its class where it was planted on one."""
    matches = [
        Match(artifact, len(truth.samples.intersection(artifact.samples)))
        for artifact in found
        if truth.class_index is None or artifact.class_index == truth.class_index
    ]
    best = max(matches, key=lambda match: match.n_hits, default=Match(None))
    return best if best.n_hits else Match(None)
