"""Models in the order of memory that suits CPUs: the same logits, whatever the model does with its activations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from spray.models.memory_format import channels_last
from spray.models.small_cnn import SmallCNN


class Viewing(SmallCNN):
    """Takes activations for contiguous, which those in channels-last order are not."""

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).view(len(x), -1))


class Strided(SmallCNN):
    """Reads activations in the order of memory: another order, another answer, and no error."""

    def forward(self, x: Tensor) -> Tensor:
        a = self.features(x)
        return self.classifier(a.as_strided((len(x), a[0].numel()), (a[0].numel(), 1)))


@pytest.mark.parametrize("kind", [SmallCNN, Viewing, Strided])
def test_logits_are_the_same_and_the_model_is_left_alone(kind: type[SmallCNN]) -> None:
    torch.manual_seed(0)
    model, x = kind(3, 5, 8).eval(), torch.rand(4, 3, 32, 32)
    with torch.inference_mode():
        before = model(x)
        found = channels_last(model, x)
        assert torch.allclose(found(x), before, atol=1e-5)
        assert torch.equal(model(x), before)
    last = next(p for p in found.parameters() if p.dim() == 4 and p.shape[1] > 1)
    assert last.is_contiguous(memory_format=torch.channels_last) == (kind is SmallCNN)
    assert not {id(p) for p in model.parameters()} & {id(p) for p in found.parameters()}


def test_a_model_without_convolutions_is_taken_as_it_is() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).eval()
    x = torch.rand(3, 3, 2, 2)
    with torch.inference_mode():
        assert torch.equal(channels_last(model, x)(x), model(x))
