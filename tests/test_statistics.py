"""Statistics of images against torch's and NumPy's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spray.isolation.statistics import BANDS, median, quantiles, quartiles, radial_power, spread

SHARES = (0.0, 0.02, 0.25, 0.5, 0.98, 1.0)


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
@pytest.mark.parametrize("n", [1, 2, 7, 100])
def test_quantiles_are_those_of_torch(dim: int, n: int) -> None:
    shape = [3, 4, 5]
    shape[dim] = n
    values = torch.rand(shape, generator=torch.Generator().manual_seed(n)).round(decimals=2)
    expected = torch.quantile(values, torch.tensor(SHARES), dim=dim)
    torch.testing.assert_close(quantiles(values, SHARES, dim), expected, rtol=0, atol=2e-7)


@pytest.mark.parametrize(("dim", "n"), [(0, 7), (0, 8), (2, 1), (1, 20)])
def test_median_is_that_of_torch(dim: int, n: int) -> None:
    shape = [3, 4, 5]
    shape[dim] = n
    values = torch.rand(shape, generator=torch.Generator().manual_seed(n))
    torch.testing.assert_close(median(values, dim), values.median(dim=dim).values, rtol=0, atol=0)


def test_quartiles_are_of_each_pixel() -> None:
    images = torch.rand(9, 2, 4, 5)
    np.testing.assert_allclose(quartiles(images), np.quantile(images.numpy(), [0.25, 0.5, 0.75], axis=0), rtol=1e-6)


def test_spread_is_the_standard_deviation() -> None:
    values = 0.5 + 1e-3 * torch.randn(4, 3, 200)
    torch.testing.assert_close(spread(values), values.std(dim=-1))
    assert torch.equal(spread(torch.full((2, 8), 0.5)), torch.zeros(2))
    assert torch.equal(spread(torch.rand(2, 1)), torch.zeros(2))


def test_power_is_averaged_in_rings() -> None:
    images = torch.rand(3, 2, 12, 16)
    window = np.outer(np.hanning(12), np.hanning(16))
    centred = images.numpy() - images.numpy().mean(axis=(2, 3), keepdims=True)
    power = (np.abs(np.fft.rfft2(centred * window)) ** 2).mean(axis=1)
    radius = np.hypot(np.fft.fftfreq(12)[:, None], np.fft.rfftfreq(16))
    rings = [power[:, (radius * 2 * BANDS).astype(int) == k].mean(axis=1) for k in range(BANDS)]
    floor = (window**2).sum() / 255**2 / 12
    np.testing.assert_allclose(radial_power(images), np.log(np.stack(rings, axis=1) + floor), atol=1e-4)
