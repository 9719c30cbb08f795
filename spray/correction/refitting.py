"""Deep feature reweighting: only the last layer is fitted again."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from spray.correction.base import CORRECTIONS, Finding, Problem, inputs
from spray.correction.choice import Trial, choose, validation
from spray.correction.groups import balance
from spray.correction.layers import INPUT, activations, find, output_layer
from spray.correction.options import STRENGTHS
from spray.errors import UserError

MOST = 20_000
"""Most images that the last layer is fitted on, before artifacts are added to copies of them."""
SHARE = 1 / 3
"""What images with an artifact weigh in every class."""
CONTROL_STRENGTH = 10.0
"""Of the penalty, when it is refitted to the images as they are."""
STEPS = 150
"""Most steps of the optimiser."""


@CORRECTIONS.register("dfr")
def dfr(problem: Problem) -> nn.Module:
    """Refit the last layer to features of images that are weighted such that an artifact says nothing about the class.

    Deep feature reweighting (Kirichenko et al., "Last layer re-training is sufficient for robustness to spurious
    correlations", 2023): logistic regression on standardised features of group-balanced data. Different are: all
    images count, by weights, instead of a balanced part of them; a third of the weight is that of images with an
    artifact, not a half; and the ℓ2 penalty, in the place of an ℓ1 one, is on what changes in the layer: a penalty on
    the weights themselves throws away what the layer had learnt. Groups are made of class and artifact, see
    `spray.correction.groups`. The strength is that of the penalty, 1 / C.

    Raises
    ------
    UserError
        If the model's output is not made by a linear layer.
    """
    head = last_layer(problem.model, inputs(problem, np.arange(min(2, len(problem.train)))))
    problem.facts["groups"] = balance(problem, share=SHARE).facts()
    strength = problem.options.strength_of("dfr")
    if strength is None:
        split = validation(problem)
        samples = _features(problem, head, split.rest)

        def trials() -> Iterator[Trial]:
            for s in STRENGTHS["dfr"]:
                yield Trial({"strength": s}, split.measure(_refitted(problem.model, head, samples, s)))

        # The control of a refitted layer is one that is refitted in the same way to the images as they are.
        plain = _features(problem, head, split.rest, balanced=False)
        control = _refitted(problem.model, head, plain, CONTROL_STRENGTH)
        best = choose(problem, split.measure(control), trials(), stop=False)
        strength = float(best.setting["strength"])
    problem.facts["chosen"] = {"strength": strength}
    return _refitted(problem.model, head, _features(problem, head, None), strength)


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


def refit(
    W: Tensor, b: Tensor, features: Tensor, labels: Tensor, weights: Tensor, strength: float, bias: bool = True
) -> tuple[Tensor, Tensor]:
    """Fit a linear layer again: multinomial logistic regression on standardised features, near the layer as it was.

    Minimises Σ w_i CE(W x_i + b, y_i) / Σ w_i + λ / 2n · (‖ΔW σ‖² + ‖Δb‖²), where σ are the features' standard
    deviations, ΔW = W - W₀ and Δb = b - b₀ + ΔW μ, with μ their means. What never varies changes nothing.

    Parameters
    ----------
    W, b : Tensor
        (classes, d) and (classes,), float64: W₀ and b₀.
    features, labels, weights : Tensor
        (n, d) float64, (n,) int64 and (n,) float64, at least 0.
    strength : float
        λ.
    bias : bool
        Whether there is one; else b stays 0 and features are not centred.

    Returns
    -------
    tuple of Tensor
        W and b.
    """
    sigma, mu = features.std(dim=0), features.mean(dim=0)
    varies = sigma > 1e-6 * sigma.max().clamp_min(1e-30)
    scale = torch.where(varies, 1 / sigma.clamp_min(1e-300), 0.0)
    mu = mu if bias else torch.zeros_like(mu)
    z, before, share = (features - mu) * scale, features @ W.T + b, weights / weights.sum()
    D, d = torch.zeros_like(W, requires_grad=True), torch.zeros_like(b, requires_grad=bias)
    parts = [D, d] if bias else [D]
    optimizer = torch.optim.LBFGS(
        parts, max_iter=STEPS, history_size=20, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        each = nn.functional.cross_entropy(before + z @ D.T + d, labels, reduction="none")
        total = (share * each).sum() + strength / (2 * len(labels)) * sum((part**2).sum() for part in parts)
        total.backward()
        return total

    with torch.enable_grad():
        optimizer.step(loss)
    step = D.detach() * scale
    return W + step, b + d.detach() - step @ mu


def _refitted(model: nn.Module, head: str, samples: tuple[Tensor, Tensor, Tensor], strength: float) -> nn.Module:
    """Return a copy of a model with another last layer."""
    model = copy.deepcopy(model)
    layer = find(model, head)
    assert isinstance(layer, nn.Linear)
    before = layer.weight.detach().double().cpu()
    b = torch.zeros(len(before), dtype=torch.float64) if layer.bias is None else layer.bias.detach().double().cpu()
    W, b = refit(before, b, *samples, strength, layer.bias is not None)
    with torch.no_grad():
        layer.weight.copy_(W)
        if layer.bias is not None:
            layer.bias.copy_(b)
    return model


def _features(
    problem: Problem, head: str, indices: np.ndarray | None, balanced: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the last layer's input (n, d), float64, for images and for copies with artifacts, their labels, weights.

    With `balanced` off the images count as they are.
    """
    groups = balance(problem, indices, SHARE)
    rng = np.random.default_rng([problem.seed, 59])
    everything = np.arange(len(groups.labels)) if indices is None else np.asarray(indices)
    drawn = np.sort(rng.permutation(everything)[:MOST])
    sets: list[tuple[np.ndarray, np.ndarray, Finding | None]] = []
    if balanced:
        added = np.where((groups.attribute == 0)[:, None], groups.added[groups.labels], 0.0)[drawn]
        weights = groups.weights[drawn] * len(groups.labels)
        sets.append((drawn, weights * (1 - added.sum(axis=1)), None))
        for k, finding in enumerate(problem.findings, start=1):
            sets.append((drawn, weights * added[:, k], finding))
    else:
        sets.append((drawn, np.ones(len(drawn)), None))
    features, labels, counts = [], [], []
    for samples, weights, added_to in sets:
        samples, weights = samples[weights > 0], weights[weights > 0]
        for start in range(0, len(samples), problem.batch_size):
            part = samples[start : start + problem.batch_size]
            pixels = problem.train.batch(part)
            if added_to is not None:
                pixels = added_to.artifact.insert(pixels, rng.integers(0, 2**31, len(part)))
            a = activations(problem.model, head + INPUT, problem.normalizer(pixels, problem.device))
            features.append(a.flatten(1).double().cpu())
        labels.append(groups.labels[samples])
        counts.append(weights)
    y, w = np.concatenate(labels).astype(np.int64), np.concatenate(counts)
    return torch.cat(features), torch.from_numpy(y), torch.from_numpy(w)
