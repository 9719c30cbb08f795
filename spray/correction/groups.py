"""Groups of training images by class and artifact, and weights that make the two independent."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from spray.correction.base import Problem, carriers

FEWEST = 8
"""Fewest samples of a group that is drawn from; a smaller one would be learnt by heart."""


@dataclass(frozen=True)
class Balanced:
    """How to draw training images such that artifacts say nothing about the class.

    Attributes
    ----------
    attribute : ndarray of int
        (N,): the first artifact that each training image carries, counted from 1, or 0.
    weights : ndarray of float
        (N,): how likely each is to be drawn; sums to 1.
    added : ndarray of float
        (classes, 1 + artifacts): the share of a class's drawn images without an artifact that each artifact is added
        to, since the class has too few images with it.
    counts : ndarray of int
        (classes, 1 + artifacts): how many images there are.
    """

    attribute: np.ndarray
    weights: np.ndarray
    added: np.ndarray
    counts: np.ndarray
    labels: np.ndarray

    def fill(self, problem: Problem, pixels: Tensor, indices: np.ndarray, rng: np.random.Generator) -> Tensor:
        """Return pixels (n, C, H, W) of training images, with artifacts added as their groups need it."""
        pixels = pixels.clone()
        free = self.attribute[indices] == 0
        until = np.cumsum(self.added[self.labels[indices]], axis=1)
        draw = rng.random(len(indices))[:, None]
        for k, finding in enumerate(problem.findings, start=1):
            hit = np.flatnonzero(free & (draw[:, 0] >= until[:, k - 1]) & (draw[:, 0] < until[:, k]))
            if len(hit):
                pixels[hit] = finding.artifact.insert(pixels[hit], rng.integers(0, 2**31, len(hit)))
        return pixels

    def facts(self) -> dict[str, object]:
        """Return the number of images by class and artifact, and which groups are filled."""
        filled = [[int(c), int(k)] for c, k in zip(*np.nonzero(self.added), strict=True)]
        return {"images": self.counts.tolist(), "filled": filled}


def balance(problem: Problem, indices: np.ndarray | None = None, share: float = 0.5) -> Balanced:
    """Return how to draw from the training images such that each class has each artifact equally often.

    In every class a share of the images that are drawn carries an artifact, the same of each artifact, and the others
    carry none; classes keep their frequencies. Where a class has fewer than `FEWEST` images with an artifact
    these are left out and, with `fill_groups`, the isolated artifact is added to images of the class without one;
    without `fill_groups` that artifact is drawn in no class. (The other way round, where a class hardly has images
    without an artifact, those that it has are drawn as often as the other groups.)

    Parameters
    ----------
    problem : Problem
        With its findings' scores.
    indices : ndarray of int, optional
        The images to draw from; by default all.
    share : float
        Of the images with an artifact; by default as many as without.
    """
    labels = np.asarray(problem.train.labels)
    n_classes, n_kinds = len(problem.train.classes), 1 + len(problem.findings)
    attribute = np.zeros(len(labels), dtype=np.int64)
    for k, finding in reversed(list(enumerate(problem.findings, start=1))):
        attribute[carriers(problem, finding)] = k
    among = np.ones(len(labels), dtype=bool) if indices is None else np.isin(np.arange(len(labels)), indices)
    counts = np.zeros((n_classes, n_kinds), dtype=np.int64)
    np.add.at(counts, (labels[among], attribute[among]), 1)
    wanted = np.full(n_kinds, share / max(1, n_kinds - 1))
    wanted[0] = 1 - share
    lacks = counts < FEWEST
    lacks[:, 0] = counts[:, 0] == 0
    if not problem.options.fill_groups:
        wanted[1:][lacks[:, 1:].any(axis=0)] = 0
        wanted /= wanted.sum()
    mass = np.tile(wanted, (n_classes, 1))
    missing = np.where(lacks, mass, 0)
    mass[lacks] = 0
    can_fill = counts[:, 0] > 0
    mass[can_fill, 0] += missing[can_fill, 1:].sum(axis=1)
    added = np.zeros_like(mass)
    added[can_fill, 1:] = missing[can_fill, 1:] / mass[can_fill, :1]
    total = mass.sum(axis=1, keepdims=True)
    mass = np.divide(mass, total, out=np.zeros_like(mass), where=total > 0) * counts.sum(axis=1, keepdims=True)
    each = np.divide(mass, counts, out=np.zeros_like(mass), where=counts > 0)
    weights = np.where(among, each[labels, attribute], 0.0)
    return Balanced(attribute, weights / weights.sum(), added, counts, labels)
