"""Networks for the tests of LRP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm)


def randomize(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Give normalisations statistics and weights as after training, what is zero small values; evaluation mode."""
    for module in model.modules():
        if isinstance(module, NORMS) and module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            if module.bias is not None:
                nn.init.uniform_(module.bias, -0.3, 0.3)
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    for name, parameter in model.named_parameters():
        if "layer_scale" in name or name.endswith("gamma"):
            nn.init.uniform_(parameter, 0.5, 1.5)
        elif not bool(parameter.any()):
            nn.init.normal_(parameter, std=0.02)
    return model.to(dtype).eval()


class Net(nn.Module):
    """A network whose forward is a function of the module and the input."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)
        self.function = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def modules() -> dict[str, nn.Module]:
    """The parts of small networks on images of three channels."""
    return {
        "c1": nn.Conv2d(3, 6, 3, padding=1),
        "b1": nn.BatchNorm2d(6),
        "c2": nn.Conv2d(6, 6, 3, padding=1),
        "b2": nn.BatchNorm2d(6),
        "relu": nn.ReLU(),
        "pool": nn.AdaptiveAvgPool2d(3),
        "fc": nn.Linear(6, 4),
    }


def head(m: Any, x: Tensor) -> Tensor:
    return m.fc(x.mean((2, 3)))


def stem(m: Any, x: Tensor) -> Tensor:
    return m.relu(m.b1(m.c1(x)))


def close(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> None:
    """Assert that `a` is `b` to a tolerance relative to the greatest entry, which isn't zero."""
    greatest = float(b.abs().max())
    assert greatest > 0
    assert float((a - b).abs().max()) <= tolerance * greatest


def torchvision_model(name: str, **options: Any) -> nn.Module:
    """A network of torchvision with random weights for five classes of images of 64 x 64."""
    import torchvision

    torch.manual_seed(0)
    if name in ("googlenet", "inception_v3"):
        options = {"init_weights": False, "aux_logits": False, **options}
    model = torchvision.models.get_model(name, num_classes=5, **options)
    if name.startswith(("vgg", "alexnet")):
        # Their classifiers have a hundred million weights.
        channels, side = (512, 7) if name.startswith("vgg") else (256, 6)
        model.classifier = nn.Sequential(nn.Linear(channels * side * side, 32), nn.ReLU(), nn.Linear(32, 5))
    return randomize(model)
