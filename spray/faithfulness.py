"""Whether an attribution is faithful: what becomes of the model's decision when the pixels it names are deleted.

Pixel flipping (Bach et al. 2015) with whole patches, which Samek et al. call region perturbation: patches are
deleted one after the other, the most relevant first, and the target's output is read after each. The faster it
falls, the better the attribution knew what the decision rests on. A random order is the control, and the least
relevant first the opposite.

References
----------
Bach et al. 2015, "On pixel-wise explanations for non-linear classifier decisions by layer-wise relevance
propagation"; Samek et al. 2017, "Evaluating the visualization of what a deep neural network has learned".
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spray.attribution.explanation import check_arguments
from spray.attribution.target import Target, check_finite, check_logits, class_indices
from spray.errors import UserError

ORDERS = ("most_relevant", "least_relevant", "random")
OUTPUTS = ("logit", "probability")


def deletion_curve(
    model: nn.Module,
    x: Tensor,
    relevance: Tensor,
    target: Target = None,
    *,
    patch: int = 16,
    steps: int | None = None,
    fill: str | float | Tensor = "mean",
    order: str = "most_relevant",
    output: str = "logit",
    seed: int = 0,
    batch_size: int = 32,
) -> Tensor:
    """Return the target's output while more and more patches of the input are deleted.

    In the notation of Samek et al. 2017, x⁽⁰⁾ = x and x⁽ᵏ⁾ = g(x⁽ᵏ⁻¹⁾, r_k), where g deletes the patch r_k and
    h(r_1) ≥ h(r_2) ≥ … is the patches' summed relevance; the curve is f(x⁽ᵏ⁾). Their g draws uniform noise; here
    it is a fixed filling, so that the curve is the same every time.

    Parameters
    ----------
    model : nn.Module
        A classifier in evaluation mode, on any device; it stays as it was.
    x : Tensor, shape (N, C, H, W), floating point
        The input, normalised as the model expects it.
    relevance : Tensor, shape (N, C, H, W), (N, 1, H, W) or (N, H, W)
        The attribution to be judged; each sample has an order of its own.
    target : int, Tensor of shape (N,), or None
        The class whose output is read; None is the class predicted for `x` itself.
    patch : int
        Side of the square patches in pixels. Those at the right and lower border are smaller if it doesn't divide
        the image.
    steps : int, optional
        Points of the curve after the first, at most one for each patch (the default). They are as evenly
        spaced as whole patches allow (see `deleted_patches`); at the last all patches are deleted.
    fill : str, float or Tensor
        What takes a deleted pixel's place: "mean", the sample's mean of each channel; "blur", the sample blurred
        by a Gaussian with a standard deviation of `patch` pixels; or values that broadcast to `x`.
    order : str
        "most_relevant" first, "least_relevant" first, or "random", the control: one order for all samples, drawn
        with `seed`, whatever the relevance.
    output : str
        "logit", or "probability", its softmax.
    seed : int
        Of the random order, and of the order among patches with equal relevance: theirs is random too, since in
        reading order they would favour attributions of what stands at the top.
    batch_size : int
        Images that the model is given at once.

    Returns
    -------
    Tensor, shape (N, steps + 1)
        On the device of `x`, in the dtype of the model's output.

    Raises
    ------
    UserError
        For arguments of another type, shape or value than described, and for values that aren't finite.
    """
    check_arguments(model, x)
    check_images(x)
    check_choice("output", output, OUTPUTS)
    if not is_count(batch_size):
        raise UserError(f"batch_size must be an integer of 1 or more, not {batch_size!r}")
    sequence = deletion_order(check_relevance(relevance, x), patch, order=order, seed=seed)
    samples, patches = sequence.shape
    counts = deleted_patches(patches, steps)
    parameter = next(model.parameters(), x)
    device = parameter.device
    with torch.inference_mode():
        filling = fill_values(x, fill, patch).to(device)
        images = x.to(device)
        outputs = [model(part.clone()) for part in images.split(batch_size)]  # clones: it may change its input
        whole = all(isinstance(part, Tensor) for part in outputs)
        clean = check_logits(torch.cat(outputs) if whole else outputs[0], images)
        classes = class_indices(clean, target)
        if classes.shape[1] != 1:
            raise UserError(f"target must name one class for each sample, not {classes.shape[1]}")
        curve = torch.empty((samples, len(counts)), dtype=clean.dtype, device=device)
        curve[:, :1] = readout(clean, classes, output)
        turn = turns(sequence, patch, x.shape[2:]).to(device)
        counts = counts.to(device)
        # One row for each image to be evaluated: its sample, and its point on the curve.
        jobs = torch.cartesian_prod(torch.arange(samples), torch.arange(1, len(counts))).to(device)
        for job in jobs.split(batch_size):
            n, k = job.unbind(1)
            deleted = turn[n, None] < counts[k, None, None, None]
            logits = model(torch.where(deleted, filling[n], images[n]))
            curve[n, k] = readout(logits, classes[n], output)[:, 0]
    check_finite(curve, "the model's output for the deleted images")
    return curve.clone().to(x.device)


def deletion_order(relevance: Tensor, patch: int, *, order: str = "most_relevant", seed: int = 0) -> Tensor:
    """Return the order in which a relevance has patches deleted.

    Parameters
    ----------
    relevance : Tensor, shape (N, C, H, W) or (N, H, W)
        Summed over the channels and the pixels of each patch.
    patch, order, seed
        As for `deletion_curve`.

    Returns
    -------
    Tensor of int64, shape (N, patches), on the CPU
        The patches of each sample, numbered row by row, the first to be deleted first.

    Raises
    ------
    UserError
        For another shape, relevance that isn't finite, or a patch or order that isn't allowed.
    """
    check_choice("order", order, ORDERS)
    if not isinstance(relevance, Tensor) or relevance.dim() not in (3, 4):
        got = f"shape {tuple(relevance.shape)}" if isinstance(relevance, Tensor) else type(relevance).__name__
        raise UserError(f"relevance must be a tensor of shape (N, C, H, W) or (N, H, W), not {got}")
    height, width = relevance.shape[-2:]
    if not is_count(patch) or patch > max(height, width):
        raise UserError(f"patch must be an integer from 1 to the image's {max(height, width)} pixels, not {patch!r}")
    check_finite(relevance, "the relevance")
    R = relevance.detach().to("cpu", torch.float64)
    R = R.sum(1) if R.dim() == 4 else R
    R = F.pad(R, (0, -width % patch, 0, -height % patch))
    pooled = R.unflatten(2, (-1, patch)).unflatten(1, (-1, patch)).sum((2, 4)).flatten(1)
    shuffled = torch.randperm(pooled.shape[1], generator=torch.Generator().manual_seed(seed))
    if order == "random":
        return shuffled.repeat(len(pooled), 1)
    return shuffled[pooled[:, shuffled].argsort(dim=1, descending=order == "most_relevant", stable=True)]


def deleted_patches(patches: int, steps: int | None = None) -> Tensor:
    """Return how many patches are deleted at each point of a curve: int64, (steps + 1,), from 0 to `patches`.

    Raises
    ------
    UserError
        If `steps` isn't from 1 to `patches`.
    """
    steps = patches if steps is None else steps
    if not is_count(steps) or steps > patches:
        raise UserError(f"steps must be an integer from 1 to the number of patches, {patches}, not {steps!r}")
    return (torch.arange(steps + 1) * patches + steps // 2) // steps


def area_under_curve(curve: Tensor) -> Tensor:
    """Return the mean height of each curve, by the trapezoidal rule: the smaller, the more faithful.

    Parameters
    ----------
    curve : Tensor, shape (N, steps + 1)
        From `deletion_curve`, most relevant first.

    Returns
    -------
    Tensor, shape (N,)
    """
    check_curve(curve)
    return torch.trapezoid(curve, dim=1) / (curve.shape[1] - 1)


def area_over_curve(curve: Tensor) -> Tensor:
    """Return each sample's area over the perturbation curve: the larger, the more faithful.

    It is 1 / (L + 1) · Σ_{k=0}^{L} (f(x⁽⁰⁾) − f(x⁽ᵏ⁾)); its mean over the samples is the AOPC of Samek et al. 2017.

    Parameters
    ----------
    curve : Tensor, shape (N, L + 1)
        From `deletion_curve`, most relevant first.

    Returns
    -------
    Tensor, shape (N,)
    """
    check_curve(curve)
    return (curve[:, :1] - curve).mean(1)


def readout(logits: Tensor, classes: Tensor, output: str) -> Tensor:
    """Return what is read of the logits: each sample's class, (N, 1)."""
    return (logits if output == "logit" else logits.softmax(1)).gather(1, classes)


def turns(sequence: Tensor, patch: int, size: tuple[int, ...]) -> Tensor:
    """Return for each pixel, (N, H, W), how many patches are deleted before its own."""
    turn = torch.empty_like(sequence).scatter_(1, sequence, torch.arange(sequence.shape[1]).expand_as(sequence))
    rows, columns = (torch.arange(n) // patch for n in size)
    return turn[:, rows[:, None] * (int(columns[-1]) + 1) + columns]


def fill_values(x: Tensor, fill: str | float | Tensor, patch: int) -> Tensor:
    """Return what takes the place of deleted pixels, in the shape of `x`."""
    if isinstance(fill, str):
        check_choice("fill", fill, ("mean", "blur"), "or a number or tensor that broadcasts to x")
        return x.mean((2, 3), keepdim=True).expand_as(x) if fill == "mean" else blur(x, float(patch))
    try:
        values = torch.as_tensor(fill, dtype=x.dtype, device=x.device).broadcast_to(x.shape)
    except (RuntimeError, TypeError, ValueError) as error:
        got = f"of shape {tuple(fill.shape)}" if isinstance(fill, Tensor) else repr(fill)
        raise UserError(
            f'fill must be "mean", "blur", a number or a tensor that broadcasts to {tuple(x.shape)}, not {got}'
        ) from error
    check_finite(values, "fill")
    return values


def blur(x: Tensor, sigma: float) -> Tensor:
    """Return images (N, C, H, W) blurred by a Gaussian cut off at 3 σ; their border pixels continue outside."""
    radius = math.ceil(3 * sigma)
    offsets = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = kernel / kernel.sum()
    planes = F.pad(x.flatten(0, 1)[:, None], (radius,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(planes, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1)).reshape(x.shape)


def is_count(value: object) -> bool:
    """Return whether a value is an integer of one or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def check_choice(name: str, value: object, allowed: tuple[str, ...], more: str = "") -> None:
    """Raise a UserError unless `value` is one of the allowed words."""
    if not isinstance(value, str) or value not in allowed:
        raise UserError(f"unknown {name} {value!r}; allowed: {', '.join(allowed)}{' ' * bool(more)}{more}")


def check_images(x: Tensor) -> None:
    """Raise a UserError unless `x` is a batch of images with finite values, at least one."""
    if x.dim() != 4 or 0 in x.shape:
        raise UserError(f"x must be images of shape (N, C, H, W), at least one, not {tuple(x.shape)}")
    check_finite(x, "x")


def check_relevance(relevance: Tensor, x: Tensor) -> Tensor:
    """Return `relevance`, or raise a UserError unless it has the samples and pixels of `x`."""
    allowed = [tuple(x.shape), (x.shape[0], 1, *x.shape[2:]), (x.shape[0], *x.shape[2:])]
    if not isinstance(relevance, Tensor) or tuple(relevance.shape) not in allowed:
        got = f"shape {tuple(relevance.shape)}" if isinstance(relevance, Tensor) else type(relevance).__name__
        raise UserError(f"relevance must be a tensor of shape {', '.join(map(str, allowed))}, not {got}")
    return relevance


def check_curve(curve: Tensor) -> None:
    """Raise a UserError unless `curve` holds curves of two points or more."""
    if not isinstance(curve, Tensor) or curve.dim() != 2 or curve.shape[1] < 2 or not curve.is_floating_point():
        got = f"{curve.dtype} of shape {tuple(curve.shape)}" if isinstance(curve, Tensor) else type(curve).__name__
        raise UserError(f"curve must be a floating-point tensor of shape (N, steps + 1) with 1 step or more, not {got}")
    check_finite(curve, "the curve")
