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
    features: np.ndarray, member: np.ndarray, null: np.ndarray, seed: int, penalty: float | None = None
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

    Returns
    -------
    scorer : Scorer
        Fitted on all samples.
    scores : ndarray
        (n,): of the class's samples, each by a fit without it.
    carries : ndarray of bool
        (n,): which of them carry it.
    """
    from sklearn.covariance import ledoit_wolf_shrinkage

    center, spread = features.mean(axis=0), features.std(axis=0) + 1e-6
    x, others = ((part - center) / spread for part in (features, null))
    if penalty is None:
        shrinkage = min(float(ledoit_wolf_shrinkage(np.concatenate([x, others]))), 0.99)
        penalty = shrinkage / (1 - shrinkage)
    folds = np.random.default_rng([seed, 11]).permutation(len(x)) % FOLDS
    scores = np.zeros(len(x))
    for _ in range(ROUNDS):
        for fold in range(FOLDS):
            used = folds != fold
            w, b = _fit(x[used], member[used], others, penalty)
            scores[~used] = x[~used] @ w + b
        carries = scores > split(scores, member)
        if carries.sum() < FEWEST or carries.mean() > MOST or (carries == member).all():
            break
        member = carries
    w, b = _fit(x, member, others, penalty)
    threshold = split(scores, member)
    high, low = np.median(scores[member]), np.median(scores[~member])
    unit = high - low if high > low else 1.0
    scorer = Scorer(w / spread / unit, float((b - (w / spread) @ center - low) / unit), float((threshold - low) / unit))
    scores = (scores - low) / unit
    return scorer, scores, scores > scorer.threshold


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

    seen: dict[str, Tensor] = {}

    def looking(name: str) -> Callable[[Tensor], None]:
        def look(a: Tensor) -> None:
            seen[name] = a.detach().clone()

        return look

    with torch.no_grad(), ExitStack() as stack:
        for name in layers:
            stack.enter_context(changed(model, name, looking(name)))
        model(x)
    parts = []
    for name, a in seen.items():
        dim = channel_dim(model, name, a.shape)
        if dim is None:
            parts.append(a)
        else:
            flat = a.movedim(dim, 1).flatten(2)
            parts += [flat.mean(dim=2), flat.amax(dim=2)]
    return torch.cat([part.float().cpu() for part in parts], dim=1)
