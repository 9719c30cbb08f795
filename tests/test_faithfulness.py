"""Deletion curves: a linear model's are known exactly, and its best order is found by trying all."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from spray.errors import UserError
from spray.faithfulness import area_over_curve, area_under_curve, deleted_patches, deletion_curve, deletion_order


class Linear(nn.Module):
    """f_c(x) = Σ w_c x + b_c; remembers the sizes of the batches it saw."""

    def __init__(self, size: tuple[int, int] = (6, 4), classes: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.w = nn.Parameter(torch.randn((classes, 2, *size), generator=generator, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(classes, generator=generator, dtype=torch.float64))
        self.batches: list[int] = []
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        self.batches.append(len(x))
        return torch.einsum("nchw,kchw->nk", x, self.w) + self.b


def images(n: int = 5, size: tuple[int, int] = (6, 4)) -> Tensor:
    return torch.randn((n, 2, *size), generator=torch.Generator().manual_seed(11), dtype=torch.float64)


def contributions(model: Linear, x: Tensor, classes: Tensor, fill: Tensor | float = 0.0) -> Tensor:
    """What each pixel adds to the logit, compared to its filling."""
    return model.w.detach()[classes] * (x - fill)


def by_hand(model: nn.Module, x: Tensor, target: int, sequence: list[int], patch: int, fill: Tensor) -> list[float]:
    """The curve of one sample, its patches overwritten one after the other."""
    x = x.clone()
    columns = -(-x.shape[2] // patch)
    curve = [model(x[None])[0, target].item()]
    for number in sequence:
        top, left = (number // columns) * patch, (number % columns) * patch
        where = (..., slice(top, top + patch), slice(left, left + patch))
        x[where] = fill[where]
        curve.append(model(x[None])[0, target].item())
    return curve


def test_curve_of_a_linear_model_has_its_closed_form():
    model, x = Linear(), images()
    classes = torch.tensor([0, 1, 2, 0, 1])
    R = contributions(model, x, classes)
    per_patch = R.detach().sum(1).reshape(5, 3, 2, 2, 2).sum((2, 4)).flatten(1)
    expected = per_patch.sort(1, descending=True).values.cumsum(1)
    start = model(x).gather(1, classes[:, None]).detach()
    curve = deletion_curve(model, x, R, classes, patch=2, fill=0.0)
    torch.testing.assert_close(curve, torch.cat([start, start - expected], 1))
    torch.testing.assert_close(curve[:, -1], model.b.detach()[classes])


def test_no_order_falls_faster_than_contributions_and_none_slower_than_their_reverse():
    model, x = Linear(), images(1, (6, 4))
    R = contributions(model, x, torch.tensor([1]), 0.3)
    fill = torch.full_like(x[0], 0.3)
    every = torch.tensor([by_hand(model, x[0], 1, list(o), 2, fill) for o in permutations(range(6))])
    every = every.to(torch.float64)
    most = deletion_curve(model, x, R, 1, patch=2, fill=0.3)[0]
    least = deletion_curve(model, x, R, 1, patch=2, fill=0.3, order="least_relevant")[0]
    torch.testing.assert_close(most, every.min(0).values)
    torch.testing.assert_close(least, every.max(0).values)


def test_random_order_lies_between_the_most_and_the_least_relevant_first():
    model, x = Linear(), images()
    R = contributions(model, x, torch.zeros(5, dtype=torch.int64))
    most, least = (
        deletion_curve(model, x, R, 0, patch=1, fill=0.0, order=order) for order in ("most_relevant", "least_relevant")
    )
    for seed in range(5):
        random = deletion_curve(model, x, R, 0, patch=1, fill=0.0, order="random", seed=seed)
        assert (most <= random + 1e-12).all()  # they may begin with the same patch
        assert (random <= least + 1e-12).all()
        assert (area_under_curve(most) < area_under_curve(random)).all()
        assert (area_under_curve(random) < area_under_curve(least)).all()
        assert (area_over_curve(most) > area_over_curve(random)).all()
    torch.testing.assert_close(most[:, [0, -1]], least[:, [0, -1]])


@pytest.mark.parametrize("order", ["most_relevant", "least_relevant", "random"])
@pytest.mark.parametrize("patch", [1, 2, 4, 5])
def test_curve_of_a_convolutional_net_is_that_of_deleting_patches_by_hand(patch: int, order: str):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    net = net.double().eval()
    x = images(3, (7, 5))
    R = torch.randn(3, 7, 5, dtype=torch.float64)
    curve = deletion_curve(net, x, R, 2, patch=patch, order=order, seed=4, batch_size=7)
    sequences = deletion_order(R, patch, order=order, seed=4)
    for i in range(3):
        mean = x[i].mean((1, 2), keepdim=True).expand_as(x[i])
        expected = by_hand(net, x[i], 2, sequences[i].tolist(), patch, mean)
        torch.testing.assert_close(curve[i], torch.tensor(expected, dtype=torch.float64))


def test_order_sorts_the_patches_sums_of_signed_relevance():
    R = torch.tensor([[[1.0, 1.0, -9.0, 5.0, 3.0], [1.0, 1.0, 1.0, 1.0, 0.5], [0.0, 0.0, 9.0, -8.0, 2.0]]])
    # patches of 2 x 2: sums 4, -2, 3.5 over 0, 1, 2
    assert deletion_order(R, 2).tolist() == [[0, 2, 5, 4, 3, 1]]
    assert deletion_order(R, 2, order="least_relevant").tolist() == [[1, 3, 4, 5, 2, 0]]
    channels = torch.stack([R[0] * 0.25, R[0] * 0.75])[None]
    assert torch.equal(deletion_order(channels, 2), deletion_order(R, 2))


def test_equal_relevance_has_a_random_order_that_the_seed_fixes():
    flat = torch.zeros(2, 8, 8)
    order = deletion_order(flat, 1, seed=1)
    assert torch.equal(order, deletion_order(flat, 1, seed=1))
    assert torch.equal(order, deletion_order(flat, 1, seed=1, order="random"))
    assert not torch.equal(order, deletion_order(flat, 1, seed=2))
    assert sorted(order[0].tolist()) == list(range(64))
    assert order[0].tolist() != list(range(64))
    top = flat.index_fill(1, torch.tensor([3]), 1.0)
    assert set(deletion_order(top, 1)[0, :8].tolist()) == set(range(24, 32))


def test_each_sample_has_the_curve_that_it_has_alone_whatever_the_batch():
    model, x = Linear(), images()
    R = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    options: dict[str, Any] = {"patch": 2, "fill": "blur", "output": "probability"}
    together = deletion_curve(model, x, R, **options)
    alone = torch.cat([deletion_curve(model, x[i : i + 1], R[i : i + 1], **options) for i in range(5)])
    torch.testing.assert_close(together, alone)
    model.batches.clear()
    torch.testing.assert_close(together, deletion_curve(model, x, R, **options, batch_size=4))
    assert max(model.batches) == 4


def test_target_defaults_to_the_class_predicted_for_the_whole_image():
    model, x = Linear(), images()
    R = contributions(model, x, torch.zeros(5, dtype=torch.int64))
    predicted = model(x).argmax(1)
    curve = deletion_curve(model, x, R, patch=2)
    assert torch.equal(curve, deletion_curve(model, x, R, predicted, patch=2))
    assert len(predicted.unique()) > 1
    torch.testing.assert_close(curve[:, 0], model(x).detach().max(1).values)


def test_probability_is_the_softmax_of_the_logits():
    model, x = Linear(), images()
    logits = torch.stack([deletion_curve(model, x, x, k, patch=3) for k in range(3)], -1)
    probability = deletion_curve(model, x, x, 1, patch=3, output="probability")
    torch.testing.assert_close(probability, logits.softmax(-1)[..., 1])


@pytest.mark.parametrize("sigma", [1, 3])
def test_blur_is_scipys(sigma: int):
    model, x = Linear(), images()
    end = deletion_curve(model, x, x, 0, patch=sigma, fill="blur")[:, -1]
    smooth = gaussian_filter(x.numpy(), (0, 0, sigma, sigma), mode="nearest", truncate=3)
    torch.testing.assert_close(end, model(torch.from_numpy(smooth)).detach()[:, 0])


def test_a_tensor_fills_what_is_deleted():
    model, x = Linear(), images()
    for fill in (torch.tensor([0.5, -1.0]).view(2, 1, 1), images().flip(0)):
        end = deletion_curve(model, x, x, 0, patch=2, fill=fill)[:, -1]
        torch.testing.assert_close(end, model(fill.to(x).expand_as(x)).detach()[:, 0])


def test_steps_thin_the_curve_out():
    model, x = Linear(), images()
    fine = deletion_curve(model, x, x, 0, patch=1)
    assert fine.shape == (5, 25)
    for steps in (1, 5, 7, 24):
        counts = deleted_patches(24, steps)
        assert counts.tolist() == np.floor(np.linspace(0, 24, steps + 1) + 0.5).astype(int).tolist()
        torch.testing.assert_close(deletion_curve(model, x, x, 0, patch=1, steps=steps), fine[:, counts])


def test_areas_of_known_curves():
    line = torch.linspace(4.0, 0.0, 9)[None]
    step = torch.tensor([[1.0, 0.0, 0.0, 0.0, 0.0]])
    assert area_under_curve(line).tolist() == [2.0]
    assert area_over_curve(line).tolist() == [2.0]
    assert area_under_curve(step).tolist() == [0.125]
    assert area_over_curve(step).tolist() == pytest.approx([0.8])
    assert area_over_curve(step + 7).tolist() == pytest.approx([0.8])


def test_model_input_and_random_state_are_left_alone():
    class InPlace(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.mul_(2))

    model, x = InPlace(), images()
    before, state = x.clone(), torch.get_rng_state()
    curve = deletion_curve(model, x, x, patch=2)
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert not curve.requires_grad
    assert not curve.is_inference()
    assert model.w.grad is None


def nan_at(sample: int) -> Tensor:
    x = images()
    x[sample, 0, 1, 2] = torch.nan
    return x


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"relevance": images(4)}, r"relevance must be a tensor of shape .*not shape \(4, 2, 6, 4\)"),
        ({"relevance": images(5, (6, 5))}, "relevance must be a tensor of shape"),
        ({"relevance": None}, "relevance must be .* not NoneType"),
        ({"relevance": nan_at(3)}, r"the relevance is not finite for samples \[3\]"),
        ({"x": nan_at(2)}, r"x is not finite for samples \[2\]"),
        ({"x": images()[0]}, r"x must be images of shape \(N, C, H, W\)"),
        ({"x": images(0)}, "at least one"),
        ({"patch": 0}, "patch must be an integer from 1 to the image's 6 pixels, not 0"),
        ({"patch": 7}, "patch must be"),
        ({"patch": 2.0}, "patch must be"),
        ({"steps": 25}, "steps must be an integer from 1 to the number of patches, 24, not 25"),
        ({"steps": 0}, "steps must be"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"fill": "noise"}, "unknown fill 'noise'; allowed: mean, blur or a number or tensor"),
        ({"fill": torch.zeros(3, 1, 1)}, r"fill must be .*not of shape \(3, 1, 1\)"),
        ({"fill": float("nan")}, "fill is not finite"),
        ({"fill": None}, "fill must be"),
        ({"order": "reverse"}, "unknown order 'reverse'; allowed: most_relevant, least_relevant, random"),
        ({"output": "loss"}, "unknown output 'loss'; allowed: logit, probability"),
        ({"target": 3}, "target 3 to 3 is out of range"),
        ({"target": [0, 1]}, "target must name one class for each sample, not 2"),
        ({"model": Linear().train()}, "training mode"),
        ({"model": nn.Conv2d(2, 1, 1).double().eval()}, "the model must return logits"),
    ],
)
def test_mistakes_are_told(change: dict[str, Any], message: str):
    arguments = {"model": Linear(), "x": images(), "relevance": images(), "target": 0, "patch": 1} | change
    with pytest.raises(UserError, match=message):
        deletion_curve(**arguments)


@pytest.mark.parametrize("area", [area_under_curve, area_over_curve])
@pytest.mark.parametrize(
    "curve", [torch.zeros(3), torch.zeros(3, 1), torch.zeros(2, 3).long(), torch.tensor([[0, torch.nan]])]
)
def test_areas_need_curves(area: Callable[[Tensor], Tensor], curve: Tensor):
    with pytest.raises(UserError, match="curve"):
        area(curve)


def test_a_model_that_fails_on_deleted_images_is_told():
    class Fragile(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / (x.flatten(1).std(1) > 0)[:, None]

    with pytest.raises(UserError, match=r"for the deleted images is not finite for samples \[0, 1, 2, 3, 4\]"):
        deletion_curve(Fragile(), images(), images(), 0, patch=2, fill=0.0)


def test_half_precision_relevance_and_model_are_welcome():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)).eval()
    x = images().float()
    full = deletion_curve(net, x, x, 0, patch=2)
    half = deletion_curve(net.bfloat16(), x.bfloat16(), x, 0, patch=2)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), full, atol=0.03, rtol=0.03)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_model_may_live_on_another_device():
    model, x = Linear(), images()
    expected = deletion_curve(model, x, x, 1, patch=2)
    curve = deletion_curve(model.cuda(), x, x, 1, patch=2)
    assert curve.device.type == "cpu"
    torch.testing.assert_close(curve, expected)
