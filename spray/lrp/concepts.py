"""Relevance at inner layers, from inner layers, and through chosen concepts there.

A layer is the output of a module, by its name as in `model.named_modules()`; the k-th call of a module that
runs several times is ``name#k``, counted from 1. A concept at a layer is

- a channel (an int) or a subset of channels (a sequence of ints): conditional relevance, Achtibat et al. 2023;
- a direction (a floating tensor (C,), such as a concept activation vector): the relevance of the projection
  onto it, Chormai et al. 2022, "Disentangled explanations of neural network predictions by finding relevant
  subspaces";
- a mask (a tensor of the layer's dimensions without the samples'), with which relevance is multiplied.

Channels are the second dimension, or the last of sequences of tokens (three dimensions, or the output of
`nn.Linear` and `nn.LayerNorm`).
"""

from __future__ import annotations

import difflib
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from spray.errors import UserError
from spray.lrp.trace import Trace, record_of

Concept = int | Sequence[int] | Tensor


class Reached(BaseException):
    """The forward pass has come to the layer where relevance starts."""

    def __init__(self, output: Tensor, module: nn.Module) -> None:
        super().__init__()
        self.output, self.module = output, module


class Capture:
    """A tap that remembers the relevance that passes."""

    def __init__(self) -> None:
        self.relevance: Tensor | None = None

    def __call__(self, R: Tensor) -> Tensor:
        """Add the relevance to what has passed already."""
        self.relevance = R if self.relevance is None else self.relevance + R
        return R


class Restrict:
    """A tap that lets only the relevance of a concept pass."""

    def __init__(self, concept: Concept, a: Tensor, dim: int, layer: str) -> None:
        self.weights, self.direction = weights_of(concept, a, dim, layer)
        self.a, self.dim = a, dim

    def __call__(self, R: Tensor) -> Tensor:
        """Return R_j h_j, or for a direction a_j h_j Σ_i h_i R_i / a_i."""
        if not self.direction:
            return R * self.weights
        context = torch.where(self.a == 0, 0, R / self.a)
        return self.a * self.weights * (context * self.weights).sum(self.dim, keepdim=True)


def weights_of(concept: Concept, a: Tensor, dim: int, layer: str) -> tuple[Tensor, bool]:
    """Return a concept as weights that broadcast to `a`, and whether they are a direction, of unit length.

    Raises
    ------
    UserError
        If the concept doesn't fit the layer.
    """
    channels = a.shape[dim]
    allowed = f"a channel from 0 to {channels - 1}, a list of them, a direction ({channels},) or a mask"
    if isinstance(concept, Tensor) and concept.dim() == a.dim() - 1 and concept.dim() > 1:
        try:
            return concept.to(a).expand(a.shape[1:])[None], False
        except RuntimeError:
            raise UserError(f"a mask of shape {tuple(concept.shape)} doesn't fit layer {layer!r}: {allowed}") from None
    shape = [1] * a.dim()
    shape[dim] = channels
    if isinstance(concept, Tensor) and concept.is_floating_point():
        if concept.shape != (channels,) or not bool(torch.isfinite(concept).all()) or not bool(concept.any()):
            raise UserError(f"a direction of shape {tuple(concept.shape)} doesn't fit layer {layer!r}: {allowed}")
        h = concept.to(a)
        return (h / h.norm()).view(shape), True
    try:
        chosen = (
            [concept.__index__()]
            if hasattr(concept, "__index__") and not isinstance(concept, Tensor)
            else list(concept)
        )  # type: ignore[arg-type]
        index = torch.tensor([int(c) for c in chosen], dtype=torch.int64, device=a.device)
    except (TypeError, ValueError):
        raise UserError(f"{concept!r} is no concept of layer {layer!r}; allowed: {allowed}") from None
    if not len(index) or int(index.min()) < 0 or int(index.max()) >= channels:
        raise UserError(f"layer {layer!r} has no channels {chosen}; allowed: {allowed}")
    return a.new_zeros(channels).index_fill(0, index, 1).view(shape), False


def channel_dim(a: Tensor, module: nn.Module) -> int:
    """Return which dimension of a layer's output counts its channels."""
    convolution = isinstance(module, nn.Conv1d | nn.ConvTranspose1d | nn.BatchNorm1d)
    tokens = a.dim() == 3 and not convolution
    return a.dim() - 1 if tokens or isinstance(module, nn.Linear | nn.LayerNorm) else 1


def start_relevance(concept: Concept, a: Tensor, module: nn.Module, layer: str) -> Tensor:
    """Return the relevance that starts at a layer: a_j h_j, what each unit adds to the concept."""
    weights, _ = weights_of(concept, a, channel_dim(a, module), layer)
    return a * weights


class Watch:
    """What is asked of inner layers, while a model runs under a trace.

    Parameters
    ----------
    model : nn.Module
        The model, whose modules the names mean.
    layers : sequence of str
        Where relevance is wanted.
    start : str, optional
        The layer at whose output the forward pass ends.
    conditions : mapping of str to Concept
        The concepts through which alone relevance passes.

    Raises
    ------
    UserError
        For a layer that the model doesn't have.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[str], start: str | None, conditions: Mapping[str, Concept]
    ) -> None:
        self.captures = {layer: Capture() for layer in layers}
        self.start, self.conditions = start, conditions
        modules = {name: module for name, module in model.named_modules() if name}
        self.wanted = {}
        for layer in [*layers, *([start] if start else []), *conditions]:
            name, _, call = layer.partition("#")
            if name not in modules or (call and not (call.isdigit() and int(call) > 0)):
                raise UserError(unknown_layer(layer, modules))
            self.wanted[id(modules[name])] = name
        self.calls: Counter[str] = Counter()

    @contextmanager
    def watching(self, trace: Trace) -> Iterator[None]:
        """Watch the modules of this thread; the model gets no hook of its own."""
        if not self.wanted:
            yield
            return
        thread = threading.get_ident()

        def see(module: nn.Module, args: Any, output: Any) -> None:
            name = self.wanted.get(id(module))
            if name is not None and threading.get_ident() == thread:
                self.calls[name] += 1
                self.arrive(trace, name, module, output)

        hook = register_module_forward_hook(see)
        try:
            yield
        finally:
            hook.remove()

    def arrive(self, trace: Trace, name: str, module: nn.Module, output: Any) -> None:
        """Tap the output of a module that has just run."""
        keys = (name, f"{name}#{self.calls[name]}")
        if not any(key in self.captures or key in self.conditions or key == self.start for key in keys):
            return
        if isinstance(module, nn.RNNBase):
            output = output[0]  # beside the states
        if not isinstance(output, Tensor):
            raise UserError(f"layer {name!r} returns a {type(output).__name__}, not a tensor; name one inside it")
        t = trace.current(output, values=False)
        record = record_of(t)
        if record is None:
            raise UserError(f"layer {name!r} does not depend on the input: it has no relevance")
        for key in keys:
            if key == self.start:
                raise Reached(trace.current(t), module)
            if key in self.captures:
                record.slot.taps.append(self.captures[key])
            if key in self.conditions:
                values = trace.current(t)
                restrict = Restrict(self.conditions[key], values.detach(), channel_dim(values, module), key)
                record.slot.taps.append(restrict)

    def check(self) -> None:
        """Raise a UserError if a layer never ran, or ran several times and its call wasn't named."""
        for layer in [*self.captures, *self.conditions, *([self.start] if self.start else [])]:
            name, _, call = layer.partition("#")
            times = self.calls[name]
            if times < int(call or 1):
                raise UserError(f"layer {layer!r} did not run: module {name!r} ran {times} times")
            if times > 1 and not call and layer != self.start:
                raise UserError(f"module {name!r} ran {times} times; name the call: {name}#1 to {name}#{times}")


def unknown_layer(layer: str, modules: Iterable[str]) -> str:
    """Return the message for a layer that doesn't exist."""
    close = difflib.get_close_matches(layer.partition("#")[0], modules, 3)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "see model.named_modules()"
    return f"the model has no layer {layer!r}; {hint}"
