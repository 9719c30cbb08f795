"""What LRP does for each torch function: the table from function names to handlers.

- Affine layers (convolutions, linear): the composite's rule. Batch normalisation right after one is merged
  into it; elsewhere it is the affine layer that it is, under the norm rule.
- Data movement and maxima: relevance goes where the values came from (plain autograd).
- Sums, means and averages: relevance is divided by contribution (the norm rule).
- Elementwise activations: relevance passes.
- Products: relevance goes to the signal, none to the gate. The gate is the operand that carries no relevance
  (constants, parameters); of two that do, the one that comes from a sigmoid or hard sigmoid, else the one
  that comes from another bounded activation.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from spray.lrp.functions import Affine, Normalize, Pass, Weigh
from spray.lrp.layers import BatchNorm, Convolution, FullyConnected, Layer, LinearMap
from spray.lrp.trace import AffineCall, Handler, Record, Trace, record_of

Call = Callable[..., Any]

HANDLERS: dict[str, Handler] = {}


def handles(names: str) -> Callable[[Handler], Handler]:
    """Return a decorator that registers a handler for torch functions, named in one string."""

    def add(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names.split(), handler))
        return handler

    return add


def carriers(*trees: Any) -> list[Tensor]:
    """Return the tensors among arguments that carry relevance."""
    return [leaf for leaf in tree_leaves(trees) if isinstance(leaf, Tensor) and record_of(leaf)]


def known(t: Tensor) -> Record:
    """Return the record of a tensor that has one."""
    record = record_of(t)
    assert record is not None
    return record


def detached(t: Tensor | None) -> Tensor | None:
    """Return an optional tensor without its graph."""
    return None if t is None else t.detach()


# Affine layers


def affine(
    trace: Trace,
    a: Tensor,
    map: LinearMap,
    weight: Tensor,
    bias: Tensor | None,
    compute: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return ``compute(a)``, an affine layer, under the composite's rule."""
    if not record_of(a) or any(t is not None and record_of(t) for t in (weight, bias)):
        trace.fail(f"a {map.kind} layer whose weight or bias depends on the input")
    record, name = known(a), trace.layer_name(weight)
    layer = partial(Layer, map, weight.detach(), detached(bias), a.shape, record.nonnegative)
    call = AffineCall(a, map, layer, name, first=not record.after_affine)
    return apply_rule(trace, call, compute)


def apply_rule(trace: Trace, call: AffineCall, compute: Callable[[Tensor], Tensor]) -> Tensor:
    """Return ``compute(input)`` of an affine layer under the composite's rule, marked as its output."""
    rule = trace.composite.rule(call.map.kind, call.name, call.first)
    rule.check(call.input, call.name)
    z = Affine.apply(call.input, compute, call.layer, rule)
    return trace.mark(z, after_affine=True, affine=call)


@handles("linear")
def linear(trace: Trace, func: Call, args: Any, kwargs: Any) -> Tensor:
    """Handle `torch.nn.functional.linear`."""

    def unpack(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        return input, weight, bias

    a, weight, bias = unpack(*args, **kwargs)
    return affine(trace, a, FullyConnected(), weight, bias, lambda t: func(t, weight, bias))


@handles("matmul mm __matmul__")
def matrix_product(trace: Trace, func: Call, args: Any, kwargs: Any) -> Tensor:
    """Handle the product of a tensor with a constant matrix, which is a linear layer."""
    a, weight = (*args, *kwargs.values())[:2]
    if not record_of(a) or record_of(weight) or weight.dim() != 2:
        trace.fail("a matrix product other than with a constant matrix on the right")
    return affine(trace, a, FullyConnected(), weight.mT, None, lambda t: func(t, weight))


@handles("conv1d conv2d conv3d")
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
    batched(trace, a, dims)
    dilation = per_dimension(dilation, dims)
    trailing: tuple[int, ...] = ()
    if padding == "same":
        padding, trailing = same_padding(weight, dilation)
    elif padding == "valid":
        padding = 0
    map = Convolution(per_dimension(stride, dims), per_dimension(padding, dims), dilation, groups, trailing=trailing)
    return affine(trace, a, map, weight, bias, rest_of(func, args, kwargs))


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
    return affine(trace, a, map, weight, bias, rest_of(func, args, kwargs))


def rest_of(func: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """Return `func` as a function of its first argument, `input`, alone."""
    rest = {key: value for key, value in kwargs.items() if key != "input"}
    return lambda a: func(a, *args[1:], **rest)


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


@handles("batch_norm")
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
    call = known(a).affine
    # Outputs of a linear layer with more than two dimensions aren't normalised one by one: nothing to merge.
    if call is None or (call.map.kind == "linear" and a.dim() > 2):
        return by_contribution(trace, func, (a,), rest)
    before, y = call.layer, a.detach()
    merged = replace(call, layer=lambda: norm.merge(before()))
    return apply_rule(trace, merged, lambda _: func(y, **rest))


# Parameter-free operations

SAME_SIGN = "mean sum avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d"


@handles(f"add sub subtract __rsub__ rsub interpolate upsample {SAME_SIGN}")
def by_contribution(trace: Trace, func: Call, args: Any, kwargs: Any) -> Tensor:
    """Handle a sum of its inputs: R_j = Σ_k a_j c_jk / z_k R_k (the norm rule)."""
    parents = carriers(args, kwargs)
    args, kwargs = tree_map_only(Tensor, lambda t: Weigh.apply(t) if record_of(t) else t.detach(), (args, kwargs))
    z = Normalize.apply(func(*args, **kwargs), trace.composite.stabilizer)
    same_sign = func.__name__ in SAME_SIGN.split() or (func.__name__ == "add" and len(parents) == 2)
    return trace.mark(
        z,
        parents,
        nonnegative=same_sign and all(known(p).nonnegative for p in parents),
        gate=min(known(p).gate for p in parents),
    )


SHAPES = (
    "reshape view flatten unflatten ravel permute transpose t T mT swapaxes swapdims movedim moveaxis "
    "squeeze unsqueeze expand expand_as view_as reshape_as broadcast_to pixel_shuffle pixel_unshuffle "
    "channel_shuffle native_channel_shuffle roll flip rot90"
)
PARTS = (
    "chunk split split_with_sizes tensor_split unbind narrow select index_select gather __getitem__ cat "
    "concat concatenate stack hstack vstack tile repeat repeat_interleave pad unfold"
)
COPIES = "contiguous clone alias to type float double half bfloat16 cpu cuda"
MAXIMA = (
    "max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices "
    "max_pool3d_with_indices adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d "
    "adaptive_max_pool1d_with_indices adaptive_max_pool2d_with_indices "
    "adaptive_max_pool3d_with_indices max amax maximum"
)


@handles(f"{SHAPES} {PARTS} {COPIES} {MAXIMA}")
def move(trace: Trace, func: Call, args: Any, kwargs: Any) -> Any:
    """Handle an operation whose outputs are inputs, elsewhere: relevance goes back where each came from."""
    parents = carriers(args, kwargs)
    result = func(*args, **kwargs)
    constants = any(
        isinstance(leaf, Tensor) and leaf.is_floating_point() and not record_of(leaf)
        for leaf in tree_leaves((args, kwargs))
    )
    nonnegative = all(known(p).nonnegative for p in parents) and not constants
    if func.__name__ == "pad":
        nonnegative &= all(value is None or value >= 0 for value in [*args[3:4], kwargs.get("value")])
    for leaf in tree_leaves(result):
        if isinstance(leaf, Tensor) and leaf.requires_grad and not record_of(leaf):
            trace.mark(leaf, parents, nonnegative=nonnegative, gate=min(known(p).gate for p in parents))
    return result


# Elementwise operations

SIGMOIDS = "sigmoid hardsigmoid"
BOUNDED = "tanh hardtanh relu6 softsign"
NONNEGATIVE = f"{SIGMOIDS} relu relu6 softplus abs"
ACTIVATIONS = (
    f"{SIGMOIDS} {BOUNDED} {NONNEGATIVE} leaky_relu rrelu prelu elu selu celu gelu silu mish hardswish "
    "logsigmoid log_sigmoid threshold _threshold clamp clip clamp_min hardshrink softshrink tanhshrink "
    "neg negative positive"
)


@handles(ACTIVATIONS)
def activation(trace: Trace, func: Call, args: Any, kwargs: Any) -> Tensor:
    """Handle an elementwise function of one tensor: relevance passes."""
    args, kwargs, in_place = without_inplace(func, args, kwargs)
    a = args[0] if args else kwargs.pop("input")
    if len(carriers(args, kwargs)) > 1:
        trace.fail(f"{func.__name__} with parameters that depend on the input")
    rest = args[1:]
    name = func.__name__
    z = trace.mark(
        Pass.apply(a, lambda t: func(t, *rest, **kwargs)),
        [a],
        nonnegative=name in NONNEGATIVE.split()
        or (name == "hardtanh" and (rest or [kwargs.get("min_val", -1)])[0] >= 0),
        gate=2 if name in SIGMOIDS.split() else int(name in BOUNDED.split()),
    )
    if in_place:
        trace.replace(a, z)
    return z


@handles("dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout")
def dropout(trace: Trace, func: Call, args: Any, kwargs: Any) -> Tensor:
    """Handle dropout, which does nothing in evaluation mode."""
    names = ("input", "p", "training")
    given = dict(zip(names, args, strict=False)) | kwargs
    if given.get("training", given.get("train", True)):
        trace.fail("active dropout")
    return given["input"]


@handles("mul multiply __rmul__")
def product(trace: Trace, func: Call, args: Any, kwargs: Any) -> Tensor:
    """Handle a product of a signal, which gets the relevance, with a gate."""
    a, b = (*args, *kwargs.values())[:2]
    gates = [known(t).gate if isinstance(t, Tensor) and record_of(t) else 3 for t in (a, b)]
    if gates[0] == gates[1]:
        trace.fail("a product of two tensors that depend on the input, neither a gate (a sigmoid's output)")
    signal, gate = (a, b) if gates[0] < gates[1] else (b, a)
    return scaled(trace, torch.mul, signal, gate)


@handles("div divide true_divide")
def quotient(trace: Trace, func: Call, args: Any, kwargs: Any) -> Tensor:
    """Handle a division by a constant."""
    signal, divisor = (*args, *kwargs.values())[:2]
    if kwargs.get("rounding_mode") is not None or len(carriers(divisor)) > 0:
        trace.fail("a division by a tensor that depends on the input")
    return scaled(trace, torch.div, signal, divisor)


def scaled(trace: Trace, func: Call, signal: Tensor, gate: Any) -> Tensor:
    """Return ``func(signal, gate)``, whose relevance goes to the signal."""
    record = known(signal)
    gate_nonnegative = gate >= 0 if not isinstance(gate, Tensor) else bool(record_of(gate) and known(gate).nonnegative)
    constant = gate.detach() if isinstance(gate, Tensor) else gate
    if isinstance(gate, Tensor) and torch.broadcast_shapes(signal.shape, gate.shape) != signal.shape:
        z = Normalize.apply(func(Weigh.apply(signal), constant), trace.composite.stabilizer)
    else:
        z = Pass.apply(signal, lambda t: func(t, constant))
    return trace.mark(z, [signal], nonnegative=record.nonnegative and gate_nonnegative, gate=record.gate)


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
