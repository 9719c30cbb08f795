"""Deep feature reweighting: only the last layer is fitted again."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from spray.correction.base import CORRECTIONS, Problem, inputs
from spray.correction.choice import Trial, choose, validation
from spray.correction.groups import balance
from spray.correction.layers import INPUT, activations, find, output_layer
from spray.correction.options import STRENGTHS
from spray.errors import UserError

MOST = 20_000
"""Most images that the last layer is fitted on."""


@CORRECTIONS.register("dfr")
def dfr(problem: Problem) -> nn.Module:
    """Refit the last layer on features of samples drawn such that an artifact says nothing about the class.

    Deep feature reweighting (Kirichenko et al., "Last layer re-training is sufficient for robustness to spurious
    correlations", 2023): logistic regression on standardised features of group-balanced data; with an ℓ2 instead of
    an ℓ1 penalty, and one balanced set instead of an average over several. Groups are made of class and artifact, see
    `spray.correction.groups`. The strength is that of the penalty, 1 / C.

    Raises
    ------
    UserError
        If the model's output is not made by a linear layer.
    """
    head = last_layer(problem.model, inputs(problem, np.arange(min(2, len(problem.train)))))
    problem.facts["groups"] = balance(problem).facts()
    strength = problem.options.strength_of("dfr")
    if strength is None:
        split = validation(problem)
        features, labels = _features(problem, head, split.rest)

        def trials() -> Iterator[Trial]:
            for s in STRENGTHS["dfr"]:
                model = copy.deepcopy(problem.model)
                _refit(model, head, features, labels, s)
                yield Trial({"strength": s}, split.measure(model))

        # The control of a refitted layer is one that is refitted in the same way to the images as they are.
        control = copy.deepcopy(problem.model)
        _refit(control, head, *_features(problem, head, split.rest, balanced=False), STRENGTHS["dfr"][0])
        best = choose(problem, split.measure(control), trials())
        strength = float(best.setting["strength"])
    problem.facts["chosen"] = {"strength": strength}
    _refit(problem.model, head, *_features(problem, head, None), strength)
    return problem.model


def last_layer(model: nn.Module, x: Tensor) -> str:
    """Return the name of the linear layer that makes the output.

    Raises
    ------
    UserError
        If there is none.
    """
    head = output_layer(model, x)
    if head is None:
        raise UserError("dfr needs a model whose output is made by an nn.Linear; leave it out of correction.methods")
    return head


def logistic(features: np.ndarray, labels: np.ndarray, strength: float, bias: bool) -> tuple[np.ndarray, np.ndarray]:
    """Fit a multinomial logistic regression on standardised features; return it for the features as they are.

    Parameters
    ----------
    features : ndarray
        (n, d).
    labels : ndarray of int
        (n,), of at least two classes.
    strength : float
        1 / C: of the ℓ2 penalty, against the summed loss.
    bias : bool
        Whether it has one; else features are scaled, but not centred.

    Returns
    -------
    ndarray, ndarray
        Weights (m, d) and biases (m,) of the m classes that occur, in ascending order.
    """
    from sklearn.linear_model import LogisticRegression

    scale = features.std(axis=0)
    scale[scale < 1e-6 * max(scale.max(), 1e-30)] = np.inf  # what never varies says nothing
    center = features.mean(axis=0) if bias else np.zeros(features.shape[1])
    fitted = LogisticRegression(C=1 / strength, fit_intercept=bias, max_iter=500)
    fitted.fit((features - center) / scale, labels)
    W, b = np.asarray(fitted.coef_, dtype=np.float64), np.broadcast_to(fitted.intercept_, len(fitted.coef_))
    if len(W) == 1:  # of two classes: the difference of their logits
        W, b = np.concatenate([-W, W]) / 2, np.concatenate([-b, b]) / 2
    W = W / scale
    return W, b - W @ center


def _refit(model: nn.Module, head: str, features: np.ndarray, labels: np.ndarray, strength: float) -> None:
    """Put new weights into the last layer; classes that do not occur keep theirs."""
    layer = find(model, head)
    assert isinstance(layer, nn.Linear)
    W, b = logistic(features, labels, strength, layer.bias is not None)
    classes = torch.from_numpy(np.unique(labels)).to(layer.weight.device)
    with torch.no_grad():
        layer.weight[classes] = torch.from_numpy(W).to(layer.weight)
        if layer.bias is not None:
            layer.bias[classes] = torch.from_numpy(b).to(layer.bias)


def _features(
    problem: Problem, head: str, indices: np.ndarray | None, balanced: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Return the last layer's input (n, d), float64, for images, group-balanced or as they are, and their classes."""
    groups = balance(problem, indices)
    weights = groups.weights
    if not balanced:
        everything = np.arange(len(groups.labels))
        weights = np.isin(everything, everything if indices is None else indices).astype(np.float64)
    rng = np.random.default_rng([problem.seed, 59])
    n = min(MOST, int((weights > 0).sum()))
    drawn = _systematic(weights, n, rng)
    parts = []
    for start in range(0, n, problem.batch_size):
        part = drawn[start : start + problem.batch_size]
        pixels = problem.train.batch(part)
        if balanced:
            pixels = groups.fill(problem, pixels, part, rng)
        a = activations(problem.model, head + INPUT, problem.normalizer(pixels, problem.device))
        parts.append(a.flatten(1).double().cpu().numpy())
    return np.concatenate(parts), groups.labels[drawn]


def _systematic(weights: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw n samples such that each comes as often as its weight says, rounded up or down."""
    order = rng.permutation(len(weights))
    points = (np.arange(n) + rng.random()) / n
    edges = np.cumsum(weights[order])
    drawn = order[np.searchsorted(edges / edges[-1], points, side="right").clip(0, len(order) - 1)]
    return rng.permutation(drawn)
