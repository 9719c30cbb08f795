"""The attribution methods besides LRP and the gradient, against closed forms and computations by hand."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spray import explain
from spray.attribution.segments import segment
from spray.attribution.surrogate import coalitions

METHODS = ["grad_cam", "integrated_gradients", "lime", "occlusion", "shap", "smooth_grad"]
QUARTERS = torch.arange(2).repeat_interleave(2)[:, None] * 2 + torch.arange(2).repeat_interleave(2)


def linear(shape: tuple[int, ...] = (2, 4, 4), classes: int = 3) -> tuple[nn.Module, Tensor]:
    """A linear model in float64, and its weights in the input's shape, one row a class."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), classes)).double().eval()
    return model, model[1].weight.detach().view(classes, *shape)


def smooth_net() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(20, 3), nn.Softplus()
    ).double().eval()  # fmt: skip


def relu_net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(6, 4, 3, padding=1), nn.ReLU(inplace=True), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 3),
    ).double().eval()  # fmt: skip


def images(n: int = 3, channels: int = 2, side: int = 4) -> Tensor:
    return torch.randn(n, channels, side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def part_sums(R: Tensor, mask: Tensor) -> Tensor:
    """The sum (N, parts) of a map over each part of a mask that broadcasts to it."""
    mask = mask.expand(R.shape)
    return torch.stack([(R * (mask == part)).flatten(1).sum(1) for part in range(int(mask.max()) + 1)], 1)


# A linear model has closed forms.


def test_linear_gradient_methods() -> None:
    model, w = linear()
    x = images()
    baseline = torch.linspace(-1, 1, 16, dtype=torch.float64).view(1, 1, 4, 4)
    torch.testing.assert_close(explain(model, x, 1, "smooth_grad"), w[1].expand_as(x))
    # Captum rounds the sum's weights to float32.
    close = {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(explain(model, x, 1, "integrated_gradients"), w[1] * x, **close)
    torch.testing.assert_close(
        explain(model, x, 1, "integrated_gradients", baseline=baseline), w[1] * (x - baseline), **close
    )
    per_channel = torch.tensor([0.5, -2.0], dtype=torch.float64)
    torch.testing.assert_close(
        explain(model, x, 1, "integrated_gradients", baseline=[0.5, -2.0]),
        w[1] * (x - per_channel[:, None, None]),
        **close,
    )
    others = w[1] - (w[0] + w[2]) / 2
    torch.testing.assert_close(explain(model, x, 1, "integrated_gradients", contrast=True), others * x, **close)


@pytest.mark.parametrize(("window", "stride"), [(2, 1), (3, 2), ((1, 4), (1, 1)), (4, 4), (1, 1), (3, 3)])
def test_linear_occlusion(window: Any, stride: Any) -> None:
    model, w = linear()
    x, baseline = images(), 0.25
    parts = (w[2] * (x - baseline)).sum(1)
    height, width = window if isinstance(window, tuple) else (window, window)
    down, right = stride if isinstance(stride, tuple) else (stride, stride)
    total, count = torch.zeros(3, 4, 4, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64)
    for top in range(0, 4 - height + down, down):
        for left in range(0, 4 - width + right, right):
            place = (slice(top, top + height), slice(left, left + width))
            total[:, *place] += parts[:, *place].sum((1, 2))[:, None, None]
            count[place] += 1
    R = explain(model, x, 2, "occlusion", window=window, stride=stride, baseline=baseline)
    torch.testing.assert_close(R.sum(1), total / count, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(R[:, 0], R[:, 1])


def test_occlusion_of_single_features() -> None:
    model, w = linear((7,))
    x = images()[:, 0, :2].flatten(1)[:, :7]
    torch.testing.assert_close(explain(model, x, 0, "occlusion"), w[0] * x, rtol=1e-12, atol=1e-12)


def test_default_windows_are_an_eighth_of_each_side() -> None:
    model, _ = linear((1, 20, 16))
    x = torch.randn(1, 1, 20, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = explain(model, x, 0, "occlusion", window=(3, 2), stride=(2, 1))
    assert torch.equal(explain(model, x, 0, "occlusion"), expected)


@pytest.mark.parametrize("features", [1, 2, 6, 12])
def test_linear_shap_is_exact(features: int) -> None:
    """Enumerated for up to 6 features, drawn for 12 (4094 coalitions): exact either way, as the game is additive."""
    model, w = linear((features,))
    x = torch.randn(3, features, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    R = explain(model, x, 1, "shap", baseline=0.5)
    torch.testing.assert_close(R, w[1] * (x - 0.5), rtol=1e-5, atol=1e-6)  # Captum rounds the outputs to float32


def test_linear_superpixels() -> None:
    model, w = linear()
    x = images()
    expected = part_sums(w[1] * (x - 0.5), QUARTERS)
    R = explain(model, x, 1, "shap", segments=QUARTERS, baseline=0.5)
    torch.testing.assert_close(part_sums(R, QUARTERS), expected, rtol=1e-5, atol=1e-6)
    assert all(len(R[i][QUARTERS.expand(2, 4, 4) == part].unique()) == 1 for i in range(3) for part in range(4))
    R = explain(model, x, 1, "lime", segments=QUARTERS, baseline=0.5, n_samples=2000)
    assert torch.equal(part_sums(R, QUARTERS).argsort(1), expected.argsort(1))
    torch.testing.assert_close(part_sums(R, QUARTERS), expected, rtol=0.02, atol=1e-3)  # the ridge shrinks them


# SmoothGrad.


def test_smooth_grad_by_hand() -> None:
    model, x = relu_net(), images(side=8) * torch.tensor([0.1, 1.0, 30.0]).view(3, 1, 1, 1)
    expected = torch.zeros_like(x)
    for i in range(3):
        generator = torch.Generator().manual_seed(7)
        deviation = 0.2 * float(x[i].max() - x[i].min())
        for _ in range(9):
            noisy = (x[i] + deviation * torch.randn(2, 8, 8, generator=generator)).requires_grad_()
            expected[i] += torch.autograd.grad(model(noisy[None])[0, 2], noisy)[0] / 9
    for batch_size in (1, 4, 64):
        R = explain(model, x, 2, "smooth_grad", n_samples=9, sigma=0.2, seed=7, batch_size=batch_size)
        torch.testing.assert_close(R, expected)


class Cubes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.pow(3).flatten(1).sum(1, keepdim=True)


def test_smooth_grad_is_the_gradient_smoothed() -> None:
    """For Σ x³ its expectation is 3 x² + 3 σ²."""
    x = images()
    deviation = 0.1 * (x.flatten(1).amax(1) - x.flatten(1).amin(1)).view(3, 1, 1, 1)
    R = explain(Cubes().eval(), x, 0, "smooth_grad", n_samples=4000, sigma=0.1)
    # Three standard errors of the mean of 6 x n + 3 n².
    error = 3 * ((6 * x * deviation) ** 2 + 18 * deviation**4).sqrt() / 4000**0.5
    assert ((R - 3 * x**2 - 3 * deviation**2).abs() < 1.3 * error).all()
    assert (R.mean() - (3 * x**2).mean()) > 2 * deviation.min() ** 2
    torch.testing.assert_close(explain(Cubes().eval(), x, 0, "smooth_grad", sigma=0), 3 * x**2)


def test_smooth_grad_noise_is_standard_normal() -> None:
    seen: list[Tensor] = []

    class Seeing(Cubes):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(x.detach().clone())
            return super().forward(x)

    x = torch.tensor([[0.0, 2.0, 1.0, 1.0]]).repeat(1, 50)
    explain(Seeing().eval(), x, 0, "smooth_grad", n_samples=200, sigma=0.25)
    noise = torch.cat([s - x for s in seen if len(s) > 1])
    assert noise.shape == (200, 200)
    assert abs(float(noise.mean())) < 0.01
    assert float(noise.std()) == pytest.approx(0.5, rel=0.02)


# Integrated gradients.


def test_integrated_gradients_are_complete() -> None:
    model, x = smooth_net(), images()
    target = torch.tensor([0, 2, 1])
    difference = (model(x) - model(torch.full_like(x, 0.3))).gather(1, target[:, None])[:, 0].detach()
    R = explain(model, x, target, "integrated_gradients", baseline=0.3)
    torch.testing.assert_close(R.flatten(1).sum(1), difference, rtol=1e-6, atol=1e-7)
    # A ReLU's gradient has steps, so the sum converges more slowly.
    model, x = relu_net(), images(side=8)
    difference = (model(x.clone()) - model(torch.zeros_like(x)))[:, 1].detach()
    R = explain(model, x, 1, "integrated_gradients", n_steps=400)
    torch.testing.assert_close(R.flatten(1).sum(1), difference, rtol=5e-3, atol=2e-3)


def test_integrated_gradients_by_hand() -> None:
    model, x = smooth_net(), images(2)
    steps, integral = 2000, torch.zeros_like(x)
    for i in range(2):
        path = (x[i] * ((torch.arange(steps, dtype=torch.float64) + 0.5) / steps).view(-1, 1, 1, 1)).requires_grad_()
        integral[i] = torch.autograd.grad(model(path)[:, 1].sum(), path)[0].mean(0)
    torch.testing.assert_close(explain(model, x, 1, "integrated_gradients"), x * integral, rtol=1e-5, atol=1e-6)


# Grad-CAM.


def bilinear(small: int, large: int) -> Tensor:
    """The matrix (large, small) of linear interpolation between pixels' centres, clamped at the edges."""
    matrix = torch.zeros(large, small, dtype=torch.float64)
    for i in range(large):
        centre = min(max((i + 0.5) * small / large - 0.5, 0.0), small - 1.0)
        low = min(int(centre), small - 1)
        high = min(low + 1, small - 1)
        matrix[i, low] += 1 - (centre - low)
        matrix[i, high] += centre - low
    return matrix


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize(("layer", "end"), [(None, 6), ("5", 6), ("4", 5), ("3", 4), ("0", 1), ("6", 7)])
def test_grad_cam_by_hand(layer: str | None, end: int, relu: bool) -> None:
    """The default of this network is the output of its last ReLU, before the pooling."""
    model, x, target = relu_net(), images(24, side=8), torch.arange(24) % 3
    maps = model[:end](x.clone()).detach().requires_grad_()
    (gradients,) = torch.autograd.grad(model[end:](maps.clone())[torch.arange(24), target].sum(), maps)
    cam = torch.einsum("nk,nkhw->nhw", gradients.mean((2, 3)), maps.detach())
    up = bilinear(cam.shape[1], 8)
    expected = torch.einsum("ih,nhw,jw->nij", up, cam.clamp(min=0) if relu else cam, up)
    R = explain(model, x, target, "grad_cam", relu=relu, **({} if layer is None else {"layer": layer}))
    torch.testing.assert_close(R.sum(1), expected, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(R[:, 0], R[:, 1])
    assert float(R.abs().max()) > 0


def test_grad_cam_takes_the_last_block_of_a_resnet() -> None:
    from torchvision.models import resnet18

    torch.manual_seed(0)
    model = resnet18(num_classes=4).eval()
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    R = explain(model, x, 1, "grad_cam", relu=False)
    assert torch.equal(R, explain(model, x, 1, "grad_cam", layer="layer4", relu=False))
    assert not torch.allclose(R, explain(model, x, 1, "grad_cam", layer="layer4.1.conv2", relu=False))


def test_grad_cam_prefers_a_map_to_a_convolution_over_one_place() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 3, 1), nn.Flatten()
    ).double().eval()  # fmt: skip
    x = images()
    assert torch.equal(explain(model, x, 0, "grad_cam"), explain(model, x, 0, "grad_cam", layer="1"))


def test_grad_cam_of_sequences_and_of_a_contrast() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 6, 3)).double().eval()
    x = images()[:, :, :2].flatten(2)
    single = [explain(model, x, k, "grad_cam", layer="1", relu=False) for k in range(3)]
    assert single[0].shape == x.shape
    contrast = explain(model, x, 1, "grad_cam", layer="1", relu=False, contrast=True)
    torch.testing.assert_close(contrast, single[1] - (single[0] + single[2]) / 2)


class FailsLater(nn.Module):
    """A model that fails in its second pass, as one that runs out of memory with gradients does."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.passes = relu_net(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        logits = self.net(x)
        if self.passes > 1:
            raise RuntimeError("out of luck")
        return logits


@pytest.mark.parametrize("method", METHODS)
def test_no_hook_outlives_an_error_in_a_later_pass(method: str) -> None:
    model = FailsLater().eval()
    with pytest.raises(RuntimeError, match="out of luck"):
        explain(model, images(side=8), 0, method)
    hooks = [value for module in model.modules() for key, value in vars(module).items() if key.endswith("_hooks")]
    assert hooks
    assert not any(hooks)


# SHAP and LIME.


def game(model: nn.Module, x: Tensor, baseline: float, on: tuple[int, ...]) -> float:
    """The logit of class 1 of one image (C, 4, 4), with some of its quarters on."""
    switch = torch.tensor([part in on for part in range(4)])[QUARTERS]
    return float(model.requires_grad_(False)(torch.where(switch, x, torch.full_like(x, baseline))[None])[0, 1])


def test_shap_is_the_mean_over_all_orders() -> None:
    model, x = relu_net_small(), images()
    R = part_sums(explain(model, x, 1, "shap", segments=QUARTERS, baseline=0.2), QUARTERS)
    expected = torch.zeros(3, 4, dtype=torch.float64)
    for i in range(3):
        for order in itertools.permutations(range(4)):
            for place, part in enumerate(order):
                gain = game(model, x[i], 0.2, order[: place + 1]) - game(model, x[i], 0.2, order[:place])
                expected[i, part] += gain / math.factorial(4)
    torch.testing.assert_close(R, expected, rtol=1e-5, atol=1e-6)


def relu_net_small() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(96, 8), nn.ReLU(), nn.Linear(8, 3)
    ).double().eval()  # fmt: skip


def test_drawn_coalitions_come_close_and_keep_the_sum() -> None:
    torch.manual_seed(6)
    model = nn.Sequential(nn.Linear(11, 40), nn.ReLU(), nn.Linear(40, 2)).double().eval()
    x = torch.randn(2, 11, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    exact = explain(model, x, 0, "shap", n_samples=2046)
    assert len(coalitions(11, 2046, 0)[0]) == 2046
    drawn = [explain(model, x, 0, "shap", n_samples=n) for n in (200, 1600)]
    total = (model(x) - model(torch.zeros_like(x)))[:, 0].detach()
    errors = [float((R - exact).norm() / exact.norm()) for R in drawn]
    assert 0 < errors[1] < errors[0] < 0.1
    for R in (exact, *drawn):
        torch.testing.assert_close(R.sum(1), total, rtol=1e-9, atol=1e-9)


def test_coalitions() -> None:
    switches, weights = coalitions(5, 30, 0)
    assert len(switches.unique(dim=0)) == 30
    for row, weight in zip(switches, weights, strict=True):
        k = int(row.sum())
        assert float(weight) == pytest.approx(4 / (math.comb(5, k) * k * (5 - k)))
    drawn, weights = coalitions(8, 251, 3)
    assert drawn.shape == (251, 8)
    assert (weights == 1).all()
    assert torch.equal(drawn[:250:2], ~drawn[1:251:2])
    # Sizes in proportion to 1 / (k (M − k)).
    sizes = torch.bincount(coalitions(21, 40000, 0)[0].sum(1), minlength=22)[1:21] / 40000
    share = torch.tensor([1 / (k * (21 - k)) for k in range(1, 21)])
    torch.testing.assert_close(sizes, share / share.sum(), rtol=0.1, atol=0)


def test_lime_agrees_with_captums() -> None:
    """Captum's own `Lime` draws its own samples, and has scikit-learn fit them."""
    from captum._utils.models.linear_model import SkLearnRidge
    from captum.attr import Lime

    model, x = relu_net_small(), images(1)

    def similarity(original: Tensor, perturbed: Tensor, z: Tensor, **options: Any) -> float:
        distance = 1 - float(nn.functional.cosine_similarity(z.double(), torch.ones_like(z).double()))
        return math.sqrt(math.exp(-(distance**2) / 0.5**2))

    torch.manual_seed(0)
    lime = Lime(model, SkLearnRidge(alpha=1.0), similarity)
    expected = lime.attribute(
        x, target=1, feature_mask=QUARTERS[None, None], n_samples=3000, perturbations_per_eval=100, baselines=0.2,
        return_input_shape=False,
    )  # fmt: skip
    R = explain(model, x, 1, "lime", segments=QUARTERS, n_samples=3000, baseline=0.2, kernel_width=0.5)
    torch.testing.assert_close(
        part_sums(R, QUARTERS), expected.double(), rtol=0, atol=0.03 * float(expected.abs().max())
    )


def test_lime_is_the_ridge_of_its_draws() -> None:
    from sklearn.linear_model import Ridge

    model = relu_net_small()
    x = images(1)
    rows: list[Tensor] = []
    handle = model[0].register_forward_hook(lambda module, args, output: rows.append(args[0].clone()))
    R = explain(model, x, 1, "lime", segments=QUARTERS, n_samples=60, kernel_width=0.3, batch_size=7)
    handle.remove()
    # What the model saw tells which parts were on; the passes that come first are of x and of the baseline.
    seen = torch.cat(rows)[-60:]
    switches = torch.stack([(seen[:, :, part == QUARTERS] != 0).all(2).all(1) for part in range(4)], 1).double()
    assert switches[0].all()
    assert 0.35 < float(switches.mean()) < 0.65
    weights = [math.exp(-((1 - math.sqrt(float(z.mean()))) ** 2) / (2 * 0.3**2)) for z in switches]
    fitted = Ridge(alpha=1.0).fit(switches.numpy(), model(seen)[:, 1].detach().numpy(), weights)
    torch.testing.assert_close(part_sums(R, QUARTERS)[0], torch.from_numpy(fitted.coef_), rtol=1e-5, atol=1e-6)


# The parts of an input.


def test_superpixels_follow_the_image() -> None:
    x = torch.zeros(2, 3, 32, 32)
    x[0, :, :, 13:] = 1.5
    x[1, :, 19:] = -2.0
    parts = segment(x, 20)
    assert parts.shape == x.shape
    assert torch.equal(parts, parts[:, :1].expand_as(parts))
    for sample, image in zip(parts, x, strict=True):
        assert 10 <= len(sample.unique()) <= 30
        assert sample.unique().tolist() == list(range(len(sample.unique())))
        assert all(len(image[sample == part].unique()) == 1 for part in sample.unique())
    assert torch.equal(segment(x[1:], 20), parts[1:])
    assert torch.equal(segment(x * 7 - 20, 20), parts)  # normalised differently
    grey = segment(x[:, :1], 20)
    assert all(len(x[0, :1][grey[0] == part].unique()) == 1 for part in grey[0].unique())


def test_forms_of_segments() -> None:
    x = images()
    expected = QUARTERS.expand(3, 2, 4, 4)
    for mask in (
        QUARTERS,
        QUARTERS.expand(3, 4, 4),
        QUARTERS[None, None],
        expected,
        QUARTERS * 5 + 2,
        QUARTERS.numpy(),
    ):
        assert torch.equal(segment(x, mask), expected)
    assert len(segment(x, None).unique()) <= 16
    flat = x.flatten(1)
    assert torch.equal(segment(flat, None), torch.arange(32).expand(3, 32))
    assert torch.equal(segment(flat, torch.arange(32) // 4), (torch.arange(32) // 4).expand(3, 32))
    per_channel = torch.tensor([0, 1]).view(1, 2, 1, 1)
    assert torch.equal(segment(x, per_channel), per_channel.expand(3, 2, 4, 4))
