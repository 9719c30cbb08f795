"""Relevance through networks: against gradient × input, zennit, equivalent networks; conservation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Net, close, head, modules, randomize, stem, torchvision_model
from torch import Tensor, nn

from spray import explain


def plain(m: Any, x: Tensor) -> Tensor:
    return head(m, F.max_pool2d(m.relu(m.b2(m.c2(stem(m, x)))), 2))


def residual(m: Any, x: Tensor) -> Tensor:
    x = stem(m, x)
    return head(m, m.relu(m.b2(m.c2(x)) + x))


def concatenated(m: Any, x: Tensor) -> Tensor:
    x = stem(m, x)
    a, b = torch.cat([x, m.c2(x)], 1).relu().chunk(2, dim=1)
    return head(m, a) - 2 * head(m, b)


def reused(m: Any, x: Tensor) -> Tensor:
    x = stem(m, x)
    for _ in range(3):
        x = m.relu(m.c2(x))
    return head(m, x)


def preactivation(m: Any, x: Tensor) -> Tensor:
    x = m.c1(x)
    return head(m, x + m.c2(m.relu(m.b2(x + 0.1))))


def norm_after_pool(m: Any, x: Tensor) -> Tensor:
    return head(m, m.relu(m.b1(m.pool(m.c1(x)))))


def overlapping_pools(m: Any, x: Tensor) -> Tensor:
    x = F.avg_pool2d(stem(m, x), 3, stride=2, padding=1, ceil_mode=True)
    return head(m, F.max_pool2d(m.c2(x), 3, stride=1, ceil_mode=True))


def scalars(m: Any, x: Tensor) -> Tensor:
    x = (2 - stem(m, (x - 0.2) / 0.5)) * 3 + 1
    return head(m, F.leaky_relu(1 - m.c2(-x) / 2, 0.1))


def shuffled(m: Any, x: Tensor) -> Tensor:
    x = stem(m, x).reshape(len(x), 2, 3, *x.shape[2:]).transpose(1, 2).flatten(1, 2).contiguous()
    x = F.interpolate(F.pad(x, (1, 1)).flip(2), scale_factor=2)
    return head(m, torch.stack([x[:, :3], x[:, 3:]], 4).permute(0, 1, 4, 2, 3).flatten(1, 2))


def functional(m: Any, x: Tensor) -> Tensor:
    x = stem(m, x).mean((2, 3))
    return torch.matmul(x, m.fc.weight.detach().T) + m.fc.bias


PIECEWISE_LINEAR = [
    plain,
    residual,
    concatenated,
    reused,
    preactivation,
    norm_after_pool,
    overlapping_pools,
    scalars,
    shuffled,
    functional,
]


@pytest.mark.parametrize("forward", PIECEWISE_LINEAR, ids=lambda f: f.__name__)
def test_lrp_0_is_gradient_x_input(forward: Callable[[Any, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = randomize(Net(forward, **modules()))
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    expected = explain(model, x, 1, method="gradient_x_input")
    assert float(expected.abs().max()) > 0
    close(explain(model, x, 1, composite="lrp_0"), expected, 1e-9)


def narrow_vgg() -> nn.Module:
    from torchvision.models.vgg import VGG, make_layers

    torch.manual_seed(0)
    model = VGG(make_layers([16, "M", 32, "M", 64, 64, "M"], batch_norm=True), init_weights=False)
    model.classifier = nn.Sequential(nn.Linear(64 * 49, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 5))
    return randomize(model)


def zennit_relevance(model: nn.Module, x: Tensor, target: int, composite: str, **options: Any) -> Tensor:
    from zennit import composites
    from zennit.torchvision import ResNetCanonizer, VGGCanonizer

    canonizer = ResNetCanonizer() if "ResNet" in type(model).__name__ else VGGCanonizer()
    composite = composites.COMPOSITES[composite](canonizers=[canonizer], **options)
    leaf = x.clone().requires_grad_()
    with composite.context(model) as modified:
        output = modified(leaf)
        initial = torch.zeros_like(output)
        initial[:, target] = output[:, target].detach()
        return torch.autograd.grad(output, leaf, initial)[0]


BOX = {
    "low": torch.tensor([-4.0, -5, -6]).double().view(1, 3, 1, 1),
    "high": torch.tensor([5.0, 6, 4]).double().view(1, 3, 1, 1),
}


ZENNIT = [
    ("epsilon_plus", {"epsilon": 0.01}),
    ("epsilon_plus_flat", {}),
    ("epsilon_gamma_box", {"gamma": 0.5, **BOX}),
    ("epsilon_alpha2_beta1", {}),
    ("epsilon_alpha2_beta1_flat", {}),
    ("excitation_backprop", {}),
]


def compare_with_zennit(model: nn.Module, composite: str, options: dict[str, Any], tolerance: float) -> None:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-12  # zennit divides by √(1 + eps) once more after its merge
    dtype = next(model.parameters()).dtype
    x = torch.randn(2, 3, 32, 32, dtype=dtype)
    options = {key: value.to(dtype) if isinstance(value, Tensor) else value for key, value in options.items()}
    expected = zennit_relevance(model, x, 2, composite, **options)
    close(explain(model, x, 2, composite=composite, **options), expected, tolerance)


@pytest.mark.parametrize(("composite", "options"), ZENNIT)
@pytest.mark.parametrize("name", ["vgg", "resnet18", pytest.param("resnet50", marks=pytest.mark.slow)])
def test_composites_agree_with_zennit(name: str, composite: str, options: dict[str, Any]) -> None:
    model = narrow_vgg() if name == "vgg" else torchvision_model(name)
    compare_with_zennit(model, composite, options, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("composite", "options"), ZENNIT[1:3])
@pytest.mark.parametrize("name", ["vgg16_bn", "resnet50"])
def test_composites_agree_with_zennit_in_single_precision(name: str, composite: str, options: dict[str, Any]) -> None:
    compare_with_zennit(torchvision_model(name).float(), composite, options, 1e-4)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@settings(max_examples=25, deadline=None)
@given(
    widths=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    kernel=st.integers(1, 3),
    skip=st.booleans(),
    average=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_relevance_is_conserved_without_biases(
    widths: list[int], kernel: int, skip: bool, average: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    convolutions = nn.ModuleList(
        nn.Conv2d(m, n, kernel, padding="same", bias=False) for m, n in zip([3, *widths[:-1]], widths, strict=True)
    )

    def forward(m: Any, x: Tensor) -> Tensor:
        for convolution in m.convolutions:
            y = F.relu(convolution(x))
            x = torch.cat([x, y], 1)[:, -y.shape[1] :] + y if skip else y
        x = F.avg_pool2d(x, 2) if average else F.max_pool2d(x, 2)
        return m.fc(x.flatten(1))

    fc = nn.Linear(widths[-1] * 9, 3, bias=False)
    model = Net(forward, convolutions=convolutions, fc=fc).double().eval()
    # With nonnegative weights every output has a positive contribution, so no relevance is lost in any rule.
    for parameter in model.parameters():
        parameter.data.abs_().add_(0.01)
    x = torch.rand(2, 3, 6, 6, dtype=torch.float64) + 0.01
    logit = model(x)[:, 0].detach()
    for composite, options in {
        "lrp_0": {},
        "epsilon": {"epsilon": 1e-12},
        "epsilon_plus_flat": {},
        "epsilon_gamma_box": {"low": 0.0, "high": 1.1},
        "excitation_backprop": {},
        "deep_taylor": {},
    }.items():
        R = explain(model, x, 0, composite=composite, **options)
        torch.testing.assert_close(R.sum((1, 2, 3)), logit, rtol=1e-3, atol=0)
    torch.testing.assert_close(
        explain(model, x, 0, init="one").sum((1, 2, 3)), torch.ones_like(logit), rtol=1e-3, atol=0
    )


def test_batch_norm_is_merged_in_order_of_execution() -> None:
    """The definition order b2, c1, b1 must not matter; merging equals folding by hand."""
    torch.manual_seed(0)
    parts = modules()
    model = randomize(Net(plain, **dict(reversed(parts.items()))))
    folded = randomize(Net(lambda m, x: head(m, F.max_pool2d(m.relu(m.c2(m.relu(m.c1(x)))), 2)), **modules()))
    folded.fc.load_state_dict(model.fc.state_dict())
    for conv, norm in (("c1", "b1"), ("c2", "b2")):
        source, bn = model.get_submodule(conv), model.get_submodule(norm)
        fused = torch.nn.utils.fuse_conv_bn_eval(source, bn)
        folded.get_submodule(conv).load_state_dict(fused.state_dict())
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    for composite in ("epsilon_plus_flat", "epsilon_alpha2_beta1", "deep_taylor"):
        close(explain(model, x, 0, composite=composite), explain(folded, x, 0, composite=composite), 1e-9)


def test_weights_that_are_computed_and_arguments_by_keyword() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 6, 3)
    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 6, 3))
    normed.load_state_dict(nn.utils.parametrizations.weight_norm(layer).state_dict())

    def by_keyword(m: Any, x: Tensor) -> Tensor:
        y = F.conv2d(input=x, weight=layer.weight, bias=layer.bias, padding="valid")
        return F.linear(input=y.mean((2, 3)), weight=m.fc.weight)

    fc = nn.Linear(6, 2, bias=False)
    x = torch.randn(2, 3, 6, 6)
    a = explain(Net(lambda m, x: m.fc(m.conv(x).mean((2, 3))), conv=normed, fc=fc).eval(), x, 0)
    torch.testing.assert_close(a, explain(Net(by_keyword, fc=fc).eval(), x, 0))
    assert float(a.abs().max()) > 0
