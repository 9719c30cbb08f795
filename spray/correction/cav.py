"""Concept activation vectors: the directions of an artifact in a layer."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Estimator = Callable[[Tensor, Tensor], Tensor]
"""Returns the unit direction (d,), of activations (n, d) and which of them, bool (n,), have the artifact."""
PENALTY = 0.05
"""The lasso's, as a share of the least one that leaves no weight at all."""


def pattern_cav(activations: Tensor, has_artifact: Tensor) -> Tensor:
    """Return the unit pattern CAV h, cov(a, t) / var(t): for binary t the difference of the two means.

    Pahde et al., "Navigating neural space: revisiting concept activation vectors to overcome directional divergence",
    2024, equation 5 (SignalCAV).

    Parameters
    ----------
    activations : Tensor
        (n, d).
    has_artifact : Tensor of bool
        (n,); both kinds must occur.

    Returns
    -------
    Tensor
        (d,), of length 1, or zero if the means agree.

    Raises
    ------
    ValueError
        If only one kind occurs.
    """
    _check(has_artifact)
    difference = activations[has_artifact].mean(dim=0) - activations[~has_artifact].mean(dim=0)
    return torch.nn.functional.normalize(difference, dim=0)


def filter_cav(kind: str, activations: Tensor, has_artifact: Tensor) -> Tensor:
    """Return the unit filter CAV: the weights of a linear classifier that tells artifact from none (Kim et al., 2018).

    Parameters
    ----------
    kind : {"svm", "logistic", "ridge", "lasso"}
        Support vector machine with squared hinge loss, logistic regression, ridge regression or lasso on ±1; both kinds
        of samples weigh the same.
    activations, has_artifact
        As of `pattern_cav`.

    Raises
    ------
    ValueError
        If only one kind occurs.
    """
    return torch.nn.functional.normalize(detector(kind, activations, has_artifact)[0], dim=0)


def detector(kind: str, activations: Tensor, has_artifact: Tensor) -> tuple[Tensor, float]:
    """Return weights w (d,) and bias b of a classifier that says artifact where w·a + b > 0.

    Parameters
    ----------
    kind, activations, has_artifact
        As of `filter_cav`.
    """
    from sklearn.linear_model import LogisticRegression, RidgeClassifier
    from sklearn.svm import LinearSVC

    _check(has_artifact)
    # One scale for all activations turns no direction, and makes the regularisation mean the same in every layer.
    a = activations.double().cpu()
    center = a.mean(dim=0)
    scale = float((a - center).square().mean().sqrt()) or 1.0
    features, labels = ((a - center) / scale).numpy(), has_artifact.cpu().numpy()
    makers = {
        "svm": lambda: LinearSVC(class_weight="balanced", dual="auto", random_state=0, max_iter=5000),
        "logistic": lambda: LogisticRegression(class_weight="balanced", max_iter=1000),
        "ridge": lambda: RidgeClassifier(class_weight="balanced"),
    }
    if kind == "lasso":
        coefficients, intercept = _lasso(features, labels)
    else:
        classifier = makers[kind]().fit(features, labels)
        coefficients, intercept = classifier.coef_, classifier.intercept_
    w = torch.from_numpy(np.array(coefficients, dtype=np.float64).reshape(-1)) / scale
    b = float(np.asarray(intercept).reshape(-1)[0]) - float(w @ center)
    return w.to(activations), b


def _lasso(features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, float]:
    """Return weights and bias of the regression on ±1 with an ℓ1 penalty, both kinds weighing the same.

    The penalty is a share of the least one that leaves no weight at all, max |Xᵀ y| / n, so that it has no scale.
    """
    from sklearn.linear_model import Lasso

    y = np.where(labels, 1.0, -1.0)
    share = np.where(labels, 0.5 / labels.sum(), 0.5 / (~labels).sum())
    largest = np.abs(share * y @ (features - share @ features)).max()
    if largest < 1e-12:  # the means agree, so that no penalty leaves a weight
        return np.zeros(features.shape[1]), 0.0
    fitted = Lasso(PENALTY * largest, max_iter=5000, tol=1e-5).fit(features, y, sample_weight=share * len(y))
    return fitted.coef_, float(fitted.intercept_)


CAVS: dict[str, Estimator] = {
    "pattern": pattern_cav,
    "svm": lambda a, t: filter_cav("svm", a, t),
    "logistic": lambda a, t: filter_cav("logistic", a, t),
    "ridge": lambda a, t: filter_cav("ridge", a, t),
    "lasso": lambda a, t: filter_cav("lasso", a, t),
}


def directions(kind: str, activations: Tensor, has_artifact: Tensor, k: int = 1) -> Tensor:
    """Return up to `k` orthonormal directions (k, d) of an artifact, the first one its CAV.

    A filter's further directions are those of classifiers fitted after the ones before were projected out, as in
    iterative null-space projection (Ravfogel et al., 2020). A pattern has no further difference of means, so its
    further directions are the principal ones along which the artifact's samples vary more than the others do: the
    leading eigenvectors of cov(a | artifact) - cov(a | none).

    Parameters
    ----------
    kind : str
        One of `CAVS`.
    activations, has_artifact
        As of `pattern_cav`.
    k : int
        How many; fewer are returned where there are no more.

    Raises
    ------
    ValueError
        If only one kind of samples occurs.
    """
    first = CAVS[kind](activations, has_artifact)
    found = [first] if bool(first.any()) else []
    if found and k > 1 and kind == "pattern":
        rest = activations - (activations @ first)[:, None] * first
        found += _varying(rest, has_artifact, k - 1)
    while kind != "pattern" and found and len(found) < k:
        H = torch.stack(found)
        rest = activations - activations @ H.T @ H
        if rest.norm() <= 1e-6 * activations.norm():
            break
        h = CAVS[kind](rest, has_artifact)
        h = h - H.T @ (H @ h)
        if h.norm() < 1e-3:
            break
        found.append(h / h.norm())
    return torch.stack(found) if found else activations.new_zeros(0, activations.shape[1])


def _varying(activations: Tensor, has_artifact: Tensor, k: int) -> list[Tensor]:
    """Return the eigenvectors of the difference of covariances with the largest positive eigenvalues."""
    parts = [activations[marked] for marked in (has_artifact, ~has_artifact)]
    parts = [(part - part.mean(dim=0)) / len(part) ** 0.5 for part in parts]
    # The difference is P - Q = Bᵀ D B with few rows in B = [parts]: its eigenvectors lie in the span of these rows.
    rows = torch.cat(parts)
    basis = torch.linalg.svd(rows, full_matrices=False)
    kept = basis.Vh[(basis.S / basis.S.max().clamp_min(1e-30)) > 1e-9]
    signs = torch.cat([torch.ones(len(parts[0])), -torch.ones(len(parts[1]))]).to(rows)
    inside = rows @ kept.T
    values, vectors = torch.linalg.eigh(inside.T @ (signs[:, None] * inside))
    order = values.argsort(descending=True)[:k]
    return [kept.T @ vectors[:, i] for i in order.tolist() if values[i] > 1e-9 * values.abs().max()]


def _check(has_artifact: Tensor) -> None:
    if has_artifact.all() or not has_artifact.any():
        raise ValueError("a CAV needs samples with and without the artifact")
