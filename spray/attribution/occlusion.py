"""Occlusion: how far the logit falls when a window of the input is hidden."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from spray.attribution.options import BATCH_SIZE, Perturbed, check_dependence, explained_classes, reference, whole
from spray.attribution.registry import ATTRIBUTIONS
from spray.attribution.target import Target
from spray.errors import UserError


@ATTRIBUTIONS.register("occlusion")
def occlusion(
    model: nn.Module,
    x: Tensor,
    target: Target,
    *,
    window: int | Sequence[int] | None = None,
    stride: int | Sequence[int] | None = None,
    baseline: float | Tensor = 0.0,
    batch_size: int = BATCH_SIZE,
) -> Tensor:
    """Return how far the logit falls when a sliding window is hidden (Zeiler and Fergus 2014, section 4.2), by Captum.

    A window covers all channels. A place's value is the mean fall over the windows that cover it, spread evenly
    over the channels: the sum over the channels is the mean fall. Windows at the far edges are cut off there.

    Parameters
    ----------
    model : nn.Module
        The model; it needs no gradient.
    x : Tensor, shape (N, C, ...) or (N, features)
        Its input.
    target : Target
        The class, as `explain` has it.
    window : int or sequence of int, optional
        The window's size: one number, or one per axis (height, width). The default is an eighth of each axis,
        rounded up; for an input without axes of places (N, features) a single feature.
    stride : int or sequence of int, optional
        How far the window moves at a time, at most `window`. The default is half of `window`, rounded up.
    baseline : float, sequence or Tensor
        What a window is hidden with: a number, one per channel, or a tensor that broadcasts to `x`.
    batch_size : int
        The most inputs that one pass of the model holds.

    Returns
    -------
    Tensor, shape of x
        The mean falls.

    Raises
    ------
    UserError
        For options, targets or outputs that aren't allowed.
    """
    batch_size, hidden = whole("batch_size", batch_size), reference(baseline, x)
    sides = tuple(x.shape[2:] or x.shape[1:])
    windows = per_axis("window", window, sides, [-(-side // 8) for side in sides] if x.dim() > 2 else [1])
    strides = per_axis("stride", stride, windows, [-(-size // 2) for size in windows])
    index = explained_classes(model, x, target)
    check_dependence(model, x, hidden)
    from captum.attr import Occlusion

    method, R = Occlusion(Perturbed(model)), torch.zeros_like(x)
    # Captum's own division rounds to float32; without its weights it returns the sums over the windows.
    method.use_weights = False
    covers = coverage(sides, windows, strides).to(x)
    channels = x.shape[1:2] if x.dim() > 2 else ()
    for i in range(len(x)):
        falls = method.attribute(
            x[i : i + 1].detach(),
            sliding_window_shapes=(*channels, *windows),
            strides=(*channels, *strides),
            baselines=hidden[i : i + 1],
            target=int(index[i]),
            perturbations_per_eval=batch_size,
        )
        R[i] = (falls[0] / covers) / (channels[0] if channels else 1)
    return R


def per_axis(name: str, value: int | Sequence[int] | None, most: Sequence[int], default: Sequence[int]) -> list[int]:
    """Return an option as one number per axis, or raise a UserError unless each is from 1 to `most`."""
    if value is None:
        return list(default)
    several = isinstance(value, Sequence) and not isinstance(value, str)
    numbers = [whole(name, v) for v in (value if several else [value] * len(most))]  # type: ignore[union-attr]
    if len(numbers) != len(most) or any(number > limit for number, limit in zip(numbers, most, strict=True)):
        limits = " x ".join(map(str, most))
        raise UserError(f"{name} must be one number or {len(most)}, at most {limits}, not {value!r}")
    return numbers


def coverage(sides: Sequence[int], windows: Sequence[int], strides: Sequence[int]) -> Tensor:
    """Return how many windows cover each place, of shape `sides`."""
    count = torch.ones(())
    for side, window, stride in zip(sides, windows, strides, strict=True):
        starts = torch.arange(-(-(side - window) // stride) + 1) * stride
        places = torch.arange(side)
        covered = (places >= starts[:, None]) & (places < starts[:, None] + window)
        count = count[..., None] * covered.sum(0)
    return count
