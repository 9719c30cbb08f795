"""Relevance at, from and through inner layers: against networks that were cut or extended by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spray import explain
from spray.errors import UserError
from spray.lrp import Composite, Epsilon, Zero, build_composite, propagate, propagate_to

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


# What is the relevance at an inner layer


@pytest.mark.parametrize("inplace", [False, True], ids=["", "in place"])
@pytest.mark.parametrize("layer", ["conv", "norm", "relu", "block", "pool", "conv2", "relu2", "average", "fc", "relu3"])
@pytest.mark.parametrize("composite", ["lrp_0", "epsilon", "epsilon_plus", "epsilon_alpha2_beta1"])
def test_relevance_at_a_layer_is_that_of_the_rest_of_the_network(composite: str, layer: str, inplace: bool) -> None:
    model, x = network(inplace), images()
    # Where a convolution's normalisation is merged, its output is the normalised one.
    first, rest = cut(folded(network()), layer)
    activation = first(x).detach()
    expected = propagate(rest, activation, build_composite(composite, rest), logit_of(1))
    result = explain(model, x, 1, composite=composite, layer=layer)
    assert result.shape == activation.shape
    close(result, expected, 1e-11)


def test_relevance_below_a_layer_is_unchanged_by_looking() -> None:
    model, x = network(), images()
    layers = [name for name, _ in model.named_modules() if name and name != "block.relu"]
    for composite, options in COMPOSITES.items():
        alone = explain(model, x, 1, composite=composite, **options)
        both = explain(model, x, 1, composite=composite, layer=["", *layers], **options)
        assert list(both) == ["", *layers]
        assert torch.equal(both[""], alone)
        for name in layers:
            assert torch.equal(both[name], explain(model, x, 1, composite=composite, layer=name, **options)), name


def test_inner_layers_of_a_block() -> None:
    """Written out by hand for LRP-0: the activation times the gradient there."""
    model, x = folded(network()), images()
    values: dict[str, Tensor] = {}
    a = model.relu(model.conv(x)).detach().requires_grad_()
    block = model.block
    values["block.c1"] = block.c1(a)
    values["block.relu#1"] = F.relu(values["block.c1"])
    values["block.c2"] = block.c2(values["block.relu#1"])
    values["block.shortcut"] = a * 1
    values["block.relu#2"] = F.relu(values["block.c2"] + values["block.shortcut"])
    logit = cut(model, "block")[1](values["block.relu#2"])[:, 2].sum()
    for name, gradient in zip(values, torch.autograd.grad(logit, list(values.values())), strict=True):
        close(explain(network(), x, 2, composite="lrp_0", layer=name), values[name].detach() * gradient, 1e-10)


def test_an_identity_is_told_from_the_other_uses_of_its_input() -> None:
    """A shortcut's relevance is its own branch's, and a condition there leaves the other branch alone."""
    model, x = network(), images()
    shortcut = explain(model, x, 0, composite="epsilon", layer="block.shortcut")
    whole = explain(model, x, 0, composite="epsilon", layer="relu")
    assert not torch.allclose(shortcut, whole)
    zero = torch.zeros(4, 8, 8)
    through_convolutions = explain(model, x, 0, composite="epsilon", layer="relu", condition={"block.shortcut": zero})
    close(through_convolutions, whole - shortcut)


@pytest.mark.parametrize("layer", ["identity", "dropout", "empty"])
def test_an_identity_between_a_convolution_and_its_norm_changes_nothing(layer: str) -> None:
    torch.manual_seed(0)
    extra = {"identity": nn.Identity(), "dropout": nn.Dropout(), "empty": nn.Sequential()}
    parts = [("conv", nn.Conv2d(3, 4, 3)), *extra.items(), ("norm", norm(4)), ("relu", nn.ReLU())]
    model = nn.Sequential()
    for name, module in [*parts, ("flatten", nn.Flatten()), ("fc", nn.Linear(4 * 36, 3))]:
        model.add_module(name, module)
    model = model.double().eval()
    both = explain(model, images(), 1, composite="epsilon_plus", layer=["", layer, "conv", "relu"])
    assert torch.equal(both[""], explain(model, images(), 1, composite="epsilon_plus"))
    close(both[layer], both["conv"])
    ones = torch.ones(4, 6, 6)
    close(explain(model, images(), 1, composite="epsilon_plus", condition={layer: ones}), both[""])


def test_a_module_whose_result_in_place_is_not_returned() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu, self.fc = nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            self.relu(y)
            return self.fc(y.mean((2, 3)))

    torch.manual_seed(0)
    model = InPlace().double().eval()
    result = explain(model, images(), 1, composite="lrp_0", layer="relu")
    a = F.relu(model.conv(images())).detach().requires_grad_()
    gradient = torch.autograd.grad(model.fc(a.mean((2, 3)))[:, 1].sum(), a)[0]
    close(result, (a * gradient).detach())


def test_relevance_is_conserved_from_layer_to_layer_without_biases() -> None:
    model = network()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.zeros_(module.running_mean)
    x = images()
    layers = ["", "conv", "norm", "relu", "block", "pool", "conv2", "relu2", "average", "flatten", "fc", "relu3", "out"]
    relevance = explain(model, x, 1, composite="lrp_0", layer=layers)
    logit = model(x)[:, 1].detach()
    for layer in layers:
        torch.testing.assert_close(relevance[layer].flatten(1).sum(1), logit, rtol=1e-9, atol=1e-9, msg=layer)
    torch.testing.assert_close(relevance["out"], logit_of(1)(model(x)))


# Where relevance starts at an inner layer


class Head(nn.Module):
    """A network's first layers, and what a fixed linear layer without bias makes of their output."""

    def __init__(self, first: nn.Module, weights: Tensor) -> None:
        super().__init__()
        self.first = first
        self.head = nn.Linear(weights.numel(), 1, bias=False, dtype=weights.dtype)
        self.head.weight.data.copy_(weights.reshape(1, -1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.first(x).flatten(1))


def concepts(shape: tuple[int, ...]) -> dict[str, tuple[Any, Tensor]]:
    """Concepts of a layer, and the weights of the linear layer that computes them."""
    generator = torch.Generator().manual_seed(3)
    channel, subset, direction = torch.zeros(shape), torch.zeros(shape), torch.zeros(shape)
    channel[1] = 1
    subset[[0, 2]] = 1
    h = torch.randn(shape[0], generator=generator, dtype=torch.float64)
    direction = (h / h.norm()).reshape(-1, *[1] * (len(shape) - 1)).expand(shape).contiguous()
    cases = {"channel": (1, channel), "subset": ([0, 2], subset), "direction": (3 * h, direction)}
    cases["numpy subset"] = (np.array([0, 2]), subset)
    cases["boolean"] = (torch.arange(shape[0]) % shape[0] % 4 % 2 == 0, subset) if shape[0] == 4 else cases["subset"]
    cases["numpy direction"] = (3 * h.numpy(), direction)
    if len(shape) > 1:
        mask = torch.rand(shape, generator=generator, dtype=torch.float64)
        cases["mask"] = (mask, mask)
        cases["positions"] = (mask[:1], mask[:1].expand(shape).contiguous())
    return {name: (concept, weights.double()) for name, (concept, weights) in cases.items()}


@pytest.mark.parametrize("inplace", [False, True], ids=["", "in place"])
@pytest.mark.parametrize("layer", ["conv", "norm", "relu", "block", "pool", "conv2", "fc", "relu3"])
@pytest.mark.parametrize("composite", ["lrp_0", "epsilon_plus", "epsilon_plus_flat", "epsilon_alpha2_beta1"])
def test_relevance_from_a_concept_is_that_of_a_linear_head(composite: str, layer: str, inplace: bool) -> None:
    model, x = network(inplace), images()
    first, _ = cut(network(), layer)
    for name, (concept, weights) in concepts(tuple(first(x).shape[1:])).items():
        truncated = Head(first, weights).eval()
        headed = build_composite(composite, truncated)
        headed = replace(headed, names={"head": Zero()})
        expected = propagate(truncated, x, headed, lambda logit: logit.detach())
        result = explain(model, x, composite=composite, start=(layer, concept))
        assert result.shape == x.shape
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-10 * float(expected.abs().max()), msg=name)


class Failing(nn.Module):
    """A module that must not run."""

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("ran after the layer where relevance starts")


def test_the_forward_pass_ends_where_relevance_starts() -> None:
    model, x = network(), images()
    expected = explain(model, x, start=("block", 1))
    calls = []
    hooks = [
        module.register_forward_pre_hook(lambda module, args, name=name: calls.append(name))
        for name, module in model.named_modules()
    ]
    explain(model, x, start=("block", 1))
    for hook in hooks:
        hook.remove()
    assert "block" in calls
    assert not {"pool", "conv2", "fc", "out"} & set(calls)
    model.pool = Failing().eval()
    assert torch.equal(explain(model, x, start=("block", 1)), expected)


def test_layers_conditions_and_the_start_together() -> None:
    model, x = network(), images()
    whole = explain(model, x, start=("block", 1), layer=["", "relu", "block"], condition={"relu": [0, 3]})
    a = cut(model, "block")[0](x).detach()
    start = torch.zeros_like(a)
    start[:, 1] = a[:, 1]
    close(whole["block"], start)
    assert bool((whole["relu"][:, [1, 2]] == 0).all())
    total = sum(explain(model, x, start=("block", 1), condition={"relu": c}) for c in range(4))
    close(total, explain(model, x, start=("block", 1)))
    # A condition at the start itself counts as well.
    assert not explain(model, x, start=("block", 1), condition={"block": 2}).any()
    close(explain(model, x, start=("block", 1), condition={"block": [1, 2]}), explain(model, x, start=("block", 1)))


def test_a_module_that_runs_several_times() -> None:
    model, x = network(), images()
    first = explain(model, x, start=("block.relu#1", 0))
    assert torch.equal(first, explain(model, x, start=("block.relu", 0)))
    close(explain(model, x, start=("block.relu#2", 0)), explain(model, x, start=("block", 0)))
    close(explain(model, x, 1, layer="block.relu#2"), explain(model, x, 1, layer="block"))
    close(
        explain(model, x, 1, condition={"block.relu#2": 2}, layer="relu"),
        explain(model, x, 1, condition={"block": 2}, layer="relu"),
    )
    with pytest.raises(UserError, match=r"ran 2 times; name the call: block.relu#1 to block.relu#2"):
        explain(model, x, 1, layer="block.relu")
    with pytest.raises(UserError, match=r"'block.relu' ran 2 times"):
        explain(model, x, 1, condition={"block.relu": 0})
    with pytest.raises(UserError, match=r"'block.relu#3' did not run: module 'block.relu' ran 2 times"):
        explain(model, x, 1, layer="block.relu#3")


# What passes through a concept


@pytest.mark.parametrize("layer", ["conv", "norm", "relu", "block", "block.c1", "block.b2", "conv2", "average", "fc"])
@pytest.mark.parametrize("composite", COMPOSITES)
def test_conditions_on_all_channels_add_up(composite: str, layer: str) -> None:
    model, x = network(), images()
    options = COMPOSITES[composite]
    shape = explain(model, x, 1, composite=composite, layer=layer, **options).shape[1:]
    whole = explain(model, x, 1, composite=composite, **options)

    def conditioned(concept: Any) -> Tensor:
        return explain(model, x, 1, composite=composite, condition={layer: concept}, **options)

    # What flows past the layer, through the block's shortcut, is in every map.
    past = conditioned(torch.zeros(shape)) if len(shape) > 1 else torch.zeros_like(x)
    assert bool(past.any()) == (layer in ("block.c1", "block.b2"))
    parts = torch.stack([conditioned(c) - past for c in range(shape[0])])
    # A condition has a layer computed before the ReLU that follows is known: another way to the same numbers.
    close(parts.sum(0), whole - past, 1e-9)
    assert not torch.allclose(parts[0], whole - past)
    close(conditioned(list(range(shape[0]))), whole, 1e-9)
    if len(shape) > 1:
        close(conditioned(torch.ones(shape)), whole, 1e-9)


@pytest.mark.parametrize("layer", ["relu", "block", "conv2", "relu3"])
@pytest.mark.parametrize("composite", ["lrp_0", "epsilon", "epsilon_plus_flat", "epsilon_alpha2_beta1_flat"])
def test_conditions_on_an_orthonormal_basis_add_up(composite: str, layer: str) -> None:
    model, x = network(), images()
    channels = explain(model, x, 1, layer=layer).shape[1]
    basis = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64)).Q
    parts = [explain(model, x, 1, composite=composite, condition={layer: 2 * h}) for h in basis.T]
    whole = explain(model, x, 1, composite=composite)
    close(torch.stack(parts).sum(0), whole, 1e-9)


class Decomposed(nn.Module):
    """Chormai et al. 2022: the pair of linear layers U Uᵀ after the first part."""

    def __init__(self, first: nn.Module, rest: nn.Module, U: Tensor) -> None:
        super().__init__()
        self.first, self.rest = first, rest
        d = U.shape[0]
        self.encode = nn.Conv2d(d, d, 1, bias=False, dtype=U.dtype)
        self.decode = nn.Conv2d(d, d, 1, bias=False, dtype=U.dtype)
        self.encode.weight.data.copy_(U.T[..., None, None])
        self.decode.weight.data.copy_(U[..., None, None])

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.decode(self.encode(self.first(x))))


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("layer", ["norm", "conv2"])
@pytest.mark.parametrize("composite", ["lrp_0", "epsilon", "epsilon_plus_flat"])
def test_a_direction_is_a_pair_of_linear_layers(composite: str, layer: str, n: int) -> None:
    """At layers without zeros: where a_i = 0, the context R_i / a_i is taken for 0."""
    model, x = network(), images(n)
    channels = {"norm": 4, "conv2": 5}[layer]
    torch.manual_seed(5)
    U = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64)).Q
    decomposed = Decomposed(*cut(model, layer), U).eval()
    rules = build_composite(composite, decomposed)
    rules = replace(rules, names={"encode": Zero(), "decode": Zero()})
    for k in range(channels):
        result = explain(model, x, 1, composite=composite, condition={layer: U[:, k]})
        expected = propagate_to(decomposed, x, rules, logit_of(1), conditions={"encode": k})[""]
        close(result, expected, 1e-8)


def test_a_direction_of_one_sample_does_not_depend_on_the_batch() -> None:
    model, x = network(), images()
    h = torch.arange(1.0, 5)
    many = explain(model, x, [1, 2], condition={"relu": h})
    for n in range(3):
        close(many[n : n + 1], explain(model, x[n : n + 1], [1, 2], condition={"relu": h}))


def test_conditions_at_several_layers() -> None:
    model, x = network(), images()
    total = torch.zeros_like(x)
    for c in range(4):
        for k in range(5):
            total += explain(model, x, 1, condition={"relu": c, "conv2": k})
    close(total, explain(model, x, 1), 1e-9)
    both = explain(model, x, 1, condition={"relu": 0, "conv2": 3}, layer=["relu", "conv2"])
    assert bool((both["relu"][:, 1:] == 0).all())
    assert bool((both["conv2"][:, [0, 1, 2, 4]] == 0).all())
    assert both["conv2"][:, 3].any()


# Several targets at once, and contrasts


@pytest.mark.parametrize("composite", COMPOSITES)
def test_several_targets_are_single_ones_side_by_side(composite: str) -> None:
    model, x = network(), images()
    options: dict[str, Any] = {"composite": composite, **COMPOSITES[composite]}
    layers = ["", "conv", "block", "fc"]
    each = torch.tensor([[0, 2], [3, 3], [1, 0]])
    h = torch.arange(1.0, 5)
    for more in ({}, {"contrast": True}, {"init": "one"}, {"condition": {"block": h}}, {"condition": {"relu": 1}}):
        alone = {t: explain(model, x, t, layer=layers, **more, **options) for t in range(4)}
        together = explain(model, x, [0, 2], layer=layers, **more, **options)
        for name in layers:
            assert together[name].shape == (3, 2, *alone[0][name].shape[1:])
            close(together[name], torch.stack([alone[0][name], alone[2][name]], 1))
        own = explain(model, x, each, layer=layers, **more, **options)
        for n in range(3):
            for t in range(2):
                close(own["block"][n, t], alone[int(each[n, t])]["block"][n])
                torch.testing.assert_close(own[""][n, t], alone[int(each[n, t])][""][n], rtol=0, atol=1e-12)


def test_a_list_of_one_target_keeps_its_dimension() -> None:
    model, x = network(), images()
    one = explain(model, x, 2)
    assert torch.equal(explain(model, x, [2]), one[:, None])
    assert torch.equal(explain(model, x, torch.full((3, 1), 2)), one[:, None])
    assert torch.equal(explain(model, x, (2,), layer="fc"), explain(model, x, 2, layer="fc")[:, None])
    empty = explain(model, x[:0], [0, 1, 2], layer=["", "block"])
    assert empty[""].shape == (0, 3, 3, 8, 8)
    assert empty["block"].shape == (0, 3, 4, 8, 8)


@pytest.mark.parametrize("composite", COMPOSITES)
def test_contrast_starts_with_the_other_logits_too(composite: str) -> None:
    model, x = network(), images()
    rules = build_composite(composite, model, **COMPOSITES[composite])

    def start(weight: float) -> Callable[[Tensor], Tensor]:
        def initial(logits: Tensor) -> Tensor:
            w = torch.full_like(logits, -1 / 3)
            w[:, 2] = 1
            return w * logits.detach() if weight else w

        return initial

    for init, by_logit in (("logit", 1), ("one", 0)):
        result = explain(model, x, 2, composite=composite, contrast=True, init=init, **COMPOSITES[composite])
        close(result, propagate(model, x, rules, start(by_logit)))
    parts = [explain(model, x, t, composite=composite, **COMPOSITES[composite]) for t in range(4)]
    result = explain(model, x, 2, composite=composite, contrast=True, **COMPOSITES[composite])
    close(result, parts[2] - (parts[0] + parts[1] + parts[3]) / 3, 1e-10)


def test_contrast_of_the_gradient() -> None:
    model, x = network(), images()
    leaf = x.clone().requires_grad_()
    logits = model(leaf)
    difference = logits[:, 2] - logits[:, [0, 1, 3]].mean(1)
    expected = torch.autograd.grad(difference.sum(), leaf)[0]
    close(explain(model, x, 2, method="gradient", contrast=True), expected)
    close(explain(model, x, 2, method="gradient_x_input", contrast=True), expected * x)


# Sequences and one-dimensional signals


def sequence_model(kind: str) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(2)
    if kind == "signal":
        layers: list[nn.Module] = [nn.Conv1d(3, 5, 3), nn.ReLU(), nn.Dropout(), nn.MaxPool1d(2), nn.Flatten()]
        layers.append(nn.Linear(5 * 3, 4))
        x = torch.randn(2, 3, 8, dtype=torch.float64)
    else:
        layers = [nn.Linear(3, 5), nn.ReLU(), nn.Dropout(), nn.LayerNorm(5), nn.Flatten(), nn.Linear(40, 4)]
        x = torch.randn(2, 8, 3, dtype=torch.float64)
    return nn.Sequential(*layers).double().eval(), x


@pytest.mark.parametrize("layer", ["0", "1", "2"])
@pytest.mark.parametrize("kind", ["signal", "tokens"])
def test_channels_of_sequences(kind: str, layer: str) -> None:
    model, x = sequence_model(kind)
    relevance = explain(model, x, 1, composite="epsilon", layer=layer, condition={layer: 4})
    free = explain(model, x, 1, composite="epsilon", layer=layer)
    kept = relevance.movedim(1 if kind == "signal" else 2, 0)
    assert kept.shape[0] == 5
    assert not kept[:4].any()
    close(kept[4], free.movedim(1 if kind == "signal" else 2, 0)[4])
    a = model[: int(layer) + 1](x)
    start = explain(model, x, composite="epsilon", layer=layer, start=(layer, 4))
    assert torch.equal(
        start.movedim(1 if kind == "signal" else 2, 0)[4], a.movedim(-2 if kind == "signal" else -1, 0)[4]
    )


def test_channels_of_images_with_channels_last() -> None:
    """The activation in a block of Swin or ConvNeXt has its channels last, the block of the latter second."""

    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.up, self.act, self.down = nn.Conv2d(3, 4, 1), nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)
            self.block, self.fc = nn.Identity(), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.down(self.act(self.up(self.conv(x).permute(0, 2, 3, 1))))
            return self.fc(self.block(y.permute(0, 3, 1, 2)).mean((2, 3)))

    torch.manual_seed(0)
    model, x = Mixer().double().eval(), torch.randn(2, 3, 6, 5, dtype=torch.float64)
    inner = explain(model, x, 1, layer="act", condition={"act": 7})
    assert inner.shape == (2, 6, 5, 8)
    assert inner[..., 7].any()
    assert not inner[..., :7].any()
    outer = explain(model, x, 1, layer="block", condition={"block": 3})
    assert outer.shape == (2, 4, 6, 5)
    assert outer[:, 3].any()
    assert not outer[:, :3].any()


# Mistakes


class Odd(nn.Module):
    """A network with parts whose outputs can't be looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.MaxPool2d(2, return_indices=True)
        self.cut = nn.Conv2d(3, 2, 1)
        self.after = nn.ReLU()
        self.unused = nn.Linear(2, 2)
        self.side = nn.ReLU()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        pooled, _ = self.pair(x)
        blocked = self.after(self.cut(pooled.detach())).sum()
        self.side(pooled)
        return self.fc(pooled.mean((2, 3))) + blocked


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": "pair"}, "returns a tuple"),
        ({"layer": "cut"}, "does not depend on the input"),
        ({"layer": "after"}, "does not depend on the input"),
        ({"layer": "unused"}, "did not run"),
        ({"layer": "side"}, "no relevance reaches layer 'side'"),
        ({"condition": {"pair": 0}}, "returns a tuple"),
        ({"start": ("cut", 0)}, "does not depend on the input"),
        ({"start": ("unused", 0)}, "did not run"),
    ],
)
def test_layers_without_relevance_are_refused(options: dict[str, Any], message: str) -> None:
    torch.manual_seed(0)
    model = Odd().double().eval()
    target = None if "start" in options else 1
    with pytest.raises(UserError, match=message):
        explain(model, images(), target, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": "blok"}, "no layer 'blok'; did you mean 'block'"),
        ({"layer": "conv_2"}, "did you mean 'conv2'"),
        ({"layer": ["conv", "xyz"]}, "no layer 'xyz'; see model.named_modules"),
        ({"layer": "conv#0"}, "no layer 'conv#0'"),
        ({"layer": "conv#"}, "no layer 'conv#'"),
        ({"layer": "conv#a"}, "no layer 'conv#a'"),
        ({"layer": "conv#2"}, "did not run: module 'conv' ran 1 times"),
        ({"layer": 5}, "name of a layer or a list of names"),
        ({"layer": ["conv", 5]}, "name of a layer or a list of names"),
        ({"layer": []}, "names no layer"),
        ({"start": "conv"}, "layer's name and a concept"),
        ({"start": ("conv",)}, "layer's name and a concept"),
        ({"start": ("conv", 1, 2)}, "layer's name and a concept"),
        ({"start": ("", 0)}, "no layer ''"),
        ({"start": ("conv", 0), "layer": "fc"}, "'fc' did not run: .* before layer 'conv', where relevance starts"),
        ({"start": ("conv", 0), "target": 1}, "leave target and contrast out"),
        ({"start": ("conv", 0), "contrast": True}, "leave target and contrast out"),
        ({"condition": ["conv"]}, "must map layers' names to concepts"),
        ({"condition": {5: 1}}, "no layer 5"),
        ({"condition": {"": 1}}, "no layer ''"),
    ],
)
def test_layers_that_do_not_exist_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        explain(network(), images(), **options)


@pytest.mark.parametrize(
    "concept",
    [
        4,
        -1,
        [0, 4],
        [],
        None,
        True,
        [True, False, True, False],
        1.5,
        [0.5, 1.0],
        "1",
        "conv",
        torch.tensor(1.5),
        torch.ones(3),
        torch.zeros(4),
        torch.tensor([1.0, float("nan"), 0, 0]),
        torch.ones(5, 8, 8),
        torch.ones(3, 4, 8, 8),
        torch.ones(3, dtype=torch.bool),
        np.ones(3),
    ],
    ids=repr,
)
def test_concepts_that_do_not_fit_are_refused(concept: Any) -> None:
    allowed = r"allowed: a channel from 0 to 3, a list of them, a direction \(4,\) or a mask"
    with pytest.raises(UserError, match=allowed):
        explain(network(), images(), 1, condition={"relu": concept})
    with pytest.raises(UserError, match=allowed):
        explain(network(), images(), start=("relu", concept))


def test_a_normalisation_merged_or_forced_gives_the_same_relevance() -> None:
    """A condition has the convolution computed before its norm is known; a mask of ones must change nothing."""
    model, x = network(), images()
    rules = Composite(Epsilon(1e-9), Epsilon(1e-9))
    ones = {"conv": torch.ones(4, 8, 8), "block.c1": torch.ones(4, 8, 8), "block.b2": torch.ones(4, 8, 8)}
    free = propagate_to(model, x, rules, logit_of(1), layers=["conv", "block.c1"])
    forced = propagate_to(model, x, rules, logit_of(1), layers=["conv", "block.c1"], conditions=ones)
    for name in free:
        close(forced[name], free[name], 1e-9)
