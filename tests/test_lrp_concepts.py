"""Relevance through the concepts of inner layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from layered import COMPOSITES, close, cut, images, logit_of, network
from torch import Tensor, nn

from spray import explain
from spray.lrp import Zero, build_composite, propagate_to

# What passes through a concept


@pytest.mark.parametrize("layer", ["conv", "norm", "relu", "block", "block.c1", "block.b2", "conv2", "average", "fc"])
@pytest.mark.parametrize("composite", COMPOSITES)
def test_conditions_on_all_channels_add_up(composite: str, layer: str) -> None:
    model, x = network(), images()
    options = COMPOSITES[composite]
    shape = explain(model, x, 1, composite=composite, layer=layer, **options).shape[1:]
    whole = explain(model, x, 1, composite=composite, **options)

    def conditioned(concept: Any) -> Tensor:
        return explain(model, x, 1, composite=composite, condition={layer: concept}, **options)

    # What flows past the layer, through the block's shortcut, is in every map.
    past = conditioned(torch.zeros(shape)) if len(shape) > 1 else torch.zeros_like(x)
    assert bool(past.any()) == (layer in ("block.c1", "block.b2"))
    parts = torch.stack([conditioned(c) - past for c in range(shape[0])])
    # A condition has a layer computed before the ReLU that follows is known: another way to the same numbers.
    close(parts.sum(0), whole - past, 1e-9)
    assert not torch.allclose(parts[0], whole - past)
    close(conditioned(list(range(shape[0]))), whole, 1e-9)
    if len(shape) > 1:
        close(conditioned(torch.ones(shape)), whole, 1e-9)


@pytest.mark.parametrize("layer", ["relu", "block", "conv2", "relu3"])
@pytest.mark.parametrize("composite", ["lrp_0", "epsilon", "epsilon_plus_flat", "epsilon_alpha2_beta1_flat"])
def test_conditions_on_an_orthonormal_basis_add_up(composite: str, layer: str) -> None:
    model, x = network(), images()
    channels = explain(model, x, 1, layer=layer).shape[1]
    basis = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64)).Q
    parts = [explain(model, x, 1, composite=composite, condition={layer: 2 * h}) for h in basis.T]
    whole = explain(model, x, 1, composite=composite)
    close(torch.stack(parts).sum(0), whole, 1e-9)


class Decomposed(nn.Module):
    """Chormai et al. 2022: the pair of linear layers U Uᵀ after the first part."""

    def __init__(self, first: nn.Module, rest: nn.Module, U: Tensor) -> None:
        super().__init__()
        self.first, self.rest = first, rest
        d = U.shape[0]
        self.encode = nn.Conv2d(d, d, 1, bias=False, dtype=U.dtype)
        self.decode = nn.Conv2d(d, d, 1, bias=False, dtype=U.dtype)
        self.encode.weight.data.copy_(U.T[..., None, None])
        self.decode.weight.data.copy_(U[..., None, None])

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.decode(self.encode(self.first(x))))


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("layer", ["norm", "conv2"])
@pytest.mark.parametrize("composite", ["lrp_0", "epsilon", "epsilon_plus_flat"])
def test_a_direction_is_a_pair_of_linear_layers(composite: str, layer: str, n: int) -> None:
    """At layers without zeros: where a_i = 0, the context R_i / a_i is taken for 0."""
    model, x = network(), images(n)
    channels = {"norm": 4, "conv2": 5}[layer]
    torch.manual_seed(5)
    U = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64)).Q
    decomposed = Decomposed(*cut(model, layer), U).eval()
    rules = build_composite(composite, decomposed)
    rules = replace(rules, names={"encode": Zero(), "decode": Zero()})
    for k in range(channels):
        result = explain(model, x, 1, composite=composite, condition={layer: U[:, k]})
        expected = propagate_to(decomposed, x, rules, logit_of(1), conditions={"encode": k})[""]
        close(result, expected, 1e-8)


def test_a_direction_of_one_sample_does_not_depend_on_the_batch() -> None:
    model, x = network(), images()
    h = torch.arange(1.0, 5)
    many = explain(model, x, [1, 2], condition={"relu": h})
    for n in range(3):
        close(many[n : n + 1], explain(model, x[n : n + 1], [1, 2], condition={"relu": h}))


def test_conditions_at_several_layers() -> None:
    model, x = network(), images()
    total = torch.zeros_like(x)
    for c in range(4):
        for k in range(5):
            total += explain(model, x, 1, condition={"relu": c, "conv2": k})
    close(total, explain(model, x, 1), 1e-9)
    both = explain(model, x, 1, condition={"relu": 0, "conv2": 3}, layer=["relu", "conv2"])
    assert bool((both["relu"][:, 1:] == 0).all())
    assert bool((both["conv2"][:, [0, 1, 2, 4]] == 0).all())
    assert both["conv2"][:, 3].any()


# Sequences and one-dimensional signals


def sequence_model(kind: str) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(2)
    if kind == "signal":
        layers: list[nn.Module] = [nn.Conv1d(3, 5, 3), nn.ReLU(), nn.Dropout(), nn.MaxPool1d(2), nn.Flatten()]
        layers.append(nn.Linear(5 * 3, 4))
        x = torch.randn(2, 3, 8, dtype=torch.float64)
    else:
        layers = [nn.Linear(3, 5), nn.ReLU(), nn.Dropout(), nn.LayerNorm(5), nn.Flatten(), nn.Linear(40, 4)]
        x = torch.randn(2, 8, 3, dtype=torch.float64)
    return nn.Sequential(*layers).double().eval(), x


@pytest.mark.parametrize("layer", ["0", "1", "2"])
@pytest.mark.parametrize("kind", ["signal", "tokens"])
def test_channels_of_sequences(kind: str, layer: str) -> None:
    model, x = sequence_model(kind)
    relevance = explain(model, x, 1, composite="epsilon", layer=layer, condition={layer: 4})
    free = explain(model, x, 1, composite="epsilon", layer=layer)
    kept = relevance.movedim(1 if kind == "signal" else 2, 0)
    assert kept.shape[0] == 5
    assert not kept[:4].any()
    close(kept[4], free.movedim(1 if kind == "signal" else 2, 0)[4])
    a = model[: int(layer) + 1](x)
    start = explain(model, x, composite="epsilon", layer=layer, start=(layer, 4))
    assert torch.equal(
        start.movedim(1 if kind == "signal" else 2, 0)[4], a.movedim(-2 if kind == "signal" else -1, 0)[4]
    )


def test_channels_of_images_with_channels_last() -> None:
    """The activation in a block of Swin or ConvNeXt has its channels last, the block of the latter second."""

    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.up, self.act, self.down = nn.Conv2d(3, 4, 1), nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)
            self.block, self.fc = nn.Identity(), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.down(self.act(self.up(self.conv(x).permute(0, 2, 3, 1))))
            return self.fc(self.block(y.permute(0, 3, 1, 2)).mean((2, 3)))

    torch.manual_seed(0)
    model, x = Mixer().double().eval(), torch.randn(2, 3, 6, 5, dtype=torch.float64)
    inner = explain(model, x, 1, layer="act", condition={"act": 7})
    assert inner.shape == (2, 6, 5, 8)
    assert inner[..., 7].any()
    assert not inner[..., :7].any()
    outer = explain(model, x, 1, layer="block", condition={"block": 3})
    assert outer.shape == (2, 4, 6, 5)
    assert outer[:, 3].any()
    assert not outer[:, :3].any()
