"""Each rule against its formula, written out with the layer's matrix (its Jacobian) in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from spray.errors import UserError
from spray.lrp import (
    AlphaBeta,
    Composite,
    Epsilon,
    Flat,
    Gamma,
    Rule,
    WSquare,
    ZBox,
    Zero,
    ZPlus,
    build_composite,
    propagate,
)
from spray.lrp.rules import divide

LOW, HIGH = -4.0, 4.5


def batch_norm(layer: nn.Module, norm: nn.Module) -> nn.Sequential:
    """A layer and a batch normalisation with statistics of its own."""
    for t, (least, greatest) in {
        norm.running_mean: (-1, 1),
        norm.running_var: (0.3, 2),
        norm.weight: (-1.5, 1.5),
        norm.bias: (-1, 1),
    }.items():
        nn.init.uniform_(t, least, greatest)
    return nn.Sequential(layer, norm)


LAYERS = {
    "linear": (lambda: nn.Linear(6, 5), (6,)),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), (6,)),
    "linear on sequences": (lambda: nn.Linear(4, 3), (2, 4)),
    "linear, batch norm": (lambda: batch_norm(nn.Linear(6, 5), nn.BatchNorm1d(5, eps=0.1)), (6,)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3), (2, 6)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 3), (2, 5, 5)),
    "conv2d, stride and padding": (lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1), (2, 6, 5)),
    "conv2d, groups and dilation": (lambda: nn.Conv2d(4, 6, (2, 3), groups=2, dilation=(1, 2)), (4, 4, 6)),
    "conv2d, padding same": (lambda: nn.Conv2d(2, 2, (2, 3), padding="same"), (2, 4, 4)),
    "conv2d, padding valid": (lambda: nn.Conv2d(2, 2, 2, padding="valid"), (2, 3, 4)),
    "conv2d, batch norm": (
        lambda: batch_norm(nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3, eps=0.1)),
        (2, 4, 4),
    ),
    "conv3d": (lambda: nn.Conv3d(1, 2, 2), (1, 3, 3, 3)),
    "conv_transpose2d, groups": (
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        (4, 3, 3),
    ),
    "conv_transpose2d, groups, batch norm": (
        lambda: batch_norm(nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2), nn.BatchNorm2d(6)),
        (4, 3, 3),
    ),
}


def stabilized(z: Tensor, epsilon: float) -> Tensor:
    return z + epsilon * torch.where(z < 0, -1.0, 1.0).to(z)


def proportions(rule: Rule, W: Tensor, b: Tensor, a: Tensor) -> Tensor:
    """The matrix (outputs, inputs) of the shares of each output's relevance that its inputs get."""
    C = W * a
    z = C.sum(1) + b
    match rule:
        case Zero():
            return C / z[:, None]
        case Epsilon():
            return C / stabilized(z, 1e-6 if rule.epsilon is None else rule.epsilon)[:, None]
        case Gamma():
            rows = []
            for k in range(len(z)):
                favoured = C[k].clamp(min=0) if z[k] > 0 else C[k].clamp(max=0)
                favoured_bias = b[k].clamp(min=0) if z[k] > 0 else b[k].clamp(max=0)
                total = z[k] + rule.gamma * (favoured.sum() + favoured_bias)
                rows.append((C[k] + rule.gamma * favoured) / stabilized(total, 1e-6))
            return torch.stack(rows)
        case AlphaBeta() | ZPlus():
            alpha, beta = (rule.alpha, rule.beta) if isinstance(rule, AlphaBeta) else (1.0, 0.0)
            P, N = C.clamp(min=0), C.clamp(max=0)
            p, n = P.sum(1) + b.clamp(min=0), N.sum(1) + b.clamp(max=0)
            return alpha * P / stabilized(p, 1e-6)[:, None] - beta * N / stabilized(n, 1e-6)[:, None]
        case Flat():
            seen = (W != 0).to(W)
            return seen / seen.sum(1, keepdim=True)
        case WSquare():
            return W**2 / (W**2).sum(1, keepdim=True)
        case ZBox():
            C = C - LOW * W.clamp(min=0) - HIGH * W.clamp(max=0)
            return C / stabilized(C.sum(1), 1e-6)[:, None]
    raise AssertionError(rule)


RULES = [
    Zero(),
    Epsilon(),
    Epsilon(0.3),
    Gamma(0.25),
    Gamma(2.0),
    AlphaBeta(2, 1),
    AlphaBeta(1, 0),
    ZPlus(),
    Flat(),
    WSquare(),
    ZBox(LOW, HIGH),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("nonnegative", [False, True], ids=["both signs", "nonnegative"])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_rule_is_its_formula(rule: Rule, layer: str, nonnegative: bool) -> None:
    torch.manual_seed(len(layer))
    make, shape = LAYERS[layer]
    module = make().double().eval()
    a = torch.randn(3, *shape, dtype=torch.float64).clamp(LOW, HIGH)
    if nonnegative:
        a = a.abs()
    z = module(a).detach()
    R = torch.randn_like(z)
    network = nn.Sequential(nn.ReLU(), module).eval() if nonnegative else module
    result = propagate(network, a, Composite(rule, rule), lambda _: R)

    zero = torch.zeros(1, *shape, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(module, zero)
    W, b = jacobian.reshape(z[0].numel(), a[0].numel()), module(zero).detach().flatten()
    expected = torch.stack([proportions(rule, W, b, a[n].flatten()).T @ R[n].flatten() for n in range(3)]).view_as(a)
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


def test_box_takes_bounds_per_channel() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 3).double()
    a = torch.rand(2, 2, 4, 4, dtype=torch.float64)
    R = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    low, high = torch.tensor([-1.0, -2.0]), torch.tensor([2.0, 1.0])
    results = [
        propagate(layer, a, Composite(ZBox(*bounds)), lambda _: R)
        for bounds in (
            ([-1, -2], [2, 1]),
            (low, high),
            (low.view(1, 2, 1, 1), high.view(2, 1, 1)),
            (low.view(2, 1, 1).expand(2, 4, 4), high.view(1, 2, 1, 1).expand(1, 2, 4, 4)),
        )
    ]
    for result in results[1:]:
        assert torch.equal(result, results[0])
    assert not torch.allclose(results[0], propagate(layer, a, Composite(ZBox(-2, 2)), lambda _: R))


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [(0.0, 1.0, "do not enclose"), (3.0, -3.0, "do not enclose"), ([0.0] * 3, 1.0, "one number per channel")],
)
def test_box_refuses_wrong_bounds(low: object, high: object, message: str) -> None:
    layer = nn.Conv2d(2, 3, 3)
    a = torch.linspace(-2, 2, 32).view(1, 2, 4, 4)
    with pytest.raises(UserError, match=message):
        propagate(layer, a, Composite(ZBox(low, high)), torch.ones_like)  # type: ignore[arg-type]


def test_stabilizer_has_the_sign_of_the_denominator_and_fits_the_dtype() -> None:
    z = torch.tensor([0.0, -0.0, 1.0, -1.0], dtype=torch.float64)
    R = torch.ones_like(z)
    assert divide(R, z, 0.5).tolist() == [2, 2, 1 / 1.5, -1 / 1.5]
    assert divide(R, z, 0).tolist() == [0, 0, 1, -1]
    assert divide(R, z)[0] == 1e6
    half = torch.zeros(1, dtype=torch.bfloat16)
    assert divide(torch.ones_like(half), half) == 1 / torch.finfo(torch.bfloat16).eps


def test_alpha_beta_refuses_other_sums() -> None:
    with pytest.raises(UserError, match="α − β = 1"):
        AlphaBeta(2, 0.5)


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.ReLU()),
        nn.Flatten(),
        nn.Linear(16, 3, bias=False),
    ).eval()


def test_composites_assign_rules_to_kinds() -> None:
    bounds = {"low": -3, "high": 3}
    expected = {
        "lrp_0": (Zero(), Zero(), Zero()),
        "epsilon": (Epsilon(), Epsilon(), Epsilon()),
        "epsilon_plus": (ZPlus(), ZPlus(), Epsilon()),
        "epsilon_plus_flat": (Flat(), ZPlus(), Epsilon()),
        "epsilon_alpha2_beta1": (AlphaBeta(2, 1), AlphaBeta(2, 1), Epsilon()),
        "epsilon_alpha2_beta1_flat": (Flat(), AlphaBeta(2, 1), Epsilon()),
        "excitation_backprop": (ZPlus(), ZPlus(), ZPlus()),
        "deep_taylor": (WSquare(), ZPlus(), ZPlus()),
    }
    for name, (first, convolution, linear) in expected.items():
        composite = build_composite(name, network())
        assert composite.rule("convolution", "0", first=True) == first, name
        assert composite.rule("convolution", "2.0", first=False) == convolution, name
        assert composite.rule("linear", "4", first=False) == linear, name
    for name in ("epsilon_gamma_box", "deep_taylor"):
        rule = build_composite(name, network(), **bounds).rule("convolution", "0", first=True)
        assert isinstance(rule, ZBox)
        assert (rule.low, rule.high) == (-3, 3)
    gamma_box = build_composite("epsilon_gamma_box", network(), **bounds, gamma=0.5, epsilon=0.1)
    assert gamma_box.rule("convolution", "2.0", first=False) == Gamma(0.5)
    assert gamma_box.rule("linear", "4", first=False) == Epsilon(0.1)


def test_mapping_assigns_rules_to_names_before_kinds() -> None:
    mapping = {"2.*": "gamma", "convolution": ZPlus(), "first": "flat", "4": Epsilon(1.0)}
    composite = build_composite(mapping, network(), gamma=0.1)
    assert composite.rule("convolution", "0", first=True) == Flat()
    assert composite.rule("convolution", "2.0", first=False) == Gamma(0.1)
    assert composite.rule("convolution", "9", first=False) == ZPlus()
    assert composite.rule("linear", "4", first=False) == Epsilon(1.0)
    assert composite.rule("linear", "9", first=False) == Epsilon()


def test_mapping_reaches_the_named_layer() -> None:
    model, x = network(), torch.rand(2, 3, 6, 6)
    flat = propagate(model, x, build_composite({"0": "flat"}, model), torch.ones_like)
    first = propagate(model, x, build_composite({"first": "flat"}, model), torch.ones_like)
    other = propagate(model, x, build_composite({"2.0": "flat"}, model), torch.ones_like)
    assert torch.equal(flat, first)
    assert not torch.allclose(flat, other)


@pytest.mark.parametrize(
    ("composite", "options", "message"),
    [
        ("epsilon_plus_flatt", {}, "did you mean 'epsilon_plus_flat'"),
        ("epsilon_plus", {"gamma": 0.1}, "takes no option gamma; allowed: epsilon"),
        ("lrp_0", {"epsilon": 0.1}, "takes no option epsilon; allowed: addition, normalization, zero_bias"),
        ("lrp_0", {"addition": "halves"}, "unknown addition .halves.; allowed: norm, equal, magnitude"),
        ("epsilon", {"zero_bias": 2}, "unknown zero_bias 2; allowed: False, True"),
        ("epsilon_gamma_box", {"low": 0}, "needs high="),
        ("epsilon_gamma_box", {}, "needs low= and high="),
        ("deep_taylor", {"high": 0}, "needs low="),
        ("epsilon", {"epsilon": -1.0}, "epsilon= must be"),
        ({"first": "z_box"}, {}, "needs low= and high="),
        ({"convolutions": "flat"}, {}, "neither a kind of layer"),
        ({"first": "flatt"}, {}, "unknown LRP rule"),
        ({"first": "flat"}, {"gamma": 1.0}, "takes no option gamma"),
    ],
)
def test_composites_refuse_mistakes(composite: object, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_composite(composite, network(), **options)  # type: ignore[arg-type]
