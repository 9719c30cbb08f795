"""Several targets at once, and contrasts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from layered import COMPOSITES, close, images, network
from torch import Tensor

from spray import explain
from spray.lrp import build_composite, propagate

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
