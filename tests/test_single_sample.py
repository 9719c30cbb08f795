"""A sample alone is explained as in company, also where torch's own gradient of batch normalisation goes astray."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spray import explain
from spray.errors import UserError


class Tokens(nn.Module):
    """A convolutional stem with batch normalisation whose places become tokens, as in hybrid transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.first, self.head = nn.Parameter(torch.randn(1, 1, 8)), nn.Linear(8 * 37, 4)
        nn.init.uniform_(self.norm.running_var, 0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(self.stem(x)).flatten(2).transpose(1, 2)
        return self.head(torch.cat([self.first.expand(len(x), -1, -1), tokens], 1).flatten(1))


METHODS: list[dict[str, Any]] = [
    {"method": "gradient"},
    {"method": "gradient_x_input"},
    {"method": "grad_cam", "layer": "stem", "relu": False},
    {"method": "smooth_grad", "n_samples": 1},
    {"method": "integrated_gradients", "batch_size": 1},
    {"composite": "epsilon"},
    {"composite": "epsilon", "fallback": "gradient"},
]


@pytest.mark.parametrize("target", [1, None, torch.tensor([1, 1])], ids=str)
@pytest.mark.parametrize("options", METHODS, ids=str)
def test_alone_as_in_company(options: dict[str, Any], target: Any) -> None:
    torch.manual_seed(0)
    model, x = Tokens().eval(), torch.randn(2, 3, 8, 8)
    both = explain(model, x, target, **options)
    alone = explain(model, x[:1], target[:1] if isinstance(target, Tensor) else target, **options)
    torch.testing.assert_close(alone, both[:1], rtol=1e-4, atol=1e-5 * float(both.abs().max()))


def test_a_normalisation_of_its_own_is_right_alone_too() -> None:
    """Batch normalisation that no layer precedes goes through autograd: relevance has to be laid out as it expects."""
    torch.manual_seed(0)
    model = Tokens()
    model.stem = nn.Identity()
    model.norm, model.head, model.first = nn.BatchNorm2d(3), nn.Linear(3 * 65, 4), nn.Parameter(torch.randn(1, 1, 3))
    model, x = model.eval(), torch.randn(2, 3, 8, 8)
    for target in (1, [0, 1]):
        both = explain(model, x, target, composite="epsilon")
        torch.testing.assert_close(explain(model, x[:1], target, composite="epsilon"), both[:1], rtol=1e-4, atol=1e-6)


def test_transforms_of_functions_are_refused() -> None:
    class Mapped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.vmap(torch.relu)(x)

    with pytest.raises(UserError, match="a transform of torch"):
        explain(Mapped().eval(), torch.randn(2, 3), 0)


def test_what_a_model_does_to_what_it_detaches_stays_in_it() -> None:
    class Scaling(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x.detach().mul_(2)
            return x.flatten(1)

    for x in (torch.rand(2, 3), torch.rand(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)):
        before = x.clone()
        explain(Scaling().eval(), x, 0, composite="epsilon")
        assert torch.equal(x, before)


def test_numpy_inside_a_model_is_refused() -> None:
    class Outside(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.from_numpy(x.numpy())

    with pytest.raises(UserError, match="numpy"):
        explain(Outside().eval(), torch.rand(2, 3), 0)


@pytest.mark.parametrize("rule", ["flat", "w_square", {"rule": "z_box", "low": -5.0, "high": 5.0}], ids=str)
def test_first_rules_of_a_product_whose_samples_come_second(rule: Any) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(4, 3))

    class Transposed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: Tensor) -> Tensor:
            return (self.weight @ x.T).T

    plain = nn.Linear(3, 4, bias=False)
    plain.weight = weight
    x = torch.randn(5, 3)
    expected = explain(plain.eval(), x, 1, composite={"first": rule})
    torch.testing.assert_close(explain(Transposed().eval(), x, 1, composite={"first": rule}), expected)
