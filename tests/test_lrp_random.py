"""Random networks: LRP-0 is gradient × input, and what the engine merges or defers changes no rule's relevance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from networks import Net, close, head, modules, randomize
from torch import Tensor, nn

from spray import explain
from spray.lrp import build_composite, propagate

CHANNELS = 4
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
MAX_POOLS = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
AVG_POOLS = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
ADAPTIVE_AVG = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
ADAPTIVE_MAX = {1: nn.AdaptiveMaxPool1d, 2: nn.AdaptiveMaxPool2d, 3: nn.AdaptiveMaxPool3d}

BLOCKS = """
conv strided grouped dilated transposed same norm relu leaky max overlapping average average_padded ceil adaptive
adaptive_max residual residual_relu concat dense reused pad pad_negative flip crop upsample scale twice
""".split()  # noqa: SIM905


class Block(nn.Module):
    """One block of a network on `dims`-dimensional images of `CHANNELS` channels."""

    def __init__(self, kind: str, dims: int) -> None:
        super().__init__()
        self.kind, self.dims = kind, dims
        options: dict[str, Any] = {
            "strided": {"stride": 2, "padding": 1},
            "grouped": {"groups": 2},
            "dilated": {"dilation": 2, "padding": 1},
            "same": {"padding": "same", "bias": False},
            "transposed": {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2},
        }.get(kind, {"padding": 1})
        layer = TRANSPOSED if kind == "transposed" else CONVOLUTIONS
        self.conv = layer[dims](CHANNELS, CHANNELS, 2 if kind == "same" else 3, **options)
        self.norm = BATCH_NORMS[dims](CHANNELS)
        self.merge = CONVOLUTIONS[dims](2 * CHANNELS, CHANNELS, 1)

    def pool(self, x: Tensor) -> Tensor:
        d = self.dims
        pools = {
            "max": lambda: MAX_POOLS[d](2),
            "overlapping": lambda: MAX_POOLS[d](3, stride=1, padding=1),
            "average": lambda: AVG_POOLS[d](2, stride=1),
            "average_padded": lambda: AVG_POOLS[d](3, 2, padding=1, ceil_mode=True, count_include_pad=False),
            "ceil": lambda: MAX_POOLS[d](3, stride=2, ceil_mode=True),
            "adaptive": lambda: ADAPTIVE_AVG[d](3),
            "adaptive_max": lambda: ADAPTIVE_MAX[d](2),
        }
        return pools[self.kind]()(x)

    def forward(self, x: Tensor) -> Tensor:
        match self.kind:
            case "norm":
                return self.norm(x)
            case "relu":
                return x.relu()
            case "leaky":
                return F.leaky_relu(x, 0.2)
            case "residual":
                return x + self.norm(self.conv(x))
            case "residual_relu":
                return F.relu(self.conv(F.relu(x)) + x)
            case "concat":
                return self.merge(torch.cat([x, self.conv(x).relu()], 1))
            case "dense":
                y = self.conv(self.norm(x).relu())
                return self.merge(torch.cat([self.norm(y), x], 1)).relu() - y
            case "reused":
                return self.conv(F.relu(self.conv(x)))
            case "pad":
                return self.conv(F.pad(x, (1, 2) * self.dims))
            case "pad_negative":
                return self.conv(F.pad(x, (2, 0) * self.dims, value=-0.5))
            case "flip":
                return x.flip(2)
            case "crop":
                return x[..., 1:] if x.shape[-1] > 2 else x
            case "upsample":
                return F.interpolate(x, scale_factor=2)
            case "scale":
                return (0.3 - x) / 2 + 1
            case "twice":  # the values before and after the ReLU and the norm are used
                y = self.conv(x)
                z = self.norm(y)
                return z.relu() + 0.5 * z - 0.25 * y
            case "conv" | "strided" | "grouped" | "dilated" | "transposed" | "same":
                return self.conv(x)
        return self.pool(x)


def network(kinds: list[str], dims: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    blocks = nn.Sequential(*(Block(kind, dims) for kind in kinds))
    first = CONVOLUTIONS[dims](3, CHANNELS, 1)

    def forward(m: Any, x: Tensor) -> Tensor:
        return m.fc(m.blocks(m.first(x)).flatten(2).mean(2))

    return randomize(Net(forward, first=first, blocks=blocks, fc=nn.Linear(CHANNELS, 3)))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    kinds=st.lists(st.sampled_from(BLOCKS), min_size=1, max_size=6), dims=st.integers(1, 3), seed=st.integers(0, 1000)
)
def test_lrp_0_is_gradient_x_input(kinds: list[str], dims: int, seed: int) -> None:
    model = network(kinds, dims, seed)
    x = torch.randn(2, 3, *(7, 6, 5)[:dims], dtype=torch.float64)
    try:
        model(x)
    except (RuntimeError, ValueError):  # what is left is smaller than a kernel
        assume(False)
    expected = explain(model, x, 1, method="gradient_x_input")
    result = explain(model, x, 1, composite="lrp_0")
    if bool(expected.any()):
        close(result, expected)
    else:
        assert not bool(result.any())


# What is merged and deferred


def merged(m: Any, x: Tensor) -> Tensor:
    x = m.relu(m.b1(m.c1(x)))
    y = m.relu(m.b2(m.c2(x)) + x)
    return head(m, m.relu(m.c2(y)))


def functional(m: Any, x: Tensor) -> Tensor:
    c1, c2, b1, b2 = m.c1, m.c2, m.b1, m.b2
    x = F.conv2d(x, c1.weight, c1.bias, padding=1)
    x = torch.relu(F.batch_norm(x, b1.running_mean, b1.running_var, b1.weight, b1.bias, eps=b1.eps))
    y = F.conv2d(input=x, weight=c2.weight, bias=c2.bias, padding="same")
    y = F.batch_norm(input=y, running_mean=b2.running_mean, running_var=b2.running_var, weight=b2.weight, bias=b2.bias)
    y = torch.add(y, x)
    return head(m, m.c2(y.relu()).clamp(min=0.0))


def in_place(m: Any, x: Tensor) -> Tensor:
    x = m.b1(m.c1(x)).relu_()
    y = m.b2(m.c2(x))
    y += x
    F.relu(y, inplace=True)
    return head(m, torch.relu_(m.c2(y)))


def unused_shortcuts(m: Any, x: Tensor) -> Tensor:
    """What is computed beside, and used by nobody or only for its shape, changes nothing."""
    y = m.c1(x)
    x = m.b1(y)
    torch.relu(y)
    before = x
    x = x.relu()
    z = m.b2(m.c2(x))
    y = z + x
    _ = y.shape, before + y, z.relu(), y.sigmoid()
    return head(m, m.c2(y.relu()).relu())


def viewed(m: Any, x: Tensor) -> Tensor:
    n = len(x)
    x = m.b1(m.c1(x)).view(n, 6, -1).view(n, 6, 6, 6).relu()
    y = m.b2(m.c2(x)).reshape(n, 6, 36).view(n, 6, 6, 6) + x.flatten(1).unflatten(1, (6, 6, 6))
    return head(m, m.c2(y.view(n, 6, 6, 6).relu()).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2).relu())


RULES: list[dict[str, Any]] = [
    {"composite": "epsilon"},
    {"composite": "epsilon_plus_flat"},
    {"composite": "epsilon_alpha2_beta1"},
    {"composite": "epsilon_gamma_box", "low": -6.0, "high": 6.0},
    {"composite": {"convolution": "gamma", "linear": "z_plus"}, "zero_bias": True},
    {"composite": {"c2": "flat", "convolution": "gamma"}},
    {"composite": {"c2": "w_square", "convolution": "epsilon"}, "addition": "magnitude"},
    {"composite": "deep_taylor", "addition": "equal"},
]


@pytest.mark.parametrize("options", RULES, ids=str)
@pytest.mark.parametrize("forward", [functional, in_place, unused_shortcuts, viewed], ids=lambda f: f.__name__)
def test_ways_of_writing_a_network_agree(forward: Callable[[Any, Tensor], Tensor], options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    parts = modules()
    reference, model = randomize(Net(merged, **parts)), Net(forward, **parts).eval()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(x), reference(x))
    # The engine names layers by their weights, so that rules reach functional calls too.
    close(explain(model, x, 1, **options), explain(reference, x, 1, **options))


@pytest.mark.parametrize("options", RULES, ids=str)
def test_single_precision_with_channels_last_agrees_with_double(options: dict[str, Any]) -> None:
    """Images in float32 run with their channels side by side; shapes and views are as the model expects them."""
    torch.manual_seed(0)
    parts = modules()
    model = randomize(Net(merged, **parts))
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    expected = explain(model, x, 1, **options)
    for forward in (merged, viewed, in_place, functional):
        single = Net(forward, **parts).float().eval()
        result = explain(single, x.float(), 1, **options)
        assert result.dtype == torch.float32
        assert result.is_contiguous()
        close(result.double(), expected, 1e-4)
        model.double()


def test_batch_norm_after_a_value_that_is_used_elsewhere() -> None:
    """Merged, the norm's relevance goes to the convolution's inputs; what else uses its output adds its own."""
    torch.manual_seed(0)
    parts = modules()
    model = randomize(Net(lambda m, x: head(m, m.b1(m.c1(x)) - m.c1(x) * 0.5), **parts))
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    for composite in ("lrp_0", "epsilon_plus", "epsilon_gamma_box"):
        options = {"low": -6.0, "high": 6.0} if composite.endswith("box") else {}
        once = Net(once_computed, **parts).eval()
        close(explain(once, x, 0, composite=composite, **options), explain(model, x, 0, composite=composite, **options))


def once_computed(m: Any, x: Tensor) -> Tensor:
    y = m.c1(x)
    return head(m, m.b1(y) - y * 0.5)


def test_relu_and_the_value_before_it_are_both_used() -> None:
    torch.manual_seed(0)
    parts = modules()

    def twice(m: Any, x: Tensor) -> Tensor:
        return head(m, m.c2(m.relu(m.c1(x))) + m.c1(x))

    def once(m: Any, x: Tensor) -> Tensor:
        y = m.c1(x)
        return head(m, m.c2(m.relu(y)) + y)

    model, reference = randomize(Net(once, **parts)), Net(twice, **parts).eval()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    for composite in ("epsilon_plus", {"c2": "flat", "convolution": "z_plus"}, "excitation_backprop"):
        close(explain(model, x, 0, composite=composite), explain(reference, x, 0, composite=composite))


@pytest.mark.parametrize("rule", ["epsilon", "gamma", "z_plus", "alpha_beta", "w_square"])
def test_merged_norm_and_rectifier_are_the_rule_of_the_merged_layer(rule: str) -> None:
    """By the Jacobian of convolution and norm together, in the rule's own test; here under a ReLU and a mean."""
    torch.manual_seed(0)
    parts = modules()
    model = randomize(Net(lambda m, x: m.relu(m.b1(m.c1(x))), **parts))
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    R = torch.randn(2, 6, 6, 6, dtype=torch.float64)
    composite = build_composite({"convolution": rule}, model)
    fused = torch.nn.utils.fuse_conv_bn_eval(model.c1, model.b1)
    for relevance in (R, R * (model(x) > 0)):
        close(
            propagate(model, x, composite, lambda _, r=relevance: r),
            propagate(fused, x, composite, lambda _, r=relevance: r),
        )
