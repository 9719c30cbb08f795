"""Relevance through networks: against gradient × input, zennit, equivalent networks; conservation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from spray import explain
from spray.errors import UserError


def randomize(model: nn.Module) -> nn.Module:
    """Give batch normalisations statistics and weights as after training; float64, evaluation mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    return model.double().eval()


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


def frozen_stem(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        x = stem(m, x)
    return head(m, x)


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


def close(a: Tensor, b: Tensor, tolerance: float) -> None:
    assert float((a - b).abs().max()) <= tolerance * float(b.abs().max())


@pytest.mark.parametrize("forward", PIECEWISE_LINEAR, ids=lambda f: f.__name__)
def test_lrp_0_is_gradient_x_input(forward: Callable[[Any, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = randomize(Net(forward, **modules()))
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    expected = explain(model, x, 1, method="gradient_x_input")
    assert float(expected.abs().max()) > 0
    close(explain(model, x, 1, composite="lrp_0"), expected, 1e-9)


def torchvision_model(name: str) -> nn.Module:
    import torchvision

    torch.manual_seed(0)
    extra = {"init_weights": False, "aux_logits": False} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, num_classes=5, **extra)
    if hasattr(model, "features") and isinstance(getattr(model, "avgpool", None), nn.AdaptiveAvgPool2d):
        channels = 512 if name.startswith("vgg") else 256
        size = model.avgpool.output_size[0]
        model.classifier = nn.Sequential(nn.Linear(channels * size * size, 32), nn.ReLU(), nn.Linear(32, 5))
    return randomize(model)


@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn", "densenet121", "googlenet", "squeezenet1_1", "alexnet"])
def test_lrp_0_is_gradient_x_input_on_torchvision(name: str) -> None:
    model = torchvision_model(name)
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    close(explain(model, x, 1, composite="lrp_0"), explain(model, x, 1, method="gradient_x_input"), 1e-9)


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


@pytest.mark.parametrize(
    ("composite", "options"),
    [
        ("epsilon_plus", {"epsilon": 0.01}),
        ("epsilon_plus_flat", {}),
        ("epsilon_gamma_box", {"gamma": 0.5, **BOX}),
        ("epsilon_alpha2_beta1", {}),
        ("epsilon_alpha2_beta1_flat", {}),
        ("excitation_backprop", {}),
    ],
)
@pytest.mark.parametrize("make", [narrow_vgg, lambda: torchvision_model("resnet18")], ids=["vgg", "resnet18"])
def test_composites_agree_with_zennit(make: Callable[[], nn.Module], composite: str, options: dict[str, Any]) -> None:
    model = make()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-12  # zennit divides by √(1 + eps) once more after its merge
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = zennit_relevance(model, x, 2, composite, **options)
    close(explain(model, x, 2, composite=composite, **options), expected, 1e-6)


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


def in_place_alias(m: Any, x: Tensor) -> Tensor:
    x = m.c1(x)
    shortcut = x
    x.relu_()
    x = m.c2(x)
    x += shortcut
    return head(m, x.mul_(2).unsqueeze_(1).add_(1).squeeze_(1))


def in_place_modules(m: Any, x: Tensor) -> Tensor:
    x = m.c1(x)
    shortcut = x
    x = F.relu(x, inplace=True)
    F.hardswish(x, inplace=True)
    x = m.c2(x)
    x = x.add_(shortcut) * 2 + 1
    return head(m, F.relu_(x))


def out_of_place(m: Any, x: Tensor) -> Tensor:
    x = m.c1(x).relu()
    return head(m, (m.c2(x) + x) * 2 + 1)


def out_of_place_modules(m: Any, x: Tensor) -> Tensor:
    x = F.hardswish(F.relu(m.c1(x)))
    return head(m, F.relu((m.c2(x) + x) * 2 + 1))


@pytest.mark.parametrize(
    ("changed", "equivalent"),
    [(in_place_alias, out_of_place), (in_place_modules, out_of_place_modules)],
)
def test_in_place_operations_are_seen_by_all_that_hold_the_tensor(changed: Any, equivalent: Any) -> None:
    torch.manual_seed(0)
    parts = modules()
    model, reference = randomize(Net(changed, **parts)), randomize(Net(equivalent, **parts))
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), reference(x))
    torch.testing.assert_close(explain(model, x, 0), explain(reference, x, 0))


def test_in_place_relus_of_a_sequential_change_nothing() -> None:
    torch.manual_seed(0)

    def build(inplace: bool) -> nn.Module:
        block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace), nn.Dropout(0.5, inplace))
        return nn.Sequential(block, nn.Sequential(nn.ReLU6(inplace)), nn.Flatten(), nn.Linear(64, 3)).double().eval()

    model, reference = build(True), build(False)
    reference.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    before = x.clone()
    assert torch.equal(explain(model, x, 0), explain(reference, x, 0))
    assert torch.equal(x, before)


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


def test_relevance_goes_to_the_signal_not_to_its_gate() -> None:
    torch.manual_seed(0)

    def gated(m: Any, x: Tensor) -> Tensor:
        x = stem(m, x)
        gate = torch.sigmoid(m.c2(x.mean((2, 3), keepdim=True)))
        return head(m, gate * x)

    def detached(m: Any, x: Tensor) -> Tensor:
        x = stem(m, x)
        gate = torch.sigmoid(m.c2(x.mean((2, 3), keepdim=True)))
        return head(m, x * gate.detach())

    model, reference = randomize(Net(gated, **modules())), Net(detached).double().eval()
    for name, module in model.named_children():
        reference.add_module(name, module)
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    assert torch.equal(explain(model, x, 0), explain(reference, x, 0))


def test_relevance_reaches_the_input_through_a_part_without_gradients() -> None:
    torch.manual_seed(0)
    parts = modules()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    frozen = explain(randomize(Net(frozen_stem, **parts)), x, 0)
    assert torch.equal(frozen, explain(Net(lambda m, x: head(m, stem(m, x)), **parts).eval(), x, 0))


class Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        return a.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


def in_place_through_view(m: Any, x: Tensor) -> Tensor:
    x = m.c1(x)
    x[:, :2].mul_(3)
    return head(m, x)


def view_of_changed(m: Any, x: Tensor) -> Tensor:
    x = m.c1(x)
    view = x.flatten(1)
    x.relu_()
    return m.fc(view[:, :6])


def assigned(m: Any, x: Tensor) -> Tensor:
    x = m.c1(x)
    x[:, 0] = 0
    return head(m, x)


def accumulated(m: Any, x: Tensor) -> Tensor:
    total = torch.zeros(len(x), 6, dtype=x.dtype)
    total += m.c1(x).mean((2, 3))
    return m.fc(total)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda m, x: head(m, m.c1(x).exp()), "no rule for exp"),
        (lambda m, x: head(m, m.c1(x)).softmax(1), "no rule for softmax"),
        (lambda m, x: head(m, F.layer_norm(m.c1(x), x.shape[2:])), "no rule for layer_norm"),
        (lambda m, x: head(m, m.c1(x) * m.c2(m.c1(x))), "neither a gate"),
        (lambda m, x: head(m, m.c1(x) / m.c2(m.c1(x))), "division"),
        (lambda m, x: head(m, m.c1(x).exp_()), "no rule for exp_"),
        (lambda m, x: head(m, F.dropout(m.c1(x), 0.5)), "active dropout"),
        (lambda m, x: head(m, F.conv2d(x, x)), "depends on the input"),
        (lambda m, x: head(m, F.batch_norm(m.c1(x), None, None, training=True)), "own statistics"),
        (lambda m, x: head(m, torch.add(m.c1(x), 1, out=torch.empty(0))), r"add\(out=...\)"),
        (lambda m, x: head(m, Hidden.apply(m.c1(x))), "can't see into"),
        (lambda m, x: Hidden.apply(head(m, m.c1(x))), "can't see"),
        (in_place_through_view, "through one of its views"),
        (view_of_changed, "through one of its views"),
        (assigned, "assigning to a part"),
        (accumulated, "writing into a tensor"),
        (lambda m, x: head(m, m.c1(x.detach())), "does not depend on its input"),
    ],
)
def test_what_has_no_rule_is_refused(forward: Any, message: str) -> None:
    torch.manual_seed(0)
    model = Net(forward, **modules()).eval()
    with pytest.raises(UserError, match=message):
        explain(model, torch.randn(2, 3, 6, 6), 0)


def test_error_names_the_module() -> None:
    inner = nn.Sequential(nn.Conv2d(3, 4, 3), nn.LocalResponseNorm(2))
    model = nn.Sequential(inner, nn.Flatten(), nn.Linear(64, 2)).eval()
    with pytest.raises(UserError, match=r"local_response_norm \(in module '0.1'\)"):
        explain(model, torch.randn(2, 3, 6, 6), 0)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_torchscript_is_refused() -> None:
    model = torch.jit.trace(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).eval(), torch.randn(1, 3, 2, 2))
    with pytest.raises(UserError, match="can't see into"):
        explain(model, torch.randn(2, 3, 2, 2), 0)


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


ACTIVATIONS = [
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.Hardshrink,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,
    nn.LeakyReLU,
    nn.LogSigmoid,
    nn.Mish,
    nn.PReLU,
    nn.RReLU,
    nn.ReLU,
    nn.ReLU6,
    nn.SELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.Softplus,
    nn.Softshrink,
    nn.Softsign,
    nn.Tanh,
    nn.Tanhshrink,
    lambda: nn.Threshold(0.1, 0.0, inplace=True),
]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: getattr(a, "__name__", "activation"))
def test_activations_pass_relevance(activation: Callable[[], nn.Module]) -> None:
    """Below an activation the relevance is that of a network whose activation is hidden in the input."""
    torch.manual_seed(0)
    convolution = nn.Conv2d(3, 2, 3, bias=False).double()
    act = activation().double().eval()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    model = nn.Sequential(act, convolution, nn.Flatten()).eval()
    values = act(x.clone()).detach()
    expected = explain(nn.Sequential(convolution, nn.Flatten()).eval(), values, 0, composite="epsilon_alpha2_beta1")
    torch.testing.assert_close(explain(model, x, 0, composite="epsilon_alpha2_beta1"), expected)
