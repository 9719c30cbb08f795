"""What isolation knows of images: features, whether the model gets them right, how well they match an artifact."""

from __future__ import annotations

import copy
import threading
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from spray.correction.layers import candidates
from spray.data.base import ImageDataset
from spray.isolation.artifact import Artifact
from spray.isolation.growing import inner_features
from spray.isolation.statistics import statistics
from spray.models.memory_format import channels_last
from spray.pipelines.context import Context
from spray.training import batches

AT_ONCE = 256
"""Images that are put through the model at once for their features."""
NULL = 600
"""Training images of other classes that scores are fitted against."""
GROWN = 3000
"""Most samples of a class that a cluster is grown among; the others are judged by their score in the end."""
FEATURES = 4096
"""Most inner activations that are looked at; of a model with more the first layers are left out."""
EXACT = 0.02
"""By how much a match may fall short and still be one to rounding."""


class StoppedError(Exception):
    """Another thread has failed, or was told to stop."""


@dataclass(frozen=True)
class Members:
    """Images of a class.

    Attributes
    ----------
    indices : ndarray of int
        (n,): which they are.
    features : ndarray
        (n, d).
    right : ndarray of bool
        (n,): which the model gets right.
    """

    indices: np.ndarray
    features: np.ndarray
    right: np.ndarray


class Samples:
    """The images of a run as a model sees them; what several clusters need is computed once.

    Parameters
    ----------
    context : Context
        Of the run.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        self.labels = np.asarray(context.train.labels)
        self.model = channels_last(context.model, context.trial_images(2))
        self.stop = threading.Event()
        self._of_class: dict[int, tuple[Members, Members]] = {}

    def prepare(self) -> None:
        """Compute what all threads share, before there are several."""
        self.others(0)

    def another(self) -> Samples:
        """Return one for another thread, with a model of its own: to look into its layers changes it for the time."""
        found = copy.copy(self)
        found.model, found._of_class = copy.deepcopy(self.model), {}
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
            self.go_on()
            inner = inner_features(self.model, self.layers, self.context.normalizer(part, self.context.device))
            parts.append(torch.cat([inner, statistics(part)], dim=1))
        return torch.cat(parts).double().numpy()

    def of_class(self, c: int) -> Members:
        """Return training images of a class; the last class's are kept."""
        return self._members(c)[0]

    def held_out(self, c: int) -> Members:
        """Return test images of a class; the last class's are kept."""
        return self._members(c)[1]

    def _members(self, c: int) -> tuple[Members, Members]:
        if c not in self._of_class:
            self._of_class = {c: (self._read(self.context.train, c), self._read(self.context.test, c))}
        return self._of_class[c]

    def _read(self, images: ImageDataset, c: int) -> Members:
        rng = np.random.default_rng([self.context.config.seed, c, 8])
        indices = some(np.flatnonzero(np.asarray(images.labels) == c), GROWN, rng)
        parts = [(np.empty((0, 0)), np.empty(0, dtype=bool))]
        for part in batches(len(indices), AT_ONCE):
            pixels = images.batch(indices[part])
            parts.append((self.features(pixels), self.predict(pixels).argmax(dim=1).numpy() == c))
        features, right = (np.concatenate(each) for each in zip(*(parts[1:] or parts), strict=True))
        return Members(indices, features, right)

    @cached_property
    def _drawn(self) -> tuple[np.ndarray, np.ndarray]:
        """Some training samples of all classes, in random order, and their features."""
        drawn = np.random.default_rng([self.context.config.seed, 9]).permutation(len(self.labels))[: 2 * NULL]
        return drawn, self.features(self.context.train.batch(drawn))

    def others(self, c: int) -> tuple[np.ndarray, np.ndarray]:
        """Return some training images of other classes, in random order, and their features."""
        indices, features = self._drawn
        which = np.flatnonzero(self.labels[indices] != c)[:NULL]
        return indices[which], features[which]

    def matches(self, artifact: Artifact, indices: np.ndarray, images: ImageDataset | None = None) -> np.ndarray:
        """Return how well some images match an artifact, training images if nothing is said."""
        images = self.context.train if images is None else images
        parts = (images.batch(indices[part]) for part in batches(len(indices), 4 * AT_ONCE))
        return np.concatenate([match(artifact, part) for part in parts])

    def go_on(self) -> None:
        """Raise `StoppedError` if another thread has asked all to stop, which share the event."""
        if self.stop.is_set():
            raise StoppedError

    def predict(self, pixels: Tensor) -> Tensor:
        """Return the logits (n, classes) of pixels (n, C, H, W)."""
        self.go_on()
        return self.context.predict_pixels(self.model, pixels)


def match(artifact: Artifact, pixels: Tensor) -> np.ndarray:
    """Return how well images match an artifact; what is beyond its samples or the rest counts no more than they do."""
    return np.asarray(artifact.score(pixels).clamp(-1, 2).double().numpy())


def together(artifact: Artifact, scores: np.ndarray, matches: np.ndarray) -> np.ndarray:
    """Return what samples are told by, (n, 2 or 3): a score of features, the match, and how nearly exact that is.

    The same piece of an image matches exactly, to rounding, and much else does half: a logarithm tells these apart.
    """
    columns = [scores, matches]
    if artifact.exact:
        columns.append(np.log(EXACT) - np.log((1 - matches).clip(0) + EXACT))
    return np.stack(columns, axis=1)


def some(indices: np.ndarray, most: int, rng: np.random.Generator) -> np.ndarray:
    """Return at most so many of them, drawn, in order."""
    return np.sort(rng.permutation(indices)[:most])
