"""LRP in float32, half precision and autocast: near to float64, finite, and of the input's dtype."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spray import explain

COMPOSITES: dict[str, dict[str, Any]] = {
    "lrp_0": {},
    "epsilon": {},
    "epsilon_plus": {},
    "epsilon_plus_flat": {},
    "epsilon_gamma_box": {"low": -6.0, "high": 6.0},
    "epsilon_alpha2_beta1": {},
    "epsilon_alpha2_beta1_flat": {},
    "excitation_backprop": {},
    "deep_taylor": {},
}


def randomize(model: nn.Module) -> nn.Module:
    """Give batch normalisations statistics and weights as after training; evaluation mode."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.3, 0.3)
    return model.eval()


def vgg(seed: int) -> nn.Module:
    from torchvision.models.vgg import VGG, make_layers

    torch.manual_seed(seed)
    model = VGG(make_layers([16, "M", 32, "M", 64, 64, "M"], batch_norm=True), init_weights=False)
    model.classifier = nn.Sequential(nn.Linear(64 * 49, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 5))
    return randomize(model)


def resnet(seed: int) -> nn.Module:
    """A ResNet-18 a quarter as wide, for small images."""
    from torchvision.models.resnet import BasicBlock

    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)]
    width = 16
    for stage in range(4):
        wider, stride = 16 * 2**stage, 2 if stage else 1
        skip = nn.Sequential(nn.Conv2d(width, wider, 1, stride, bias=False), nn.BatchNorm2d(wider)) if stage else None
        layers += [BasicBlock(width, wider, stride, skip), BasicBlock(wider, wider)]
        width = wider
    return randomize(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5)))


MODELS = {"vgg": vgg, "resnet": resnet}


def images(seed: int = 0, n: int = 2) -> Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).clamp(-5, 5)


def double(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).double()


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a.double().flatten(1), b.double().flatten(1)).min())


def error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


# The pass of relevance in another dtype


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", MODELS)
def test_relevance_in_bfloat16_is_near_to_float32(name: str, seed: int) -> None:
    model, x = MODELS[name](seed), images(seed)
    for composite, options in COMPOSITES.items():
        full = explain(model, x, 1, composite=composite, **options)
        half = explain(model, x, 1, composite=composite, relevance_dtype="bfloat16", **options)
        assert half.dtype == torch.float32
        assert not torch.equal(half, full), "nothing was reduced"
        assert cosine(half, full) >= 0.999, composite


class Cancelling(nn.Module):
    """A residual addition whose terms nearly cancel."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Linear(8, 3)
        self.b.weight.data.copy_(-self.a.weight.data * (1 + 0.02 * torch.randn_like(self.a.weight)))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc((self.a(x) + self.b(x)).relu().mean((2, 3)))


def test_relevance_in_bfloat16_is_coarse_where_sums_cancel() -> None:
    """Large relevance of both signs cancels on its way down: 8 bits of each leave few of the difference."""
    torch.manual_seed(0)
    model, x = Cancelling().eval(), images()
    full = explain(model, x, 1, composite="epsilon")
    half = explain(model, x, 1, composite="epsilon", relevance_dtype="bfloat16")
    assert cosine(half, full) >= 0.95


@pytest.mark.parametrize("name", MODELS)
def test_relevance_in_float64_is_nearer_to_all_in_float64(name: str) -> None:
    model, x = MODELS[name](0), images()
    # With other rules the rounding of the forward pass, which stays in float32, outweighs that of the relevance.
    for composite, factor in {"lrp_0": 0.7, "epsilon_plus_flat": 1.3}.items():
        exact = explain(double(model), x.double(), 1, composite=composite)
        single = explain(model, x, 1, composite=composite)
        wide = explain(model, x, 1, composite=composite, relevance_dtype=torch.float64)
        assert wide.dtype == torch.float32
        assert error(wide, exact) < factor * error(single, exact), composite


# The model in float32


@pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_float32_is_near_to_float64(name: str, format: torch.memory_format) -> None:
    """Where relevance is divided by sums of both signs (ε, residual additions), rounding in the *forward* pass shows.

    Then relevance in float64 on the same float32 activations is no nearer.
    """
    model, x = MODELS[name](0), images().contiguous(memory_format=format)
    for composite, options in COMPOSITES.items():
        exact = explain(double(model), x.double(), 1, composite=composite, **options)
        single = error(explain(model, x, 1, composite=composite, **options), exact)
        assert single < 1e-3, composite
        if single > 1e-5:
            assert composite == "epsilon" or (name == "resnet" and composite != "lrp_0"), composite
            wide = explain(model, x, 1, composite=composite, relevance_dtype="float64", **options)
            assert single < 1.5 * error(wide, exact), composite


def zennit_epsilon(model: nn.Module, x: Tensor, target: int) -> Tensor:
    from zennit.composites import LayerMapComposite, layer_map_base
    from zennit.rules import Epsilon
    from zennit.torchvision import VGGCanonizer
    from zennit.types import Convolution

    rules = [*layer_map_base(), (Convolution, Epsilon(1e-6)), (nn.Linear, Epsilon(1e-6))]
    leaf = x.clone().requires_grad_()
    with LayerMapComposite(layer_map=rules, canonizers=[VGGCanonizer()]).context(model) as modified:
        output = modified(leaf)
        start = torch.zeros_like(output)
        start[:, target] = output[:, target].detach()
        return torch.autograd.grad(output, leaf, start)[0]


@pytest.mark.slow
def test_float32_is_no_worse_than_that_of_zennit() -> None:
    """For ε, whose error is that of the smallest denominator in a network: the mean over several networks."""
    ratios = []
    for seed in range(12):
        model, x = vgg(seed), images(seed, 1)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 0.0  # zennit divides by √(1 + eps) once more after its merge
        own = error(
            explain(model, x, 1, composite="epsilon"), explain(double(model), x.double(), 1, composite="epsilon")
        )
        theirs = error(zennit_epsilon(model, x, 1), zennit_epsilon(double(model), x.double(), 1))
        ratios.append(math.log(own / theirs))
    assert math.exp(sum(ratios) / len(ratios)) < 2


# The model in half precision, and autocast


class Attention(nn.Module):
    """A transformer's block."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.norm1(x)
        x = x + self.attention(y, y, y)[0]
        return self.fc((x + self.mlp(self.norm2(x))).mean(1))


class Recurrent(nn.Module):
    """An LSTM and a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru = nn.LSTM(6, 8, batch_first=True), nn.GRU(8, 8, batch_first=True)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.gru(self.lstm(x)[0])[0][:, -1])


def case(name: str) -> tuple[nn.Module, Tensor]:
    if name in MODELS:
        return MODELS[name](3), images(3)
    torch.manual_seed(0)
    model = {"attention": Attention, "recurrent": Recurrent}[name]()
    return model.eval(), torch.randn(2, 7, 6)


NAMES = [*MODELS, "attention", "recurrent"]


@pytest.mark.parametrize("name", NAMES)
def test_autocast(name: str) -> None:
    model, x = case(name)
    composites = ["epsilon_plus_flat", "epsilon_gamma_box", "epsilon_alpha2_beta1", "excitation_backprop"]
    for composite in composites if name in MODELS else ["epsilon", "epsilon_plus_flat"]:
        options = COMPOSITES[composite]
        full = explain(model, x, 1, composite=composite, **options)
        half = explain(model, x, 1, composite=composite, autocast=torch.bfloat16, **options)
        assert half.dtype == torch.float32
        assert half.shape == x.shape
        assert bool(torch.isfinite(half).all())
        assert not torch.equal(half, full), "autocast did nothing"
        assert cosine(half, full) > 0.9, composite
        both = explain(model, x, [0, 1], composite=composite, autocast=torch.bfloat16, **options)
        torch.testing.assert_close(both[:, 1], half, rtol=0, atol=1e-2 * float(half.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_models_in_half_precision(name: str, dtype: torch.dtype) -> None:
    """The forward pass is the user's own; what is asked of the relevance is that it is not made much worse."""
    model, x = case(name)
    exact = {c: explain(double(model), x.double(), 1, composite=c, **o) for c, o in COMPOSITES.items()}
    small = copy.deepcopy(model).to(dtype)
    for composite, options in COMPOSITES.items():
        if name not in MODELS and composite not in ("lrp_0", "epsilon", "epsilon_plus_flat"):
            continue
        R = explain(small, x.to(dtype), 1, composite=composite, **options)
        assert R.dtype == dtype
        assert bool(torch.isfinite(R).all()), composite
        assert cosine(R, exact[composite]) > (0.9 if dtype == torch.bfloat16 else 0.97), composite
        layer = {"vgg": "features.3", "resnet": "4", "attention": "embed", "recurrent": "fc"}[name]
        assert explain(small, x.to(dtype), 1, composite=composite, layer=layer, **options).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("composite", COMPOSITES)
def test_empty_denominators_are_stabilised_in_every_dtype(composite: str, dtype: torch.dtype) -> None:
    """Zero images through layers without biases: every denominator is 0."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False), nn.ReLU(), nn.AvgPool2d(4)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 3, bias=False)).to(dtype).eval()
    x = torch.zeros(2, 3, 8, 8, dtype=dtype)
    x[1, :, :4] = 1
    R = explain(model, x, 1, composite=composite, init="one", **COMPOSITES[composite])
    assert R.dtype == dtype
    assert bool(torch.isfinite(R).all())
    assert float(R.abs().max()) < 1e3
