"""Affine layers: convolutions, fully connected layers, products with constants, and what is computed with them.

A convolution or fully connected layer isn't computed when the model calls it but when its values are first
needed: a batch normalisation that comes next is merged into its weights, and a ReLU into its node, which then
needs the ReLU's output alone (where that is zero there is no relevance).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from spray.lrp.handlers import Call, detached, handles, placeholder, signature
from spray.lrp.layers import BatchNorm, Convolution, FullyConnected, Layer, LinearMap, Product, memory_format
from spray.lrp.operations import divided_by_contribution, elementwise
from spray.lrp.pooling import ZeroPadding
from spray.lrp.rules import Rule, default_stabilizer
from spray.lrp.tape import Node, Slot
from spray.lrp.trace import Trace, known, record_of


@dataclass(frozen=True, eq=False)
class AffineCall:
    """A call of an affine layer.

    Attributes
    ----------
    a, kept : Tensor
        The values of its input; `kept` are those for the way back.
    source : Slot
        Where the relevance of the input gathers.
    map, weight, bias, norm
        What it computes; a batch normalisation follows if there is a `norm`.
    rule : Rule
        Its rule.
    name : str
        The module it belongs to.
    nonnegative : bool
        Whether the input can't be negative.
    dtype : torch.dtype or None
        The dtype of the relevance; None is that of the output.
    """

    a: Tensor
    kept: Tensor
    source: Slot
    map: LinearMap
    weight: Tensor
    bias: Tensor | None
    rule: Rule
    name: str
    nonnegative: bool
    dtype: torch.dtype | None
    norm: BatchNorm | None = None

    def parameters(self) -> tuple[Tensor, Tensor | None]:
        """Return weight and bias, the normalisation merged, in the memory format that the input has."""
        weight = self.weight.contiguous(memory_format=memory_format(self.a)) if self.weight.dim() > 2 else self.weight
        return (weight, self.bias) if self.norm is None else self.norm.merge(self.map, weight, self.bias)

    def compute(self, trace: Trace, slot: Slot, rectify: bool = False, z: Tensor | None = None) -> Tensor:
        """Return its output, computed already (`z`) or now, with the negative values cut off if a ReLU follows."""
        self.rule.check(self.a, self.name)
        parameters = self.parameters()
        if z is None:
            with torch.autocast(self.a.device.type, enabled=False):
                z = self.map.forward(self.a, *parameters)
        z = z.relu_() if rectify else z
        known_of_it: dict[str, Any] = {"slot": slot, "after_affine": True}
        known_of_it |= {"nonnegative": True} if rectify else {"deferred": self}
        trace.mark(z, **known_of_it)
        last = trace.composite.last_rule(self.name)
        back = self._back(trace, slot, z, parameters, rectify, last)
        proportional = self.rule.proportional and (last is None or last.proportional)
        trace.tape.append(Node((self.source,), (slot,), back, affine=True, proportional=proportional))
        return z

    def _back(
        self,
        trace: Trace,
        slot: Slot,
        z: Tensor,
        parameters: tuple[Tensor, Tensor | None],
        rectify: bool,
        last: Rule | None,
    ) -> Callable[..., Any]:
        rule, dtype = self.rule, self.dtype or z.dtype
        a = self.kept if rule.uses_input or rule.uses_output or last else None
        out = trace.keep(z, self.dtype) if rule.uses_output or last else None
        ignores_bias = trace.composite.zero_bias
        layer = Layer(self.map, *parameters, self.a.shape, self.nonnegative, epsilon=default_stabilizer(z.dtype))

        def back(arrived: Sequence[Tensor | None]) -> tuple[Tensor]:
            (R,) = arrived
            assert R is not None
            f = replace(layer, rectified=rectify and not slot.loose).to(dtype)
            chosen = last if last is not None and not slot.leads_to_affine else rule
            inputs = None if a is None else a.to(dtype)
            outputs = None if out is None else out.to(dtype)
            if rectify and slot.loose and chosen.uses_output:
                assert inputs is not None
                outputs = f(inputs, f.w, f.b)
            f = f.without_bias() if ignores_bias else f
            return (chosen(f, inputs, outputs, R.to(dtype)),)  # type: ignore[arg-type]

        return back


def affine(
    trace: Trace, a: Tensor, map: LinearMap, weight: Tensor, bias: Tensor | None, z: Tensor | None = None
) -> Tensor:
    """Return an affine layer of `a`, under the composite's rule: a placeholder, unless it is computed already."""
    record = record_of(a)
    if record is None or any(t is not None and record_of(t) for t in (weight, bias)):
        trace.fail(f"a {map.kind} layer whose weight or bias depends on the input")
    name = trace.layer_name(weight)
    rule = trace.composite.rule(map.kind, name, not record.after_affine)
    dtype = trace.relevance_dtype
    if map.kind == "linear" and weight.numel() > a.numel():
        dtype = None  # converting the weight would cost more than it saves
    weight, bias = weight.detach(), detached(bias)
    kept = trace.keep(a, dtype)
    call = AffineCall(a.detach(), kept, record.slot, map, weight, bias, rule, name, record.nonnegative, dtype)
    if z is not None:
        return call.compute(trace, Slot(), z=z)
    return placeholder(trace, a, map.output_shape(a.shape, weight), deferred=call, after_affine=True)


def eager(a: Tensor) -> bool:
    """Return whether autocast decides on the dtype, so that a layer has to be computed where it is called."""
    return torch.is_autocast_enabled(a.device.type)


@handles("linear")
def linear(trace: Trace, func: Call, args: Any, kwargs: Any) -> Tensor:
    """Handle `torch.nn.functional.linear`."""

    def unpack(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        return input, weight, bias

    a, weight, bias = unpack(*args, **kwargs)
    z = func(a, weight, bias) if eager(a) else None
    return affine(trace, a, FullyConnected(), weight, bias, z)


@handles("conv1d conv2d conv3d", lazy=True)
def convolution(trace: Trace, func: Call, args: Any, kwargs: Any) -> Tensor:
    """Handle convolutions."""

    def unpack(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        return input, weight, bias, stride, padding, dilation, groups

    a, weight, bias, stride, padding, dilation, groups = unpack(*args, **kwargs)
    dims = weight.dim() - 2
    dilation = per_dimension(dilation, dims)
    trailing: tuple[int, ...] = ()
    if padding == "same":
        padding, trailing = same_padding(weight, dilation)
    elif padding == "valid":
        padding = 0
    padding = per_dimension(padding, dims)
    zeros = waiting_zeros(a)
    if zeros is not None and not trailing and not eager(a) and zeros.a.dim() == dims + 2:
        a = zeros.a
        padding = tuple(p + before for p, before in zip(padding, zeros.before, strict=True))
        trailing = tuple(after - before for before, after in zip(zeros.before, zeros.after, strict=True))
    else:
        a = trace.current(a)
    batched(trace, a, dims)
    map = Convolution(per_dimension(stride, dims), padding, dilation, groups, trailing=trailing)
    return affine(trace, a, map, weight, bias, rest_of(func, args, kwargs)(a) if eager(a) else None)


def waiting_zeros(a: Tensor) -> ZeroPadding | None:
    """Return the zero padding that a convolution can take into its own: there is no less of it after than before."""
    record = record_of(a)
    if record is None or not record.waiting or not isinstance(record.deferred, ZeroPadding) or record.slot.taps:
        return None
    zeros = record.deferred
    fits = all(before <= after for before, after in zip(zeros.before, zeros.after, strict=True))
    return zeros if fits else None


def rest_of(func: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """Return `func` as a function of its first argument, `input`, alone."""
    rest = {key: value for key, value in kwargs.items() if key != "input"}
    return lambda a: func(a, *args[1:], **rest)


@handles("conv_transpose1d conv_transpose2d conv_transpose3d")
def transposed_convolution(trace: Trace, func: Call, args: Any, kwargs: Any) -> Tensor:
    """Handle transposed convolutions."""

    def unpack(
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Any:
        return input, weight, bias, stride, padding, output_padding, groups, dilation

    a, weight, bias, stride, padding, output_padding, groups, dilation = unpack(*args, **kwargs)
    dims = weight.dim() - 2
    batched(trace, a, dims)
    map = Convolution(
        per_dimension(stride, dims),
        per_dimension(padding, dims),
        per_dimension(dilation, dims),
        groups,
        transposed=True,
        output_padding=per_dimension(output_padding, dims),
    )
    return affine(trace, a, map, weight, bias, func(*args, **kwargs) if eager(a) else None)


def batched(trace: Trace, a: Tensor, dims: int) -> None:
    """Refuse a convolution's input without the dimension of the samples."""
    if a.dim() != dims + 2:
        trace.fail(f"a convolution of an input with {a.dim()} dimensions instead of {dims + 2}")


def per_dimension(value: Any, dims: int) -> tuple[int, ...]:
    """Return an int or a sequence of one or `dims` ints as `dims` ints."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


def same_padding(weight: Tensor, dilation: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return what padding='same' means: the padding on both sides and torch's odd rest after the end."""
    total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    return tuple(t // 2 for t in total), tuple(t % 2 for t in total)


@handles("batch_norm", lazy=True)
def batch_norm(trace: Trace, func: Call, args: Any, kwargs: Any) -> Tensor:
    """Handle batch normalisation: merged into the affine layer whose output it gets, else on its own."""
    bound = signature(func).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    a = given["input"]
    if given["training"] or given["running_mean"] is None:
        trace.fail("batch normalisation with the batch's own statistics")
    norm = BatchNorm(
        mean=given["running_mean"].detach(),
        var=given["running_var"].detach(),
        weight=detached(given["weight"]),
        bias=detached(given["bias"]),
        eps=given["eps"],
    )
    rest = {key: value for key, value in given.items() if key != "input"}
    record = known(a)
    call = record.deferred if isinstance(record.deferred, AffineCall) else None
    # Outputs of a linear layer with more than two dimensions aren't normalised one by one: nothing to merge.
    if (
        call is None
        or call.norm is not None
        or isinstance(call.map, Product)
        or (call.map.kind == "linear" and a.dim() > 2)
    ):
        a = trace.current(a)
        shift = norm.shift(a) if trace.composite.zero_bias else None
        return divided_by_contribution(trace, func, (a,), rest, shift)
    merged = replace(call, norm=norm)
    slot = Slot(taps=list(record.slot.taps))
    if record.waiting:
        return placeholder(trace, a, tuple(a.shape), deferred=merged, after_affine=True, slot=slot)
    return merged.compute(trace, slot, z=func(a, **rest))


@handles("relu", lazy=True)
def relu(trace: Trace, func: Call, args: Any, kwargs: Any) -> Tensor:
    """Handle the ReLU: with the operation before it, if that waits; else as any activation."""
    a = args[0] if args else kwargs["input"]
    inplace = bool(kwargs.get("inplace", args[1] if len(args) > 1 else False))
    record = known(a)
    if record.waiting and record.deferred is not None:
        z = record.deferred.compute(trace, Slot(taps=list(record.slot.taps)), rectify=True)
    else:
        z = elementwise(trace, torch.relu, (trace.current(a),), {})
    if inplace:
        trace.replace(a, z)
    return z
