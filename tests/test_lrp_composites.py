"""Composites: mappings to rules, the last layers, additions and biases against formulas, conservation and zennit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from spray import explain
from spray.errors import UserError
from spray.lrp import AlphaBeta, Composite, Epsilon, Flat, Gamma, Rule, WSquare, Zero, ZPlus, propagate


def close(a: Tensor, b: Tensor, tolerance: float = 1e-10) -> None:
    assert float(b.abs().max()) > 1e-12, "nothing to compare"
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * float(b.abs().max()))


def network(bias: bool = True, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential()
    layers = {
        "stem": nn.Conv2d(3, 4, 3, padding=1, bias=bias),
        "relu1": nn.ReLU(),
        "body": nn.Conv2d(4, 5, 3, bias=bias),
        "relu2": nn.ReLU(),
        "flatten": nn.Flatten(),
        "fc": nn.Linear(5 * 16, 7, bias=bias),
        "relu3": nn.ReLU(),
        "out": nn.Linear(7, 3, bias=bias),
    }
    for name, layer in layers.items():
        model.add_module(name, layer)
    return model.double().eval()


def images() -> Tensor:
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


# Mappings


@pytest.mark.parametrize(
    "mapping",
    [
        {"convolution": "z_plus", "linear": "epsilon", "first": "flat"},
        {"convolution": ZPlus(), "linear": Epsilon(), "first": Flat()},
        {"convolution": {"rule": "z_plus"}, "linear": {"rule": "epsilon"}, "first": {"rule": "flat"}},
        {"body": "z_plus", "stem": "flat"},
        {"[b]ody": "z_plus", "st*": "flat", "*": "epsilon"},
        {"convolution": {"rule": "alpha_beta", "alpha": 1.0, "beta": 0.0}, "stem": Flat()},
        {"stem": "flat", "s*": "gamma", "*": "lrp_0", "body": "w_square", "first": "w_square"},
    ],
    ids=str,
)
def test_mappings_are_the_composite_that_they_describe(mapping: dict[str, Any]) -> None:
    expected = explain(network(), images(), 1, composite="epsilon_plus_flat")
    result = explain(network(), images(), 1, composite=mapping)
    if "s*" in mapping:  # the first pattern that fits counts, and names go before kinds
        rules = Composite(Zero(), Zero(), names={"stem": Flat()})
        expected = propagate(network(), images(), rules, logit(1))
    close(result, expected)


def logit(target: int) -> Any:
    def initial(logits: Tensor) -> Tensor:
        R = torch.zeros_like(logits)
        R[:, target] = logits[:, target]
        return R.detach()

    return initial


def test_options_of_a_rule_in_a_mapping() -> None:
    result = explain(network(), images(), 1, composite={"body": {"rule": "gamma", "gamma": 0.1}})
    close(result, explain(network(), images(), 1, composite={"body": Gamma(0.1)}))
    assert not torch.allclose(result, explain(network(), images(), 1, composite={"body": Gamma(0.25)}))
    close(
        explain(
            network(),
            images(),
            1,
            composite={"convolution": "gamma", "fc": {"rule": "epsilon", "epsilon": 0.2}},
            gamma=2,
        ),
        explain(network(), images(), 1, composite={"convolution": Gamma(2), "fc": Epsilon(0.2)}),
    )
    with_bounds = {"first": {"rule": "z_box", "low": [-9.0, -8, -7], "high": 9.0}}
    assert explain(network(), images(), 1, composite=with_bounds).any()


# The last layers


class TwoHeads(nn.Module):
    """Two heads whose outputs are joined, one of them deeper; pooling and a scale after them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Conv2d(3, 4, 3)
        self.inner = nn.Conv2d(4, 4, 1)
        self.deep = nn.Conv2d(4, 2, 1)
        self.shallow = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.body(x))
        maps = torch.cat([self.deep(F.relu(self.inner(x))), self.shallow(x)], 1)
        return 2 * F.adaptive_avg_pool2d(maps, 1).flatten(1)


def test_last_is_for_layers_that_no_affine_layer_comes_after() -> None:
    torch.manual_seed(0)
    model = TwoHeads().double().eval()
    for target in ([0, 1, 2, 3], 0, 3):
        by_kind = explain(model, images(), target, composite={"last": "z_plus", "convolution": "gamma"})
        by_name = {"deep": "z_plus", "shallow": "z_plus", "convolution": "gamma"}
        close(by_kind, explain(model, images(), target, composite=by_name))
    close(
        explain(network(), images(), 1, composite={"last": "gamma"}),
        explain(network(), images(), 1, composite={"out": "gamma"}),
    )
    # A name goes before "last".
    close(
        explain(network(), images(), 1, composite={"last": "z_plus", "out": "gamma"}),
        explain(network(), images(), 1, composite={"out": "gamma"}),
    )
    # Where relevance starts at an inner layer, the last is the one before.
    close(
        explain(network(), images(), composite={"last": "gamma"}, start=("relu2", 1)),
        explain(network(), images(), composite={"body": "gamma"}, start=("relu2", 1)),
    )


@pytest.mark.parametrize("rule", ["flat", "w_square", {"rule": "z_box", "low": 0.0, "high": 20.0}], ids=str)
def test_a_last_rule_that_gives_relevance_to_zeros(rule: Any) -> None:
    """The ReLU before it has outputs that are zero, and those get relevance."""
    result = explain(network(), images(), 1, composite={"last": rule})
    close(result, explain(network(), images(), 1, composite={"out": rule}))


# Additions


class Residual(nn.Module):
    """An addition of two signals, of both signs or after ReLUs."""

    def __init__(self, rectified: bool) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 5), nn.Linear(4, 5), nn.Linear(5, 3)
        self.rectified = rectified

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.a(x) + self.b(x)) if self.rectified else self.a(x) + self.b(x))


@pytest.mark.parametrize("rectified", [False, True])
@pytest.mark.parametrize("addition", ["norm", "equal", "magnitude"])
def test_additions_are_split_by_their_formula(addition: str, rectified: bool) -> None:
    torch.manual_seed(0)
    model = Residual(rectified).double().eval()
    x = torch.randn(3, 4, dtype=torch.float64)
    a, b = model.a(x), model.b(x)
    z = F.relu(a + b) if rectified else a + b
    y = model.out(z)[:, 1:2]
    R = z * model.out.weight[1] / (y + 1e-6 * y.sign()) * y
    shares = {
        "norm": (a / (a + b + 1e-6 * (a + b).sign()), b / (a + b + 1e-6 * (a + b).sign())),
        "equal": (torch.full_like(a, 0.5), torch.full_like(a, 0.5)),
        "magnitude": (a.abs() / (a.abs() + b.abs()), b.abs() / (a.abs() + b.abs())),
    }[addition]
    results = explain(model, x, 1, composite="epsilon", addition=addition, layer=["a", "b", ""])
    for name, share in zip("ab", shares, strict=True):
        close(results[name], (R * share).detach(), 1e-5)
    layer_by_layer = sum(
        x * ((results[name] / (t + 1e-6 * t.sign())) @ layer.weight)
        for name, t, layer in (("a", a, model.a), ("b", b, model.b))
    )
    close(results[""], layer_by_layer.detach())
    many = explain(model, x, [0, 1], composite="epsilon", addition=addition)
    close(many[:, 1], results[""], 1e-12)
    close(explain(model, x, 1, composite={"addition": addition}), results[""])


# Biases


def zennit_relevance(model: nn.Module, x: Tensor, rule: Any) -> Tensor:
    from zennit.composites import LayerMapComposite, layer_map_base
    from zennit.types import Convolution

    leaf = x.clone().requires_grad_()
    layers = [*layer_map_base(), (Convolution, rule), (nn.Linear, rule)]
    with LayerMapComposite(layer_map=layers).context(model) as modified:
        output = modified(leaf)
        return torch.autograd.grad(output, leaf, logit(1)(output))[0]


@pytest.mark.parametrize("name", ["epsilon", "z_plus", "alpha_beta", "flat", "w_square"])
def test_biases_are_left_out_as_in_zennit(name: str) -> None:
    from zennit import rules

    own, theirs = {
        "epsilon": (Epsilon(1e-6), rules.Epsilon(1e-6, zero_params="bias")),
        "z_plus": (ZPlus(), rules.ZPlus(zero_params="bias")),
        "alpha_beta": (AlphaBeta(2, 1), rules.AlphaBeta(2, 1, zero_params="bias")),
        "flat": (Flat(), rules.Flat(zero_params="bias")),
        "w_square": (WSquare(), rules.WSquare(zero_params="bias")),
    }[name]
    for seed in range(3):
        model = network(seed=seed)
        result = explain(model, images(), 1, composite={"convolution": own, "linear": own}, zero_bias=True)
        # zennit has a stabiliser in the denominators of w² as well.
        close(result, zennit_relevance(model, images(), theirs), 1e-4 if name == "w_square" else 1e-6)
        also = explain(model, images(), 1, composite={"convolution": own, "linear": own, "zero_bias": True})
        close(also, result)
        if name not in ("flat", "w_square"):
            assert not torch.allclose(
                result, explain(model, images(), 1, composite={"convolution": own, "linear": own})
            )


@pytest.mark.parametrize("rule", [Gamma(0.3), AlphaBeta(2, 1), Epsilon(0.1), ZPlus(), Zero()], ids=repr)
def test_a_layer_without_the_share_of_its_bias_is_one_that_has_none(rule: Rule) -> None:
    """Also for γ, where zennit takes the sign of the output with its bias."""
    model = network()
    relevance = explain(
        model,
        images(),
        1,
        composite={"linear": rule, "convolution": rule},
        layer=["relu1", "body", "fc", "flatten"],
        zero_bias=True,
    )
    activations = model[:2](images()).detach(), model[:5](images()).detach()
    for layer, below, above, a in (("body", "relu1", "body", activations[0]), ("fc", "flatten", "fc", activations[1])):
        alone = network().get_submodule(layer)
        alone.bias = None
        unbiased = nn.Sequential(nn.ReLU(), alone).eval()
        expected = propagate(unbiased, a, Composite(rule, rule), lambda _, name=above: relevance[name])
        close(relevance[below], expected)


@settings(max_examples=25, deadline=None)
@given(
    widths=st.lists(st.integers(4, 6), min_size=1, max_size=3),
    skip=st.booleans(),
    norm=st.booleans(),
    average=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_relevance_is_conserved_without_the_share_of_biases(
    widths: list[int], skip: bool, norm: bool, average: bool, seed: int
) -> None:
    torch.manual_seed(seed)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sizes = list(zip([3, *widths[:-1]], widths, strict=True))
            self.convs = nn.ModuleList(nn.Conv2d(m, n, 3, padding=1) for m, n in sizes)
            self.norms = nn.ModuleList(nn.BatchNorm2d(n) for n in widths)
            self.skips = nn.ModuleList(nn.Conv2d(m, n, 3, padding=1) for m, n in sizes)
            self.fc = nn.Linear(widths[-1] * 9, 3)

        def forward(self, x: Tensor) -> Tensor:
            for conv, bn, side in zip(self.convs, self.norms, self.skips, strict=True):
                y = bn(conv(x)) if norm else conv(x)
                x = F.relu(y + side(x) if skip else y)
            x = F.avg_pool2d(x, 2) if average else F.max_pool2d(x, 2)
            return self.fc(x.flatten(1))

    model = Net()
    for bn in model.norms:
        nn.init.uniform_(bn.running_mean, -0.3, 0.3)
        nn.init.uniform_(bn.bias, -0.3, 0.3)
    model = model.double().eval()
    x = images()
    # An output whose inputs are all zero has no share but its bias's, whose relevance would be lost.
    empty: list[bool] = []

    def look(_: nn.Module, inputs: tuple[Tensor]) -> None:
        seen = F.max_pool2d(inputs[0].abs().amax(dim=1, keepdim=True), 3, stride=1, padding=1)
        empty.append(bool((seen == 0).any()))

    handles = [conv.register_forward_pre_hook(look) for conv in model.convs]
    y = model(x)[:, 0].detach()
    for handle in handles:
        handle.remove()
    assume(not any(empty))
    # LRP-0 is ε without a stabiliser, in sums and averages too.
    R = explain(model, x, 0, composite="lrp_0", zero_bias=True).sum((1, 2, 3))
    torch.testing.assert_close(R, y, rtol=1e-6, atol=1e-6)
    unlike = explain(model, x, 0, composite="lrp_0").sum((1, 2, 3))
    assert not torch.allclose(unlike, y, rtol=1e-6, atol=1e-6)


# Mistakes


@pytest.mark.parametrize(
    ("composite", "options", "message"),
    [
        ("epsilonplus", {}, "allowed: deep_taylor, epsilon, epsilon_alpha2_beta1"),
        ({"conv": "flat"}, {}, r"neither a kind of layer \(first, convolution, linear, last\) nor a module"),
        ({"linear": "foo"}, {}, "allowed: alpha_beta, epsilon, flat, gamma, lrp_0"),
        ({"linear": None}, {}, "allowed: alpha_beta, epsilon"),
        ({"linear": Gamma}, {}, "allowed: alpha_beta, epsilon"),
        ({"linear": {"gamma": 1}}, {}, "names no rule"),
        ({"linear": {"rule": "gamma", "gama": 1}}, {}, "takes no option gama; allowed: gamma"),
        ({"linear": {"rule": "gamma", "gamma": -1}}, {}, "gamma= must be a number of 0 or more"),
        ({"linear": {"rule": "epsilon", "epsilon": "x"}}, {}, "epsilon= must be a number of 0 or more"),
        ({"linear": {"rule": "alpha_beta", "alpha": 3.0}}, {}, "α − β = 1"),
        ({"first": "z_box"}, {}, "needs low= and high="),
        ({"linear": "gamma"}, {"epsilon": 1}, "takes no option epsilon; allowed: gamma"),
        ("epsilon", {"addition": "sum"}, "unknown addition 'sum'; allowed: norm, equal, magnitude"),
        ("epsilon", {"zero_bias": "yes"}, "unknown zero_bias 'yes'; allowed: False, True"),
        ("epsilon", {"normalization": "none"}, "unknown normalization 'none'; allowed: norm, pass"),
        ({"addition": "sum"}, {}, "unknown addition 'sum'; allowed: norm, equal, magnitude"),
        ("epsilon", {"gamma": 1}, "takes no option gamma; allowed: epsilon, addition"),
        ("epsilon_gamma_box", {"low": 0}, "needs high="),
        (5, {}, "composite"),
        (None, {}, "composite"),
        (["flat"], {}, "composite"),
        ({5: "flat"}, {}, "5"),
        ({"linear": {"rule": "alpha_beta", "alpha": "x"}}, {}, "alpha"),
        ({"first": {"rule": "z_box", "low": -9.0, "high": "a"}}, {}, "high"),
    ],
    ids=str,
)
def test_mistakes_are_told(composite: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        explain(network(), images(), 1, composite=composite, **options)


def test_zero_bias_leaves_out_what_a_normalisation_of_its_own_adds() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(8)
    for values, (least, greatest) in {
        norm.running_mean: (-1, 1),
        norm.running_var: (0.5, 2),
        norm.bias: (-1, 1),
    }.items():
        nn.init.uniform_(values, least, greatest)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), norm, nn.Linear(8, 3)).double().eval()
    x = torch.randn(4, 6, dtype=torch.float64)
    R = explain(model, x, 1, composite="epsilon", epsilon=1e-12, zero_bias=True)
    assert not torch.allclose(explain(model, x, 1, composite="epsilon").sum(1), R.sum(1), rtol=0.1)
    # The stabiliser of the normalisation, 1e-6, takes its share.
    torch.testing.assert_close(R.sum(1), model(x)[:, 1].detach(), rtol=1e-4, atol=0)


def test_an_addition_with_alpha_one_is_an_addition() -> None:
    torch.manual_seed(0)
    a, b = nn.Linear(5, 4).double(), nn.Linear(5, 4).double()
    x = torch.randn(3, 5, dtype=torch.float64)

    class Net(nn.Module):
        def __init__(self, add: Any) -> None:
            super().__init__()
            self.a, self.b, self.add = a, b, add

        def forward(self, x: Tensor) -> Tensor:
            return self.add(self.a(x), self.b(x))

    plain, with_alpha = Net(lambda s, t: s + t).eval(), Net(lambda s, t: torch.add(s, t, alpha=1)).eval()
    for addition in ("norm", "equal", "magnitude"):
        expected = explain(plain, x, 1, composite="epsilon", addition=addition)
        assert torch.equal(explain(with_alpha, x, 1, composite="epsilon", addition=addition), expected)
