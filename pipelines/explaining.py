"""One cluster explained: grown to all samples that are like it, isolated, scored, and put to the causal test."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from spray.data.base import ImageDataset
from spray.figures import fitted
from spray.isolation.artifact import Artifact
from spray.isolation.causal import measure_effect, shows
from spray.isolation.choice import (
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
from spray.isolation.growing import FEWEST, FREE, MOST, Scorer, boundary, grow, halfway, recognize
from spray.isolation.matching import alike
from spray.isolation.matted import Colored
from spray.isolation.sample_bias import sample_bias
from spray.isolation.subgroups import subgroups
from spray.pipelines.candidates import Attempt, Candidate, Recognized, Start
from spray.pipelines.clusters import jaccard
from spray.pipelines.context import Context
from spray.pipelines.samples import AT_ONCE, Members, Samples, match, some, together
from spray.store.reading import Rows
from spray.training import batches

TRIED = 150
"""Training images of other classes that explanations are tried on; the proof is made on others."""
ADDED = 250
"""Samples without an artifact that it is added to, to learn how to recognize it."""
LISTED = 4
"""Candidates that can have no verdict, whatever their effect, are tested on an n-th of the images."""
HELD_OUT = 20
"""Fewest test images of a class with what was isolated, and without, for it to be removed from them."""
RAW = 16
"""Fewest samples of a cluster that are looked at as they are ..."""
SAME = 0.8
"""... unless it grew to samples of which so many are the same (Jaccard index)."""
LOOKS = 2
"""Most times that samples are looked at again which an artifact was recognized in."""


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
        self.samples = Samples(context)

    def another(self) -> Explainer:
        """Return one for another thread."""
        found = copy.copy(self)
        found.samples = self.samples.another()
        return found

    def explain(
        self,
        cluster: str,
        c: int,
        members: np.ndarray,
        unusual: bool,
        repeated: bool = False,
        strangeness: float | None = None,
    ) -> Candidate | None:
        """Return what a cluster of class `c` shares; None where too few samples or nothing to isolate are left.

        Of a cluster that the ranking doesn't find `unusual` only the same piece of an image is a finding, or what
        accounts for all that tells its samples from the rest. That the very same was `repeated` in its samples makes
        it unusual if it is indeed the same piece that is isolated: the same black ground is repeated, too. What has a
        `strangeness` is a kind of sample: where no artifact accounts for it, its samples stay what they are.
        """
        options, seed = self.context.config.isolate, self.context.config.seed
        rng = np.random.default_rng([seed, c, len(members)])
        own = self.samples.of_class(c)
        of_class = own.indices
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
        found = self._recognized(artifact, best.start, own, c)
        better = self._looked_again(best, found, c, rng)
        if better is None and not best.trials[0].settled:
            better = self._shaded(attempts, best, c, rng)
        if better is not None and (best.trials[0].accounts or _worth(better) > _worth(best)):
            best = better
            artifact = refitted(best.trials[0], best.evidence)
            found = self._recognized(artifact, best.start, own, c)
        trials, evidence = best.trials, best.evidence
        unusual = unusual or (repeated and trials[0].same_piece)
        if trials[0].accounts:
            strangeness = None
        if strangeness is not None:
            found = self._kind(artifact, member, c)
        carries = _sensible(found.carries, best.start.carries) if strangeness is None else found.carries
        threshold = found.second.threshold if carries is found.carries else halfway(found.scores, carries)
        held = self.samples.held_out(c)
        held_carries = self._held_out_scores(artifact, found, c) > threshold
        held_out = bool(min(held_carries.sum(), (~held_carries).sum()) >= HELD_OUT)
        test, others = self.context.test, np.flatnonzero(self.context.test.labels != c)
        # Cut-outs may show what makes the class; against those of other classes they would pass for an artifact.
        content = self.samples.others(c)[0] if trials[0].accounts and artifact.constant else of_class[~carries]
        proof = unusual or trials[0].unnatural_in(float(carries.mean()))
        n_tested, n_samples = (n if proof else -(-n // LISTED) for n in (options.n_tested, options.n_samples))
        # Test images seldom carry what was planted in training images alone.
        images, indices, with_it = (
            (test, held.indices, held_carries) if held_out else (self.context.train, of_class, carries)
        )
        effect = measure_effect(
            self.samples.predict,
            artifact,
            c,
            test.batch(some(others, n_tested, rng)),
            images.batch(some(indices[with_it], n_samples, rng)),
            images.batch(some(indices[~with_it], n_samples, rng)),
            seed,
            natural_changes(trials[0], evidence, seed),
            self.context.train.batch(some(content, n_samples, rng)),
        )
        return Candidate(
            c,
            cluster,
            artifact,
            samples=of_class[carries],
            own_scores=dict(zip(of_class.tolist(), found.scores.tolist(), strict=True)),
            threshold=threshold,
            first=found.scorer,
            second=found.second,
            trials=trials,
            effect=replace(effect, removal_held_out=held_out),
            bias=replace(
                sample_bias(found.scores, carries, own.right, (held_carries, held.right) if held_out else None),
                strangeness=strangeness,
            ),
            unusual=proof,
            ranked=unusual,
        )

    def _starts(self, member: np.ndarray, c: int) -> list[Start]:
        """Return what an artifact is isolated from: the cluster grown and, where that is something else, as it is.

        A cluster knows little of its samples but may be pure; grown by what the model sees of them it has more that
        carry the artifact, and often others that look like them.
        """
        features, null, seed = self.samples.of_class(c).features, self.samples.others(c)[1], self.context.config.seed
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
        artifact = isolate_near(attempt.evidence) or refitted(trial, attempt.evidence)
        start = self._recognized(artifact, attempt.start, self.samples.of_class(c), c)
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
        if lead.settled or (whole and lead.likeness < RESEMBLES):
            return None
        for look in range(LOOKS):
            if look:
                found = self._recognized(refitted(lead, best.evidence), best.start, self.samples.of_class(c), c)
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

    def _shaded(self, attempts: list[Attempt], best: Attempt, c: int, rng: np.random.Generator) -> Attempt | None:
        """Look again from where a shade is recognized that came near without leading.

        Isolated from samples of a kind it cannot make all of the rest like them, but is what it is, and tells the other
        samples that have it: from all of these it is isolated again.
        """
        near = [
            replace(attempt, trials=[trial])
            for attempt in attempts
            for trial in attempt.trials
            if trial.isolator == "shading" and trial.likeness >= RESEMBLES and trial is not best.trials[0]
        ]
        for lead in sorted(near, key=lambda attempt: -attempt.trials[0].likeness):
            artifact = refitted(lead.trials[0], lead.evidence)
            found = self._recognized(artifact, lead.start, self.samples.of_class(c), c)
            if (better := self._looked_again(lead, found, c, rng)) is not None:
                return better
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
        samples, most, seed = self.samples, self.context.config.isolate.n_samples, self.context.config.seed
        of_class, features = samples.of_class(c).indices, samples.of_class(c).features
        inside, outside = np.flatnonzero(start.carries), np.flatnonzero(~start.carries)
        if matched:
            rows = features[:, -self.samples.n_statistics :]
            outside = outside[alike(rows[inside], rows[outside])]
        inside, outside = (some(each, most, rng) for each in (inside, outside))
        evidence = self._evidence(of_class[inside], of_class[outside])
        others = self.context.train.batch(samples.others(c)[0][:TRIED])
        known = features[inside], features[outside]
        asked = c, samples.features, start.scorer, samples.predict
        trials = tried(evidence, *asked, others, seed, unusual, names, known)
        return Attempt(start, evidence, trials)

    def _recognized(self, artifact: Artifact, start: Start, own: Members, c: int) -> Recognized:
        """Return what recognizes an artifact: a score of features, and one of that and of the match.

        Learnt from images that it is added to; from the cluster itself where it can't be added, having no content.
        Of the others those that match it, too, may be no examples of images without it: a cluster is seldom complete.
        """
        of_class, features, seed = own.indices, own.features, self.context.config.seed
        first, scores, carries = start.scorer, start.scores, start.carries
        null, null_features = self.samples.others(c)
        matches, null_matches = (self.samples.matches(artifact, indices) for indices in (of_class, null))
        if not shows(artifact):
            seen, null_seen = (
                together(artifact, *part) for part in ((scores, matches), (first(null_features), null_matches))
            )
            second, scores, _ = grow(seen, carries, null_seen, seed, FREE)
            return Recognized(first, scores, scores > second.threshold, second)
        rng = np.random.default_rng([seed, c, 12])
        origin = some(np.flatnonzero(~carries), ADDED, rng)
        pixels = artifact.insert(self.context.train.batch(of_class[origin]), rng.integers(0, 2**31, len(origin)))
        added_matches = match(artifact, pixels)
        left_out, kept = carries, np.ones(len(origin), dtype=bool)
        if artifact.exact or isinstance(artifact, Colored):  # other scores are classifiers of the very same samples
            doubted = carries | (matches > boundary(matches, added_matches, carries))
            if doubted.mean() <= MOST and (~doubted[origin]).sum() >= RAW:
                left_out, kept = doubted, ~doubted[origin]
        origin, pixels, added_matches = origin[kept], pixels[torch.from_numpy(kept)], added_matches[kept]
        first, scores, added = recognize(features, left_out, self.samples.features(pixels), origin, null_features, seed)
        second, scores, _ = recognize(
            together(artifact, scores, matches),
            left_out,
            together(artifact, added, added_matches),
            origin,
            together(artifact, first(null_features), null_matches),
            seed,
            FREE,
        )
        return Recognized(first, scores, scores > second.threshold, second)

    def _kind(self, artifact: Artifact, member: np.ndarray, c: int) -> Recognized:
        """Return a kind of sample by what the model sees of it; how an image matches an artifact says nothing."""
        features, null = self.samples.of_class(c).features, self.samples.others(c)[1]
        scorer, scores, _ = grow(features, member, null, self.context.config.seed, rounds=1)
        weights = np.zeros(together(artifact, np.zeros(1), np.zeros(1)).shape[1])
        weights[0] = 1.0
        return Recognized(scorer, scores, member, Scorer(weights, 0.0, scorer.threshold))

    def groups(self, c: int, most: int) -> list[np.ndarray]:
        """Return groups of a class's samples that the model's inner activations show, see `subgroups`."""
        own, null = self.samples.of_class(c), self.samples.others(c)[1]
        return [own.indices[member] for member in subgroups(own.features, null, self.context.config.seed, most)]

    def scores(self, found: Sequence[Candidate]) -> np.ndarray:
        """Return each candidate's score of every training sample, float32 (candidates, N).

        Samples that it was fitted on get the score of the fit without them.
        """
        result = self._scores_of(self.context.train, found)
        for row, candidate in zip(result, found, strict=True):
            row[list(candidate.own_scores)] = list(candidate.own_scores.values())
        return result

    def test_scores(self, found: Sequence[Candidate]) -> np.ndarray:
        """Return each candidate's score of every test image, float32 (candidates, n)."""
        return self._scores_of(self.context.test, found)

    def _held_out_scores(self, artifact: Artifact, found: Recognized, c: int) -> np.ndarray:
        """Return the score (n,) of test images of a class for what was recognized in its training images."""
        held = self.samples.held_out(c)
        if not len(held.indices):
            return np.empty(0)
        matches = self.samples.matches(artifact, held.indices, self.context.test)
        return _score(artifact, found.scorer, found.second, held.features, matches)

    def _scores_of(self, images: ImageDataset, found: Sequence[Candidate]) -> np.ndarray:
        result = np.zeros((len(found), len(images)), dtype=np.float32)
        for part in batches(len(images), 4 * AT_ONCE) if found else ():
            pixels = images.batch(part)
            features = self.samples.features(pixels)
            for row, candidate in zip(result, found, strict=True):
                matches = match(candidate.artifact, pixels)
                row[part] = _score(candidate.artifact, candidate.first, candidate.second, features, matches)
        return result

    def _evidence(self, inside: np.ndarray, outside: np.ndarray) -> Evidence:
        batch = self.context.train.batch
        return Evidence(batch(inside), self._maps(inside), batch(outside), self._maps(outside))

    def _maps(self, indices: np.ndarray) -> Tensor:
        """Return heatmaps (n, H, W) of the images' size, however small and with however many channels they are kept."""
        maps = self.relevance[indices].astype(np.float32).sum(axis=1)
        return torch.from_numpy(fitted(maps, self.context.train.image_shape[1:]))


def _score(artifact: Artifact, first: Scorer, second: Scorer, features: np.ndarray, matches: np.ndarray) -> np.ndarray:
    """Return what an image is recognized by, (n,), from its features (n, d) and how well it matches (n,)."""
    return second(together(artifact, first(features), matches))


def _worth(attempt: Attempt) -> tuple[bool, float]:
    """Return what attempts are compared by."""
    return attempt.trials[0].unnatural, attempt.trials[0].evidence


def _alike(one: np.ndarray, other: np.ndarray) -> bool:
    """Return whether two sets of samples, as masks, are almost the same."""
    return jaccard(np.flatnonzero(one), np.flatnonzero(other)) >= SAME


def _sensible(grown: np.ndarray, before: np.ndarray) -> np.ndarray:
    """Return the grown samples, or those before if these are too few, or most of the former are not among them."""
    enough = FEWEST <= grown.sum() <= len(grown) - FEWEST
    return grown if enough and (grown & before).sum() >= before.sum() / 2 else before
