"""What the trace sees: operations in place, custom functions, checkpoints; what it refuses, and how it says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from networks import Net, close, head, modules, randomize, stem
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spray import explain
from spray.errors import UserError


def pair(changed: Any, equivalent: Any) -> tuple[nn.Module, nn.Module, Tensor]:
    """Two networks of the same parts and an input."""
    torch.manual_seed(0)
    parts = modules()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    return randomize(Net(changed, **parts)), Net(equivalent, **parts).eval(), x


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


def before_and_after(m: Any, x: Tensor) -> Tensor:
    y = m.c1(x)
    z = y.clone()
    y.relu_()
    return head(m, m.c2(y) + z)


def before_and_after_out_of_place(m: Any, x: Tensor) -> Tensor:
    y = m.c1(x)
    return head(m, m.c2(y.relu()) + y)


@pytest.mark.parametrize(
    ("changed", "equivalent"),
    [
        (in_place_alias, out_of_place),
        (in_place_modules, out_of_place_modules),
        (before_and_after, before_and_after_out_of_place),
    ],
)
def test_in_place_operations_are_seen_by_all_that_hold_the_tensor(changed: Any, equivalent: Any) -> None:
    model, reference, x = pair(changed, equivalent)
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


def test_relevance_reaches_the_input_through_a_part_without_gradients() -> None:
    def frozen(m: Any, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = stem(m, x)
        with torch.inference_mode():
            x = m.relu(m.c2(x))
        return head(m, x)

    model, reference, x = pair(frozen, lambda m, x: head(m, m.relu(m.c2(stem(m, x)))))
    assert torch.equal(explain(model, x, 0), explain(reference, x, 0))


class Function(torch.autograd.Function):
    """A custom function whose gradient is wrong, so that its use would be seen."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return -2 * g, *[None] * (len(ctx.needs_input_grad) - 1)


class Identity(Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        return a


class View(Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        return a.view_as(a)


class Swish(Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        ctx.save_for_backward(a)
        return a * torch.sigmoid(a)


class Convolution(Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(a, weight, bias, padding=1)


class WithSetup(Function):
    @staticmethod
    def forward(a: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return a.relu() * 3, a.argmax(1)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Tensor) -> Tensor:
        return g


def checkpointed(reentrant: bool) -> Any:
    return lambda m, x: head(m, checkpoint(lambda y: m.b2(m.c2(y)), stem(m, x), use_reentrant=reentrant).relu())


@pytest.mark.parametrize("composite", ["epsilon", "epsilon_plus_flat"])
@pytest.mark.parametrize(
    ("changed", "equivalent"),
    [
        (lambda m, x: head(m, Identity.apply(m.c1(x)).relu()), lambda m, x: head(m, m.c1(x).relu())),
        (lambda m, x: head(m, View.apply(m.c1(x))), lambda m, x: head(m, m.c1(x))),
        (lambda m, x: head(m, Swish.apply(m.c1(x))), lambda m, x: head(m, F.silu(m.c1(x)))),
        (
            lambda m, x: head(m, m.b1(Convolution.apply(x, m.c1.weight, m.c1.bias)).relu_()),
            lambda m, x: head(m, m.b1(m.c1(x)).relu()),
        ),
        (lambda m, x: head(m, WithSetup.apply(m.c1(x))[0]), lambda m, x: head(m, m.c1(x).relu() * 3)),
        (checkpointed(True), lambda m, x: head(m, m.b2(m.c2(stem(m, x))).relu())),
        (checkpointed(False), lambda m, x: head(m, m.b2(m.c2(stem(m, x))).relu())),
        (
            lambda m, x: head(m, torch.utils.checkpoint.checkpoint(m.c1, x, use_reentrant=True).relu()),
            lambda m, x: head(m, m.c1(x).relu()),
        ),
    ],
    ids=["identity", "view", "swish", "convolution", "setup", "checkpoint", "no reentry", "checkpointed layer"],
)
def test_custom_functions_and_checkpoints_are_looked_into(changed: Any, equivalent: Any, composite: str) -> None:
    model, reference, x = pair(changed, equivalent)
    close(explain(model, x, 0, composite=composite), explain(reference, x, 0, composite=composite), 1e-12)


class Numpy(Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        return torch.from_numpy(a.detach().numpy() * 2)


class Threshold(Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        return (a > 0).to(a.dtype)


class Sign(Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        return a.sign()


def doubled(x: Tensor) -> Tensor:
    return x.relu() * 2


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


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of torch.jit
@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda m, x: head(m, m.c1(x).exp()), "no rule for exp"),
        (lambda m, x: head(m, m.c1(x).exp_()), "no rule for exp"),
        (lambda m, x: head(m, m.c1(x).relu().sqrt()), "no rule for sqrt"),
        (lambda m, x: head(m, m.c1(x).relu() ** 0.5), "no rule for pow"),
        (lambda m, x: head(m, m.c1(x) ** -1), "no rule for pow"),
        (lambda m, x: head(m, 1 / m.c1(x)), "no rule for __r(true)?div"),
        (lambda m, x: m.fc(m.c1(x).flatten(2).logsumexp(2)), "no rule for logsumexp"),
        (lambda m, x: m.fc(torch.var_mean(m.c1(x), (2, 3))[0]), "no rule for var"),
        (lambda m, x: F.log_softmax(head(m, m.c1(x)), 1), "no rule for log_softmax"),
        (lambda m, x: head(m, m.c1(x).cumprod(2)), "no rule for cumprod"),
        (lambda m, x: head(m, m.c1(x).round_()), "no rule for round"),
        (lambda m, x: head(m, F.dropout(m.c1(x), 0.5)), "active dropout"),
        (lambda m, x: head(m, F.conv2d(x, x)), "depends on the input"),
        (lambda m, x: head(m, F.batch_norm(m.c1(x), None, None, training=True)), "own statistics"),
        (lambda m, x: head(m, torch.add(m.c1(x), 1, out=torch.empty(0))), r"add\(out=...\)"),
        (lambda m, x: head(m, Numpy.apply(m.c1(x))), "can't see into"),
        (lambda m, x: head(m, Numpy.apply(m.c1(x)) + m.c1(x)), "can't see into"),
        (lambda m, x: head(m, Threshold.apply(m.c1(x)) + m.c1(x)), "can't see into"),
        (lambda m, x: Numpy.apply(head(m, m.c1(x))), "can't see into"),
        (lambda m, x: head(m, Sign.apply(m.c1(x))), "no rule for sign"),
        (lambda m, x: head(m, torch.jit.script(doubled)(m.c1(x))), "can't see into"),
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


def test_values_that_are_read_unseen_are_not_made_up() -> None:
    model = Net(lambda m, x: head(m, m.c1(x) + nn.Parameter(m.c1(x))), **modules()).eval()
    with pytest.raises(UserError, match="not finite"):
        explain(model, torch.randn(2, 3, 6, 6), 0)


def test_error_names_the_module() -> None:
    class Exponential(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.exp()

    inner = nn.Sequential(nn.Conv2d(3, 4, 3), Exponential())
    model = nn.Sequential(inner, nn.Flatten(), nn.Linear(64, 2)).eval()
    with pytest.raises(UserError, match=r"exp \(in module '0.1'\)"):
        explain(model, torch.randn(2, 3, 6, 6), 0)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_torchscript_is_refused() -> None:
    model = torch.jit.trace(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).eval(), torch.randn(1, 3, 2, 2))
    with pytest.raises(UserError, match="can't see into"):
        explain(model, torch.randn(2, 3, 2, 2), 0)


@pytest.mark.parametrize(
    "function",
    [
        lambda y: y.cumprod(2),
        lambda y: torch.erfinv(0.1 * y),
        lambda y: y.exp(),
        lambda y: y.exp_(),
        lambda y: (y.relu() + 1).sqrt(),
        lambda y: (y.relu() + 1) ** 0.5,
        lambda y: y.flatten(2).log_softmax(2).unflatten(2, (6, 6)),
        lambda y: F.grid_sample(y, torch.linspace(-1, 1, 64, dtype=y.dtype).view(2, 4, 4, 2), align_corners=False),
    ],
)
def test_fallback_is_the_gradient_with_a_warning(function: Any) -> None:
    torch.manual_seed(0)
    model = randomize(Net(lambda m, x: head(m, m.c2(function(m.c1(x)))), **modules()))
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    with pytest.raises(UserError, match="no rule for"):
        explain(model, x, 0, composite="lrp_0")
    with pytest.warns(UserWarning, match="LRP has no rule for .*: its relevance is that of gradient x input"):
        relevance = explain(model, x, 0, composite="lrp_0", fallback="gradient")
    close(relevance, explain(model, x, 0, method="gradient_x_input"))


@pytest.mark.filterwarnings("ignore:LRP has no rule for log")
def test_statistics_stay_gates_with_a_fallback() -> None:
    def gated(m: Any, x: Tensor) -> Tensor:
        y = m.c1(x)
        return head(m, y * y.var((2, 3), keepdim=True).log())

    def constant(m: Any, x: Tensor) -> Tensor:
        y = m.c1(x)
        return head(m, y * y.var((2, 3), keepdim=True).log().detach())

    model, reference, x = pair(gated, constant)
    with pytest.warns(UserWarning, match="no rule for var"):
        relevance = explain(model, x, 0, composite="lrp_0", fallback="gradient")
    close(relevance, explain(reference, x, 0, method="gradient_x_input"))


def test_fallback_refuses_what_it_can_not_follow() -> None:
    model = Net(lambda m, x: head(m, m.c1(x) + torch.fft.irfft2(torch.fft.rfft2(m.c1(x)))), **modules()).eval()
    with (
        pytest.warns(UserWarning, match="no rule for fft_rfft2"),
        pytest.raises(UserError, match="fft_rfft2, which returns complex numbers"),
    ):
        explain(model, torch.randn(2, 3, 6, 6), 0, fallback="gradient")
