"""Normalisations by the sample's own statistics against their matrices with the deviation for a constant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import close
from torch import Tensor, nn

from spray.lrp import Composite, Epsilon, propagate

N, EPSILON = 2, 1e-6


@pytest.fixture(autouse=True)
def double() -> Any:
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def relevance(model: nn.Module, x: Tensor, R: Tensor, **options: Any) -> Tensor:
    return propagate(model, x, Composite(**options), lambda _: R)


def stabilized(z: Tensor) -> Tensor:
    return z + EPSILON * torch.where(z < 0, -1.0, 1.0)


def through_matrix(C: Tensor, z: Tensor, R: Tensor) -> Tensor:
    """R_j = Σ_k C_kj / z_k R_k for one sample: contributions (outputs, inputs), outputs, relevance."""
    return C.T @ (R / stabilized(z))


def group_norm() -> nn.Module:
    return nn.GroupNorm(2, 4, eps=0.1)


NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "layer norm": (lambda: nn.LayerNorm(6, eps=0.1), (6,)),
    "layer norm of sequences": (lambda: nn.LayerNorm(6), (3, 6)),
    "layer norm over two dimensions": (lambda: nn.LayerNorm((3, 4)), (2, 3, 4)),
    "layer norm without weights": (lambda: nn.LayerNorm(6, elementwise_affine=False), (6,)),
    "layer norm without bias": (lambda: nn.LayerNorm(6, bias=False), (6,)),
    "rms norm": (lambda: nn.RMSNorm(6, eps=0.1), (3, 6)),
    "rms norm without eps": (lambda: nn.RMSNorm(6), (6,)),
    "group norm": (group_norm, (4, 3, 2)),
    "group norm of vectors": (group_norm, (4,)),
    "instance norm 1d": (lambda: nn.InstanceNorm1d(3), (3, 5)),
    "instance norm 2d": (lambda: nn.InstanceNorm2d(3, affine=True, eps=0.1), (3, 4, 2)),
}


def deviation(norm: nn.Module, a: Tensor) -> Tensor:
    """The standard deviation by which a sample is divided, entry by entry, from the definition."""
    eps = torch.finfo(a.dtype).eps if norm.eps is None else norm.eps
    match norm:
        case nn.LayerNorm() | nn.RMSNorm():
            dims = tuple(range(-len(norm.normalized_shape), 0))
            square = a.square().mean(dims, keepdim=True) - (
                a.mean(dims, keepdim=True).square() if isinstance(norm, nn.LayerNorm) else 0
            )
            return (square + eps).sqrt().expand_as(a)
    groups = norm.num_groups if isinstance(norm, nn.GroupNorm) else norm.num_features
    blocks = a.reshape(groups, -1)
    return (blocks.var(1, unbiased=False, keepdim=True) + eps).sqrt().expand_as(blocks).reshape(a.shape)


@pytest.mark.parametrize("zero_bias", [False, True])
@pytest.mark.parametrize("name", NORMS)
def test_normalisation_by_contribution(name: str, zero_bias: bool) -> None:
    """With its deviation for a constant the norm is affine: R_j = Σ_k J_kj a_j / z_k R_k with the matrix J."""
    make, shape = NORMS[name]
    norm = make()
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, -1.5, 1.5)
    x = torch.randn(N, *shape) + 0.3
    R = torch.randn(N, *shape)
    result = relevance(norm.eval(), x, R, zero_bias=zero_bias)
    bias = getattr(norm, "bias", None)
    for n in range(N):
        a, sigma = x[n], deviation(norm, x[n])
        z = norm(x[n : n + 1])[0].detach()
        # The Jacobian of σ(a)·(z − β), with σ constant, is σ times the centring and the weight.
        columns = []
        for j in range(a.numel()):
            e = torch.zeros_like(a).view(-1).index_fill(0, torch.tensor([j]), 1.0).view_as(a)
            columns.append(linear_part(norm, e, sigma).flatten())
        W = torch.stack(columns, 1)
        offset = z.flatten() - W @ a.flatten()
        shift = torch.zeros_like(z) if bias is None else shaped(norm, bias.detach(), z)
        close(offset + 1, shift.flatten() + 1)
        out = z - shift if zero_bias else z
        expected = through_matrix(W * a.flatten(), out.flatten(), R[n].flatten())
        close(result[n].flatten(), expected)


def shaped(norm: nn.Module, t: Tensor, a: Tensor) -> Tensor:
    """A weight or bias in the shape of a sample."""
    per_channel = not isinstance(norm, nn.LayerNorm | nn.RMSNorm)
    return (t.view(-1, *[1] * (a.dim() - 1)) if per_channel else t).expand_as(a)


def linear_part(norm: nn.Module, a: Tensor, sigma: Tensor) -> Tensor:
    """γ (a − mean a) / σ of one sample."""
    if isinstance(norm, nn.RMSNorm):
        centred = a
    elif isinstance(norm, nn.LayerNorm):
        centred = a - a.mean(tuple(range(-len(norm.normalized_shape), 0)), keepdim=True)
    else:
        groups = norm.num_groups if isinstance(norm, nn.GroupNorm) else norm.num_features
        blocks = a.reshape(groups, -1)
        centred = (blocks - blocks.mean(1, keepdim=True)).reshape(a.shape)
    weight = getattr(norm, "weight", None)
    return centred / sigma * (1.0 if weight is None else shaped(norm, weight.detach(), a))


@pytest.mark.parametrize("name", NORMS)
def test_normalisation_that_passes(name: str) -> None:
    make, shape = NORMS[name]
    x, R = torch.randn(2, N, *shape).unbind()
    assert torch.equal(relevance(make().eval(), x, R, normalization="pass"), R)


def test_epsilon_of_the_rules_is_not_that_of_norms() -> None:
    """A rule's ε is the layers'; the stabiliser elsewhere stays."""
    x, R = torch.randn(2, N, 3, 8).unbind()
    norm = nn.LayerNorm(8).eval()
    assert torch.equal(relevance(norm, x, R), relevance(norm, x, R, linear=Epsilon(0.5)))
