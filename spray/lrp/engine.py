"""Relevance propagation through an unmodified model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from spray.errors import UserError
from spray.lrp import affine as affine  # registers its handlers, as the next ones do
from spray.lrp import attention as attention
from spray.lrp import norms as norms
from spray.lrp import operations as operations
from spray.lrp.composites import Composite
from spray.lrp.handlers import HANDLERS, LAZY
from spray.lrp.tape import Slot
from spray.lrp.trace import Trace, known, record_of


def propagate(
    model: nn.Module,
    x: Tensor,
    composite: Composite,
    initial: Callable[[Tensor], Tensor],
    relevance_dtype: torch.dtype | None = None,
) -> Tensor:
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
        Takes the model's output and returns the relevance to start with: of its shape, or (T, *shape) for T
        targets at once.
    relevance_dtype : torch.dtype, optional
        The dtype in which relevance is propagated; None is that of each layer's output.

    Returns
    -------
    Tensor
        The relevance, of the shape of `x`, or (T, *x.shape).

    Raises
    ------
    UserError
        If the model uses an operation that no rule is known for, or its output doesn't depend on `x`.
    """
    trace = Trace(model, composite, HANDLERS, frozenset(LAZY), relevance_dtype)
    # On a CPU convolutions are faster on channels that lie side by side.
    channels_last = x.dim() == 4 and x.device.type == "cpu" and x.dtype != torch.float64
    a = x.detach().contiguous(memory_format=torch.channels_last) if channels_last else x.detach()
    source = Slot()
    trace.mark(a := a.view_as(a), slot=source)
    with torch.enable_grad(), trace:
        output = model(a)
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        if isinstance(output, Tensor):
            output = trace.current(output)
        R = initial(output)
        if record_of(output) is None:
            raise UserError("the model's output does not depend on its input: there is no relevance to propagate")
        single, start = R.dim() == output.dim(), known(output).slot
        del output
        trace.tape.play(start, R[None] if single else R, loose=True)
        arrived = source.relevance
        if arrived is None:
            arrived = x.new_zeros(1 if single else R.shape[0], *x.shape)
        arrived = arrived.to(x.dtype)
        return arrived[0].contiguous() if single else arrived.contiguous()
