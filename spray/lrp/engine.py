"""Relevance propagation through an unmodified model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spray.errors import UserError
from spray.lrp import affine as affine  # these register their handlers
from spray.lrp import attention as attention
from spray.lrp import embedding as embedding
from spray.lrp import norms as norms
from spray.lrp import operations as operations
from spray.lrp import recurrent as recurrent
from spray.lrp.composites import Composite
from spray.lrp.concepts import Concept, Reached, Watch, start_relevance
from spray.lrp.handlers import HANDLERS, LAZY
from spray.lrp.tape import Slot
from spray.lrp.trace import Trace, known, record_of


def propagate(
    model: nn.Module,
    x: Tensor,
    composite: Composite,
    initial: Callable[[Tensor], Tensor],
    relevance_dtype: torch.dtype | None = None,
    fallback: str = "error",
) -> Tensor:
    """Return the relevance of a model's input.

    Parameters
    ----------
    model : nn.Module
        Any model in evaluation mode; its forward pass runs once, as it is.
    x : Tensor, shape (N, ...)
        The input, floating or the numbers of tokens; not an inference tensor.
    composite : Composite
        Which rule each layer gets.
    initial : callable
        Takes the model's output and returns the relevance to start with: of its shape, or (T, *shape) for T
        targets at once.
    relevance_dtype : torch.dtype, optional
        The dtype in which relevance is propagated; None is that of each layer's output.
    fallback : {"error", "gradient"}
        What happens at an operation that no rule is known for: a UserError, or it is taken for the linear map
        that its gradient is, with a warning.

    Returns
    -------
    Tensor
        The relevance, of the shape of `x`, or (T, *x.shape).

    Raises
    ------
    UserError
        If the model uses an operation that no rule is known for, or its output doesn't depend on `x`.
    """
    return propagate_to(model, x, composite, initial, relevance_dtype=relevance_dtype, fallback=fallback)[""]


def propagate_to(
    model: nn.Module,
    x: Tensor,
    composite: Composite,
    initial: Callable[[Tensor], Tensor] | None,
    *,
    layers: Sequence[str] = (),
    start: tuple[str, Concept] | None = None,
    conditions: Mapping[str, Concept] | None = None,
    relevance_dtype: torch.dtype | None = None,
    fallback: str = "error",
    sum_positions: bool = False,
) -> dict[str, Tensor]:
    """Return the relevance of a model's input and inner layers; see `propagate`.

    Parameters
    ----------
    model, x, composite, initial, relevance_dtype, fallback
        As in `propagate`.
    layers : sequence of str
        The inner layers whose relevance is wanted (see `spray.lrp.concepts`).
    start : tuple of str and Concept, optional
        The inner layer and the concept there that is explained, instead of an output.
    conditions : mapping of str to Concept, optional
        Inner layers, and the concepts through which alone relevance passes there.
    sum_positions : bool
        Sum the relevance of inner layers over all dimensions but those of samples and channels.

    Returns
    -------
    dict of str to Tensor
        The relevance of the input under "", and of each layer under its name, of the shape of its output, or
        (N, channels) where positions are summed; with one dimension more in front where `initial` asks for
        several targets.
    """
    watch = Watch(model, layers, start[0] if start else None, conditions or {})
    integers = None if x.is_floating_point() else embedding.integers
    trace = Trace(model, composite, HANDLERS, frozenset(LAZY), relevance_dtype, FALLBACKS[fallback], integers)
    # On a CPU convolutions are faster on channels that lie side by side.
    channels_last = x.dim() == 4 and x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)
    # A copy, since a model may change what it detaches.
    a = x.detach().clone(memory_format=torch.channels_last if channels_last else torch.preserve_format)
    source = Slot()
    trace.mark(a, slot=source)
    output: Any
    channel_dim: int | None = None
    with torch.enable_grad(), watch.watching(trace), trace:
        try:
            output = model(a)
        except Reached as signal:
            output, channel_dim = signal.output, signal.dim
        finally:
            if trace.random is not None:
                trace.random.put_back()
    watch.check()
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        if isinstance(output, Tensor):
            output = trace.current(output)
        if channel_dim is not None and start is not None:
            R = start_relevance(start[1], output.detach(), channel_dim, start[0])
        else:
            assert initial is not None
            R = initial(output)
        if record_of(output) is None:
            raise UserError("the model's output does not depend on its input: there is no relevance to propagate")
        single, first = R.dim() == output.dim(), known(output).slot
        output = None  # so that the sweep can free what it has passed
        trace.tape.play(first, R[None] if single else R, loose=True)
        dtype = x.dtype if x.is_floating_point() else R.dtype
        captured = {layer: capture.relevance_of(sum_positions) for layer, capture in watch.captures.items()}
        arrived = {"": source.relevance, **captured}
        if arrived[""] is None:
            arrived[""] = torch.zeros(1 if single else len(R), *x.shape, dtype=dtype, device=x.device)
        missing = [layer for layer, relevance in arrived.items() if relevance is None]
        if missing:
            raise UserError(
                f"no relevance reaches layer {missing[0]!r}: it lies on no path from the start to the input"
            )
        whole = {layer: r.to(dtype) for layer, r in arrived.items() if r is not None}
        return {layer: r[0].contiguous() if single else r.contiguous() for layer, r in whole.items()}


def fall_back(trace: Trace, func: Any, args: Any, kwargs: Any) -> Any:
    """Take an operation without a rule for the linear map that its gradient is."""
    name = func.__name__
    warnings.warn(f"LRP has no rule for {name}{trace.place()}: its relevance is that of gradient x input", stacklevel=2)
    return operations.by_contribution(trace, func, args, kwargs)


FALLBACKS = {"error": None, "gradient": fall_back}
