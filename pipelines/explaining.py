"""One cluster explained: grown to all samples that are like it, isolated, scored, and put to the causal test."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from spray.correction.layers import candidates
from spray.figures import fitted
from spray.isolation.artifact import Artifact
from spray.isolation.causal import measure_effect, sample_bias, shows
from spray.isolation.choice import (
    CONFIRMED,
    ISOLATORS,
    PARTS,
    RESEMBLES,
    SAME_CONTENT,
    SHARP,
    WHOLE,
    isolate_near,
    natural_changes,
    refitted,
    tried,
)
from spray.isolation.evidence import Evidence
from spray.isolation.growing import FEWEST, FREE, MOST, boundary, grow, inner_features, recognize
from spray.isolation.matching import alike
from spray.isolation.matted import Colored
from spray.isolation.statistics import statistics
from spray.isolation.subgroups import subgroups
from spray.models.memory_format import channels_last
from spray.pipelines.candidates import Attempt, Candidate, Recognized, Start
from spray.pipelines.clusters import jaccard
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
LISTED = 4
"""Candidates that can have no verdict, whatever their effect, are tested on an n-th of the images."""
GROWN = 3000
"""Most samples of a class that a cluster is grown among; all get their score in the end."""
EXACT = 0.02
"""By how much a match may fall short and still be one to rounding."""
RAW = 16
"""Fewest samples of a cluster that are looked at as they are ..."""
SAME = 0.8
"""... unless it grew to samples of which so many are the same (Jaccard index)."""
LOOKS = 2
"""Most times that samples are looked at again which an artifact was recognized in."""
FEATURES = 4096
"""Most inner activations that are looked at; of a model with more the first layers are left out."""


class StoppedError(Exception):
    """Another thread has failed, or was told to stop."""


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
        self.model = channels_last(context.model, context.trial_images(2))
        self.stop = threading.Event()
        self._of_class: tuple[int, np.ndarray, np.ndarray, np.ndarray] | None = None

    def prepare(self) -> None:
        """Compute what all threads share, before there are several."""
        self._others(0)

    def another(self) -> Explainer:
        """Return one for another thread, with a model of its own: to look into its layers changes it for the time."""
        found = copy.copy(self)
        found.model = copy.deepcopy(self.model)
        return found

    @cached_property
    def layers(self) -> list[str]:
        """The inner layers whose activations are looked at: the last ones that are not too many."""
        names = candidates(self.model, self.context.trial_images(4))
        x = self.context.trial_images(1)
        for start in range(len(names)):
            if inner_features(self.model, names[start:], x).shape[1] <= FEATURES:
                return names[start:]
        return names[-1:]

    @cached_property
    def n_statistics(self) -> int:
        """How many of the features, the last ones, are statistics of the image alone."""
        return statistics(self.context.train.batch(np.arange(1))).shape[1]

    def features(self, pixels: Tensor) -> np.ndarray:
        """Return what scores are made of, float64 (n, d), of pixels (n, C, H, W)."""
        parts = []
        for part in pixels.split(AT_ONCE):
            self._go_on()
            inner = inner_features(self.model, self.layers, self.context.normalizer(part, self.context.device))
            parts.append(torch.cat([inner, statistics(part)], dim=1))
        return torch.cat(parts).double().numpy()

    def explain(
        self, cluster: str, c: int, members: np.ndarray, unusual: bool, repeated: bool = False
    ) -> Candidate | None:
        """Return what a cluster of class `c` shares; None where too few samples or nothing to isolate are left.

        Of a cluster that the ranking doesn't find `unusual` only the same piece of an image is a finding, or what
        accounts for all that tells its samples from the rest. That the very same was `repeated` in its samples makes
        it unusual if it is indeed the same that is isolated.
        """
        options, seed = self.context.config.isolate, self.context.config.seed
        rng = np.random.default_rng([seed, c, len(members)])
        of_class, features, right = self._class(c)
        member = np.isin(of_class, members)
        if min(member.sum(), (~member).sum()) < FEWEST:
            return None
        grown, *plain = self._starts(member, c)
        attempts = [self._attempt(grown, c, rng, unusual or repeated)]
        for start in plain:
            attempts.append(self._attempt(start, c, rng, unusual or repeated, WHOLE))
            attempts.append(self._attempt(start, c, rng, False, PARTS, matched=True))
        attempts += self._again(attempts, c, rng)
        attempts = [attempt for attempt in attempts if attempt.trials]
        if not attempts:
            return None
        best = max(attempts, key=_worth)
        artifact = refitted(best.trials[0], best.evidence)
        found = self._recognized(artifact, best.start, of_class, features, c)
        better = self._looked_again(best, found, c, rng)
        if better is not None and (best.trials[0].accounts or _worth(better) > _worth(best)):
            best = better
            artifact = refitted(best.trials[0], best.evidence)
            found = self._recognized(artifact, best.start, of_class, features, c)
        trials, evidence, carries = best.trials, best.evidence, best.start.carries
        unusual = unusual or (repeated and artifact.constant)
        carries = _sensible(found.carries, carries)
        test, others = self.context.test, np.flatnonzero(self.context.test.labels != c)
        # Cut-outs may show what makes the class; against those of other classes they would pass for an artifact.
        content = self._others(c)[0] if trials[0].accounts and artifact.constant else of_class[~carries]
        proof = unusual or trials[0].unnatural_in(float(carries.mean()))
        n_tested, n_samples = (n if proof else -(-n // LISTED) for n in (options.n_tested, options.n_samples))
        effect = measure_effect(
            self._predict,
            artifact,
            c,
            test.batch(_some(others, n_tested, rng)),
            self.context.train.batch(_some(of_class[carries], n_samples, rng)),
            self.context.train.batch(_some(of_class[~carries], n_samples, rng)),
            seed,
            natural_changes(trials[0], evidence, seed),
            self.context.train.batch(_some(content, n_samples, rng)),
        )
        own = dict(zip(of_class.tolist(), found.scores.tolist(), strict=True))
        bias = sample_bias(found.scores, carries, right)
        scorers = found.scorer, found.second
        return Candidate(c, cluster, artifact, of_class[carries], own, *scorers, trials, effect, bias, proof, unusual)

    def _starts(self, member: np.ndarray, c: int) -> list[Start]:
        """Return what an artifact is isolated from: the cluster grown and, where that is something else, as it is.

        A cluster knows little of its samples but may be pure; grown by what the model sees of them it has more that
        carry the artifact, and often others that look like them.
        """
        features, null, seed = self._class(c)[1], self._others(c)[1], self.context.config.seed
        scorer, scores, carries = grow(features, member, null, seed)
        starts = [Start(scorer, scores, _sensible(carries, member))]
        if member.sum() >= RAW and not _alike(member, starts[0].carries):
            scorer, scores, _ = grow(features, member, null, seed, rounds=1)
            starts.append(Start(scorer, scores, member))
        return starts

    def _again(self, attempts: list[Attempt], c: int, rng: np.random.Generator) -> list[Attempt]:
        """Look again at the sharpest of the same pieces of an image, from all samples of the class that show it.

        What the cluster had in common besides, such as dark ground, is then gone. Changes of the whole image are not
        looked at again: samples that look changed are a kind of image, too.
        """
        found = [
            (trial, attempt)
            for attempt in attempts
            for trial in attempt.trials
            if trial.isolator in SAME_CONTENT and trial.separation >= SHARP
        ]
        if not found:
            return []
        trial, attempt = max(found, key=lambda each: each[0].separation)
        of_class, features, _ = self._class(c)
        artifact = isolate_near(attempt.evidence) or refitted(trial, attempt.evidence)
        start = self._recognized(artifact, attempt.start, of_class, features, c)
        few, before = start.carries.sum() < RAW, attempt.start.carries
        if few or (~start.carries).sum() < RAW or _alike(start.carries, before):
            return []
        return [self._attempt(start, c, rng, False, SAME_CONTENT, matched=True)]

    def _looked_again(self, best: Attempt, found: Recognized, c: int, rng: np.random.Generator) -> Attempt | None:
        """Try again from the samples that the best explanation was recognized in, if it accounts for nothing yet.

        What only resembles an artifact may tell its samples all the same: the shape of a sticker that is turned anyhow,
        a noise of about the right strength. Natural kinds account for themselves then, too, but not as well.
        """
        lead = best.trials[0]
        whole = lead.isolator in WHOLE
        if (lead.accounts and lead.left <= CONFIRMED) or (whole and lead.likeness < RESEMBLES):
            return None
        of_class, features, _ = self._class(c)
        for look in range(LOOKS):
            if look:
                found = self._recognized(refitted(lead, best.evidence), best.start, of_class, features, c)
            few = min(found.carries.sum(), (~found.carries).sum()) < RAW
            if few or _alike(found.carries, best.start.carries):
                return None
            best = self._attempt(found, c, rng, False, WHOLE if whole else (*PARTS, "donated"))
            if not best.trials:
                return None
            # What leaves least leads on, whatever looks most like the samples.
            lead = min(best.trials, key=lambda trial: (not trial.confirmed, trial.separation < SHARP, trial.left))
            best = replace(best, trials=[lead, *(trial for trial in best.trials if trial is not lead)])
            if lead.confirmed:
                return best
        return None

    def _attempt(
        self,
        start: Start,
        c: int,
        rng: np.random.Generator,
        unusual: bool,
        names: Sequence[str] = tuple(ISOLATORS),
        matched: bool = False,
    ) -> Attempt:
        """Try to explain what some samples of a class share, by what the rest or its `matched` part has not."""
        (of_class, features, _), most = self._class(c), self.context.config.isolate.n_samples
        inside, outside = np.flatnonzero(start.carries), np.flatnonzero(~start.carries)
        if matched:
            rows = features[:, -self.n_statistics :]
            outside = outside[alike(rows[inside], rows[outside])]
        inside, outside = (_some(each, most, rng) for each in (inside, outside))
        evidence = self._evidence(of_class[inside], of_class[outside])
        others = self.context.train.batch(self._others(c)[0][:TRIED])
        seed = self.context.config.seed
        known = features[inside], features[outside]
        trials = tried(evidence, c, self.features, start.scorer, self._predict, others, seed, unusual, names, known)
        return Attempt(start, evidence, trials)

    def _recognized(
        self, artifact: Artifact, start: Start, of_class: np.ndarray, features: np.ndarray, c: int
    ) -> Recognized:
        """Return what recognizes an artifact: a score of features, and one of that and of the match.

        Learnt from images that it is added to; from the cluster itself where it can't be added, having no content.
        Of the others those that match it, too, may be no examples of images without it: a cluster is seldom complete.
        """
        first, scores, carries = start.scorer, start.scores, start.carries
        seed = self.context.config.seed
        null, null_features = self._others(c)
        matches, null_matches = (self._matches(artifact, indices) for indices in (of_class, null))
        if not shows(artifact):
            seen, null_seen = (
                _together(artifact, *part) for part in ((scores, matches), (first(null_features), null_matches))
            )
            second, scores, _ = grow(seen, carries, null_seen, seed, FREE)
            return Recognized(first, scores, scores > second.threshold, second)
        rng = np.random.default_rng([seed, c, 12])
        origin = _some(np.flatnonzero(~carries), ADDED, rng)
        pixels = artifact.insert(self.context.train.batch(of_class[origin]), rng.integers(0, 2**31, len(origin)))
        added_matches = _match(artifact, pixels)
        left_out, kept = carries, np.ones(len(origin), dtype=bool)
        if artifact.exact or isinstance(artifact, Colored):  # other scores are classifiers of the very same samples
            doubted = carries | (matches > boundary(matches, added_matches, carries))
            if doubted.mean() <= MOST and (~doubted[origin]).sum() >= RAW:
                left_out, kept = doubted, ~doubted[origin]
        origin, pixels, added_matches = origin[kept], pixels[torch.from_numpy(kept)], added_matches[kept]
        first, scores, added = recognize(features, left_out, self.features(pixels), origin, null_features, seed)
        second, scores, _ = recognize(
            _together(artifact, scores, matches),
            left_out,
            _together(artifact, added, added_matches),
            origin,
            _together(artifact, first(null_features), null_matches),
            seed,
            FREE,
        )
        return Recognized(first, scores, scores > second.threshold, second)

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
                artifact = candidate.artifact
                row[part] = candidate.second(_together(artifact, candidate.first(features), _match(artifact, pixels)))
        for row, candidate in zip(result, found, strict=True):
            row[list(candidate.own_scores)] = list(candidate.own_scores.values())
        return result

    def _class(self, c: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return samples of a class, their features, and which the model gets right; the last class's are kept."""
        if self._of_class is None or self._of_class[0] != c:
            rng = np.random.default_rng([self.context.config.seed, c, 8])
            indices = _some(np.flatnonzero(self.labels == c), GROWN, rng)
            parts = []
            for part in batches(len(indices), AT_ONCE):
                pixels = self.context.train.batch(indices[part])
                parts.append((self.features(pixels), self._predict(pixels).argmax(dim=1).numpy() == c))
            features, right = (np.concatenate(each) for each in zip(*parts, strict=True))
            self._of_class = c, indices, features, right
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

    def _go_on(self) -> None:
        """Raise `StoppedError` if another thread has asked all to stop, which share the event."""
        if self.stop.is_set():
            raise StoppedError

    def _predict(self, pixels: Tensor) -> Tensor:
        self._go_on()
        return self.context.predict_pixels(self.model, pixels)


def _worth(attempt: Attempt) -> tuple[bool, float]:
    """Return what attempts are compared by."""
    return attempt.trials[0].unnatural, attempt.trials[0].evidence


def _match(artifact: Artifact, pixels: Tensor) -> np.ndarray:
    """Return how well images match an artifact; what is beyond its samples or the rest counts no more than they do."""
    return np.asarray(artifact.score(pixels).clamp(-1, 2).double().numpy())


def _together(artifact: Artifact, scores: np.ndarray, matches: np.ndarray) -> np.ndarray:
    """Return what samples are told by, (n, 2 or 3): a score of features, the match, and how nearly exact that is.

    The same piece of an image matches exactly, to rounding, and much else does half: a logarithm tells these apart.
    """
    columns = [scores, matches]
    if artifact.exact:
        columns.append(np.log(EXACT) - np.log((1 - matches).clip(0) + EXACT))
    return np.stack(columns, axis=1)


def _some(indices: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    return np.sort(rng.permutation(indices)[:most])


def _alike(one: np.ndarray, other: np.ndarray) -> bool:
    """Return whether two sets of samples, as masks, are almost the same."""
    return jaccard(np.flatnonzero(one), np.flatnonzero(other)) >= SAME


def _sensible(grown: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Return the grown samples, or those before if these are too few, or most of the former are not among them."""
    enough = FEWEST <= grown.sum() <= len(grown) - FEWEST
    return grown if enough and (grown & before).sum() >= before.sum() / 2 else before
