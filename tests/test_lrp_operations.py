"""Operations without weights: activations, gates, products, powers, movement; what is known of their results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import Net, close, head, modules, randomize, stem
from torch import Tensor, nn

from spray import explain
from spray.lrp import Composite, Epsilon, ZPlus, build_composite, propagate

Forward = Callable[[Any, Tensor], Tensor]


def relevance(forward: Forward, composite: Any = "epsilon_plus_flat", **options: Any) -> Tensor:
    torch.manual_seed(0)
    model = randomize(Net(forward, **modules()))
    return explain(model, torch.randn(2, 3, 6, 6, dtype=torch.float64), 0, composite=composite, **options)


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


def se_gate(m: Any, y: Tensor) -> Tensor:
    return torch.sigmoid(m.c2(y.mean((2, 3), keepdim=True)))


GATES: dict[str, Forward] = {
    "sigmoid": lambda m, y: se_gate(m, y),
    "expanded": lambda m, y: se_gate(m, y).expand_as(y),
    "expanded view": lambda m, y: se_gate(m, y).flatten(1)[:, :, None, None].expand(-1, -1, 6, 6).view_as(y),
    "converted": lambda m, y: se_gate(m, y).float().type_as(y).to(y),
    "difference": lambda m, y: 1 - se_gate(m, y),
    "negated": lambda m, y: -se_gate(m, y),
    "cut off": lambda m, y: se_gate(m, y).clamp(0.2, 0.8).clamp_min(0.3),
    "doubled": lambda m, y: 2.0 * se_gate(m, y) * se_gate(m, -y),
    "hard sigmoid": lambda m, y: F.hardsigmoid(m.c2(y.mean((2, 3), keepdim=True))),
    "hard sigmoid by hand": lambda m, y: F.relu6(y + 3) / 6,
    "hard sigmoid by clamp": lambda m, y: (y + 3).clamp(0, 6) / 6,
    "tanh": lambda m, y: torch.tanh(m.c2(y)),
    "norm": lambda m, y: y.norm(dim=(2, 3), keepdim=True),
    "inverse norm": lambda m, y: 1 / y.norm(dim=(2, 3), keepdim=True).clamp(min=1e-6),
    "standard deviation": lambda m, y: torch.rsqrt(y.var((2, 3), keepdim=True) + 1e-5),
    "root mean square": lambda m, y: y.square().mean((2, 3), keepdim=True).sqrt(),
    "exponential": lambda m, y: y.exp() / y.exp().sum(1, keepdim=True),
    "logarithm": lambda m, y: (1 + y**2).log(),
    "error function": lambda m, y: 0.5 * (1 + torch.erf(y / 2**0.5)),
    "constant": lambda m, y: torch.full_like(y, -0.5),
}


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("swapped", [False, True], ids=["signal first", "gate first"])
def test_relevance_goes_to_the_signal_not_to_its_gate(gate: str, swapped: bool) -> None:
    function = GATES[gate]

    def gated(m: Any, x: Tensor) -> Tensor:
        y = m.c1(x)
        g = function(m, y)
        return head(m, g * y if swapped else y * g)

    def constant(m: Any, x: Tensor) -> Tensor:
        y = m.c1(x)
        return head(m, y * function(m, y).detach())

    close(relevance(gated), relevance(constant), 1e-12)


def test_divisors_are_constants() -> None:
    a = relevance(lambda m, x: head(m, torch.div(other=2 + m.c2(x.new_ones(x.shape[0], 6, 6, 6)), input=m.c1(x))))
    b = relevance(lambda m, x: head(m, m.c1(x) / (2 + m.c2(x.new_ones(x.shape[0], 6, 6, 6)))))
    close(a, b, 1e-12)

    def divided(m: Any, x: Tensor) -> Tensor:
        y = m.c1(x)
        return head(m, y / (1 + m.c2(y).abs()))

    def constant(m: Any, x: Tensor) -> Tensor:
        y = m.c1(x)
        return head(m, y / (1 + m.c2(y).abs()).detach())

    close(relevance(divided), relevance(constant), 1e-12)


def gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    return torch.autograd.grad(function(leaf)[:, 0].sum(), leaf)[0]


def test_two_signals_get_half_each() -> None:
    """R of a product is half its value at each factor; with LRP-0 that is half of gradient × input in all."""
    torch.manual_seed(0)
    a, b = nn.Linear(6, 4).double(), nn.Linear(6, 1).double()
    x = torch.randn(5, 6, dtype=torch.float64)

    class Multiplied(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return a(x) * b(x)

    expected = x * gradient(lambda x: (a(x) * b(x).detach() + a(x).detach() * b(x)) / 2, x)
    close(explain(Multiplied().eval(), x, 0, composite="lrp_0"), expected)


@pytest.mark.parametrize(
    ("power", "product"),
    [
        (lambda y: y.square(), lambda y: y * y),
        (lambda y: y**2, lambda y: y * y),
        (lambda y: torch.pow(y, exponent=3.0), lambda y: y * y * y),
        (lambda y: torch.pow(y.relu(), 2) * 3 - 1, lambda y: y.relu() * y.relu() * 3 - 1),
    ],
)
def test_whole_powers_are_products(power: Any, product: Any) -> None:
    close(relevance(lambda m, x: head(m, power(m.c1(x)))), relevance(lambda m, x: head(m, product(m.c1(x)))), 1e-12)


@pytest.mark.parametrize("activation", [torch.tanh, torch.relu, F.hardtanh])
def test_weights_of_a_softmax_and_what_they_weigh_get_half_each(activation: Any) -> None:
    """As a product of elements and a sum, and as a product of matrices."""
    torch.manual_seed(0)
    values, scores = nn.Linear(3, 4).double(), nn.Linear(3, 1).double()
    fc = nn.Linear(4, 2).double()

    def elements(m: Any, x: Tensor) -> Tensor:
        return m.fc((activation(m.values(x)) * m.scores(x).softmax(1)).sum(1))

    def matrices(m: Any, x: Tensor) -> Tensor:
        return m.fc((m.scores(x).softmax(1).mT @ activation(m.values(x))).squeeze(1))

    x = torch.randn(2, 5, 3, dtype=torch.float64)
    results = [
        explain(Net(f, values=values, scores=scores, fc=fc).eval(), x, 0, composite="lrp_0")
        for f in (elements, matrices)
    ]
    close(*results)


def test_a_square_is_a_signal_beside_a_gate() -> None:
    def squared(m: Any, x: Tensor) -> Tensor:
        y = m.c1(x)
        return head(m, y.relu().square() * torch.sigmoid(m.c2(y)) * y.norm())

    def constant(m: Any, x: Tensor) -> Tensor:
        y = m.c1(x)
        return head(m, y.relu().square() * torch.sigmoid(m.c2(y)).detach() * y.norm().detach())

    close(relevance(squared), relevance(constant), 1e-12)


def other(m: Any, x: Tensor) -> Tensor:
    return m.b2(m.c2(m.c1(x)))


@pytest.mark.parametrize(
    ("operation", "equivalent"),
    [
        (lambda a, b: torch.addcmul(a, torch.ones(6, 6), b, value=-2), lambda a, b: a + b * -2),
        (lambda a, b: torch.addcdiv(a, b, 2 + b.detach().abs()), lambda a, b: a + b / (2 + b.detach().abs())),
        (lambda a, b: torch.lerp(a, b, 0.3), lambda a, b: a * 0.7 + b * 0.3),
        (lambda a, b: torch.lerp(a, b, a.mean().sigmoid()), lambda a, b: (lambda g: a * (1 - g) + b * g)(gate_of(a))),
        (lambda a, b: torch.add(a, b, alpha=-0.5), lambda a, b: a - 0.5 * b),
        (lambda a, b: torch.stack(list(a)) + b, lambda a, b: a + b),
        (lambda a, b: a.flatten(2).median(2)[0][:, :, None, None] + b, lambda a, b: median(a) + b),
        (lambda a, b: F.dropout(a, 0.0) + b, lambda a, b: a + b),
        (lambda a, b: F.fold(F.unfold(a, 2, stride=2), (6, 6), 2, stride=2) + b, lambda a, b: a + b),
        (lambda a, b: torch.cumsum(a, 2)[:, :, -1:] + b, lambda a, b: a.sum(2, keepdim=True) + b),
    ],
)
def test_operations_are_what_they_are_made_of(operation: Any, equivalent: Any) -> None:
    results = [relevance(lambda m, x, f=f: head(m, f(m.c1(x), other(m, x)))) for f in (operation, equivalent)]
    close(*results, 1e-5)  # the stabiliser is added at different places


def gate_of(a: Tensor) -> Tensor:
    return a.mean().detach().sigmoid()


def median(a: Tensor) -> Tensor:
    flat = a.flatten(2)
    place = flat.detach().kthvalue(18, 2)[1]
    return flat.gather(2, place[..., None])[..., None]


@pytest.mark.parametrize(
    ("operation", "equivalent"),
    [
        (lambda w, b, y: torch.addmm(b, y, w.T), F.linear),
        (lambda w, b, y: torch.addmm(mat2=w.T, mat1=y, input=b), F.linear),
        (lambda w, b, y: torch.stack([torch.addmv(b, w, v) for v in y]), F.linear),
        (lambda w, b, y: torch.stack([w.mv(v) for v in y]) + b, F.linear),
        (lambda w, b, y: torch.tensordot(y, w, ([1], [1])) + b, F.linear),
        (lambda w, b, y: torch.einsum("oi,ni->no", w, y) + b, F.linear),
        (lambda w, b, y: torch.baddbmm(b, y[:, None], w.T.expand(2, 6, 4)).squeeze(1), F.linear),
        (lambda w, b, y: y @ w.T + b, F.linear),
        (lambda w, b, y: (w @ y.T).T + b, F.linear),
    ],
)
def test_products_with_constants_are_linear_layers(operation: Any, equivalent: Any) -> None:
    def by(function: Any) -> Forward:
        def forward(m: Any, x: Tensor) -> Tensor:
            y, w, b = m.c1(x).mean((2, 3)), m.fc.weight, m.fc.bias
            return function(y, w, b) if function is F.linear else function(w, b, y)

        return forward

    for composite in ("epsilon", "lrp_0"):
        close(relevance(by(operation), composite), relevance(by(equivalent), composite), 1e-4)


@pytest.mark.parametrize("rule", ["z_plus", "gamma", "epsilon"])
@pytest.mark.parametrize("zero_bias", [False, True])
def test_addmm_is_a_linear_layer_with_its_bias(rule: str, zero_bias: bool) -> None:
    composite = {"linear": rule, "zero_bias": zero_bias}
    by_addmm = relevance(lambda m, x: torch.addmm(m.fc.bias, m.c1(x).mean((2, 3)), m.fc.weight.T), composite)
    close(by_addmm, relevance(lambda m, x: head(m, m.c1(x)), composite), 1e-12)


MASK = torch.arange(6) % 2 == 0
NEGATIVE = torch.tensor(-1.0, dtype=torch.float64)
EDGE = NEGATIVE.expand(2, 6, 6, 1)
MINIMA = torch.tensor([-1, 3, -2, 3, 1, 3])


@pytest.mark.parametrize(
    ("operation", "equivalent"),
    [
        (lambda y, _: torch.where(MASK, -1.0, y), lambda y, _: torch.where(MASK, NEGATIVE, y)),
        (lambda y, _: torch.where(MASK, torch.tensor(-1), y), lambda y, _: torch.where(MASK, NEGATIVE, y)),
        (lambda y, _: torch.where(~MASK, y, other=-1), lambda y, _: torch.where(MASK, NEGATIVE, y)),
        (lambda y, _: y.where(~MASK, -1), lambda y, _: torch.where(MASK, NEGATIVE, y)),
        (lambda y, _: y.masked_fill(MASK, torch.tensor(-1)), lambda y, _: torch.where(MASK, NEGATIVE, y)),
        (lambda y, _: y.masked_fill(MASK, value=-1), lambda y, _: torch.where(MASK, NEGATIVE, y)),
        (lambda y, _: F.pad(y, (1, 1), value=-1), lambda y, _: torch.cat([EDGE, y, EDGE], 3)),
        (lambda y, z: torch.add(y, z, alpha=-1), lambda y, z: y - z),
        (lambda y, z: y.add(z, alpha=-1), lambda y, z: y - z),
        (lambda y, _: y / -2, lambda y, _: y / torch.tensor(-2.0)),
        (lambda y, _: -y, lambda y, _: y * torch.tensor(-1.0)),
        (lambda y, _: torch.cat([y, torch.tensor(-1).expand(2, 6, 6, 6)]).unflatten(0, (2, 2)).sum(0),
         lambda y, _: torch.cat([y, NEGATIVE.expand(2, 6, 6, 6)]).unflatten(0, (2, 2)).sum(0)),
        (lambda y, _: torch.minimum(y, MINIMA), lambda y, _: torch.minimum(y, MINIMA.double())),
    ],
)  # fmt: skip
@pytest.mark.parametrize("rule", ["z_plus", "gamma", "alpha_beta"])
def test_values_that_may_be_negative_are_not_taken_for_nonnegative(operation: Any, equivalent: Any, rule: str) -> None:
    """The rules leave the branch of negative inputs out where there can't be any, as after a ReLU."""
    results = [
        relevance(
            lambda m, x, f=f: head(m, m.c2(f(stem(m, x), m.relu(m.c2(stem(m, x)))))),
            {"convolution": rule, "first": "epsilon", "linear": "epsilon"},
        )
        for f in (operation, equivalent)
    ]
    close(*results, 1e-4)


def stabilized(z: Tensor) -> Tensor:
    return z + 1e-6 * torch.where(z < 0, -1.0, 1.0).to(z)


@pytest.mark.parametrize("addition", ["norm", "equal", "magnitude"])
@pytest.mark.parametrize("rule", ["flat", "w_square"])
def test_relevance_where_a_rectifier_is_zero(rule: str, addition: str) -> None:
    """Flat and w² in a middle layer give relevance to ReLUs that are zero; it passes, by the rules layer by layer."""
    torch.manual_seed(0)
    parts = modules()
    model = randomize(Net(lambda m, x: m.fc(m.c2(m.relu(m.c1(x)) + m.relu(m.c1(-x))).mean((2, 3))), **parts))
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    composite = {"c2": rule, "convolution": "epsilon", "linear": "epsilon", "addition": addition}
    result = propagate(model, x, build_composite(composite, model), lambda out: out)

    with torch.no_grad():
        z_a, z_b = model.c1(x), model.c1(-x)
        a, b = z_a.relu(), z_b.relu()
        z = model.c2(a + b)
        pooled = z.mean((2, 3))
        out = model.fc(pooled)
        R = pooled * ((out / stabilized(out)) @ model.fc.weight)
        R = z / 36 * (R / stabilized(pooled))[..., None, None]
        w = torch.ones_like(model.c2.weight) if rule == "flat" else model.c2.weight**2
        total = F.conv2d(torch.ones(1, 6, 6, 6, dtype=x.dtype), w, padding=1)
        R = F.conv_transpose2d(R / total, w, padding=1)
        if addition == "equal":
            R_a = R_b = R / 2
        else:
            R_a, R_b = (R * term / stabilized(a + b) for term in (a, b))
        expected = sum(
            v * F.conv_transpose2d(R_v / stabilized(z_v), model.c1.weight, padding=1)
            for v, z_v, R_v in ((x, z_a, R_a), (-x, z_b, R_b))
        )
    close(result, expected)


def test_loose_relevance_under_other_rules() -> None:
    """A first layer under z⁺ whose ReLU gets relevance where it is zero."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(8, 2))
    model = model.double().eval()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    R = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    for rule in (ZPlus(), Epsilon(0.1)):
        direct = propagate(model[0], x, Composite(rule, rule), lambda _: R)
        through = propagate(model[:2], x, Composite(rule, rule), lambda _: R)
        close(through, direct)
