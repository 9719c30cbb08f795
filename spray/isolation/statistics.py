"""Statistics of whole images, by which they can be told apart that differ everywhere rather than at a place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

BANDS = 6
"""Rings of equal width that the spectrum is averaged over, up to the highest frequency along an axis."""


def radial_power(images: Tensor, n_bands: int = BANDS) -> Tensor:
    """Return the log of the power in rings of the spectrum, (n, n_bands), of windowed images (n, C, H, W).

    The mean is taken off and a Hann window put on first, or the jump from one border to the other would look like high
    frequencies. Channels are averaged. The rings are those of `frequencies`.
    """
    height, width = images.shape[2:]
    window = torch.outer(torch.hann_window(height, periodic=False), torch.hann_window(width, periodic=False))
    centred = images - images.mean(dim=(2, 3), keepdim=True)
    power = torch.fft.rfft2(centred * window.to(images)).abs().square().mean(dim=1)
    fy, fx = torch.fft.fftfreq(height), torch.fft.rfftfreq(width)
    radius = torch.hypot(fy[:, None], fx)
    ring = (radius * 2 * n_bands).long().flatten()
    member = (ring[:, None] == torch.arange(n_bands)).to(power)
    rings = power.flatten(1) @ (member / member.sum(dim=0))
    # Below a 255th of the range there is nothing but rounding.
    floor = float(window.square().sum()) / 255**2 / 12
    return (rings + floor).log()


def frequencies(n_bands: int = BANDS) -> Tensor:
    """Return the middle of each ring in cycles per pixel, (n_bands,)."""
    return (torch.arange(n_bands) + 0.5) / (2 * n_bands)


def quantiles(values: Tensor, shares: Sequence[float], dim: int) -> Tensor:
    """Return quantiles as `torch.quantile` does, (len(shares), ...), of values on the CPU, many times as fast."""
    rows = _sorted(values, dim)
    rank = torch.tensor(shares).to(values) * (rows.shape[-1] - 1)
    low, high = (torch.from_numpy(rows[..., end.long().numpy()]).movedim(-1, 0) for end in (rank.floor(), rank.ceil()))
    return torch.lerp(low, high, (rank - rank.floor()).reshape(-1, *[1] * (low.dim() - 1)))


def median(values: Tensor, dim: int) -> Tensor:
    """Return the median as `torch.median` does, the lower of two in the middle; on the CPU faster."""
    if values.device.type != "cpu":
        return values.median(dim=dim).values
    rows = _sorted(values, dim)
    return torch.from_numpy(rows[..., (rows.shape[-1] - 1) // 2].copy())


def _sorted(values: Tensor, dim: int) -> np.ndarray:
    """Return values sorted along a dimension, the last one then.

    NumPy does that by vector instructions, if what is sorted lies in one piece.
    """
    return np.sort(np.ascontiguousarray(values.movedim(dim, -1).numpy()), axis=-1)


def quartiles(images: Tensor) -> Tensor:
    """Return the quartiles (3, C, H, W) of each pixel over images (n, C, H, W)."""
    return quantiles(images, (0.25, 0.5, 0.75), dim=0)


def spread(values: Tensor) -> Tensor:
    """Return the standard deviation along the last dimension; PyTorch's own `std` takes seven times as long."""
    centred = values - values.mean(dim=-1, keepdim=True)
    return torch.linalg.vector_norm(centred, dim=-1) / max(values.shape[-1] - 1, 1) ** 0.5


def statistics(images: Tensor) -> Tensor:
    """Return a row of statistics (n, d) of each image (n, C, H, W) in [0, 1].

    Of each channel mean, spread, range and the 2 % and 98 % quantiles, mean and spread along the border; differences of
    channels; the power spectrum in rings; how much brighter and how much less varied corners are than the middle.
    """
    n, channels, height, width = images.shape
    flat = images.flatten(2)
    depth = max(1, min(height, width) // 10)
    border = torch.cat(
        [images[:, :, :depth].flatten(2), images[:, :, -depth:].flatten(2), images[:, :, :, :depth].flatten(2)], dim=2
    )
    y, x = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
    far = (y[:, None].square() + x.square()).flatten()
    corners, middle = (flat.index_select(2, part.nonzero()[:, 0]) for part in (far > 1.0, far < 0.4))
    typical = spread(flat)
    parts = [flat.mean(dim=2), typical, (typical + 1 / 255).log(), *quantiles(flat, (0.0, 1.0, 0.02, 0.98), dim=2)]
    parts += [border.mean(dim=2), spread(border)]
    parts += [corners.mean(dim=2) - middle.mean(dim=2), spread(corners) - spread(middle)]
    if channels > 1:
        difference = flat[:, 1:] - flat[:, :-1]
        parts += [difference.mean(dim=2), spread(difference)]
    parts.append(radial_power(images))
    return torch.cat([part.reshape(n, -1) for part in parts], dim=1)


def discriminant(inside: Tensor, outside: Tensor) -> tuple[Tensor, float]:
    """Return weights w (d,) and bias b such that w·φ + b has the median 1 inside and 0 outside.

    Linear discriminant analysis with the shrinkage of Ledoit and Wolf (2004).

    Parameters
    ----------
    inside, outside : Tensor
        (n, d), (m, d): statistics of both kinds of images.
    """
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    both = torch.cat([inside, outside]).double().numpy()
    center, spread = both.mean(axis=0), both.std(axis=0) + 1e-9
    labels = np.arange(len(both)) < len(inside)
    fitted = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit((both - center) / spread, labels)
    w = torch.from_numpy(fitted.coef_[0] / spread).to(inside)
    high, low = float((inside @ w).median()), float((outside @ w).median())
    unit = high - low if high > low else 1.0
    return w / unit, -low / unit
