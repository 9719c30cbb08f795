"""Maximum pooling of images, and zero padding that a convolution takes into its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spray.lrp.handlers import Call, handles, placeholder
from spray.lrp.layers import memory_format
from spray.lrp.operations import move
from spray.lrp.tape import Node, Slot
from spray.lrp.trace import Trace, known


@handles("max_pool2d")
def max_pool2d(trace: Trace, func: Call, args: Any, kwargs: Any) -> Any:
    """Handle maximum pooling of images, in the dtype of the relevance: it goes to the winner."""
    names = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    given = dict(zip(names, args, strict=False)) | kwargs
    a = given["input"]
    if a.dim() != 4 or given.get("return_indices", False):
        return move(trace, func, args, kwargs)
    kernel = pair(given["kernel_size"])
    stride = pair(given.get("stride") or kernel)
    window = (
        kernel,
        stride,
        pair(given.get("padding", 0)),
        pair(given.get("dilation", 1)),
        given.get("ceil_mode", False),
    )
    values, indices = torch.ops.aten.max_pool2d_with_indices(a.detach(), *window)
    record, shape, format = known(a), tuple(a.shape), memory_format(a)
    z = trace.mark(values, [a], nonnegative=record.nonnegative, gate=record.gate)

    def back(arrived: Sequence[Tensor | None]) -> Sequence[Tensor]:
        (R,) = arrived
        assert R is not None
        # Only its shape and dtype are read.
        like = torch.empty(shape, dtype=R.dtype, device=R.device, memory_format=format)
        per_target = [torch.ops.aten.max_pool2d_with_indices_backward(r, like, *window, indices) for r in R]
        return [per_target[0][None] if len(per_target) == 1 else torch.stack(per_target)]

    trace.tape.append(Node((record.slot,), (known(z).slot,), back, keeps_zeros=True))
    return z


def pair(value: Any) -> list[int]:
    """Return an int, or one or two ints, as two ints."""
    values = [value] if isinstance(value, int) else list(value)
    return values * 2 if len(values) == 1 else values


@dataclass(frozen=True, eq=False)
class ZeroPadding:
    """Zeros around an image, which wait for a convolution: there they are padding, and no input.

    `before` and `after` count them in each dimension but the samples' and the channels'.
    """

    a: Tensor
    before: tuple[int, ...]
    after: tuple[int, ...]

    def compute(self, trace: Trace, slot: Slot, rectify: bool = False) -> Tensor:
        """Return the padded image; what arrives at the zeros is lost."""
        widths = [n for pair in reversed(list(zip(self.before, self.after, strict=True))) for n in pair]
        z = F.pad(self.a.detach(), widths)
        record = known(self.a)
        trace.mark(
            z.relu_() if rectify else z,
            [self.a],
            slot=slot,
            nonnegative=rectify or record.nonnegative,
            gate=record.gate,
        )
        inside = tuple(slice(start, start + n) for start, n in zip(self.before, self.a.shape[2:], strict=True))

        def back(arrived: Sequence[Tensor | None]) -> Sequence[Tensor]:
            (R,) = arrived
            assert R is not None
            return [R[(..., *inside)]]  # type: ignore[index]

        trace.tape.append(Node((record.slot,), (slot,), back, returns="shared", keeps_zeros=True))
        return z


@handles("pad")
def pad(trace: Trace, func: Call, args: Any, kwargs: Any) -> Any:
    """Handle padding; zeros around an image wait for a convolution."""
    given = dict(zip(("input", "pad", "mode", "value"), args, strict=False)) | kwargs
    a, widths = given["input"], list(given["pad"])
    plain = given.get("mode", "constant") == "constant" and not given.get("value")
    if not plain or a.dim() < 3 or min(widths) < 0 or len(widths) > 2 * (a.dim() - 2):
        return move(trace, func, args, kwargs)
    widths += [0] * (2 * (a.dim() - 2) - len(widths))
    before, after = tuple(reversed(widths[::2])), tuple(reversed(widths[1::2]))
    inner = [n + b + e for n, b, e in zip(a.shape[2:], before, after, strict=True)]
    record = known(a)
    facts = {"nonnegative": record.nonnegative, "gate": record.gate, "after_affine": record.after_affine}
    return placeholder(trace, a, (*a.shape[:2], *inner), deferred=ZeroPadding(a, before, after), **facts)
