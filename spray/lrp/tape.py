"""The tape that a forward pass leaves behind, and the sweep that plays it backwards with relevance.

Every tensor through which relevance may flow has a `Slot`; every operation is a `Node` from slots to slots
whose `back` turns the relevance of its outputs into that of its inputs. Relevance has one dimension more than
the tensor it belongs to: the targets, in front, so that several are explained in one sweep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

# From the relevance of the outputs (None: no relevance arrived there) to that of the inputs.
Back = Callable[[Sequence[Tensor | None]], Sequence[Tensor | None]]


class Tap(Protocol):
    """Something that looks at, or changes, the relevance that arrives at a slot."""

    def __call__(self, R: Tensor) -> Tensor:
        """Return the relevance to go on with, of shape (T, ...)."""


@dataclass(eq=False, slots=True)
class Slot:
    """The place where the relevance of one tensor gathers.

    Attributes
    ----------
    relevance : Tensor or None
        What has arrived so far.
    owned : bool
        Whether nothing else holds that tensor, so that it may be overwritten.
    loose : bool
        Whether relevance may arrive where the tensor is zero. Most rules return a multiple of the tensor; below
        them, a layer before a ReLU knows that outputs that were cut off have no relevance.
    leads_to_affine : bool
        Whether an affine layer lies between it and the output.
    taps : list of Tap
        What is done with the relevance once it is complete.
    """

    relevance: Tensor | None = None
    owned: bool = False
    loose: bool = False
    leads_to_affine: bool = False
    taps: list[Tap] = field(default_factory=list)

    def add(self, R: Tensor, owned: bool) -> None:
        """Add relevance that flows back from one of the tensor's uses; `owned`: it may be overwritten."""
        if self.relevance is None:
            self.relevance, self.owned = R, owned
        elif self.owned and self.relevance.dtype == R.dtype:
            self.relevance += R
        else:
            self.relevance, self.owned = self.relevance + R, True

    def take(self) -> Tensor | None:
        """Return the complete relevance and forget it."""
        R, self.relevance = self.relevance, None
        if R is not None:
            for tap in reversed(self.taps):
                R = tap(R)
                self.owned = False
        return R


@dataclass(eq=False, slots=True)
class Node:
    """One operation.

    Attributes
    ----------
    inputs, outputs : sequence of Slot
        Where it takes relevance to and from.
    back : Back
        What it does with it.
    affine : bool
        Whether it is an affine layer.
    returns : {"new", "same", "shared"}
        What `back` returns: tensors that nothing else holds, the tensor it was given, or views and others.
    keeps_zeros : bool
        Whether inputs that are zero get no relevance if outputs that are zero have none.
    proportional : bool
        Whether inputs that are zero never get relevance.
    """

    inputs: Sequence[Slot]
    outputs: Sequence[Slot]
    back: Back
    affine: bool = False
    returns: str = "new"
    keeps_zeros: bool = False
    proportional: bool = False


class Tape:
    """The operations of one forward pass, in order of execution."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []

    def append(self, node: Node) -> None:
        """Add an operation."""
        self.nodes.append(node)

    def play(self, start: Slot, R: Tensor, loose: bool) -> None:
        """Propagate relevance backwards from a slot; what the operations hold is freed on the way.

        Parameters
        ----------
        start : Slot
            Where relevance starts.
        R : Tensor, shape (T, ...)
            The relevance there.
        loose : bool
            Whether it may be other than zero where the tensor is zero.
        """
        start.add(R, owned=False)
        start.loose |= loose
        while self.nodes:
            node = self.nodes.pop()
            arrived = [slot.take() for slot in node.outputs]
            if all(R is None for R in arrived):
                continue
            loose = not node.proportional and (not node.keeps_zeros or any(slot.loose for slot in node.outputs))
            onwards = node.affine or any(slot.leads_to_affine for slot in node.outputs)
            owned = node.returns == "new" or (node.returns == "same" and node.outputs[0].owned)
            for slot, share in zip(node.inputs, node.back(arrived), strict=True):
                if share is not None:
                    slot.add(share, owned)
                    slot.loose |= loose
                    slot.leads_to_affine |= onwards


def fold(R: Tensor) -> Tensor:
    """Return relevance (T, N, ...) as one batch (T·N, ...)."""
    return R[0] if R.shape[0] == 1 else R.flatten(0, 1)


def unfold(R: Tensor, targets: int) -> Tensor:
    """Return one batch (T·N, ...) as relevance (T, N, ...)."""
    return R[None] if targets == 1 else R.unflatten(0, (targets, -1))


def laid_out_as(output: Tensor, vector: Tensor) -> Tensor:
    """Return a vector in the dtype and memory layout of an output; some of torch's backwards rely on it."""
    if vector.dtype == output.dtype and vector.stride() == output.stride():
        return vector
    return torch.empty_like(output, requires_grad=False).copy_(vector)


def vjp(outputs: Sequence[Tensor], inputs: Sequence[Tensor], R: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return the vector-Jacobian products of a piece of autograd's graph, one for each target.

    Parameters
    ----------
    outputs, inputs : sequence of Tensor
        The ends of the piece; outputs that need no gradient must be left out.
    R : sequence of Tensor or None
        For each output the vectors (T, ...), in any floating dtype.

    Returns
    -------
    list of Tensor or None
        For each input the products (T, ...), in the dtype of `R`.
    """
    pairs = [(output, r) for output, r in zip(outputs, R, strict=True) if r is not None]
    dtype = pairs[0][1].dtype
    per_target = []
    for t in range(pairs[0][1].shape[0]):
        vectors = [laid_out_as(output, r[t]) for output, r in pairs]
        per_target.append(
            torch.autograd.grad([output for output, _ in pairs], inputs, vectors, retain_graph=True, allow_unused=True)
        )
    return [
        None
        if products[0] is None
        else torch.stack(products).to(dtype)
        if len(products) > 1
        else products[0][None].to(dtype)
        for products in zip(*per_target, strict=True)
    ]
