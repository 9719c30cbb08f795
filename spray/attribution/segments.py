"""The parts of an input that LIME and SHAP switch on and off together."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from spray.attribution.target import check_finite
from spray.errors import UserError

# Superpixels of an image, unless the caller says otherwise.
SEGMENTS = 50
# SLIC's weight of closeness against likeness: colours are compared in CIELAB (0 to 100), others from 0 to 1.
COMPACTNESS = {"lab": 20.0, "other": 0.2}


def segment(x: Tensor, segments: Any) -> Tensor:
    """Return which part each entry of the input belongs to.

    Parameters
    ----------
    x : Tensor, shape (N, ...)
        The input.
    segments : int, Tensor of int, or None
        A number asks for so many superpixels of each image, about, by SLIC (Achanta et al. 2012). A tensor
        gives the parts: of shape (H, W) for all samples, (N, H, W) for each one, or broadcastable to `x`. None is
        50 superpixels for an input of shape (N, C, H, W); for others every entry is a part of its own.

    Returns
    -------
    Tensor of int64, shape of x
        The parts of each sample, numbered from 0 without gaps.

    Raises
    ------
    UserError
        For anything else, or superpixels of an image that isn't finite.
    """
    image = x.dim() == 4
    if segments is None:
        segments = SEGMENTS if image else torch.arange(x[:1].numel() if len(x) else 0).view(1, *x.shape[1:])
    if not isinstance(segments, Tensor | np.ndarray):
        number = count(segments, x)
        check_finite(x, "the input")
        return torch.stack([superpixels(sample, number) for sample in x]) if len(x) else x.long()
    mask = torch.as_tensor(segments, device=x.device)
    places = x.shape[2:] or x.shape[1:]
    if mask.is_floating_point() or mask.is_complex() or mask.dtype == torch.bool:
        refuse(segments, x, f"{mask.dtype}")
    if mask.shape == places:
        mask = mask.view(1, *[1] * (x.dim() - 1 - mask.dim()), *places)
    elif mask.dim() == x.dim() - 1 and mask.dim() > 1:
        mask = mask[:, None]
    if mask.dim() != x.dim():
        refuse(segments, x, f"shape {tuple(segments.shape)}")
    try:
        mask = mask.expand(x.shape)
    except RuntimeError:
        refuse(segments, x, f"shape {tuple(segments.shape)}")
    return torch.stack([torch.unique(sample, return_inverse=True)[1] for sample in mask]) if len(x) else x.long()


def count(segments: Any, x: Tensor) -> int:
    """Return a number of superpixels, or raise a UserError unless it is at least 1 and the input is an image."""
    try:
        number = 0 if isinstance(segments, bool) else operator.index(segments)
    except TypeError:
        number = 0
    if number < 1:
        refuse(segments, x, repr(segments))
    if x.dim() != 4:
        raise UserError(
            f"a number of segments needs images (N, C, H, W), not {tuple(x.shape)}; give a tensor of ints, or leave "
            "it out to explain every feature on its own"
        )
    return number


def refuse(segments: Any, x: Tensor, got: str) -> None:
    """Raise the UserError that says what segments may be."""
    places = tuple(x.shape[2:] or x.shape[1:])
    raise UserError(
        f"segments must be a whole number of at least 1 or a tensor of ints of shape {places}, {(len(x), *places)} or "
        f"one that broadcasts to {tuple(x.shape)}, not {got}"
    )


def superpixels(image: Tensor, number: int) -> Tensor:
    """Return about `number` superpixels (C, H, W), the same in every channel, of an image (C, H, W)."""
    from skimage.segmentation import slic

    channels, height, width = image.shape
    pixels = image.detach().permute(1, 2, 0).double().cpu().numpy()
    lab = channels == 3
    # The input is normalised; `slic` itself brings an image to the range from 0 to 1.
    labels = slic(
        pixels,
        n_segments=min(number, height * width),
        compactness=COMPACTNESS["lab" if lab else "other"],
        sigma=1,
        convert2lab=lab,
        start_label=0,
        channel_axis=-1,
    )
    parts = np.unique(labels, return_inverse=True)[1].reshape(height, width)
    return torch.from_numpy(parts.astype(np.int64)).to(image.device).expand(image.shape)
