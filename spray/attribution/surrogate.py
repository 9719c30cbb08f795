"""Local linear models of a model, in the space of an input's parts switched on and off: LIME and KernelSHAP."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from spray.attribution.options import (
    BATCH_SIZE,
    Perturbed,
    check_dependence,
    explained_classes,
    positive,
    reference,
    whole,
)
from spray.attribution.registry import ATTRIBUTIONS
from spray.attribution.segments import segment
from spray.attribution.target import Target
from spray.errors import UserError

N_SAMPLES = 1000
# LIME's penalty of squared coefficients, as in its authors' code.
RIDGE = 1.0
# SHAP enumerates all coalitions where that takes no more than `n_samples`; above so many parts it never does.
ENUMERABLE = 20
# The least squares take memory as the square of the number of parts.
MOST_PARTS = 10_000

# From a number of parts M to which of them are on in each evaluation (n, M), and the evaluations' weights (n,).
Draw = Callable[[int], tuple[Tensor, Tensor]]
# From the switches (n, M), what they add to the baseline's logit (n,) and the weights (n,), in float64, and what all
# parts together add, to the coefficients (M,).
Fit = Callable[[Tensor, Tensor, Tensor, float], Tensor]


@ATTRIBUTIONS.register("lime")
def lime(
    model: nn.Module,
    x: Tensor,
    target: Target,
    *,
    segments: int | Tensor | None = None,
    n_samples: int = N_SAMPLES,
    kernel_width: float = 0.25,
    baseline: float | Tensor = 0.0,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
) -> Tensor:
    """Return the coefficients of a local linear model (Ribeiro et al. 2016, section 3 and algorithm 1), by Captum.

    Parts of the input are switched off at random, each with probability 1/2; a ridge regression with the penalty 1
    predicts the logit from the switches. A sample weighs √exp(−d²/`kernel_width`²) with d the cosine distance
    between its switches and all of them on, as in the authors' code for images. A part's coefficient is spread
    evenly over its entries: the sum over a part is its coefficient.

    Parameters
    ----------
    model : nn.Module
        The model; it needs no gradient.
    x : Tensor, shape (N, ...)
        Its input.
    target : Target
        The class, as `explain` has it.
    segments : int, Tensor of int, or None
        The parts: how many superpixels, or a tensor that numbers them; see `spray.attribution.segments.segment`.
    n_samples : int
        Evaluations of the model per sample.
    kernel_width : float
        The kernel's width.
    baseline : float, sequence or Tensor
        What a part is switched off to: a number, one per channel, or a tensor that broadcasts to `x`.
    seed : int
        The seed of the draws; samples with equally many parts have the same draws.
    batch_size : int
        The most inputs that one pass of the model holds.

    Returns
    -------
    Tensor, shape (N, ...)
        The coefficients.

    Raises
    ------
    UserError
        For options, targets or outputs that aren't allowed.
    """
    width, seed = positive("kernel_width", kernel_width), whole("seed", seed, 0)
    count = whole("n_samples", n_samples, 2)

    def draw(parts: int) -> tuple[Tensor, Tensor]:
        switches = torch.rand(count, parts, generator=torch.Generator().manual_seed(seed)) < 0.5
        switches[0] = True
        distance = 1 - (switches.sum(1) / parts).double().sqrt()
        return switches, (-(distance**2) / (2 * width**2)).exp()

    return coefficients(model, x, target, segments, baseline, batch_size, draw, ridge)


@ATTRIBUTIONS.register("shap")
def shap(
    model: nn.Module,
    x: Tensor,
    target: Target,
    *,
    segments: int | Tensor | None = None,
    n_samples: int = N_SAMPLES,
    baseline: float | Tensor = 0.0,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
) -> Tensor:
    """Return Shapley values by KernelSHAP (Lundberg and Lee 2017, theorem 2), by Captum.

    The Shapley values of the game "the logit with these parts of the input on and the others at the baseline" are
    the solution of a weighted least-squares problem over all coalitions, under the constraint that they sum to
    f(x) − f(baseline), which is kept exactly. Where there are more coalitions than `n_samples`, they are drawn in
    proportion to their weights, each with its complement (Covert and Lee 2021); else the values are exact. A part's
    value is spread evenly over its entries: the sum over a part is its value, the sum over all f(x) − f(baseline).

    Parameters
    ----------
    model : nn.Module
        The model; it needs no gradient.
    x : Tensor, shape (N, ...)
        Its input.
    target : Target
        The class, as `explain` has it.
    segments : int, Tensor of int, or None
        The parts: how many superpixels, or a tensor that numbers them; see `spray.attribution.segments.segment`.
    n_samples : int
        The most coalitions that are evaluated per sample; twice as many as there are parts or more.
    baseline : float, sequence or Tensor
        What a part is switched off to: a number, one per channel, or a tensor that broadcasts to `x`.
    seed : int
        The seed of the draws; samples with equally many parts have the same draws.
    batch_size : int
        The most inputs that one pass of the model holds.

    Returns
    -------
    Tensor, shape (N, ...)
        The Shapley values.

    Raises
    ------
    UserError
        For options, targets or outputs that aren't allowed, or too few samples for the parts.
    """
    count, seed = whole("n_samples", n_samples, 2), whole("seed", seed, 0)

    def draw(parts: int) -> tuple[Tensor, Tensor]:
        return coalitions(parts, count, seed)

    return coefficients(model, x, target, segments, baseline, batch_size, draw, shapley)


def coefficients(
    model: nn.Module,
    x: Tensor,
    target: Target,
    segments: int | Tensor | None,
    baseline: float | Tensor,
    batch_size: int,
    draw: Draw,
    fit: Fit,
) -> Tensor:
    """Return the coefficients of each sample's own linear model, spread evenly over the parts' entries."""
    batch_size, hidden = whole("batch_size", batch_size), reference(baseline, x)
    index = explained_classes(model, x, target)
    parts = segment(x, segments)
    check_dependence(model, x, hidden)
    logits, R = Perturbed(model), torch.zeros_like(x)
    for i in range(len(x)):
        sample, off, part = x[i : i + 1].detach(), hidden[i : i + 1], parts[i : i + 1]
        number = int(part.max()) + 1
        if number > MOST_PARTS:
            raise UserError(f"{number} parts are too many for a linear model; give at most {MOST_PARTS} by segments=")
        switches, weights = draw(number)
        found = fit_sample(logits, sample, off, part, int(index[i]), switches, weights, fit, batch_size)
        R[i] = (found / torch.bincount(part.flatten()))[part[0]].to(x.dtype)
    return R


class Surrogate:
    """A linear model as Captum's `LimeBase` wants it, fitted by a function."""

    def __init__(self, fit: Fit, total: float) -> None:
        self.function, self.total = fit, total

    def fit(self, loader: Any) -> None:
        """Fit to a loader of switches, outputs and weights."""
        # Without the loader's own iterator, which draws from the global random generator.
        switches, outputs, weights = (tensor.double() for tensor in loader.dataset.tensors)
        self.coefficients = self.function(switches, outputs, weights.to(outputs.device), self.total)

    def representation(self) -> Tensor:
        """Return the coefficients."""
        return self.coefficients


def fit_sample(
    logits: Perturbed,
    x: Tensor,
    off: Tensor,
    parts: Tensor,
    index: int,
    switches: Tensor,
    weights: Tensor,
    fit: Fit,
    batch_size: int,
) -> Tensor:
    """Return the coefficients (M,) of a sample (1, ...), in float64, from the model's logits at the drawn switches."""
    from captum.attr import LimeBase

    switches = switches.to(x.device)
    with torch.no_grad():
        on, base = logits(torch.cat([x, off]))[:, index]
    total = float(on) - float(base)
    if not len(switches):  # SHAP of a single part, whose value needs no evaluation
        return fit(switches.double(), base.new_zeros(0).double(), weights.to(x.device), total)

    def drawn(inputs: Tensor, **options: Any) -> Iterator[Tensor]:
        yield from switches.split(1)

    weight = iter(weights.split(1))
    explainer = LimeBase(
        # Captum rounds the outputs to float32: it gets what the parts add, not the larger logit.
        lambda inputs: logits(inputs)[:, index] - base,
        Surrogate(fit, total),
        similarity_func=lambda *inputs, **options: next(weight),
        perturb_func=drawn,
        perturb_interpretable_space=True,
        from_interp_rep_transform=lambda row, inputs, **options: torch.where(row[0][parts], inputs, off),
        to_interp_rep_transform=None,
    )
    return explainer.attribute(x, n_samples=len(switches), perturbations_per_eval=batch_size)


def ridge(switches: Tensor, outputs: Tensor, weights: Tensor, total: float) -> Tensor:
    """Return the coefficients of a weighted ridge regression with an intercept that isn't penalised."""
    share = (weights / weights.sum())[:, None]
    Z = switches - (share * switches).sum(0)
    y = outputs[:, None] - (share * outputs[:, None]).sum(0)
    gram = Z.T @ (weights[:, None] * Z) + RIDGE * torch.eye(Z.shape[1], dtype=Z.dtype, device=Z.device)
    return torch.linalg.solve(gram, Z.T @ (weights[:, None] * y))[:, 0]


def shapley(switches: Tensor, outputs: Tensor, weights: Tensor, total: float) -> Tensor:
    """Return the φ that minimise Σ w (z·φ − y)² and sum to `total` (Lundberg and Lee 2017, equation 5)."""
    parts = switches.shape[1]
    share = switches.mean(1, keepdim=True)
    # φ = total / M + ψ with Σ ψ = 0, for which z·ψ = (z − mean z)·ψ; the shortest solution ψ sums to 0 by itself.
    Z, y = switches - share, outputs[:, None] - total * share
    gram = torch.linalg.pinv(Z.T @ (weights[:, None] * Z), rtol=1e-10, hermitian=True)
    return total / parts + (gram @ (Z.T @ (weights[:, None] * y)))[:, 0]


def coalitions(parts: int, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return coalitions of parts, and their weights in the least-squares problem of the Shapley values.

    Parameters
    ----------
    parts : int
        M. The kernel is π(z) = (M − 1) / (C(M, |z|) |z| (M − |z|)) (Lundberg and Lee 2017, theorem 2).
    count : int
        The most coalitions.
    seed : int
        The seed of the draws.

    Returns
    -------
    switches : Tensor of bool, shape (n, M)
        All 2ᴹ − 2 coalitions that are neither empty nor whole where there are no more than `count`; else `count`
        drawn ones, in pairs of complements.
    weights : Tensor of float64, shape (n,)
        The kernel of all coalitions; 1 where they were drawn in proportion to it.

    Raises
    ------
    UserError
        If `count` is too few.
    """
    if parts <= ENUMERABLE and 2**parts - 2 <= count:
        switches = (torch.arange(1, 2**parts - 1)[:, None] >> torch.arange(parts)) % 2 == 1
        kernel = [0.0] + [(parts - 1) / (math.comb(parts, k) * k * (parts - k)) for k in range(1, parts)]
        return switches, torch.tensor(kernel, dtype=torch.float64)[switches.sum(1)]
    if count < 2 * parts:
        raise UserError(
            f"n_samples={count} is too few for {parts} parts; give at least {2 * parts}, or fewer parts by segments="
        )
    generator = torch.Generator().manual_seed(seed)
    size = torch.arange(1, parts)
    half = -(-count // 2)
    sizes = torch.multinomial(1 / (size * (parts - size)), half, replacement=True, generator=generator) + 1
    ranks = torch.rand(half, parts, generator=generator).argsort(1).argsort(1)
    switches = ranks < sizes[:, None]
    return torch.stack([switches, ~switches], 1).flatten(0, 1)[:count], torch.ones(count, dtype=torch.float64)
