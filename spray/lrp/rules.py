"""The rules of layer-wise relevance propagation, in the notation of the papers.

`a` are a layer's inputs, ``z = w·a + b`` its outputs, `R` the relevance of its outputs; a rule returns the
relevance of its inputs. ``f(a, w, b)`` evaluates the layer with another weight and bias, ``f.T(s, w)`` is its
transpose, so that ``a * f.T(R / f(a, w), w)`` reads R_j = Σ_k a_j w_jk / (Σ_j a_j w_jk) R_k.

Conventions (those of zennit's defaults, except where said):

- a bias takes its share of the relevance: it is in the denominator, and what belongs to it is not passed on;
- where a rule splits weights by sign it splits the bias as well, and a bias is counted in one branch only;
- the stabiliser is added with the sign of the denominator, sign(0) = +1; by default it is 1e-6, in half
  precision, where that would be nothing, the dtype's machine epsilon;
- ``flat`` and ``w_square`` spread the relevance over the inputs alone (the paper's Σ_i has no bias; zennit's
  w² counts it) and need no stabiliser; positions of zero padding take no part.

References
----------
Bach et al. 2015 (ε, αβ); Montavon et al. 2017, "Explaining nonlinear classification decisions with deep
Taylor decomposition" (z⁺, w², zᴮ); Montavon et al. 2019, "Layer-wise relevance propagation: an overview",
table 10.1 (LRP-0, ε, γ); Andéol et al. 2021 (generalised γ); Lapuschkin et al. 2019 (flat).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from spray.errors import UserError
from spray.lrp.layers import Layer, Product
from spray.lrp.tape import fold, unfold
from spray.registry import Registry

Bound = float | Sequence[float] | Tensor

RULES: Registry[type[Rule]] = Registry("LRP rule")


def divide(R: Tensor, z: Tensor, epsilon: float | None = None) -> Tensor:
    """Return ``R / (z + ε·sign(z))`` with sign(0) = +1.

    Parameters
    ----------
    R, z : Tensor
        Numerator and denominator.
    epsilon : float, optional
        The stabiliser ε. None is 1e-6, or the dtype's machine epsilon if that is larger than 1e-4. With 0 the
        quotient is 0 where z is 0.
    """
    if epsilon is None:
        epsilon = default_stabilizer(z.dtype)
    if epsilon == 0:
        return torch.where(z == 0, torch.zeros_like(R), R / z)
    sign = torch.where(z < 0, z.new_tensor(-epsilon), z.new_tensor(epsilon))
    return overwrite(R, sign.add_(z))


def default_stabilizer(dtype: torch.dtype) -> float:
    """Return the stabiliser that fits the precision of a dtype."""
    machine = torch.finfo(dtype).eps
    return machine if machine > 1e-4 else 1e-6


def overwrite(R: Tensor, z: Tensor) -> Tensor:
    """Return ``R / z``, (T, N, ...) / (N, ...), in the memory of `z` where that is possible."""
    if R.shape == (1, *z.shape) and R.dtype == z.dtype:
        return torch.div(R[0], z, out=z)[None]
    return (R / z).to(R.dtype)


def weigh(c: Tensor, a: Tensor) -> Tensor:
    """Return ``a · c`` in the memory of `c`, (T, N, ...), which nothing else holds."""
    return c.mul_(a)


def plus(t: Tensor) -> Tensor:
    """Return the positive part t⁺."""
    return t.clamp(min=0)


def minus(t: Tensor) -> Tensor:
    """Return the negative part t⁻ (zero or below)."""
    return t.clamp(max=0)


class Rule:
    """How an affine layer hands the relevance of its outputs to its inputs.

    `proportional` says that inputs which are zero never get relevance.
    """

    uses_input: ClassVar[bool] = True
    uses_output: ClassVar[bool] = True
    proportional: ClassVar[bool] = True

    def __call__(self, f: Layer, a: Tensor, z: Tensor, R: Tensor) -> Tensor:
        """Return the relevance of the inputs `a`.

        Parameters
        ----------
        f : Layer
            The layer.
        a : Tensor
            Its inputs (only if `uses_input`).
        z : Tensor
            Its outputs (only if `uses_output`); if ``f.rectified``, with the negative ones set to zero.
        R : Tensor, shape (T, ...)
            The relevance of its outputs for T targets.
        """
        raise NotImplementedError

    def check(self, a: Tensor, name: str) -> None:
        """Raise a UserError if the rule can't be used on a layer called `name` with inputs `a`."""


@RULES.register("lrp_0")
@dataclass(frozen=True)
class Zero(Rule):
    """LRP-0: R_j = Σ_k a_j w_jk / Σ_0,j a_j w_jk · R_k."""

    def __call__(self, f: Layer, a: Tensor, z: Tensor, R: Tensor) -> Tensor:
        """See `Rule`."""
        return weigh(f.T(divide(R, without_bias(f, z), 0), f.w), a)


@RULES.register("epsilon")
@dataclass(frozen=True)
class Epsilon(Rule):
    """LRP-ε: R_j = Σ_k a_j w_jk / (z_k + ε·sign z_k) · R_k."""

    epsilon: float | None = None

    def __call__(self, f: Layer, a: Tensor, z: Tensor, R: Tensor) -> Tensor:
        """See `Rule`."""
        epsilon = f.epsilon if self.epsilon is None else self.epsilon
        z = without_bias(f, z)
        s = overwrite(R, z + epsilon) if f.rectified and epsilon and f.offset is None else divide(R, z, epsilon)
        return weigh(f.T(s, f.w), a)


@RULES.register("gamma")
@dataclass(frozen=True)
class Gamma(Rule):
    """LRP-γ, generalised to inputs and outputs of both signs.

    Where z_k > 0 the contributions (a w)⁺, where z_k < 0 the contributions (a w)⁻ count 1 + γ times.
    """

    gamma: float = 0.25

    def __call__(self, f: Layer, a: Tensor, z: Tensor, R: Tensor) -> Tensor:
        """See `Rule`."""
        w_up = torch.add(f.w, f.w_plus, alpha=self.gamma)
        if f.nonnegative and f.rectified and f.offset is None:
            # Only outputs z > 0 have relevance; there z + γP > 0, elsewhere the quotient is 0.
            b = None if f.b is None else f.b + self.gamma * plus(f.b)
            D = f(a, w_up, f.with_bias(b, f.epsilon)).clamp_(min=f.epsilon)
            return weigh(f.T(overwrite(R, D), w_up), a)
        z = without_bias(f, z)
        # Where z ≥ 0 the denominator is z + γP, elsewhere z + γ(z − P): its modulus is |z| + γ|z⁻| + γP.
        D = positive_part(f, a, f.epsilon, self.gamma).add_(F.leaky_relu(z, -1 - self.gamma))
        s = overwrite(R, D)
        s_plus = torch.where(z >= 0, s, 0)
        s_minus = torch.sub(s_plus, s, out=s)
        if f.nonnegative:
            w_down = torch.add(f.w, f.w_minus, alpha=self.gamma)
            return weigh(f.T(s_plus, w_up).add_(f.T(s_minus, w_down)), a)
        with_positive = f.T(s_plus, f.w_plus) + f.T(s_minus, f.w_minus)
        with_negative = f.T(s_plus, f.w_minus) + f.T(s_minus, f.w_plus)
        favoured = plus(a) * with_positive + minus(a) * with_negative
        return weigh(f.T(s_plus.add_(s_minus), f.w), a).add_(favoured, alpha=self.gamma)


@RULES.register("alpha_beta")
@dataclass(frozen=True)
class AlphaBeta(Rule):
    """LRP-αβ: R_j = Σ_k (α (a_j w_jk)⁺ / Σ_0,j (a_j w_jk)⁺ − β (a_j w_jk)⁻ / Σ_0,j (a_j w_jk)⁻) R_k."""

    alpha: float = 2.0
    beta: float = 1.0
    uses_output: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.beta < 0 or abs(self.alpha - self.beta - 1) > 1e-9:
            raise UserError(f"the αβ rule needs β ≥ 0 and α − β = 1, but got α = {self.alpha}, β = {self.beta}")

    def __call__(self, f: Layer, a: Tensor, z: Tensor, R: Tensor) -> Tensor:
        """See `Rule`."""
        s = overwrite(R, positive_part(f, a, f.epsilon))
        R_plus = share(f, a, s).mul_(self.alpha)
        if self.beta == 0:
            return R_plus
        s = overwrite(R, negative_part(f, a, -f.epsilon))
        return R_plus.sub_(share(f, a, s, negative=True), alpha=self.beta)


@RULES.register("z_plus")
@dataclass(frozen=True)
class ZPlus(Rule):
    """z⁺: R_j = Σ_k (a_j w_jk)⁺ / Σ_0,j (a_j w_jk)⁺ · R_k, which is αβ with α = 1, β = 0.

    An output without a positive contribution passes nothing on.
    """

    uses_output: ClassVar[bool] = False

    def __call__(self, f: Layer, a: Tensor, z: Tensor, R: Tensor) -> Tensor:
        """See `Rule`."""
        return share(f, a, overwrite(R, positive_part(f, a, f.epsilon)))


@RULES.register("flat")
@dataclass(frozen=True)
class Flat(Rule):
    """Flat: R_j = Σ_k 1 / Σ_j 1 · R_k over the inputs j that output k sees."""

    uses_input: ClassVar[bool] = False
    uses_output: ClassVar[bool] = False
    proportional: ClassVar[bool] = False

    def __call__(self, f: Layer, a: Tensor, z: Tensor, R: Tensor) -> Tensor:
        """See `Rule`."""
        even = f.map.spread(fold(R), f.shape, f.w)
        return spread(f, torch.ones_like(f.w), R) if even is None else unfold(even, R.shape[0])


@RULES.register("w_square")
@dataclass(frozen=True)
class WSquare(Rule):
    """w²: R_j = Σ_k w_jk² / Σ_j w_jk² · R_k."""

    uses_input: ClassVar[bool] = False
    uses_output: ClassVar[bool] = False
    proportional: ClassVar[bool] = False

    def __call__(self, f: Layer, a: Tensor, z: Tensor, R: Tensor) -> Tensor:
        """See `Rule`."""
        return spread(f, f.w.square(), R)


@RULES.register("pass")
@dataclass(frozen=True)
class Pass(Rule):
    """Pass: R_j = R_k, for layers with as many outputs as inputs."""

    uses_input: ClassVar[bool] = False
    uses_output: ClassVar[bool] = False
    proportional: ClassVar[bool] = False

    def __call__(self, f: Layer, a: Tensor, z: Tensor, R: Tensor) -> Tensor:
        """See `Rule`."""
        if R.shape[1:] != torch.Size(f.shape):
            shapes = f"{tuple(f.shape)} to {tuple(R.shape[1:])}"
            raise UserError(f"the rule 'pass' needs a layer with as many outputs as inputs, not from {shapes}")
        return R.clone()


@RULES.register("z_box")
@dataclass(frozen=True, eq=False)
class ZBox(Rule):
    """zᴮ: R_j = Σ_k (x_j w_jk − l_j w_jk⁺ − h_j w_jk⁻) / Σ_j (…) · R_k; the bias cancels.

    Parameters
    ----------
    low, high : float, sequence or Tensor
        The least and greatest value an input can have, *after* its normalisation: one number, one per
        channel, or a tensor that broadcasts to the input.
    """

    low: Bound
    high: Bound
    proportional: ClassVar[bool] = False

    def __call__(self, f: Layer, a: Tensor, z: Tensor, R: Tensor) -> Tensor:
        """See `Rule`."""
        low, high = bound(self.low, a), bound(self.high, a)
        if isinstance(f.map, Product):  # whose samples may not come first
            low, high = low.expand_as(a), high.expand_as(a)
        # The bounds' part is the same for all samples, and the bias is in both: it cancels.
        s = divide(R, without_bias(f, z) - f(low, f.w_plus, f.b) - f(high, f.w_minus), f.epsilon)
        c, c_plus, c_minus = f.transposes(s, (f.w, f.w_plus, f.w_minus))
        return a * c - low * c_plus - high * c_minus

    def check(self, a: Tensor, name: str) -> None:
        """Raise a UserError if `a` isn't within the bounds."""
        low, high = bound(self.low, a), bound(self.high, a)
        slack = 1e-3 * (high - low)
        if bool((slack < 0).any()) or bool((a < low - slack).any()) or bool((a > high + slack).any()):
            least, greatest = float(a.detach().min()), float(a.detach().max())
            raise UserError(
                f"low= and high= do not enclose the input of layer {name!r}, which has values from "
                f"{least:.4g} to {greatest:.4g}: give the bounds per channel after normalisation"
            )


def positive_part(f: Layer, a: Tensor, epsilon: float = 0, scale: float = 1) -> Tensor:
    """Return ``scale`` · Σ_0,j (a_j w_jk)⁺ + ε; both ride on the weights, so they cost nothing."""
    b = None if f.b is None else plus(f.b) * scale
    b = f.with_bias(b, epsilon) if epsilon else b
    w = f.w_plus if scale == 1 else f.w_plus * scale
    P = f(a, w, b) if f.nonnegative else f(plus(a), w, b).add_(f(minus(a), f.w_minus), alpha=scale)
    # Where a device computes convolutions through transforms, rounding may leave the half line.
    return P if P.device.type == "cpu" else P.clamp_(min=epsilon)


def negative_part(f: Layer, a: Tensor, epsilon: float = 0) -> Tensor:
    """Return Σ_0,j (a_j w_jk)⁻ + ε, for an ε of zero or below."""
    b = None if f.b is None else minus(f.b)
    b = f.with_bias(b, epsilon) if epsilon else b
    N = f(a, f.w_minus, b) if f.nonnegative else f(plus(a), f.w_minus, b).add_(f(minus(a), f.w_plus))
    return N if N.device.type == "cpu" else N.clamp_(max=epsilon)


def without_bias(f: Layer, z: Tensor) -> Tensor:
    """Return ``w·a``, given ``z = w·a + b`` (where the layer has relevance, if it is rectified)."""
    if f.offset is None:
        return z
    return z - (f.offset.view(-1, *[1] * (z.dim() - 2)) if f.map.kind == "convolution" else f.offset)


def share(f: Layer, a: Tensor, s: Tensor, negative: bool = False) -> Tensor:
    """Return Σ_k (a_j w_jk)⁺ s_k, or with `negative` Σ_k (a_j w_jk)⁻ s_k."""
    if f.nonnegative:
        return weigh(f.T(s, f.w_minus if negative else f.w_plus), a)
    w, w_negative = (f.w_minus, f.w_plus) if negative else (f.w_plus, f.w_minus)
    return weigh(f.T(s, w), plus(a)).add_(weigh(f.T(s, w_negative), minus(a)))


def spread(f: Layer, w: Tensor, R: Tensor) -> Tensor:
    """Return Σ_k w_jk / Σ_j w_jk · R_k, whatever the inputs are."""
    # Samples come first but in products of matrices, where all are counted.
    shape = f.shape if isinstance(f.map, Product) else (1, *f.shape[1:])
    z = f(torch.ones(tuple(shape), dtype=R.dtype, device=R.device), w)
    return f.T(torch.where(z == 0, 0, R / z), w)


def bound(value: Bound, a: Tensor) -> Tensor:
    """Return a bound as one sample of the shape of the inputs `a`."""
    t = torch.as_tensor(value, dtype=a.dtype, device=a.device)
    if t.dim() == 1 and t.numel() > 1:
        t = t.view(-1, *[1] * (a.dim() - 2))
    try:
        return t.expand(1, *a.shape[1:])
    except RuntimeError:
        raise UserError(
            f"low= or high= has shape {tuple(t.shape)}; allowed are a number, one number per channel "
            f"({a.shape[1]}) or a tensor that broadcasts to (1, {', '.join(map(str, a.shape[1:]))})"
        ) from None
