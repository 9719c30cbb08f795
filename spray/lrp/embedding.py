"""Models whose input are whole numbers: tokens, categories.

A token's relevance is that of its embedding, summed over its dimensions: an embedding is a linear layer of the
token's one-hot code, which is zero but for one entry. It counts as the affine layer that comes first, so that
rules for the first layer (flat, w², zᴮ), which are for pixels, don't apply to embeddings.

On the way to the embedding the numbers may be moved (views, parts, concatenations) and renumbered (a shift into a
shared table). Comparisons of numbers, such as masks, and what is computed from these are constants. Numbers that are
converted to a floating dtype, or computed with so that the result is floating, are signals like any other. What is
left, as sums and products of several numbers that are numbers again, is an error: relevance would be lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from spray.lrp.handlers import Call, handles, leaf_of, sum_to
from spray.lrp.operations import COPIES, MAXIMA, PARTS, SHAPES
from spray.lrp.tape import Back, Node, vjp
from spray.lrp.trace import METADATA, Trace, carriers, known, name_of, names, record_of

MOVES = names(f"{SHAPES} {PARTS} {MAXIMA}")
CONVERSIONS = names(f"{COPIES} long int short byte char detach data")
# Of these functions of two or more tensors the first is moved; numbers elsewhere are positions.
INDEXED = names("__getitem__ index_select gather take_along_dim take")
# Elementwise functions: of one tensor of numbers and constants they give other numbers for the same tokens.
ELEMENTWISE = names(
    "add __add__ __radd__ sub subtract __sub__ __rsub__ rsub mul multiply __mul__ __rmul__ floor_divide __floordiv__ "
    "remainder __mod__ fmod clamp clip clamp_min clamp_max neg negative __neg__ abs absolute __abs__"
)
# What gives floating results of numbers, and what a signal may meet a number in.
NUMERIC = ELEMENTWISE | names("div divide true_divide __truediv__ __rdiv__ __rtruediv__ pow __pow__ sqrt rsqrt exp log")
NUMERIC |= names("log1p log2 sigmoid tanh sin cos")
# Positions in a tensor, and tensors that share no more than its shape, are no signals.
CONSTANTS = names(
    "argmax argmin argsort nonzero count_nonzero zeros_like ones_like full_like empty_like rand_like "
    "randn_like randint_like new_zeros new_ones new_full new_empty new_tensor"
)


def integers(trace: Trace, func: Call, args: Any, kwargs: Any) -> Any:
    """Handle any function of integer tensors that carry relevance.

    Raises
    ------
    UserError
        If numbers are computed from numbers in a way that relevance can't follow.
    """
    name = name_of(func)
    parents = list({id(t): t for t in carriers(args, kwargs)}.values())
    if name in METADATA:
        return func(*args, **kwargs)
    if name == "__iter__":
        with trace:
            return iter(torch.unbind(args[0]))
    if any(t.is_floating_point() for t in parents):
        if name in NUMERIC:
            return as_signals(trace, func, args, kwargs, next(t.dtype for t in parents if t.is_floating_point()))
        if name in trace.handlers:
            return trace.handlers[name](trace, func, args, kwargs)
    elif name in ("embedding", "embedding_bag", "one_hot"):
        return trace.handlers[name](trace, func, args, kwargs)
    elif name in MOVES or name in INDEXED:
        return move_indices(trace, func, parents, args, kwargs)
    result = func(*args, **kwargs)
    tensors = [t for t in tree_leaves(result) if isinstance(t, Tensor) and t.dtype != torch.bool]
    if not tensors or name in CONSTANTS:
        return result
    if name in CONVERSIONS:
        return copied(trace, args[0] if args else kwargs["input"], result)
    if name in NUMERIC and result.is_floating_point():
        return as_signals(trace, func, args, kwargs, result.dtype)
    if name in ELEMENTWISE and len(parents) == 1:
        shape = parents[0].shape
        return mark(trace, result, parents[0], lambda R: [sum_to(known_relevance(R), shape)])
    trace.fail(f"{name} of the model's integer input", "can't follow")


def known_relevance(arrived: Sequence[Tensor | None]) -> Tensor:
    """Return the relevance of a node's only output."""
    (R,) = arrived
    assert R is not None
    return R


def mark(trace: Trace, z: Tensor, parent: Tensor, back: Back, **known_of_it: Any) -> Tensor:
    """Return `z`, computed from one tensor of numbers, with its record, and append its node."""
    trace.mark(z, [parent], **known_of_it)
    trace.tape.append(Node((known(parent).slot,), (known(z).slot,), back, returns="same"))
    return z


def copied(trace: Trace, ids: Tensor, z: Tensor) -> Tensor:
    """Return numbers in another dtype or memory; relevance passes."""
    if z is ids or record_of(ids) is None:  # only the dtype of numbers was asked for
        return z
    return mark(trace, z, ids, lambda R: R)


def as_signals(trace: Trace, func: Call, args: Any, kwargs: Any, dtype: torch.dtype) -> Any:
    """Return what a function computes of numbers as a signal, under the rules of `func`."""

    def convert(t: Tensor) -> Tensor:
        return t.to(dtype) if record_of(t) and not t.is_floating_point() else t

    with trace:
        args, kwargs = tree_map_only(Tensor, convert, (args, kwargs))
        return func(*args, **kwargs)


def move_indices(trace: Trace, func: Call, parents: list[Tensor], args: Any, kwargs: Any) -> Any:
    """Handle the movement of numbers: relevance goes back where each came from.

    A floating copy of the numbers goes the same way, and its graph back.
    """
    name = name_of(func)
    source = args[0] if args else kwargs.get("input")
    if name in INDEXED:
        if not (isinstance(source, Tensor) and record_of(source)):
            return looked_up(trace, func, args, kwargs)
        parents = [source]
    leaves = {id(t): leaf_of(t.double()) for t in parents}
    with torch.enable_grad():
        given = tree_map_only(Tensor, lambda t: leaves.get(id(t), t), (args, kwargs))
        graph = func(*given[0], **given[1])
    # Maxima of equal numbers may be found elsewhere among floating ones; otherwise views stay views.
    real = graph if name in names(MAXIMA) else func(*args, **kwargs)
    outputs: list[Tensor] = []
    marked: list[Tensor] = []

    def of_pair(moved: Any, t: Any) -> Any:
        if isinstance(moved, list | tuple):
            return type(moved)([of_pair(*pair) for pair in zip(moved, t, strict=True)])
        if not (isinstance(moved, Tensor) and moved.requires_grad):
            return t
        outputs.append(moved)
        t = t.detach().to(parents[0].dtype) if t is moved else t.detach()
        marked.append(trace.mark(t, parents))
        return t

    result = of_pair(graph, real)
    if outputs:
        inputs = [leaves[id(t)] for t in parents]
        slots = tuple(known(t).slot for t in parents), tuple(known(t).slot for t in marked)
        trace.tape.append(Node(*slots, lambda arrived: vjp(outputs, inputs, arrived), returns="shared"))
    return result


def looked_up(trace: Trace, func: Call, args: Any, kwargs: Any) -> Tensor:
    """Handle a look-up of numbers in a constant table: what it finds stands for the number."""
    name = name_of(func)
    found = func(*args, **kwargs)
    if name == "index_select":
        (ids,), simple = carriers(args, kwargs), kwargs.get("dim", args[1] if len(args) > 1 else None) == 0
    elif name == "__getitem__":
        ids, simple = args[1], isinstance(args[1], Tensor)
    else:
        (ids,) = carriers(args, kwargs)
        simple = found.shape == ids.shape
    if not simple:
        trace.fail(f"{name} with several indices that are the model's integer input", "can't follow")
    if found.dtype == torch.bool:
        return found
    return mark(trace, found, ids, lambda R: [summed(R, ids.dim())], after_affine=found.is_floating_point())


def summed(arrived: Sequence[Tensor | None], dims: int) -> Tensor:
    """Return the relevance (T, numbers ..., features ...) of numbers in `dims` dimensions: their features' sum."""
    R = known_relevance(arrived)
    return R.flatten(dims + 1).sum(-1) if R.dim() > dims + 1 else R


@handles("embedding")
def embedding(trace: Trace, func: Call, args: Any, kwargs: Any) -> Tensor:
    """Handle `torch.nn.functional.embedding` (and `torch.embedding`, which takes the weight first)."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    weight, ids = sorted(tensors, key=lambda t: not t.is_floating_point())
    if record_of(weight):
        if record_of(ids):
            trace.fail("an embedding whose weight depends on the input")
        with trace:
            return weight[ids]
    given = own_weight(weight, kwargs)
    z = func(*tree_map_only(Tensor, given, args), **tree_map_only(Tensor, given, kwargs))
    return mark(trace, z, ids, lambda R: [summed(R, ids.dim())], after_affine=True)


def own_weight(weight: Tensor, kwargs: dict[str, Any]) -> Call:
    """Return what replaces the weight by a copy if `max_norm` would change it: the model stays as it is."""
    copy = weight.detach() if kwargs.get("max_norm") is None else weight.detach().clone()
    return lambda t: copy if t is weight else t


@handles("embedding_bag")
def embedding_bag(trace: Trace, func: Call, args: Any, kwargs: Any) -> Tensor:
    """Handle `torch.nn.functional.embedding_bag` for bags of one size: embeddings and their sum or mean."""
    ids, weight = args
    mode, factors, padding = (kwargs.get(key) for key in ("mode", "per_sample_weights", "padding_idx"))
    if not record_of(ids) or record_of(weight) or (factors is not None and record_of(factors)):
        trace.fail("embedding_bag whose weights depend on the input")
    if mode not in ("sum", "mean") or kwargs.get("offsets") is not None:
        trace.fail(f"embedding_bag of mode {mode!r}" if mode == "max" else "embedding_bag with offsets")
    counted = torch.ones_like(ids) if padding is None else (ids != padding % len(weight)).long()
    shares = counted.to(weight.dtype) if factors is None else counted * factors.detach()
    if mode == "mean":
        shares = shares / counted.sum(1, keepdim=True).clamp(min=1)
    options = {key: kwargs[key] for key in ("max_norm", "norm_type") if key in kwargs}
    with trace:
        return (F.embedding(ids, weight, **options) * shares[..., None]).sum(1)


@handles("one_hot")
def one_hot(trace: Trace, func: Call, args: Any, kwargs: Any) -> Tensor:
    """Handle `torch.nn.functional.one_hot`: a token's relevance is that of its code's entries."""
    ids = args[0] if args else kwargs["input"]
    return mark(trace, func(*args, **kwargs), ids, lambda R: [summed(R, ids.dim())], nonnegative=True)
