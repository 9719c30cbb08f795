"""Relevance at inner layers, from inner layers, and through chosen concepts there.

A layer is the output of a module, by its name as in `model.named_modules()`; the k-th call of a module that
runs several times is ``name#k``, counted from 1. A concept at a layer is

- a channel (an int) or a subset of channels (a sequence of ints, or a boolean tensor (C,)): conditional
  relevance, Achtibat et al. 2023;
- a direction (a floating tensor (C,), such as a concept activation vector): the relevance of the projection
  onto it, Chormai et al. 2022, "Disentangled explanations of neural network predictions by finding relevant
  subspaces";
- a mask (a tensor of the layer's dimensions without the samples', two or more), with which relevance is
  multiplied.

Channels are the last dimension of the outputs of linear layers and layer norms, the second of those of
convolutions and what belongs to them. Of other modules they are the dimension that has as many entries as the
layer of these kinds that ran last; if that doesn't tell, the last of three dimensions, else the second.
"""

from __future__ import annotations

import difflib
import operator
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from spray.errors import UserError
from spray.lrp.tape import Node, Slot
from spray.lrp.trace import Record, Trace, carriers, record_of

Concept = int | Sequence[int] | Tensor | np.ndarray[Any, Any]

CHANNELS_LAST = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Embedding)
CHANNELS_SECOND = (
    nn.GroupNorm,
    *(
        getattr(nn, f"{kind}{dims}d")
        for kind in ("Conv", "ConvTranspose", "BatchNorm", "InstanceNorm", "MaxPool", "AvgPool")
        for dims in (1, 2, 3)
    ),
)


class Reached(BaseException):
    """The forward pass has come to the layer where relevance starts, whose channels dimension `dim` counts."""

    def __init__(self, output: Tensor, dim: int) -> None:
        super().__init__()
        self.output, self.dim = output, dim


class Capture:
    """A tap that remembers the relevance that passes."""

    def __init__(self) -> None:
        self.relevance: Tensor | None = None
        self.dim = 1  # of the channels, counted without that of the targets

    def relevance_of(self, channels_only: bool) -> Tensor | None:
        """Return the relevance that passed, (T, N, ...), or summed over positions: (T, N, channels)."""
        if self.relevance is None or not channels_only:
            return self.relevance
        positions = [dim for dim in range(2, self.relevance.dim()) if dim != self.dim + 1]
        return self.relevance.sum(positions) if positions else self.relevance

    def __call__(self, R: Tensor) -> Tensor:
        """Add the relevance to what has passed already."""
        self.relevance = R if self.relevance is None else self.relevance + R
        return R


class Restrict:
    """A tap that lets only the relevance of a concept pass."""

    def __init__(self, concept: Concept, a: Tensor, dim: int, layer: str) -> None:
        self.weights, self.direction = weights_of(concept, a, dim, layer)
        self.a, self.dim = a, dim - a.dim()  # counted from the end: relevance has the targets in front

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
    if isinstance(concept, np.ndarray):
        concept = torch.as_tensor(concept, device=a.device)
    if isinstance(concept, Tensor) and concept.dim() == a.dim() - 1 and concept.dim() > 1:
        try:
            return concept.to(a).expand(a.shape[1:])[None], False
        except RuntimeError:
            raise UserError(
                f"a mask of shape {tuple(concept.shape)} doesn't fit layer {layer!r}, whose samples have shape "
                f"{tuple(a.shape[1:])}; allowed: {allowed}"
            ) from None
    shape = [1] * a.dim()
    shape[dim] = channels
    if isinstance(concept, Tensor) and concept.is_floating_point():
        if concept.shape != (channels,) or not bool(torch.isfinite(concept).all()) or not bool(concept.any()):
            raise UserError(
                f"a direction of shape {tuple(concept.shape)} doesn't fit layer {layer!r}, or is zero or not finite; "
                f"allowed: {allowed}"
            )
        h = concept.detach().to(a)
        return (h / h.norm()).view(shape), True
    if isinstance(concept, Tensor) and concept.dtype == torch.bool and concept.shape == (channels,):
        concept = concept.nonzero().flatten()
    return a.new_zeros(channels).index_fill(0, channel_indices(concept, channels, layer, allowed, a.device), 1).view(
        shape
    ), False


def channel_indices(concept: Concept, channels: int, layer: str, allowed: str, device: torch.device) -> Tensor:
    """Return a channel, or several, as an int64 tensor; raise a UserError if it is none."""
    many = concept.tolist() if isinstance(concept, Tensor) else concept
    many = list(many) if isinstance(many, Iterable) and not isinstance(many, str | bytes) else [many]
    try:
        if any(isinstance(c, bool | np.bool_) for c in many):
            raise TypeError
        chosen = [operator.index(c) for c in many]
    except TypeError:
        raise UserError(f"{concept!r} is no concept of layer {layer!r}; allowed: {allowed}") from None
    if not chosen or min(chosen) < 0 or max(chosen) >= channels:
        raise UserError(f"layer {layer!r} has no channels {chosen}; allowed: {allowed}")
    return torch.tensor(chosen, dtype=torch.int64, device=device)


def start_relevance(concept: Concept, a: Tensor, dim: int, layer: str) -> Tensor:
    """Return the relevance that starts at a layer with channels in dimension `dim`: a_j h_j."""
    weights, _ = weights_of(concept, a, dim, layer)
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
        for layer in self.layers():
            name, sharp, call = layer.partition("#") if isinstance(layer, str) else (layer, "", "")
            if name not in modules or (sharp and not (call.isdecimal() and int(call) > 0)):
                raise UserError(unknown_layer(layer, modules))
            self.wanted[id(modules[name])] = name
        self.calls: Counter[str] = Counter()
        self.entered: list[list[Record | None]] = []
        # For outputs of a number of dimensions: how many channels the last layer had, and whether in the last one.
        self.layout: dict[int, tuple[int, bool]] = {}

    def layers(self) -> list[str]:
        """Return the names of all layers that something is asked of."""
        return [*self.captures, *([] if self.start is None else [self.start]), *self.conditions]

    @contextmanager
    def watching(self, trace: Trace) -> Iterator[None]:
        """Watch the modules of this thread; the model gets no hook of its own."""
        if not self.wanted:
            yield
            return
        thread = threading.get_ident()

        def enter(module: nn.Module, args: Any) -> None:
            if id(module) in self.wanted and threading.get_ident() == thread:
                self.entered.append([record_of(trace.current(t, values=False)) for t in carriers(args)])

        def see(module: nn.Module, args: Any, output: Any) -> Tensor | None:
            if threading.get_ident() != thread:
                return None
            last = isinstance(module, CHANNELS_LAST)
            if isinstance(output, Tensor) and output.dim() > 1 and (last or isinstance(module, CHANNELS_SECOND)):
                self.layout[output.dim()] = (output.shape[-1 if last else 1], last)
            name = self.wanted.get(id(module))
            if name is None:
                return None
            self.calls[name] += 1
            return self.arrive(trace, name, module, output, self.entered.pop())

        hooks = register_module_forward_pre_hook(enter), register_module_forward_hook(see)  # type: ignore[arg-type]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def arrive(
        self, trace: Trace, name: str, module: nn.Module, output: Any, entered: Sequence[Record | None]
    ) -> Tensor | None:
        """Tap the output of a module that has just run; return what is to take its place, if anything."""
        keys = (name, f"{name}#{self.calls[name]}")
        captures = [self.captures[key] for key in keys if key in self.captures]
        conditions = [key for key in keys if key in self.conditions]
        if not (captures or conditions or self.start in keys):
            return None
        if not isinstance(output, Tensor):
            raise UserError(f"layer {name!r} returns a {type(output).__name__}, not a tensor; name one inside it")
        t = trace.current(output, values=False)
        record = record_of(t)
        if record is None:
            raise UserError(f"layer {name!r} does not depend on the input: it has no relevance")
        replacement = None
        if any(record is other for other in entered):
            # What it returns is its input, which may be used elsewhere too.
            t = replacement = pass_on(trace, t, record)
            record = record_of(t)
            assert record is not None
        # The tap that comes last acts first: what is captured is what the conditions let pass.
        for capture in captures:
            capture.dim = self.channel_dim(t, module)
        record.slot.taps.extend(captures)
        for key in conditions:
            values = trace.current(t)
            restrict = Restrict(self.conditions[key], values.detach(), self.channel_dim(values, module), key)
            record.slot.taps.append(restrict)
        if self.start in keys:
            values = trace.current(t)
            raise Reached(values, self.channel_dim(values, module))
        return replacement

    def channel_dim(self, a: Tensor, module: nn.Module) -> int:
        """Return which dimension of a layer's output counts its channels."""
        last = a.dim() - 1
        if isinstance(module, CHANNELS_LAST):
            return last
        if isinstance(module, CHANNELS_SECOND) or a.dim() < 3:
            return 1
        channels, in_last = self.layout.get(a.dim(), (0, a.dim() == 3))
        fits_second, fits_last = a.shape[1] == channels, a.shape[-1] == channels
        if fits_second != fits_last:
            return last if fits_last else 1
        return last if (in_last if fits_last else a.dim() == 3) else 1

    def check(self) -> None:
        """Raise a UserError if a layer never ran, or ran several times and its call wasn't named."""
        for layer in self.layers():
            name, _, call = layer.partition("#")
            times = self.calls[name]
            if times < int(call or 1):
                before = f" before layer {self.start!r}, where relevance starts" if self.start is not None else ""
                raise UserError(f"layer {layer!r} did not run: module {name!r} ran {times} times{before}")
            if times > 1 and not call and layer != self.start:
                raise UserError(f"module {name!r} ran {times} times; name the call: {name}#1 to {name}#{times}")


def pass_on(trace: Trace, t: Tensor, record: Record) -> Tensor:
    """Return a tensor that is the same but has a slot of its own, so that its uses can be told from others."""
    facts: dict[str, Any] = {"nonnegative": record.nonnegative, "gate": record.gate, "contiguous": record.contiguous}
    facts |= {"after_affine": record.after_affine, "deferred": record.deferred}
    if record.waiting:
        return trace.mark(t.detach(), **facts, waiting=True, slot=Slot(taps=list(record.slot.taps)))
    with torch.no_grad():
        copy = trace.mark(t.detach(), [t], shares=True, **facts)
    slot = record_of(copy).slot  # type: ignore[union-attr]
    trace.tape.append(Node((record.slot,), (slot,), lambda R: R, returns="same", keeps_zeros=True))
    return copy


def unknown_layer(layer: str, modules: Iterable[str]) -> str:
    """Return the message for a layer that doesn't exist."""
    close = difflib.get_close_matches(str(layer).partition("#")[0], modules, 3)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "see model.named_modules()"
    return f"the model has no layer {layer!r}; {hint}"
