"""Layers and concepts that are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from layered import images, network
from torch import Tensor, nn

from spray import explain
from spray.errors import UserError

# Mistakes


class Odd(nn.Module):
    """A network with parts whose outputs can't be looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.MaxPool2d(2, return_indices=True)
        self.cut = nn.Conv2d(3, 2, 1)
        self.after = nn.ReLU()
        self.unused = nn.Linear(2, 2)
        self.side = nn.ReLU()
        self.fc = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        pooled, _ = self.pair(x)
        blocked = self.after(self.cut(pooled.detach())).sum()
        self.side(pooled)
        return self.fc(pooled.mean((2, 3))) + blocked


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": "pair"}, "returns a tuple"),
        ({"layer": "cut"}, "does not depend on the input"),
        ({"layer": "after"}, "does not depend on the input"),
        ({"layer": "unused"}, "did not run"),
        ({"layer": "side"}, "no relevance reaches layer 'side'"),
        ({"condition": {"pair": 0}}, "returns a tuple"),
        ({"start": ("cut", 0)}, "does not depend on the input"),
        ({"start": ("unused", 0)}, "did not run"),
    ],
)
def test_layers_without_relevance_are_refused(options: dict[str, Any], message: str) -> None:
    torch.manual_seed(0)
    model = Odd().double().eval()
    target = None if "start" in options else 1
    with pytest.raises(UserError, match=message):
        explain(model, images(), target, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer": "blok"}, "no layer 'blok'; did you mean 'block'"),
        ({"layer": "conv_2"}, "did you mean 'conv2'"),
        ({"layer": ["conv", "xyz"]}, "no layer 'xyz'; see model.named_modules"),
        ({"layer": "conv#0"}, "no layer 'conv#0'"),
        ({"layer": "conv#"}, "no layer 'conv#'"),
        ({"layer": "conv#a"}, "no layer 'conv#a'"),
        ({"layer": "conv#2"}, "did not run: module 'conv' ran 1 times"),
        ({"layer": 5}, "name of a layer or a list of names"),
        ({"layer": ["conv", 5]}, "name of a layer or a list of names"),
        ({"layer": []}, "names no layer"),
        ({"start": "conv"}, "layer's name and a concept"),
        ({"start": ("conv",)}, "layer's name and a concept"),
        ({"start": ("conv", 1, 2)}, "layer's name and a concept"),
        ({"start": ("", 0)}, "no layer ''"),
        ({"start": ("conv", 0), "layer": "fc"}, "'fc' did not run: .* before layer 'conv', where relevance starts"),
        ({"start": ("conv", 0), "target": 1}, "leave target and contrast out"),
        ({"start": ("conv", 0), "contrast": True}, "leave target and contrast out"),
        ({"condition": ["conv"]}, "must map layers' names to concepts"),
        ({"condition": {5: 1}}, "no layer 5"),
        ({"condition": {"": 1}}, "no layer ''"),
    ],
)
def test_layers_that_do_not_exist_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        explain(network(), images(), **options)


@pytest.mark.parametrize(
    "concept",
    [
        4,
        -1,
        [0, 4],
        [],
        None,
        True,
        [True, False, True, False],
        1.5,
        [0.5, 1.0],
        "1",
        "conv",
        torch.tensor(1.5),
        torch.ones(3),
        torch.zeros(4),
        torch.tensor([1.0, float("nan"), 0, 0]),
        torch.ones(5, 8, 8),
        torch.ones(3, 4, 8, 8),
        torch.ones(3, dtype=torch.bool),
        np.ones(3),
    ],
    ids=repr,
)
def test_concepts_that_do_not_fit_are_refused(concept: Any) -> None:
    allowed = r"allowed: a channel from 0 to 3, a list of them, a direction \(4,\) or a mask"
    with pytest.raises(UserError, match=allowed):
        explain(network(), images(), 1, condition={"relu": concept})
    with pytest.raises(UserError, match=allowed):
        explain(network(), images(), start=("relu", concept))
