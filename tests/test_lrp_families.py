"""LRP through the families of torchvision and timm, with random weights.

With LRP-0 the relevance is gradient × input, of the network itself where it is piecewise linear, else of a surrogate
whose activations, gates, deviations and products have the gradients that AttnLRP gives them (see `surrogate`).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import close, randomize, torchvision_model
from surrogate import lrp_0_of_surrogate
from torch import nn

from spray import explain

FAST = ["alexnet", "densenet121", "googlenet", "resnet18", "shufflenet_v2_x1_0", "squeezenet1_1", "vgg11_bn"]
SLOW = ["inception_v3", "mnasnet1_0", "regnet_x_400mf", "resnet50", "resnext50_32x4d", "vgg16_bn", "wide_resnet50_2"]
# With gates, attention, normalisations by their own statistics or smooth activations.
GATED = ["regnet_y_400mf", "mobilenet_v3_small"]
OTHERS = ["mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "efficientnet_v2_s", "convnext_tiny", "swin_t"]
OTHERS += ["swin_v2_t", "vit_b_16", "maxvit_t"]


def build(name: str) -> nn.Module:
    if name == "vit_b_16":
        return torchvision_model(name, image_size=64)
    if name == "maxvit_t":
        from torchvision.models import MaxVit

        torch.manual_seed(0)
        return randomize(MaxVit((64, 64), 16, 2, [16, 32], [1, 1], 8, 0.0, num_classes=5))
    return torchvision_model(name)


def slow(names: list[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", FAST + slow(SLOW))
def test_lrp_0_is_gradient_x_input(name: str) -> None:
    model = build(name)
    side = 96 if name == "inception_v3" else 64
    x = torch.randn(1, 3, side, side, dtype=torch.float64)
    close(explain(model, x, 1, composite="lrp_0"), explain(model, x, 1, method="gradient_x_input"))


@pytest.mark.parametrize("name", GATED + slow(OTHERS))
def test_lrp_0_is_gradient_x_input_of_the_surrogate(name: str) -> None:
    model = build(name)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    close(explain(model, x, 1, composite="lrp_0"), lrp_0_of_surrogate(model, x, 1))


def test_gates_are_constants() -> None:
    """RegNetY under LRP-0 is gradient × input of the network whose squeeze-and-excitation gates don't move."""
    model = build("regnet_y_400mf")
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    relevance = explain(model, x, 1, composite="lrp_0")
    moving = explain(model, x, 1, method="gradient_x_input")
    for module in model.modules():
        if isinstance(module, nn.Sigmoid):
            module.register_forward_hook(lambda module, inputs, output: output.detach())
    close(relevance, explain(model, x, 1, method="gradient_x_input"))
    assert float((relevance - moving).abs().max()) > 1e-3 * float(moving.abs().max())


class Unsaturated(nn.Module):
    """MobileNetV2's smallest part: below 6, its ReLU6 is a ReLU."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6(), nn.Flatten(), nn.Linear(128, 3))
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(self.scale * x)


def test_relu6_passes_relevance_where_it_is_saturated() -> None:
    torch.manual_seed(0)
    model = randomize(Unsaturated(1.0))
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    close(explain(model, x, 0, composite="lrp_0"), explain(model, x, 0, method="gradient_x_input"))
    model.scale = 20.0
    relevance, gradient = (explain(model, x, 0, **o) for o in ({"composite": "lrp_0"}, {"method": "gradient_x_input"}))
    assert float((relevance - gradient).abs().max()) > 0.1 * float(relevance.abs().max())
    close(relevance, lrp_0_of_surrogate(model, x, 0))


def check(model: nn.Module, x: torch.Tensor, tolerance: float) -> None:
    """Assert what holds of any model: finite and other than zero, the same in any batch; the model stays as it is."""
    before = {name: t.clone() for name, t in model.state_dict().items()}
    for composite in ("epsilon_plus_flat", "epsilon"):
        relevance = explain(model, x, 1, composite=composite)
        assert bool(torch.isfinite(relevance).all())
        close(explain(model, x[:1], 1, composite=composite), relevance[:1], tolerance)
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("name", FAST + SLOW + GATED + OTHERS)
def test_torchvision_runs(name: str) -> None:
    side = 96 if name == "inception_v3" else 64
    check(build(name), torch.randn(2, 3, side, side, dtype=torch.float64), 1e-9)


TIMM = [
    "beit_base_patch16_224",
    "caformer_s18",
    "cait_xxs24_224",
    "coat_lite_tiny",
    "coatnet_pico_rw_224",
    "convnextv2_atto",
    "davit_tiny",
    "deit3_small_patch16_224",
    "dla34",
    "ecaresnet26t",
    "efficientformerv2_s0",
    "eva02_tiny_patch14_224",
    "focalnet_tiny_srf",
    "ghostnet_050",
    "hrnet_w18_small",
    "inception_next_atto",
    "levit_128s",
    "maxvit_rmlp_pico_rw_256",
    "mixer_s32_224",
    "mobilenetv4_conv_small",
    "mobilevitv2_050",
    "nf_regnet_b0",
    "pit_ti_224",
    "poolformerv2_s12",
    "pvt_v2_b0",
    "regnety_002",
    "repvgg_a0",
    "resmlp_12_224",
    "resnest14d",
    "resnetv2_50x1_bit",
    "seresnet33ts",
    "skresnet18",
    "swinv2_tiny_window8_256",
    "tiny_vit_5m_224",
    "twins_svt_small",
    "vit_small_patch16_dinov3",
    "vit_tiny_patch16_224",
    "volo_d1_224",
    "xception41",
    "xcit_nano_12_p16_224",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_timm_is_gradient_x_input_of_the_surrogate(name: str) -> None:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    try:
        model = timm.create_model(name, num_classes=5, img_size=64)
    except TypeError:  # it takes any size
        model = timm.create_model(name, num_classes=5)
    model = randomize(model)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    check(model, x, 1e-9)
    close(explain(model, x, 1, composite="lrp_0"), lrp_0_of_surrogate(model, x, 1))
