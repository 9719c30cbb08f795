"""One cluster explained: grown to all samples that are like it, isolated, scored, and put to the causal test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spray.correction.layers import candidates
from spray.figures import fitted
from spray.isolation.artifact import Artifact
from spray.isolation.causal import Effect, SampleBias, measure_effect, sample_bias, shows
from spray.isolation.choice import Trial, natural_changes, refitted, tried
from spray.isolation.evidence import Evidence
from spray.isolation.growing import FEWEST, FREE, Scorer, grow, inner_features, recognize
from spray.isolation.statistics import statistics
from spray.isolation.subgroups import subgroups
from spray.pipelines.context import Context
from spray.store.reading import Rows
from spray.training import batches

AT_ONCE = 256
"""Images that are put through the model at once for their features."""
NULL = 600
"""Training images of other classes that scores are fitted against."""
TRIED = 150
"""Training images of other classes that explanations are tried on; the proof is made on others."""
ADDED = 250
"""Samples without an artifact that it is added to, to learn how to recognize it."""
GROWN = 3000
"""Most samples of a class that a cluster is grown among; all get their score in the end."""
FEATURES = 4096
"""Most inner activations that are looked at; of a model with more the first layers are left out."""


@dataclass
class Candidate:
    """An isolated candidate and what was measured on it."""

    class_index: int
    cluster: str
    artifact: Artifact
    samples: np.ndarray
    own_scores: dict[int, float]
    first: Scorer
    second: Scorer
    trials: list[Trial]
    effect: Effect
    bias: SampleBias
    unusual: bool
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


class Explainer:
    """Explains clusters of one run; what several of them need is computed once.

    Parameters
    ----------
    context : Context
        Of the run.
    relevance : Rows
        (N, C, h, w): the heatmaps of all training samples.
    """

    def __init__(self, context: Context, relevance: Rows) -> None:
        self.context, self.relevance = context, relevance
        self.labels = np.asarray(context.train.labels)
        self._of_class: tuple[int, np.ndarray, np.ndarray, np.ndarray] | None = None

    @cached_property
    def layers(self) -> list[str]:
        """The inner layers whose activations are looked at: the last ones that are not too many."""
        names = candidates(self.context.model, self.context.trial_images(4))
        x = self.context.trial_images(1)
        for start in range(len(names)):
            if inner_features(self.context.model, names[start:], x).shape[1] <= FEATURES:
                return names[start:]
        return names[-1:]

    def features(self, pixels: Tensor) -> np.ndarray:
        """Return what scores are made of, float64 (n, d), of pixels (n, C, H, W)."""
        parts = []
        for part in pixels.split(AT_ONCE):
            inner = inner_features(self.context.model, self.layers, self.context.normalizer(part, self.context.device))
            parts.append(torch.cat([inner, statistics(part)], dim=1))
        return torch.cat(parts).double().numpy()

    def explain(self, cluster: str, c: int, members: np.ndarray, unusual: bool) -> Candidate | None:
        """Return what a cluster of class `c` shares; None where too few samples or nothing to isolate are left.

        Of a cluster that the ranking doesn't find `unusual` only the same piece of an image is a finding, or what
        accounts for all that tells its samples from the rest.
        """
        options, seed = self.context.config.isolate, self.context.config.seed
        rng = np.random.default_rng([seed, c, len(members)])
        of_class, features, right = self._class(c)
        member = np.isin(of_class, members)
        if min(member.sum(), (~member).sum()) < FEWEST:
            return None
        null, null_features = self._others(c)
        first, scores, carries = grow(features, member, null_features, seed)
        carries = _sensible(carries, member)
        evidence = self._evidence(
            _some(of_class[carries], options.n_samples, rng), _some(of_class[~carries], options.n_samples, rng)
        )
        trials = tried(
            evidence,
            c,
            self.features,
            first,
            self._predict,
            self.context.train.batch(null[:TRIED]),
            seed,
            unusual,
        )
        if not trials:
            return None
        artifact = refitted(trials[0], evidence)
        first, second, scores = self._recognized(artifact, first, scores, carries, of_class, features, c)
        carries = _sensible(scores > second.threshold, carries)
        test, others = self.context.test, np.flatnonzero(self.context.test.labels != c)
        effect = measure_effect(
            self._predict,
            artifact,
            c,
            test.batch(_some(others, options.n_tested, rng)),
            self.context.train.batch(_some(of_class[carries], options.n_samples, rng)),
            self.context.train.batch(_some(of_class[~carries], options.n_samples, rng)),
            seed,
            natural_changes(trials[0], evidence, seed),
        )
        own = dict(zip(of_class.tolist(), scores.tolist(), strict=True))
        bias = sample_bias(scores, carries, right)
        unusual = unusual or trials[0].unnatural
        return Candidate(c, cluster, artifact, of_class[carries], own, first, second, trials, effect, bias, unusual)

    def _recognized(
        self,
        artifact: Artifact,
        first: Scorer,
        scores: np.ndarray,
        carries: np.ndarray,
        of_class: np.ndarray,
        features: np.ndarray,
        c: int,
    ) -> tuple[Scorer, Scorer, np.ndarray]:
        """Return what recognizes an artifact: a score of features, one of that and of the match, and its value.

        Learnt from images that it is added to; from the cluster itself where it can't be added, having no content.
        """
        seed = self.context.config.seed
        null, null_features = self._others(c)
        matches, null_matches = (self._matches(artifact, indices) for indices in (of_class, null))
        if not shows(artifact):
            pairs = np.stack([scores, matches], axis=1)
            null_pairs = np.stack([first(null_features), null_matches], axis=1)
            second, scores, _ = grow(pairs, carries, null_pairs, seed, FREE)
            return first, second, scores
        rng = np.random.default_rng([seed, c, 12])
        origin = _some(np.flatnonzero(~carries), ADDED, rng)
        pixels = artifact.insert(self.context.train.batch(of_class[origin]), rng.integers(0, 2**31, len(origin)))
        first, scores, added = recognize(features, carries, self.features(pixels), origin, null_features, seed)
        second, scores, _ = recognize(
            np.stack([scores, matches], axis=1),
            carries,
            np.stack([added, _match(artifact, pixels)], axis=1),
            origin,
            np.stack([first(null_features), null_matches], axis=1),
            seed,
            FREE,
        )
        return first, second, scores

    def groups(self, c: int, most: int) -> list[np.ndarray]:
        """Return groups of a class's samples that the model's inner activations show, see `subgroups`."""
        of_class, features, _ = self._class(c)
        return [of_class[member] for member in subgroups(features, self._others(c)[1], self.context.config.seed, most)]

    def scores(self, found: Sequence[Candidate]) -> np.ndarray:
        """Return each candidate's score of every training sample, float32 (candidates, N).

        Samples that it was fitted on get the score of the fit without them.
        """
        n = len(self.labels)
        result = np.zeros((len(found), n), dtype=np.float32)
        for part in batches(n, 4 * AT_ONCE) if found else ():
            pixels = self.context.train.batch(part)
            features = self.features(pixels)
            for row, candidate in zip(result, found, strict=True):
                row[part] = candidate.second(
                    np.stack([candidate.first(features), _match(candidate.artifact, pixels)], axis=1)
                )
        for row, candidate in zip(result, found, strict=True):
            row[list(candidate.own_scores)] = list(candidate.own_scores.values())
        return result

    def _class(self, c: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return samples of a class, their features, and which the model gets right; the last class's are kept."""
        if self._of_class is None or self._of_class[0] != c:
            rng = np.random.default_rng([self.context.config.seed, c, 8])
            indices = _some(np.flatnonzero(self.labels == c), GROWN, rng)
            pixels = self.context.train.batch(indices)
            self._of_class = c, indices, self.features(pixels), self._predict(pixels).argmax(dim=1).numpy() == c
        return self._of_class[1:]

    @cached_property
    def _drawn(self) -> tuple[np.ndarray, np.ndarray]:
        """Some training samples of all classes, in random order, and their features."""
        drawn = np.random.default_rng([self.context.config.seed, 9]).permutation(len(self.labels))[: 2 * NULL]
        return drawn, self.features(self.context.train.batch(drawn))

    def _others(self, c: int) -> tuple[np.ndarray, np.ndarray]:
        indices, features = self._drawn
        which = np.flatnonzero(self.labels[indices] != c)[:NULL]
        return indices[which], features[which]

    def _evidence(self, inside: np.ndarray, outside: np.ndarray) -> Evidence:
        batch = self.context.train.batch
        return Evidence(batch(inside), self._maps(inside), batch(outside), self._maps(outside))

    def _maps(self, indices: np.ndarray) -> Tensor:
        """Return heatmaps (n, H, W) of the images' size, however small and with however many channels they are kept."""
        maps = self.relevance[indices].astype(np.float32).sum(axis=1)
        return torch.from_numpy(fitted(maps, self.context.train.image_shape[1:]))

    def _matches(self, artifact: Artifact, indices: np.ndarray) -> np.ndarray:
        parts = (self.context.train.batch(indices[part]) for part in batches(len(indices), 4 * AT_ONCE))
        return np.concatenate([_match(artifact, part) for part in parts])

    def _predict(self, pixels: Tensor) -> Tensor:
        return self.context.predict_pixels(self.context.model, pixels)


def _match(artifact: Artifact, pixels: Tensor) -> np.ndarray:
    """Return how well images match an artifact; what is beyond its samples or the rest counts no more than they do."""
    return np.asarray(artifact.score(pixels).clamp(-1, 2).double().numpy())


def _some(indices: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    return np.sort(rng.permutation(indices)[:most])


def _sensible(grown: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Return the grown samples, or those before if these are too few, or most of the former are not among them."""
    enough = FEWEST <= grown.sum() <= len(grown) - FEWEST
    return grown if enough and (grown & before).sum() >= before.sum() / 2 else before


def trial_row(trial: Trial) -> dict[str, Any]:
    """Return what is told of an explanation that was tried."""
    return {
        "isolator": trial.isolator,
        "kind": trial.artifact.kind,
        "likeness": trial.likeness,
        "explained": trial.explained,
        "separation": trial.separation,
        "told_apart": trial.apart,
        "still_told_apart": trial.still_apart,
        "flip_rate": trial.flip_rate,
        "control_flip_rate": trial.control_flip_rate,
    }
