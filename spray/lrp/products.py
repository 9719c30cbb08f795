"""Products, quotients and statistics.

- Products: relevance goes to the signal, none to the gate. The gate is the operand that carries no relevance
  (constants, parameters); of two that do, the one that comes from a sigmoid, hard sigmoid or a statistic
  (a norm, a variance), else the one that comes from another bounded activation; of two alike, each gets
  half (Achtibat et al. 2024, eq. 15), and so do the weights of a softmax and what they weigh, as in a
  product of matrices.
- Whole powers are products of equal signals: among these the relevance is divided, so that it passes.
- Other statistics (roots, exponentials, variances) can only be gates: relevance that would have to flow through
  one is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from spray.lrp.handlers import Call, handles, operands, sum_to
from spray.lrp.operations import passes
from spray.lrp.tape import Node
from spray.lrp.trace import Trace, carriers, known, record_of

# The `gate` of the weights that a softmax gives.
WEIGHTS = -1


@handles("mul multiply __mul__ __rmul__")
def product(trace: Trace, func: Call, args: Any, kwargs: Any) -> Tensor:
    """Handle a product of a signal, which gets the relevance, with a gate; two signals get half each."""
    a, b = operands(args, kwargs)
    gates = [known(t).gate if isinstance(t, Tensor) and record_of(t) else 3 for t in (a, b)]
    if gates[0] == gates[1] or (WEIGHTS in gates and max(gates) < 2):
        return product_of_signals(trace, a, b)
    signal, gate = (a, b) if gates[0] < gates[1] else (b, a)
    return scaled(trace, torch.mul, signal, gate)


def product_of_signals(trace: Trace, a: Tensor, b: Tensor) -> Tensor:
    """Return ``a * b``; each gets half of the relevance (Achtibat et al. 2024, eq. 15)."""
    z = trace.mark(
        torch.mul(a.detach(), b.detach()),
        [a, b],
        nonnegative=known(a).nonnegative and known(b).nonnegative,
        gate=max(0, min(known(a).gate, known(b).gate)),
    )
    shapes = a.shape, b.shape

    def back(arrived: Sequence[Tensor | None]) -> Sequence[Tensor]:
        (R,) = arrived
        assert R is not None
        return [sum_to(R / 2, shape) for shape in shapes]

    trace.tape.append(Node((known(a).slot, known(b).slot), (known(z).slot,), back, keeps_zeros=True))
    return z


@handles("div divide true_divide __truediv__ __rdiv__ __rtruediv__")
def quotient(trace: Trace, func: Call, args: Any, kwargs: Any) -> Tensor:
    """Handle a division: the divisor is a gate."""
    signal, divisor = operands(args, kwargs)
    if func.__name__ in ("__rdiv__", "__rtruediv__"):
        signal, divisor = divisor, signal
    if kwargs.get("rounding_mode") is not None or not carriers(signal):
        return statistic(trace, func, args, kwargs)
    return scaled(trace, torch.div, signal, divisor)


def scaled(trace: Trace, func: Call, signal: Tensor, gate: Any) -> Tensor:
    """Return ``func(signal, gate)``, whose relevance goes to the signal."""
    record = known(signal)
    gate_nonnegative = gate >= 0 if not isinstance(gate, Tensor) else bool(record_of(gate) and known(gate).nonnegative)
    constant = gate.detach() if isinstance(gate, Tensor) else gate
    z = trace.mark(
        func(signal.detach(), constant),
        [signal],
        nonnegative=record.nonnegative and gate_nonnegative,
        gate=record.gate,
    )
    if z.shape == signal.shape:
        passes(trace, signal, z, keeps_zeros=True)
    else:
        shape = signal.shape

        def back(arrived: Sequence[Tensor | None]) -> Sequence[Tensor]:
            (R,) = arrived
            assert R is not None
            return [sum_to(R, shape)]

        trace.tape.append(Node((record.slot,), (known(z).slot,), back, keeps_zeros=True))
    return z


@handles("addcmul addcdiv")
def plus_product(trace: Trace, func: Call, args: Any, kwargs: Any) -> Tensor:
    """Handle a product or quotient that is added to something."""
    given = dict(zip(("input", "tensor1", "tensor2"), args, strict=False)) | kwargs
    value = given.get("value", 1)
    with trace:
        combine = torch.mul if func.__name__ == "addcmul" else torch.div
        z = combine(given["tensor1"], given["tensor2"])
        return given["input"] + (z if value == 1 else z * value)


@handles("lerp")
def lerp(trace: Trace, func: Call, args: Any, kwargs: Any) -> Tensor:
    """Handle a weighted mean of two tensors."""
    given = dict(zip(("input", "end", "weight"), args, strict=False)) | kwargs
    weight = given["weight"]
    with trace:
        return given["input"] * (1 - weight) + given["end"] * weight


# Statistics


@handles("pow __pow__ square")
def power(trace: Trace, func: Call, args: Any, kwargs: Any) -> Any:
    """Handle a power: a whole one is a product of n equal signals, each of which gets R / n."""
    a, exponent = (args[0] if args else kwargs["input"], 2) if func.__name__ == "square" else operands(args, kwargs)
    whole = isinstance(exponent, int | float) and exponent >= 1 and float(exponent).is_integer()
    if not whole:
        return statistic(trace, func, args, kwargs)
    nonnegative = known(a).nonnegative or exponent % 2 == 0
    z = trace.mark(func(*args, **kwargs).detach(), [a], nonnegative=nonnegative, gate=known(a).gate)
    passes(trace, a, z, keeps_zeros=True)
    return z


@handles("var_mean std_mean")
def statistic_and_mean(trace: Trace, func: Call, args: Any, kwargs: Any) -> tuple[Tensor, Tensor]:
    """Handle the functions that return a statistic beside the mean."""
    spread = torch.var if func.__name__ == "var_mean" else torch.std
    with trace:
        kept = {key: value for key, value in kwargs.items() if key in ("input", "dim", "keepdim")}
        position = args[:2] if len(args) < 2 or not isinstance(args[1], bool) else args[:1]
        return spread(*args, **kwargs), torch.mean(*position, **kept)


@handles(
    "__rpow__ sqrt rsqrt reciprocal exp exp2 expm1 log log2 log10 log1p var std norm vector_norm "
    "linalg_norm linalg_vector_norm matrix_norm logsumexp prod floor_divide floor ceil round sign "
    "remainder fmod erf sin cos"
)
def statistic(trace: Trace, func: Call, args: Any, kwargs: Any) -> Any:
    """Handle a function that no rule divides relevance for: its results can be gates, but not signals."""
    parents = carriers(args, kwargs)
    if trace.fallback is not None:
        result = trace.fallback(trace, func, args, kwargs)
        known(result).gate = 2
        return result
    result = func(*args, **kwargs)
    what, place = func.__name__, trace.place()

    def back(arrived: Sequence[Tensor | None]) -> Sequence[None]:
        if any(bool(R.any()) for R in arrived if R is not None):
            trace.fail(what, place=place)
        return [None] * len(parents)

    return tree_map_only(Tensor, lambda t: statistic_output(trace, t, parents, back), result)


def statistic_output(trace: Trace, t: Tensor, parents: list[Tensor], back: Callable[..., Any]) -> Tensor:
    """Return a statistic with its record: it is taken for a gate."""
    if not t.is_floating_point():
        return t
    z = trace.mark(t.detach(), parents, gate=2)
    trace.tape.append(Node(tuple(known(p).slot for p in parents), (known(z).slot,), back))
    return z
