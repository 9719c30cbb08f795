"""What the methods that evaluate a model many times share: their options and the model on changed inputs."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spray.attribution.gradients import gradient
from spray.attribution.target import Target, check_logits, class_indices
from spray.errors import UserError

# The most inputs that one pass of a model holds, unless the caller says otherwise.
BATCH_SIZE = 64


def whole(name: str, value: Any, least: int = 1) -> int:
    """Return an option as an int, or raise a UserError unless it is a whole number of at least `least`."""
    try:
        number = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise UserError(f"{name} must be a whole number of at least {least}, not {value!r}")
    return number


def positive(name: str, value: Any, or_zero: bool = False) -> float:
    """Return an option as a float, or raise a UserError unless it is finite and above 0 (or 0, with `or_zero`)."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not known or value < 0 or (value == 0 and not or_zero):
        raise UserError(f"{name} must be a finite number {'of at least' if or_zero else 'above'} 0, not {value!r}")
    return float(value)


def dtype_named(option: str, dtype: torch.dtype | str | None, allowed: Sequence[str], why: str = "") -> Any:
    """Return a dtype given as such or by name (None: none), or raise a UserError unless it is one of `allowed`."""
    dtypes = {name: getattr(torch, name) for name in allowed}
    if dtype is None or any(dtype is one for one in dtypes.values()):
        return dtype
    if not isinstance(dtype, str) or dtype not in dtypes:
        raise UserError(f"unknown {option} {dtype!r}; allowed: {', '.join(allowed)}{why}")
    return dtypes[dtype]


def reference(baseline: Any, x: Tensor) -> Tensor:
    """Return what stands for "absent", in the shape of the input.

    Parameters
    ----------
    baseline : float, sequence or Tensor
        A number, one number per channel, or a tensor that broadcasts to `x`.
    x : Tensor, shape (N, ...)
        The input.

    Returns
    -------
    Tensor
        Shape, dtype and device of `x`.

    Raises
    ------
    UserError
        For anything else, or values that aren't finite.
    """
    allowed = f"a finite number, one per channel, or a tensor that broadcasts to shape {tuple(x.shape)}"
    try:
        values = torch.as_tensor(baseline, dtype=x.dtype, device=x.device).detach()
        if values.dim() == 1 and x.dim() > 2 and len(values) == x.shape[1]:
            values = values.view(-1, *[1] * (x.dim() - 2))
        values = values.expand(x.shape)
    except (TypeError, ValueError, RuntimeError):
        got = f"shape {tuple(baseline.shape)}" if isinstance(baseline, Tensor) else repr(baseline)
        raise UserError(f"baseline must be {allowed}, not {got}") from None
    if not bool(torch.isfinite(values).all()):
        raise UserError(f"baseline must be {allowed}, but it has values that aren't finite")
    return values


def explained_classes(model: nn.Module, x: Tensor, target: Target) -> Tensor:
    """Return each sample's class to explain, int64 of shape (N,), from one pass without gradients.

    Raises
    ------
    UserError
        For an output that isn't logits, or a target that isn't allowed.
    """
    with torch.no_grad():
        return class_indices(check_logits(model(x.detach().clone()), x), target)[:, 0]


def check_dependence(model: nn.Module, x: Tensor, other: Tensor) -> None:
    """Raise a UserError if the model's output depends on its input neither in value nor through a gradient.

    Methods that hide parts of the input need no gradient, so a model without one is refused only if it doesn't
    tell the input from another one.
    """
    logits = Perturbed(model)
    with torch.no_grad():
        same = len(x) and torch.equal(logits(x.detach()), logits(other))
    if same:
        gradient(model, x, 0)


class Perturbed(nn.Module):
    """A model on changed copies of its input: checks its output and leaves the copies as they are.

    The numbers of samples in an error are those of the copies that a method made, which the message says.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits; the model gets a clone, since it may change its input in place."""
        output = self.model(x.clone())
        try:
            return check_logits(output, x)
        except UserError as error:
            raise UserError(f"for changed copies of the input: {error}") from None
