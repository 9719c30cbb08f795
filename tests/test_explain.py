"""The contract that every attribution method keeps, and the mistakes that `explain` refuses."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spray import explain
from spray.attribution import ATTRIBUTIONS
from spray.errors import UserError
from spray.lrp import COMPOSITES

METHODS = [(method, {}) for method in ATTRIBUTIONS.names() if method != "lrp"] + [
    ("lrp", {"composite": name, **({"low": -9.0, "high": 9.0} if name == "epsilon_gamma_box" else {})})
    for name in COMPOSITES.names()
]
CONTRACT = pytest.mark.parametrize(
    ("method", "options"), METHODS, ids=[options.get("composite", method) for method, options in METHODS]
)


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.ReLU(inplace=True),  # the first operation changes its input in place
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(36, 5),
    )
    model[1].weight.requires_grad_(False)
    model[7].weight.grad = torch.ones(5, 36)
    model[7].register_forward_hook(lambda module, args, output: output + 0.0)
    return model.eval()


def images(n: int = 4) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(n, 3, 6, 6) + 0.1


def state(model: nn.Module) -> dict[str, Any]:
    """All that `explain` must not change."""
    return {
        "weights": {name: t.clone() for name, t in model.state_dict().items()},
        "grads": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "training": [module.training for module in model.modules()],
        "hooks": [[len(v) for k, v in vars(m).items() if k.endswith("_hooks") and v] for m in model.modules()],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "parameter attributes": [sorted(vars(p)) for p in model.parameters()],
        "random": torch.get_rng_state(),
    }


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    else:
        assert a == b


@CONTRACT
def test_attribution_has_the_inputs_shape_and_leaves_everything_as_it_was(method: str, options: dict[str, Any]) -> None:
    model, x = network(), images().requires_grad_()
    before, x_before = copy.deepcopy(state(model)), x.detach().clone()
    R = explain(model, x, 2, method=method, **options)
    assert R.shape == x.shape
    assert R.dtype == x.dtype
    assert R.device == x.device
    assert not R.requires_grad
    assert torch.isfinite(R).all()
    assert float(R.abs().max()) > 0
    assert_same(state(model), before)
    assert torch.equal(x, x_before)
    assert x.grad is None
    assert torch.is_grad_enabled()


@CONTRACT
def test_samples_do_not_depend_on_their_batch(method: str, options: dict[str, Any]) -> None:
    model, x = network().double(), images().double()
    R = explain(model, x, 1, method=method, **options)
    alone = torch.cat([explain(model, x[i : i + 1], 1, method=method, **options) for i in range(len(x))])
    torch.testing.assert_close(R, alone, rtol=1e-9, atol=1e-12)


@CONTRACT
def test_attribution_is_the_same_whatever_the_global_generator(method: str, options: dict[str, Any]) -> None:
    model, x = network(), images()
    torch.manual_seed(2)
    R = explain(model, x, 1, method=method, **options)
    torch.manual_seed(3)
    assert torch.equal(explain(model, x, 1, method=method, **options), R)


@CONTRACT
def test_place_in_the_batch_does_not_matter(method: str, options: dict[str, Any]) -> None:
    model, x = network().double(), images().double()
    target = torch.tensor([0, 1, 2, 3])
    R = explain(model, x, target, method=method, **options)
    turned = explain(model, x.flip(0), target.flip(0), method=method, **options)
    torch.testing.assert_close(turned.flip(0), R, rtol=1e-9, atol=1e-12)


@CONTRACT
def test_forms_of_a_target_agree(method: str, options: dict[str, Any]) -> None:
    model, x = network(), images()
    predicted = model(x.clone()).argmax(1)
    by_default = explain(model, x, method=method, **options)
    assert torch.equal(explain(model, x, predicted, method=method, **options), by_default)
    assert torch.equal(explain(model, x, None, method=method, **options), by_default)
    same = [explain(model, x, t, method=method, **options) for t in (3, torch.tensor(3), torch.full((4,), 3))]
    assert torch.equal(same[0], same[1])
    assert torch.equal(same[0], same[2])
    one = torch.tensor([0, 3, 0, 0])
    mixed = explain(model, x, one, method=method, **options)
    torch.testing.assert_close(mixed[1], same[0][1])
    assert not torch.allclose(mixed[0], same[0][0])


@CONTRACT
def test_attribution_works_where_gradients_are_off(method: str, options: dict[str, Any]) -> None:
    model, x = network(), images()
    expected = explain(model, x, 0, method=method, **options)
    with torch.no_grad():
        assert torch.equal(explain(model, x, 0, method=method, **options), expected)
    with torch.inference_mode():
        assert torch.equal(explain(model, x.clone(), 0, method=method, **options).clone(), expected)


class Failing(nn.Module):
    """Draws random numbers, then fails."""

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError(f"out of luck: {torch.rand(1)}")


@pytest.mark.parametrize("method", ATTRIBUTIONS.names())
def test_an_error_leaves_everything_as_it_was(method: str) -> None:
    model, x = network(), images()
    model.append(Failing().eval())
    before = copy.deepcopy(state(model))
    with pytest.raises(RuntimeError, match="out of luck"):
        explain(model, x, 2, method=method)
    assert_same(state(model), before)
    assert torch.is_grad_enabled()
    assert not torch.overrides._get_current_function_mode_stack()


def test_gradients_are_those_of_the_target() -> None:
    model, x = network(), images()
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(model(leaf * 1)[:, 2].sum(), leaf)
    torch.testing.assert_close(explain(model, x, 2, method="gradient"), expected)
    torch.testing.assert_close(explain(model, x, 2, method="gradient_x_input"), expected * x)


def test_relevance_starts_with_the_logit_or_one() -> None:
    model, x = network().double(), images().double()
    logit = model(x.clone())[:, 2].detach()
    with_logit, with_one = explain(model, x, 2), explain(model, x, 2, init="one")
    torch.testing.assert_close(with_logit, with_one * logit.view(-1, 1, 1, 1))


class Constant(nn.Module):
    """Returns what it is made with."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output

    def forward(self, x: Tensor) -> Any:
        return self.output(x) if callable(self.output) else self.output


def broken(x: Tensor) -> Tensor:
    y = x.flatten(1)[:, :3]
    return torch.cat([y[:1], y[1:] / torch.zeros(3, 1)])


@pytest.mark.parametrize("method", ATTRIBUTIONS.names())
@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda x: {"out": x.flatten(1)}, "logits of shape"),
        (lambda x: x, "logits of shape"),
        (lambda x: x.flatten(1)[:2], "logits of shape"),
        (broken, r"the model's output is not finite for samples \[1, 2, 3\]"),
        (lambda x: torch.zeros(4, 3), "input"),
    ],
)
def test_outputs_that_cannot_be_explained_are_refused(method: str, output: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        explain(Constant(output).eval(), images(), 0, method=method)


@pytest.mark.parametrize("method", ATTRIBUTIONS.names())
@pytest.mark.parametrize(
    ("target", "message"),
    [
        (5, "out of range"),
        (-1, "out of range"),
        (torch.tensor([0, 1, 2, 9]), "out of range"),
        (torch.tensor([0, 1]), "a tensor of 4 ints"),
        (torch.zeros(4), "a tensor of 4 ints"),
        (torch.tensor(1.0), "a tensor of 4 ints"),
        ("cat", "a tensor of 4 ints"),
    ],
)
def test_wrong_targets_are_refused(method: str, target: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        explain(network(), images(), target, method=method)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "lrpp"}, "unknown attribution method 'lrpp' \\(did you mean 'lrp'\\?\\)"),
        ({"init": "softmax"}, "allowed: logit, one"),
        ({"x": torch.zeros(4, 3, 6, 6, dtype=torch.int64)}, "floating-point"),
        ({"x": torch.zeros(4)}, "of shape \\(4,\\)"),
        ({"x": [1.0]}, "not list"),
        ({"model": "resnet18"}, "not str"),
        ({"model": network().train()}, "call model.eval"),
        ({"x": torch.full((4, 3, 6, 6), float("nan"))}, "not finite for samples"),
        ({"method": "gradient", "epsilon": 0.1}, "takes no option epsilon"),
    ],
)
def test_wrong_arguments_are_refused(changes: dict[str, Any], message: str) -> None:
    arguments = {"model": network(), "x": images(), "target": 0} | changes
    with pytest.raises(UserError, match=message):
        explain(**arguments)


def test_a_part_in_training_mode_is_named() -> None:
    model = network()
    model[2].train()
    with pytest.raises(UserError, match="module '2' is in training mode"):
        explain(model, images())


@CONTRACT
def test_an_empty_batch_gives_an_empty_attribution(method: str, options: dict[str, Any]) -> None:
    model, x = network(), images()[:0]
    before = copy.deepcopy(state(model))
    R = explain(model, x, method=method, **options)
    assert R.shape == (0, 3, 6, 6)
    assert R.dtype == torch.float32
    assert_same(state(model), before)


@pytest.mark.parametrize(
    "code",
    [
        "from spray import explain",
        "from spray.attribution import ATTRIBUTIONS; import spray; explain = spray.explain",
    ],
)
def test_explain_is_the_function_in_every_order_of_imports(code: str) -> None:
    check = f"{code}\nimport types; assert isinstance(explain, types.FunctionType)"
    subprocess.run([sys.executable, "-c", check], check=True)
