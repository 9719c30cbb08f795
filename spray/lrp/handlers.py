"""The table from the names of torch functions to what LRP does for them, and what its handlers share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from spray.lrp.tape import Slot
from spray.lrp.trace import Handler, Trace

Call = Callable[..., Any]

HANDLERS: dict[str, Handler] = {}

# Functions whose handlers take operands that have not been computed yet.
LAZY: set[str] = set()


def handles(names: str, lazy: bool = False) -> Callable[[Handler], Handler]:
    """Return a decorator that registers a handler for torch functions, named in one string."""

    def add(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names.split(), handler))
        if lazy:
            LAZY.update(names.split())
        return handler

    return add


def detached(t: Tensor | None) -> Tensor | None:
    """Return an optional tensor without its graph."""
    return None if t is None else t.detach()


def leaf_of(t: Tensor) -> Tensor:
    """Return a tensor's values as the start of a graph of its own."""
    return t.detach().requires_grad_()


def placeholder(trace: Trace, like: Tensor, shape: tuple[int, ...], **known: Any) -> Tensor:
    """Return a tensor that stands for a result to come; it has no memory of its own."""
    # Not a number, so that whatever reads it unseen by the trace spoils the output, which is checked.
    empty = like.detach().new_full((), float("nan")).expand(shape)
    return trace.mark(empty, **{"slot": Slot(), "waiting": True, **known})


@lru_cache(maxsize=256)
def signature(func: Call) -> inspect.Signature:
    """Return the signature of a Python-level torch function."""
    return inspect.signature(func)


def without_inplace(func: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, bool]:
    """Return arguments with ``inplace=False``, and whether it was True."""
    try:
        parameters = signature(func)
    except (TypeError, ValueError):  # a builtin, which has no such argument
        return args, dict(kwargs), False
    if "inplace" not in parameters.parameters:
        return args, dict(kwargs), False
    bound = parameters.bind(*args, **kwargs)
    in_place = bool(bound.arguments.pop("inplace", False))
    return bound.args, bound.kwargs, in_place


def operands(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Return the two operands of a function, however they are passed."""
    second = ("other", "exponent", "mat2", "vec", "tensor")
    a, *rest = args or (kwargs["input"],)
    return a, rest[0] if rest else next(kwargs[name] for name in second if name in kwargs)


def sum_to(R: Tensor, shape: torch.Size) -> Tensor:
    """Return relevance (T, ...) summed over the dimensions along which a tensor of `shape` was broadcast."""
    return (
        R
        if R.shape[1:] == shape
        else R.sum_to_size(R.shape[0], *(1,) * (R.dim() - 1 - len(shape)), *shape).reshape(R.shape[0], *shape)
    )
