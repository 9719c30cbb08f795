"""Derivatives along an artifact's direction, against differences and networks whose answer is known."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from spray.correction.wrapped import Projected, Projection
from spray.sensitivity import concept_layer, directional_derivatives


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(2, 5, 3), nn.Tanh(), nn.Conv2d(5, 4, 3), nn.Tanh())
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


@pytest.fixture
def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Net().double().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).normal(size=(7, 2, 6, 6)))


def direction(size: int, seed: int = 1) -> Tensor:
    return nn.functional.normalize(torch.from_numpy(np.random.default_rng(seed).normal(size=size)), dim=0)


@pytest.mark.parametrize("each", [False, True])
def test_equals_a_difference_of_outputs(net: nn.Module, x: Tensor, each: bool) -> None:
    # Flattening holds the same numbers.
    assert concept_layer(net, x) == "head.0"
    h, step = direction(4 * 2 * 2), 1e-6
    target: int | Tensor = torch.arange(7) % 3 if each else 2
    a = net.features(x).detach()
    moved = [net.head(a + sign * step * h.view(1, 4, 2, 2)) for sign in (1, -1)]
    slopes = ((moved[0] - moved[1]) / (2 * step)).detach().numpy()
    expected = [slopes[i, (i % 3) if each else 2] for i in range(7)]
    before = copy.deepcopy(net.state_dict())
    found = directional_derivatives(net, "features.3", h, x, target)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_a_linear_output_has_its_weights_as_gradient(x: Tensor) -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2)).double().eval()
    h = direction(48)
    weights = net[3].weight[1].detach() @ h
    np.testing.assert_allclose(directional_derivatives(net, "1", h, x, 1), np.full(7, float(weights)))


def test_what_is_projected_out_counts_for_nothing(net: nn.Module, x: Tensor) -> None:
    h, other = direction(16), direction(16, seed=2)
    model = Projected(net, [Projection("head.0", h[None], torch.zeros(1, dtype=torch.float64))]).eval()
    layer = concept_layer(model, x)
    assert layer == "model.head.0"
    assert directional_derivatives(model, layer, h, x, 0).tolist() == [0.0] * 7
    assert np.abs(directional_derivatives(net, "features.3", h, x, 0)).min() > 1e-6
    # Another direction is left, less its part along the first one.
    rest = other - (other @ h) * h
    base = directional_derivatives(model, layer, other, x, 0)
    np.testing.assert_allclose(base, directional_derivatives(model, layer, rest, x, 0), rtol=1e-9)
    assert np.abs(base).min() > 1e-6


def test_a_model_without_inner_layers_has_no_concept_layer(x: Tensor) -> None:
    assert concept_layer(nn.Sequential(nn.Flatten(), nn.Linear(72, 3)).double(), x) is None
