"""Which output of a model is explained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spray.errors import UserError

# One class for all samples, one for each (N,), several for all (a list or tuple), several for each (N, T),
# or None: the prediction.
Target = int | Sequence[int] | Tensor | None


class Contrast(nn.Module):
    """A model whose output for a class is its logit minus the mean logit of the other classes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor:
        """Return f_t − mean_{k≠t} f_k for every class t."""
        logits = check_logits(self.model(x), x)
        others = max(1, logits.shape[1] - 1)
        return logits - (logits.sum(1, keepdim=True) - logits) / others

    def get_submodule(self, target: str) -> nn.Module:
        """Return a module by its name in the model."""
        return self.model.get_submodule(target)


def check_logits(output: Any, x: Tensor) -> Tensor:
    """Return a model's output, or raise a UserError unless it is finite and of shape (N, classes)."""
    if not isinstance(output, Tensor) or output.dim() != 2 or output.shape[0] != x.shape[0]:
        got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise UserError(f"the model must return logits of shape (N, classes) with N = {x.shape[0]}, not {got}")
    check_finite(output, "the model's output")
    return output


def check_finite(values: Tensor, what: str) -> None:
    """Raise a UserError that names the first samples with values that are infinite or not a number."""
    if bool(torch.isfinite(values.sum())):  # a sum with a value that isn't finite never is
        return
    bad = (~torch.isfinite(values)).flatten(1).any(1).nonzero().flatten().tolist()
    if not bad:
        return
    more = ", ..." if len(bad) > 5 else ""
    raise UserError(
        f"{what} is not finite for samples [{', '.join(map(str, bad[:5]))}{more}]; check their values "
        "and the model's weights"
    )


def several(target: Target) -> bool:
    """Return whether a target asks for several classes of each sample."""
    return isinstance(target, list | tuple) or (isinstance(target, Tensor) and target.dim() == 2)


def columns(target: Target) -> list[Target]:
    """Return several targets one by one.

    Raises
    ------
    UserError
        If there is none.
    """
    single: list[Target] = list(target.unbind(1)) if isinstance(target, Tensor) else list(target)  # type: ignore[arg-type]
    if not single:
        raise UserError("target names no class; give at least one")
    return single


def class_indices(logits: Tensor, target: Target) -> Tensor:
    """Return the classes to explain.

    Parameters
    ----------
    logits : Tensor, shape (N, classes)
        The model's output.
    target : Target
        What was asked for.

    Returns
    -------
    Tensor of int64, shape (N, T)
        T classes of each sample; T is 1 unless `several`.

    Raises
    ------
    UserError
        For a target of another type or shape, or a class that the model doesn't have.
    """
    n, classes = logits.shape
    if target is None:
        index = logits.detach().argmax(1, keepdim=True)
    elif isinstance(target, Tensor) and target.dim() > 0:
        if target.dim() > 2 or len(target) != n or target.is_floating_point() or target.dtype == torch.bool:
            refuse(target, n, f"{target.dtype} of shape {tuple(target.shape)}")
        index = target.to(logits.device, torch.int64)
        index = index[:, None] if index.dim() == 1 else index
    else:
        try:
            numbers = [t.__index__() for t in (target if isinstance(target, list | tuple) else [target])]  # type: ignore[union-attr]
        except (AttributeError, TypeError):
            refuse(target, n, repr(target))
        index = torch.tensor(numbers, dtype=torch.int64, device=logits.device).expand(n, -1)
    if index.shape[1] == 0:
        raise UserError("target names no class; give at least one")
    if n and not 0 <= int(index.min()) <= int(index.max()) < classes:
        raise UserError(
            f"target {int(index.min())} to {int(index.max())} is out of range: the model has classes 0 to {classes - 1}"
        )
    return index


def refuse(target: Target, n: int, got: str) -> None:
    """Raise the UserError that says what a target may be."""
    raise UserError(
        f"target must be an int, None, a list of ints or a tensor of {n} ints or of {n} rows of ints, not {got}"
    )


def one_hot(logits: Tensor, index: Tensor) -> Tensor:
    """Return masks (N, classes) that are 1 at each sample's class `index` (N,)."""
    return torch.zeros_like(logits, requires_grad=False).scatter(1, index[:, None], 1)
