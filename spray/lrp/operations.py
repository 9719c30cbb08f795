"""Operations without weights that keep each value's meaning: sums, movement and activations.

- Data movement and maxima: relevance goes where the values came from (plain autograd).
- Sums, means and averages: relevance is divided by contribution (the norm rule).
- Elementwise activations: relevance passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from spray.lrp.handlers import Call, handles, leaf_of, placeholder, without_inplace
from spray.lrp.rules import divide, overwrite, weigh
from spray.lrp.tape import Node, Slot, vjp
from spray.lrp.trace import Trace, carriers, known, names, record_of

# Sums

SAME_SIGN = names(
    "mean sum avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d"
)


@dataclass(frozen=True, eq=False)
class Sum:
    """A sum of two tensors of one shape that has not been computed yet: a ReLU may follow."""

    terms: tuple[Tensor, Tensor]
    sources: tuple[Slot, Slot]
    known: dict[str, Any]

    def compute(self, trace: Trace, slot: Slot, rectify: bool = False) -> Tensor:
        """Return the sum, with the negative values cut off if a ReLU follows."""
        z = torch.add(*self.terms)
        if rectify:
            z = z.relu_()
        trace.mark(z, **{**self.known, "slot": slot, "nonnegative": rectify or self.known["nonnegative"]})
        split = trace.composite.addition
        dtype = trace.relevance_dtype or z.dtype
        a, b = (trace.keep(term, trace.relevance_dtype) for term in self.terms)
        out = trace.keep(z, trace.relevance_dtype)
        epsilon = trace.epsilon(z.dtype)

        def back(arrived: Sequence[Tensor | None]) -> Sequence[Tensor]:
            (R,) = arrived
            assert R is not None
            R = R.to(dtype)
            if split == "equal":
                half = R / 2
                return half, half.clone()
            if split == "magnitude":
                s = R / a.abs().add_(b.abs()).add_(epsilon or torch.finfo(dtype).tiny)
                return s * a.abs(), s * b.abs()
            if rectify and epsilon and not slot.loose:
                s = overwrite(R, out + epsilon)
            else:
                s = divide(R, a + b if rectify and slot.loose else out, epsilon)
            return s * a, weigh(s, b)

        trace.tape.append(Node(self.sources, (slot,), back, proportional=split != "equal"))
        return z


@handles("add __add__ __radd__")
def add(trace: Trace, func: Call, args: Any, kwargs: Any) -> Tensor:
    """Handle an addition: the sum of two signals waits for a ReLU."""
    terms = carriers(args)
    same = len(terms) == 2 and terms[0].shape == terms[1].shape and terms[0].dtype == terms[1].dtype
    plain = not set(kwargs) - {"alpha"} and kwargs.get("alpha", 1) == 1
    if not same or not plain or not terms[0].is_floating_point():
        return by_contribution(trace, torch.add, args, kwargs)
    a, b = (known(t) for t in terms)
    facts = {
        "nonnegative": a.nonnegative and b.nonnegative,
        "gate": min(a.gate, b.gate),
        "after_affine": a.after_affine or b.after_affine,
    }
    values = (terms[0].detach(), terms[1].detach())
    return placeholder(trace, terms[0], tuple(terms[0].shape), deferred=Sum(values, (a.slot, b.slot), facts), **facts)


@handles(f"sub subtract __sub__ __rsub__ rsub cumsum fold interpolate upsample {' '.join(SAME_SIGN)}")
def by_contribution(trace: Trace, func: Call, args: Any, kwargs: Any) -> Tensor:
    """Handle a sum of its inputs: R_j = Σ_k a_j c_jk / z_k R_k (the norm rule)."""
    return divided_by_contribution(trace, func, args, kwargs)


def divided_by_contribution(trace: Trace, func: Call, args: Any, kwargs: Any, offset: Tensor | None = None) -> Tensor:
    """Return ``func(*args, **kwargs)``, a sum of its inputs and of an `offset` that gets no relevance."""
    parents = carriers(args, kwargs)
    leaves = {id(t): leaf_of(t) for t in parents}
    with torch.enable_grad():
        args, kwargs = tree_map_only(Tensor, lambda t: leaves.get(id(t), t.detach()), (args, kwargs))
        graph = func(*args, **kwargs)
    if not isinstance(graph, Tensor) or graph.is_complex():
        trace.fail(f"{func.__name__}, which returns complex numbers or several tensors")
    inputs, values, epsilon = list(leaves.values()), graph.detach(), trace.epsilon(graph.dtype)
    sum_of_two = func.__name__ == "add" and len(parents) == 2 and kwargs.get("alpha", 1) >= 0
    same_sign = func.__name__ in SAME_SIGN or sum_of_two
    z = trace.mark(
        values.view_as(values),
        parents,
        nonnegative=same_sign and all(known(p).nonnegative for p in parents),
        gate=min(known(p).gate for p in parents),
    )

    def back(arrived: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
        (R,) = arrived
        assert R is not None
        summed = values if offset is None else values - offset
        products = vjp([graph], inputs, [divide(R.to(values.dtype), summed, epsilon)])
        return [None if g is None else g * a.detach() for g, a in zip(products, inputs, strict=True)]

    slots = {id(t): known(t).slot for t in parents}
    trace.tape.append(Node(tuple(slots.values()), (known(z).slot,), back, proportional=True))
    return z


# Movement

SHAPES = (
    "reshape view flatten unflatten ravel permute transpose t T mT swapaxes swapdims movedim moveaxis "
    "squeeze unsqueeze expand expand_as view_as reshape_as broadcast_to pixel_shuffle pixel_unshuffle "
    "channel_shuffle native_channel_shuffle roll flip rot90 _unsafe_view"
)
PARTS = (
    "chunk split split_with_sizes tensor_split unbind narrow select index_select gather __getitem__ cat "
    "concat concatenate stack hstack vstack dstack tile repeat repeat_interleave pad constant_pad_nd unfold "
    "masked_fill where take_along_dim diagonal tril triu masked_select"
)
COPIES = "contiguous clone alias to type float double half bfloat16 cpu cuda type_as"
MAXIMA = (
    "max_pool1d max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices "
    "max_pool3d_with_indices adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d "
    "adaptive_max_pool1d_with_indices adaptive_max_pool2d_with_indices "
    "adaptive_max_pool3d_with_indices max amax maximum min amin minimum sort msort topk median nanmedian kthvalue "
    "mode cummax cummin aminmax"
)
# Of their second tensor they take the shape or dtype alone.
LIKE = names("view_as reshape_as expand_as type_as to")
# Their whole numbers say where, not what.
POSITIONS = names("gather __getitem__ index_select take_along_dim repeat_interleave")
# The first always, the next if they can, see the memory of their argument.
VIEWS = names("view view_as")
VIEWS_IF_CONTIGUOUS = names("reshape reshape_as flatten unflatten ravel")
KEEP_CONTIGUOUS = VIEWS | VIEWS_IF_CONTIGUOUS | names("squeeze unsqueeze contiguous clone cat stack")


@handles(f"{SHAPES} {PARTS} {COPIES} {MAXIMA}")
def move(trace: Trace, func: Call, args: Any, kwargs: Any) -> Any:
    """Handle an operation whose outputs are inputs, elsewhere: relevance goes back where each came from."""
    name = func.__name__
    moved = (args[:1], kwargs.get("input")) if name in LIKE else (args, kwargs)
    parents = [t for t in carriers(moved) if t.is_floating_point()]  # an index moves nothing
    if not parents:
        return func(*args, **kwargs)
    leaves = {id(t): leaf_of(t) for t in parents}
    contiguous = known(parents[0]).contiguous
    if name == "contiguous" and contiguous and len(args) == 1 and not kwargs:
        return parents[0]
    with torch.enable_grad():
        given, given_kwargs = tree_map_only(Tensor, lambda t: leaves.get(id(t), t), (args, kwargs))
        try:
            graph = func(*given, **given_kwargs)
        except RuntimeError:
            if name != "view" or isinstance(given[1], torch.dtype):
                raise
            graph = torch.reshape(given[0], given[1] if isinstance(given[1], tuple | list) else given[1:])
    nonnegative = all(known(p).nonnegative for p in parents) and not negative_constants(name, args, kwargs)
    facts = {"nonnegative": nonnegative, "gate": min(known(p).gate for p in parents)}
    originals = {id(leaves[id(t)]): t for t in parents}
    outputs: list[Tensor] = []
    marked: list[Tensor] = []

    def mark(t: Tensor) -> Tensor:
        if id(t) in originals:
            return originals[id(t)]
        if not t.requires_grad:
            return t
        outputs.append(t)
        shares = name in VIEWS or (name in VIEWS_IF_CONTIGUOUS and contiguous)
        alike = name in KEEP_CONTIGUOUS or t.is_contiguous()
        marked.append(trace.mark(t.detach(), parents, shares, contiguous=alike, **facts))
        return marked[-1]

    result = tree_map_only(Tensor, mark, graph)
    if outputs:
        inputs = list(leaves.values())
        sources = tuple(known(t).slot for t in {id(t): t for t in parents}.values())
        trace.tape.append(
            Node(
                sources,
                tuple(known(t).slot for t in marked),
                lambda arrived: vjp(outputs, inputs, arrived),
                returns="shared",
                keeps_zeros=True,
            )
        )
    return result


def negative_constants(name: str, args: Any, kwargs: Any) -> bool:
    """Return whether what isn't moved but put in (by `where`, `masked_fill`, ...) may be negative."""
    numbers = tree_leaves((args, kwargs)) if name == "where" else [*args[2:], kwargs.get("value")]
    filled = name in ("pad", "constant_pad_nd", "masked_fill", "where")
    return (filled and any(isinstance(v, int | float) and v < 0 for v in numbers)) or any(
        isinstance(leaf, Tensor)
        and not record_of(leaf)
        and leaf.dtype != torch.bool
        and (leaf.is_floating_point() or name not in POSITIONS)
        for leaf in tree_leaves((args, kwargs))
    )


# Elementwise operations

SIGMOIDS = names("sigmoid hardsigmoid")
BOUNDED = names("tanh hardtanh relu6 softsign")
NONNEGATIVE = SIGMOIDS | names("relu relu6 softplus abs")
ZERO_AT_ZERO = names(
    "tanh hardtanh relu6 softsign relu abs leaky_relu rrelu prelu elu selu celu gelu silu mish hardswish "
    "hardshrink softshrink tanhshrink nan_to_num neg negative positive"
)
OTHERS = "softplus logsigmoid log_sigmoid threshold _threshold clamp clip clamp_min clamp_max"

# A gate stays one when it is negated or cut off.
KEEP_GATES = names("neg negative positive abs clamp clip clamp_min clamp_max")


@handles(f"{' '.join(SIGMOIDS | BOUNDED | ZERO_AT_ZERO)} {OTHERS}")
def elementwise(trace: Trace, func: Call, args: Any, kwargs: Any) -> Tensor:
    """Handle an elementwise function of one tensor: relevance passes."""
    args, kwargs, in_place = without_inplace(func, args, kwargs)
    a = args[0] if args else kwargs.pop("input")
    if len(carriers(args, kwargs)) > 1:
        trace.fail(f"{func.__name__} with parameters that depend on the input")
    name, rest = func.__name__, args[1:]
    bounds = {"min": None, "max": None, **dict(zip(("min", "max"), rest, strict=False)), **kwargs}
    bounded = name in BOUNDED or (name in ("clamp", "clip") and None not in (bounds["min"], bounds["max"]))
    z = trace.mark(
        func(a, *rest, **kwargs),
        [a],
        nonnegative=name in NONNEGATIVE or (name == "hardtanh" and (rest or [kwargs.get("min_val", -1)])[0] >= 0),
        gate=2 if name in SIGMOIDS else max(int(bounded), known(a).gate if name in KEEP_GATES else 0),
    )
    passes(trace, a, z, keeps_zeros=name in ZERO_AT_ZERO)
    if in_place:
        trace.replace(a, z)
    return z


def passes(trace: Trace, a: Tensor, z: Tensor, keeps_zeros: bool) -> None:
    """Let relevance pass from `z` to `a`, of the same shape."""
    trace.tape.append(Node((known(a).slot,), (known(z).slot,), lambda R: R, returns="same", keeps_zeros=keeps_zeros))


@handles("dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout feature_dropout", lazy=True)
def dropout(trace: Trace, func: Call, args: Any, kwargs: Any) -> Tensor:
    """Handle dropout, which does nothing in evaluation mode."""
    names = ("input", "p", "training")
    given = dict(zip(names, args, strict=False)) | kwargs
    if given.get("training", given.get("train", True)) and given.get("p", 0.5) > 0:
        trace.fail("active dropout")
    return given["input"]
