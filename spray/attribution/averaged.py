"""Gradients averaged over many versions of the input: SmoothGrad and integrated gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spray.attribution.gradients import gradient
from spray.attribution.options import BATCH_SIZE, Perturbed, explained_classes, positive, reference, whole
from spray.attribution.registry import ATTRIBUTIONS
from spray.attribution.target import Target


@ATTRIBUTIONS.register("smooth_grad")
def smooth_grad(
    model: nn.Module,
    x: Tensor,
    target: Target,
    *,
    n_samples: int = 50,
    sigma: float = 0.15,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
) -> Tensor:
    """Return the mean gradient over copies of the input with Gaussian noise (Smilkov et al. 2017, section 2).

    The noise doesn't come from Captum's `NoiseTunnel`, which has one deviation for a whole batch and draws from
    the device's global generator: here a sample's noise is the same in every batch, at every place in it, on
    every device and for every `batch_size`.

    Parameters
    ----------
    model : nn.Module
        The model.
    x : Tensor, shape (N, ...)
        Its input.
    target : Target
        The class, as `explain` has it.
    n_samples : int
        Noisy copies of each sample.
    sigma : float
        The noise's standard deviation as a share of the sample's range, max x − min x.
    seed : int
        The noise's seed; every sample has the same standard noise.
    batch_size : int
        The most inputs that one pass of the model holds.

    Returns
    -------
    Tensor, shape (N, ...)
        The mean gradient of the target's logit.

    Raises
    ------
    UserError
        For options, targets or outputs that aren't allowed.
    """
    n_samples, batch_size, seed = whole("n_samples", n_samples), whole("batch_size", batch_size), whole("seed", seed, 0)
    sigma = positive("sigma", sigma, or_zero=True)
    index = explained_classes(model, x, target)
    total = torch.zeros_like(x)
    if not len(x):
        return total
    gradient(model, x, index)  # says where there is none
    flat = x.detach().flatten(1)
    deviation = sigma * (flat.amax(1) - flat.amin(1))
    generator = torch.Generator().manual_seed(seed)
    logits = Perturbed(model)
    for start in range(0, n_samples, batch_size):
        # One draw a copy, so that the noise doesn't depend on how the copies are split into passes.
        count = min(batch_size, n_samples - start)
        noise = torch.stack([torch.randn(x.shape[1:], generator=generator) for _ in range(count)]).to(x)
        for i in range(len(x)):
            total[i] += gradient(logits, x[i] + deviation[i] * noise, index[i]).sum(0)
    return total / n_samples


@ATTRIBUTIONS.register("integrated_gradients")
def integrated_gradients(
    model: nn.Module,
    x: Tensor,
    target: Target,
    *,
    baseline: float | Tensor = 0.0,
    n_steps: int = 50,
    batch_size: int = BATCH_SIZE,
) -> Tensor:
    """Return (x − x′) ⊙ ∫₀¹ ∇f(x′ + α (x − x′)) dα (Sundararajan et al. 2017, equation 1), by Captum.

    The integral is a Gauss-Legendre sum whose weights Captum rounds to float32, so that the result is good to
    about 1e-7 at best, in float64 too. Completeness, Σᵢ Rᵢ = f(x) − f(x′), holds up to the sum's error: raise
    `n_steps` where it matters.

    Parameters
    ----------
    model : nn.Module
        The model.
    x : Tensor, shape (N, ...)
        Its input.
    target : Target
        The class, as `explain` has it.
    baseline : float, sequence or Tensor
        x′: a number, one per channel, or a tensor that broadcasts to `x`.
    n_steps : int
        Points on the path.
    batch_size : int
        The most inputs that one pass of the model holds.

    Returns
    -------
    Tensor, shape (N, ...)
        The integrated gradients of the target's logit.

    Raises
    ------
    UserError
        For options, targets or outputs that aren't allowed.
    """
    n_steps, batch_size = whole("n_steps", n_steps), whole("batch_size", batch_size)
    start = reference(baseline, x)
    index = explained_classes(model, x, target)
    if not len(x):
        return torch.zeros_like(x)
    gradient(model, x, index)  # says where there is none
    from captum.attr import IntegratedGradients

    method, R = IntegratedGradients(Perturbed(model)), torch.zeros_like(x)
    for some in torch.arange(len(x), device=x.device).split(batch_size):
        R[some] = method.attribute(
            x.detach()[some], start[some], target=index[some], n_steps=n_steps, internal_batch_size=batch_size
        ).to(x.dtype)
    return R
