"""A network with layers of every kind, and what the tests of inner layers do with it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

ATOL = 1e-12

COMPOSITES: dict[str, dict[str, Any]] = {
    "lrp_0": {},
    "epsilon": {},
    "epsilon_plus": {},
    "epsilon_plus_flat": {},
    "epsilon_gamma_box": {"low": -6.0, "high": 6.0},
    "epsilon_alpha2_beta1": {},
    "epsilon_alpha2_beta1_flat": {},
    "excitation_backprop": {},
    "deep_taylor": {},
}


def norm(channels: int) -> nn.BatchNorm2d:
    """A batch normalisation with statistics of its own."""
    layer = nn.BatchNorm2d(channels)
    nn.init.uniform_(layer.running_mean, -0.3, 0.3)
    nn.init.uniform_(layer.running_var, 0.5, 1.5)
    nn.init.uniform_(layer.weight, 0.5, 1.5)
    nn.init.uniform_(layer.bias, -0.3, 0.3)
    return layer


class Block(nn.Module):
    """A residual block."""

    def __init__(self, channels: int, inplace: bool = False) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.b1 = norm(channels)
        self.c2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.b2 = norm(channels)
        self.shortcut = nn.Identity()
        self.relu = nn.ReLU(inplace)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.b1(self.c1(x)))
        return self.relu(self.b2(self.c2(y)) + self.shortcut(x))


def network(inplace: bool = False, seed: int = 0) -> nn.Sequential:
    """A small residual network; "block.relu" runs twice."""
    torch.manual_seed(seed)
    layers = {
        "conv": nn.Conv2d(3, 4, 3, padding=1),
        "norm": norm(4),
        "relu": nn.ReLU(inplace),
        "block": Block(4, inplace),
        "pool": nn.MaxPool2d(2),
        "conv2": nn.Conv2d(4, 5, 3),
        "relu2": nn.ReLU(inplace),
        "average": nn.AdaptiveAvgPool2d(2),
        "flatten": nn.Flatten(),
        "fc": nn.Linear(20, 6),
        "relu3": nn.ReLU(inplace),
        "out": nn.Linear(6, 4),
    }
    model = nn.Sequential()
    for name, layer in layers.items():
        model.add_module(name, layer)
    return model.double().eval()


def images(n: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, 8, 8, generator=generator, dtype=torch.float64)


def close(a: Tensor, b: Tensor, tolerance: float = ATOL) -> None:
    assert float(b.abs().max()) > 1e-9, "nothing to compare"
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.abs().max()))


def folded(model: nn.Sequential) -> nn.Sequential:
    """The network with its batch normalisations in the convolutions' weights, by torch's own means."""
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    model = copy.deepcopy(model)
    model.conv, model.norm = fuse_conv_bn_eval(model.conv, model.norm), nn.Identity()
    block = model.block
    block.c1, block.b1 = fuse_conv_bn_eval(block.c1, block.b1), nn.Identity()
    block.c2, block.b2 = fuse_conv_bn_eval(block.c2, block.b2), nn.Identity()
    return model


def cut(model: nn.Sequential, layer: str) -> tuple[nn.Sequential, nn.Sequential]:
    """Return a network's parts up to the layer's output and after it."""
    at = [name for name, _ in model.named_children()].index(layer) + 1
    return model[:at], model[at:]


def logit_of(target: int) -> Callable[[Tensor], Tensor]:
    def initial(logits: Tensor) -> Tensor:
        R = torch.zeros_like(logits)
        R[:, target] = logits[:, target]
        return R.detach()

    return initial
