"""From a cluster, never quite pure nor complete, to a score of every sample: self-training with a linear classifier.

What the classifier sees of a sample are the model's inner activations (its weights there are a concept activation
vector, CAV), statistics of the image and, once an artifact was isolated, how well the sample matches it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

FOLDS = 5
ROUNDS = 3
"""Most rounds of self-training."""
FEWEST = 4
"""Fewest samples that an artifact is isolated from."""
MOST = 0.8
"""Largest share of a class that carries an artifact: more, and there is no rest to compare it with."""
FREE = 1e-3
"""Penalty on the squared weights of few features that are scores themselves."""
FARTHEST = 8.0
"""Most standard deviations by which a feature of a sample with an artifact added may be off: no network saw such."""
SHARES = (0.02, 0.6)
"""Least and largest share of a class that carries an artifact at first."""
LOWEST = 0.05
"""Share of the scores of what an artifact was added to that tells how far below the median such scores reach."""
NARROWEST = 0.05
"""Least standard deviation of the scores of what an artifact was added to: true samples have it rounded and cut off."""
STEPS = 100
"""Of expectation maximization."""
BANDWIDTH = 0.08
"""Of the density of scores, of which that with an artifact is typically 1 and that without 0."""
VALLEY = 1.5
"""How many times as dense scores are on both sides of a valley."""


@dataclass(frozen=True)
class Scorer:
    """A linear score of features, such that it is typically 1 for carriers and 0 for the rest of their class.

    Attributes
    ----------
    weights : ndarray
        (d,).
    bias : float
        Added to it.
    threshold : float
        Of the score: above it are carriers.
    """

    weights: np.ndarray
    bias: float
    threshold: float

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Return the score (n,), float64, of features (n, d)."""
        return features @ self.weights + self.bias


def grow(
    features: np.ndarray,
    member: np.ndarray,
    null: np.ndarray,
    seed: int,
    penalty: float | None = None,
    rounds: int = ROUNDS,
) -> tuple[Scorer, np.ndarray, np.ndarray]:
    """Grow a cluster to all samples of its class that are like it, and drop those of it that are not.

    In turns a linear classifier learns to tell the samples from the rest of the class, and every sample is judged by
    the one that was fitted without it; the class's scores are split by a mixture of two normal distributions.

    Parameters
    ----------
    features : ndarray
        (n, d), of the class's samples.
    member : ndarray of bool
        (n,): the cluster.
    null : ndarray
        (m, d), of samples of other classes: they are no carriers, and weigh as much as the rest of the class.
    seed : int
        Of the folds.
    penalty : float, optional
        On the squared weights of standardised features. Where nothing is said it is what shrinks their covariance by as
        much as Ledoit and Wolf (2004) find best: there may be more features than samples.
    rounds : int
        Most turns taken. After a single one the classifier is of the cluster as it was given.

    Returns
    -------
    scorer : Scorer
        Fitted on all samples.
    scores : ndarray
        (n,): of the class's samples, each by a fit without it.
    carries : ndarray of bool
        (n,): which of them carry it.
    """
    center, spread = features.mean(axis=0), features.std(axis=0) + 1e-6
    x, others = ((part - center) / spread for part in (features, null))
    penalty = _shrinkage(x, others) if penalty is None else penalty
    folds = np.random.default_rng([seed, 11]).permutation(len(x)) % FOLDS
    scores = np.zeros(len(x))
    for turn in range(1, rounds + 1):
        for fold in range(FOLDS):
            used = folds != fold
            w, b = _fit(x[used], member[used], others, penalty)
            scores[~used] = x[~used] @ w + b
        carries = scores > split(scores, member)
        few_or_most = carries.sum() < FEWEST or carries.mean() > MOST
        if few_or_most or (carries == member).all() or turn == rounds == 1:
            break
        member = carries
    w, b = _fit(x, member, others, penalty)
    threshold = split(scores, member)
    high, low = np.median(scores[member]), np.median(scores[~member])
    unit = high - low if high > low else 1.0
    scorer = _scorer(w, b, center, spread, low, unit, (threshold - low) / unit)
    scores = (scores - low) / unit
    return scorer, scores, scores > scorer.threshold


def recognize(
    features: np.ndarray,
    carries: np.ndarray,
    added: np.ndarray,
    origin: np.ndarray,
    null: np.ndarray,
    seed: int,
    penalty: float | None = None,
) -> tuple[Scorer, np.ndarray, np.ndarray]:
    """Learn to recognize an isolated artifact from samples that it was added to.

    They differ from what they were made of in the artifact alone, so that a classifier of the two learns nothing else,
    as it does from the cluster, whose samples may have more in common. Every sample, and what was made of it, is judged
    by a fit without them.

    Parameters
    ----------
    features : ndarray
        (n, d), of a class's samples.
    carries : ndarray of bool
        (n,): which of them are thought to carry the artifact; they are not fitted on.
    added : ndarray
        (m, d): of samples with the artifact added.
    origin : ndarray of int
        (m,): which of the n they were made of.
    null : ndarray
        (k, d), of samples of other classes.
    seed, penalty
        As of `grow`.

    Returns
    -------
    scorer : Scorer
        Fitted on all, with the threshold of `boundary`.
    scores : ndarray
        (n,), typically 1 with the artifact, 0 without.
    added_scores : ndarray
        (m,).
    """
    center, spread = features.mean(axis=0), features.std(axis=0) + 1e-6
    x, others = ((part - center) / spread for part in (features, null))
    y = ((added - center) / spread).clip(-FARTHEST, FARTHEST)
    penalty = _shrinkage(x, others) if penalty is None else penalty
    folds = np.random.default_rng([seed, 11]).permutation(len(x)) % FOLDS
    scores, added_scores = np.zeros(len(x)), np.zeros(len(y))

    def fit(used: np.ndarray) -> tuple[np.ndarray, float]:
        inside, outside = y[used[origin]], x[used & ~carries]
        return _fit(
            np.concatenate([inside, outside]), np.arange(len(inside) + len(outside)) < len(inside), others, penalty
        )

    for fold in range(FOLDS):
        held = folds == fold
        w, b = fit(~held)
        scores[held], added_scores[held[origin]] = x[held] @ w + b, y[held[origin]] @ w + b
    w, b = fit(np.ones(len(x), dtype=bool))
    high, low = np.median(added_scores), np.median(scores[~carries])
    unit = high - low if high > low else 1.0
    scores, added_scores = (scores - low) / unit, (added_scores - low) / unit
    return _scorer(w, b, center, spread, low, unit, boundary(scores, added_scores, carries)), scores, added_scores


def boundary(scores: np.ndarray, added: np.ndarray, carries: np.ndarray) -> float:
    """Return the score from which on a sample more likely carries an artifact than not.

    Scores are a mixture of two normal distributions, of which that with the artifact is known: samples that it was
    added to have it, by median and the larger of two robust widths: that of the median absolute deviation and that of
    the lowest 5 %, since what hides an artifact in part is more often below. Share and the other one are fitted by
    expectation maximization.
    """
    from scipy.stats import norm

    middle = float(np.median(added))
    below = (middle - float(np.quantile(added, LOWEST))) / -norm.ppf(LOWEST)
    width = max(1.4826 * float(np.median(np.abs(added - middle))), below, NARROWEST)
    share = float(np.clip(carries.mean(), *SHARES))
    low, spread = float(scores[~carries].mean()), float(scores[~carries].std()) + 1e-6

    def posterior(s: np.ndarray) -> np.ndarray:
        with_it, without = share * norm.pdf(s, middle, width), (1 - share) * norm.pdf(s, low, spread) + 1e-300
        likely = with_it / (with_it + without)
        # Normal distributions of different widths cross twice: beyond the middles there is no doubt.
        return np.where(s >= middle, 1.0, np.where(s <= low, 0.0, likely))

    for _ in range(STEPS):
        likely = posterior(scores)
        rest = 1 - likely
        if rest.sum() < 1 or low >= middle:
            break
        share = float(np.clip(likely.mean(), 1 / len(scores), 1 - 1 / len(scores)))
        low = float(rest @ scores / rest.sum())
        spread = float(np.sqrt(rest @ (scores - low) ** 2 / rest.sum())) + 1e-6
    grid = np.linspace(min(low, middle), middle, 401)
    return _valley(scores, float(grid[np.argmax(posterior(grid) > 0.5)]), middle)


def _valley(scores: np.ndarray, start: float, end: float) -> float:
    """Return where the density of scores (n,) is lowest between two, if it is clearly higher before and behind."""
    from scipy.stats import norm

    grid = np.linspace(start, end + (end - start), 401)
    density = norm.pdf((grid[:, None] - scores) / BANDWIDTH).sum(axis=1)
    lowest = int(np.argmin(density[grid <= end]))
    clearly = min(density[0], density[lowest:].max()) >= VALLEY * density[lowest]
    return float(grid[lowest]) if clearly else start


def _scorer(
    w: np.ndarray, b: float, center: np.ndarray, spread: np.ndarray, low: float, unit: float, threshold: float
) -> Scorer:
    """Return the score of plain features from a fit (w, b) on standardised ones, 0 at `low` and 1 a unit above."""
    return Scorer(w / spread / unit, float((b - (w / spread) @ center - low) / unit), float(threshold))


def _shrinkage(x: np.ndarray, others: np.ndarray) -> float:
    """Return the penalty that shrinks the covariance by as much as Ledoit and Wolf (2004) find best."""
    from sklearn.covariance import ledoit_wolf_shrinkage

    shrinkage = min(float(ledoit_wolf_shrinkage(np.concatenate([x, others]))), 0.99)
    return shrinkage / (1 - shrinkage)


def _fit(x: np.ndarray, member: np.ndarray, others: np.ndarray, penalty: float) -> tuple[np.ndarray, float]:
    """Return weights and bias of a ridge regression on ±1: half of the weight on members, a quarter each on the others.

    With that many features as here it separates no worse than a logistic regression, and has a closed form.
    """
    parts = [x[member], x[~member], others]
    shares = [0.5, 0.25, 0.25]
    weight = np.concatenate([np.full(len(p), share / max(1, len(p))) for p, share in zip(parts, shares, strict=True)])
    weight /= weight.sum()
    y = np.concatenate([np.full(len(p), 1.0 if i == 0 else -1.0) for i, p in enumerate(parts)])
    rows = np.concatenate(parts)
    mean, level = weight @ rows, weight @ y
    root = np.sqrt(weight)
    a, t = (rows - mean) * root[:, None], (y - level) * root
    if a.shape[1] <= a.shape[0]:
        w = np.linalg.solve(a.T @ a + penalty * np.eye(a.shape[1]), a.T @ t)
    else:
        w = a.T @ np.linalg.solve(a @ a.T + penalty * np.eye(a.shape[0]), t)
    return w, float(level - mean @ w)


def split(scores: np.ndarray, member: np.ndarray) -> float:
    """Return the threshold between the two parts that scores fall into.

    It is halfway between two: where both parts of a mixture of normal distributions, fitted from the members on, are
    equally likely, which a broad part draws away from itself too far, and Otsu's, which a small part draws to itself.
    """
    from skimage.filters import threshold_otsu
    from sklearn.mixture import GaussianMixture

    values = scores[:, None]
    parts = [values[~member], values[member]]
    if min(len(part) for part in parts) < 2 or scores.std() < 1e-9:
        return float(scores.mean())
    means = np.array([part.mean(axis=0) for part in parts])
    spread = np.array([1 / max(float(part.var()), 1e-6) for part in parts])
    mixture = GaussianMixture(
        2,
        covariance_type="spherical",
        weights_init=[len(part) / len(scores) for part in parts],
        means_init=means,
        precisions_init=spread,
        reg_covar=1e-3 * float(scores.var()),
    ).fit(values)
    low, high = np.argsort(mixture.means_[:, 0])
    grid = np.linspace(mixture.means_[low, 0], mixture.means_[high, 0], 201)
    likely = mixture.predict_proba(grid[:, None])[:, high] > 0.5
    between = np.flatnonzero(likely)
    likelier = grid[between[0]] if len(between) and not likely.all() else grid.mean()
    return float((likelier + threshold_otsu(scores)) / 2)


def halfway(scores: np.ndarray, carries: np.ndarray) -> float:
    """Return the score halfway between what samples with and without an artifact typically have (medians).

    A single stray sample must not make half of the others carriers.

    Parameters
    ----------
    scores : ndarray
        (n,).
    carries : ndarray of bool
        (n,): which have it; some, and not all.
    """
    return float(np.median(scores[carries]) + np.median(scores[~carries])) / 2


def inner_features(model: nn.Module, layers: list[str], x: Tensor) -> Tensor:
    """Return an image's activations in some layers, (n, d): mean and maximum of each channel over all positions.

    Parameters
    ----------
    model : nn.Module
        In eval mode.
    layers : list of str
        Names as of `spray.correction.layers.candidates`.
    x : Tensor
        (n, ...): normalised images.
    """
    from contextlib import ExitStack

    from spray.correction.layers import changed, channel_dim

    seen: dict[str, list[Tensor]] = {}

    def looking(name: str) -> Callable[[Tensor], None]:
        def look(a: Tensor) -> None:
            dim = channel_dim(model, name, a.shape)
            if dim is None:
                seen[name] = [a.clone()]  # the next layer may work in place
            else:
                positions = [d for d in range(1, a.dim()) if d != dim]
                seen[name] = [a.mean(dim=positions), a.amax(dim=positions)]

        return look

    with torch.no_grad(), ExitStack() as stack:
        for name in layers:
            stack.enter_context(changed(model, name, looking(name)))
        model(x)
    return torch.cat([part.float().cpu() for parts in seen.values() for part in parts], dim=1)
