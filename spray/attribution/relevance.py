"""Layer-wise relevance propagation as an attribution method."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from spray.attribution.options import dtype_named
from spray.attribution.registry import ATTRIBUTIONS
from spray.attribution.target import Target, check_logits, class_indices, several
from spray.errors import UserError
from spray.lrp import Concept, Rule, build_composite, propagate_to

Relevance = Tensor | dict[str, Tensor]


@ATTRIBUTIONS.register("lrp")
def lrp(
    model: nn.Module,
    x: Tensor,
    target: Target,
    *,
    composite: str | Mapping[str, Rule | str | Mapping[str, Any]] = "epsilon_plus_flat",
    init: str = "logit",
    contrast: bool = False,
    layer: str | Sequence[str] | None = None,
    start: tuple[str, Concept] | None = None,
    condition: Mapping[str, Concept] | None = None,
    relevance_dtype: torch.dtype | str | None = None,
    fallback: str = "error",
    sum_positions: bool = False,
    on_logits: Callable[[Tensor], Any] | None = None,
    **options: Any,
) -> Relevance:
    """Propagate relevance layer by layer (Bach et al. 2015; Montavon et al. 2019).

    Parameters
    ----------
    model, x, target
        As in `explain`.
    composite : str or mapping
        Which rule each layer gets.
    init : {"logit", "one"}
        Relevance starts with the target's logit, or with 1.
    contrast : bool
        Relevance starts with the target's logit and minus the mean of the others'.
    layer : str or sequence of str, optional
        The inner layer, or several, whose relevance is returned instead of the input's (see
        `spray.lrp.concepts`). Of several a mapping is returned; "" is the input.
    start : tuple of str and Concept, optional
        The inner layer and the channels, direction or mask there that is explained instead of a class. The
        forward pass ends there, at the first call of a module that runs several times unless another is named.
    condition : mapping of str to Concept, optional
        Inner layers with the channels, direction or mask through which alone relevance passes there.
    relevance_dtype : torch.dtype or str, optional
        "bfloat16" propagates relevance in half the memory and, where the processor has it, time; the forward pass
        stays as it is.
    fallback : {"error", "gradient"}
        What happens at an operation that has no rule.
    sum_positions : bool
        Relevance at inner layers is summed over positions: (N, channels).
    on_logits : callable, optional
        Is given the logits of `x` that are explained.
    **options
        Those of the composite.
    """
    check_choice("init", init, ("logit", "one"))
    check_choice("fallback", fallback, ("error", "gradient"))
    if start is not None and (target is not None or contrast):
        raise UserError("start= explains an inner layer: leave target and contrast out")
    check_concepts(layer, start, condition)
    model = getattr(model, "_orig_mod", model)  # what torch.compile made can't be traced

    def initial(output: Any) -> Tensor:
        logits = check_logits(output, x)
        if on_logits is not None:
            on_logits(logits.detach())
        index = class_indices(logits, target)
        weights = torch.zeros_like(logits).expand(index.shape[1], -1, -1).scatter(2, index.T[..., None], 1)
        if contrast:
            weights = torch.where(weights == 1, weights, -1 / max(1, logits.shape[1] - 1))
        return weights if init == "one" else weights * logits.detach()

    layers = [] if layer is None else [layer] if isinstance(layer, str) else list(layer)
    allowed, why = ("float32", "float64", "bfloat16"), " (float16 has too small a range)"
    dtype = dtype_named("relevance_dtype", relevance_dtype, allowed, why)
    with uncompiled(model):
        results = propagate_to(
            model,
            x,
            build_composite(composite, model, **options),
            initial,
            layers=[name for name in layers if name],
            start=start,
            conditions=condition,
            relevance_dtype=dtype,
            fallback=fallback,
            sum_positions=sum_positions,
        )
    one = start is not None or not several(target)
    results = {name: R if start else R[0] if one else R.transpose(0, 1) for name, R in results.items()}
    if layer is None or isinstance(layer, str):
        return results[layer or ""]
    return {name: own(results[name], [results[other] for other in layers[:k]]) for k, name in enumerate(layers)}


def own(R: Tensor, others: Sequence[Tensor]) -> Tensor:
    """Return relevance in memory of its own: it may have passed from one of the other layers unchanged."""
    shared = any(R.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() for other in others)
    return R.clone() if shared else R


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Run the parts of a model that `torch.compile` has compiled as they were written: only so they can be traced."""
    compiled = any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules())
    if not compiled:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def check_concepts(layer: Any, start: Any, condition: Any) -> None:
    """Raise a UserError unless what is asked of inner layers has the right form."""
    if isinstance(layer, Sequence) and not isinstance(layer, str) and not layer:
        raise UserError('layer= names no layer; give at least one ("" is the input)')
    if layer is not None and (not isinstance(layer, Sequence) or any(not isinstance(name, str) for name in layer)):
        raise UserError(f"layer= must be the name of a layer or a list of names, not {layer!r}")
    if start is not None and not (isinstance(start, Sequence) and len(start) == 2 and isinstance(start[0], str)):
        raise UserError(f"start= must be a layer's name and a concept there, as ('features.3', 7), not {start!r}")
    if condition is not None and not isinstance(condition, Mapping):
        raise UserError(f"condition= must map layers' names to concepts, as {{'features.3': 7}}, not {condition!r}")


def check_choice(option: str, value: Any, allowed: Sequence[str]) -> None:
    """Raise a UserError unless an option has one of the values that are allowed."""
    if value not in allowed:
        raise UserError(f"unknown {option} {value!r}; allowed: {', '.join(allowed)}")
