"""Relevance propagation through an unmodified model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from spray.errors import UserError
from spray.lrp.composites import Composite
from spray.lrp.operations import HANDLERS
from spray.lrp.trace import Trace, record_of


def propagate(model: nn.Module, x: Tensor, composite: Composite, initial: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the relevance of a model's input.

    Parameters
    ----------
    model : nn.Module
        Any model in evaluation mode; its forward pass runs once, as it is.
    x : Tensor, shape (N, ...)
        The input; not an inference tensor.
    composite : Composite
        Which rule each layer gets.
    initial : callable
        Takes the model's output and returns the relevance to start with, of the same shape.

    Returns
    -------
    Tensor
        The relevance, of the shape of `x`.

    Raises
    ------
    UserError
        If the model uses an operation that no rule is known for, or its output doesn't depend on `x`.
    """
    trace = Trace(model, composite, HANDLERS)
    a = x.detach().requires_grad_()
    with torch.enable_grad():
        trace.mark(a)
        with trace:
            output = model(a)
        if isinstance(output, Tensor):
            output = trace.current(output)
        R = initial(output)
        if record_of(output) is None:
            raise UserError("the model's output does not depend on its input: there is no relevance to propagate")
        return torch.autograd.grad(output, a, R)[0]
