"""Relevance at inner layers, and from them: against networks that were cut or extended by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from layered import COMPOSITES, close, cut, folded, images, logit_of, network, norm
from torch import Tensor, nn

from spray import explain
from spray.errors import UserError
from spray.lrp import Composite, Epsilon, Zero, build_composite, propagate, propagate_to

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


def test_a_normalisation_merged_or_forced_gives_the_same_relevance() -> None:
    """A condition has the convolution computed before its norm is known; a mask of ones must change nothing."""
    model, x = network(), images()
    rules = Composite(Epsilon(1e-9), Epsilon(1e-9))
    ones = {"conv": torch.ones(4, 8, 8), "block.c1": torch.ones(4, 8, 8), "block.b2": torch.ones(4, 8, 8)}
    free = propagate_to(model, x, rules, logit_of(1), layers=["conv", "block.c1"])
    forced = propagate_to(model, x, rules, logit_of(1), layers=["conv", "block.c1"], conditions=ones)
    for name in free:
        close(forced[name], free[name], 1e-9)
