"""What the attribution methods besides LRP share: passes, seeds, data types, and the mistakes that they refuse."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from test_attribution_methods import METHODS, images, linear, relu_net
from torch import Tensor, nn

from spray import explain
from spray.attribution import ATTRIBUTIONS
from spray.errors import UserError

PARTS = ("lime", "shap")  # the methods that work on an input's parts


@pytest.mark.parametrize("method", [m for m in METHODS if m != "grad_cam"])
def test_passes_hold_no_more_than_the_batch_size(method: str) -> None:
    model, x = relu_net(), images(2, side=8)
    sizes: list[int] = []
    handle = model[0].register_forward_hook(lambda module, args, output: sizes.append(len(args[0])))
    small = explain(model, x, 0, method, batch_size=3)
    handle.remove()
    assert max(sizes) == (2 if method == "integrated_gradients" else 3)  # whole steps of both samples
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if method in PARTS else {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(small, explain(model, x, 0, method, batch_size=1000), **tolerance)


@pytest.mark.parametrize("method", ["lime", "shap", "smooth_grad"])
def test_seeds(method: str) -> None:
    model, x = relu_net(), images(2, side=8)
    torch.manual_seed(11)
    first = explain(model, x, 0, method)
    torch.manual_seed(12)
    assert torch.equal(explain(model, x, 0, method, seed=0), first)
    other = explain(model, x, 0, method, seed=1)
    assert not torch.equal(other, first)
    assert float(torch.corrcoef(torch.stack([other.flatten(), first.flatten()]))[0, 1]) > 0.8


@pytest.mark.parametrize("method", METHODS)
def test_float32_agrees_with_float64(method: str) -> None:
    model, x = relu_net(), images(2, side=8)
    exact = explain(model, x, 0, method)
    R = explain(model.float(), x.float(), 0, method)
    assert R.dtype == torch.float32
    torch.testing.assert_close(R.double(), exact, rtol=1e-3, atol=1e-4 * float(exact.abs().max()))


class Detached(nn.Module):
    """A model without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.net = relu_net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).detach()


@pytest.mark.parametrize("method", ["lime", "occlusion", "shap"])
def test_methods_that_hide_parts_need_no_gradient(method: str) -> None:
    x = images(2, side=8)
    assert torch.equal(explain(Detached().eval(), x, 0, method), explain(relu_net(), x, 0, method))


@pytest.mark.parametrize("method", ["grad_cam", "integrated_gradients", "smooth_grad"])
def test_methods_that_differentiate_say_that_there_is_no_gradient(method: str) -> None:
    with pytest.raises(UserError, match="output has no gradient with respect to"):
        explain(Detached().eval(), images(2, side=8), 0, method)


class Blind(nn.Module):
    """A model that doesn't look at its input."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ones(len(x), 3, dtype=x.dtype)


@pytest.mark.parametrize("method", ["integrated_gradients", "lime", "occlusion", "shap", "smooth_grad"])
def test_a_model_that_does_not_look_at_its_input_is_told(method: str) -> None:
    with pytest.raises(UserError, match="the model's output has no gradient with respect to its input"):
        explain(Blind().eval(), images(2, side=8), 0, method)


@pytest.mark.parametrize("method", METHODS)
def test_methods_do_not_draw_from_the_global_generator(method: str) -> None:
    """`explain` would put its state back; who calls a method directly has no such protection."""
    model, x = relu_net(), images(2, side=8)
    before = torch.get_rng_state()
    ATTRIBUTIONS.get(method)(model, x, 0)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("method", PARTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_images_that_are_not_finite_have_no_superpixels(method: str, value: float) -> None:
    x = images(2, side=8)
    x[1, 0, 3, 3] = value
    deaf = nn.Sequential(nn.Flatten(), Finite(), nn.Linear(128, 3).double()).eval()
    with pytest.raises(UserError, match=r"the input is not finite for samples \[1\]"):
        explain(deaf, x, 0, method)


class Finite(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.nan_to_num(0, 0, 0)


class Division(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (1 / x).flatten(1)


@pytest.mark.parametrize("method", ["integrated_gradients", "lime", "occlusion", "shap"])
def test_a_baseline_that_the_model_cannot_take_is_told(method: str) -> None:
    x = torch.rand(2, 6, dtype=torch.float64) + 1
    assert torch.isfinite(explain(Division().eval(), x, 0, method, baseline=0.5)).all()
    if method != "integrated_gradients":  # the path doesn't reach its ends
        with pytest.raises(UserError, match="changed copies of the input: the model's output is not finite"):
            explain(Division().eval(), x, 0, method)


@pytest.mark.parametrize("method", METHODS)
def test_mistakes_in_targets_come_before_the_work(method: str) -> None:
    with pytest.raises(UserError, match="classes 0 to 2"):
        explain(relu_net(), images(2, side=8), 3, method)


MISTAKES: list[tuple[str, dict[str, Any], str]] = [
    *[(m, {"n_samples": n}, "n_samples must be a whole number of at least") for m in PARTS for n in (0, 2.5, True)],
    *[(m, {"batch_size": 0}, "batch_size must be a whole number of at least 1") for m in METHODS if m != "grad_cam"],
    *[(m, {"seed": s}, "seed must be a whole number of at least 0") for m in (*PARTS, "smooth_grad") for s in (-1, "")],
    *[
        (m, {"baseline": b}, "baseline must be a finite number, one per channel, or a tensor")
        for m in ("integrated_gradients", "occlusion", *PARTS)
        for b in (float("nan"), "black", [1.0, 2.0, 3.0], torch.zeros(3, 3), None)
    ],
    ("smooth_grad", {"n_samples": 0}, "n_samples must be a whole number of at least 1, not 0"),
    ("smooth_grad", {"sigma": -0.1}, "sigma must be a finite number of at least 0, not -0.1"),
    ("smooth_grad", {"sigma": float("inf")}, "sigma must be a finite number"),
    ("smooth_grad", {"sigma": "wide"}, "sigma must be a finite number"),
    ("smooth_grad", {"baseline": 0.0}, "takes no option baseline; allowed: n_samples, sigma, seed, batch_size"),
    ("integrated_gradients", {"n_steps": 0}, "n_steps must be a whole number of at least 1, not 0"),
    ("grad_cam", {"layer": "44"}, "no layer '44'; did you mean '4'"),
    ("grad_cam", {"layer": "xyz"}, "no layer 'xyz'; allowed: 0, 1, 2"),
    ("grad_cam", {"layer": ""}, "no layer ''"),
    ("grad_cam", {"layer": 4}, "no layer 4"),
    ("grad_cam", {"layer": "8"}, r"output of layer '8' has shape \(2, 3\), which is no feature map"),
    ("grad_cam", {"relu": "yes"}, "relu must be True or False, not 'yes'"),
    ("occlusion", {"window": 9}, "window must be one number or 2, at most 8 x 8, not 9"),
    ("occlusion", {"window": 0}, "window must be a whole number of at least 1, not 0"),
    ("occlusion", {"window": (2, 2, 2)}, r"window must be one number or 2, at most 8 x 8, not \(2, 2, 2\)"),
    ("occlusion", {"window": 2, "stride": 3}, "stride must be one number or 2, at most 2 x 2, not 3"),
    ("lime", {"kernel_width": 0}, "kernel_width must be a finite number above 0, not 0"),
    ("shap", {"n_samples": 20}, r"n_samples=20 is too few for \d+ parts; give at least \d+, or fewer parts"),
    *[
        (m, {"segments": s}, "segments must be a whole number of at least 1 or a tensor of ints of shape")
        for m in PARTS
        for s in (0, 2.5, True, "slic", torch.zeros(8, 8), torch.zeros(3, 3).long(), torch.zeros(5, 8, 8).long())
    ],
]  # fmt: skip


@pytest.mark.parametrize(("method", "options", "message"), MISTAKES)
def test_wrong_options_are_refused(method: str, options: dict[str, Any], message: str) -> None:
    model, x = relu_net(), images(2, side=8)
    before = torch.get_rng_state()
    with pytest.raises(UserError, match=message):
        explain(model, x, 0, method, **options)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(module._forward_hooks for module in model.modules())


def test_layers_that_do_not_run_are_told() -> None:
    model = relu_net()
    model.add_module("spare", nn.Conv2d(2, 2, 1))
    model.forward = lambda x: nn.Sequential(*list(model)[:-1])(x)  # type: ignore[method-assign]
    with pytest.raises(UserError, match="layer 'spare' does not run in the model"):
        explain(model.eval(), images(2, side=8), 0, "grad_cam", layer="spare")


def test_inputs_that_a_method_is_not_for_are_told() -> None:
    model, _ = linear((7,))
    x = torch.randn(2, 7, dtype=torch.float64)
    with pytest.raises(UserError, match=r"grad_cam needs an input of shape \(N, C, H, W\), not \(2, 7\)"):
        explain(model, x, 0, "grad_cam")
    with pytest.raises(UserError, match="a number of segments needs images"):
        explain(model, x, 0, "lime", segments=3)
    model, _ = linear()
    with pytest.raises(UserError, match="runs no convolution over its input; name the layer"):
        explain(model, images(), 0, "grad_cam")
    wide = nn.Sequential(nn.Flatten(), nn.Linear(10_001, 2)).eval()
    with pytest.raises(UserError, match="10001 parts are too many"):
        explain(wide, torch.ones(1, 10_001), 0, "shap")


def test_captum_is_imported_only_where_it_is_used() -> None:
    code = "import spray.attribution, sys; assert 'captum' not in sys.modules and 'skimage' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_configuration(method: str) -> None:
    path = Path(__file__).parent.parent / "conf/attribution" / f"{method}.yaml"
    assert yaml.safe_load(path.read_text()) == {"method": method}
    assert method in ATTRIBUTIONS.names()


def test_numpy_numbers_are_options_too() -> None:
    model, x = relu_net(), images(2, side=8)
    R = explain(model, x, 0, "smooth_grad", n_samples=np.int64(5), seed=np.int64(0), sigma=np.float64(0.1))
    assert torch.equal(R, explain(model, x, 0, "smooth_grad", n_samples=5, sigma=0.1))
