"""The entry to every attribution method: `explain`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from spray.attribution.options import dtype_named
from spray.attribution.registry import ATTRIBUTIONS, Attribution
from spray.attribution.target import Contrast, Target, check_finite, columns, several
from spray.errors import UserError
from spray.lrp import Rule


def explain(
    model: nn.Module,
    x: Tensor,
    target: Target = None,
    method: str = "lrp",
    composite: str | Mapping[str, Rule | str | Mapping[str, Any]] = "epsilon_plus_flat",
    **options: Any,
) -> Any:
    """Attribute a model's output for a class to the input.

    The model is left as it was: weights, hooks, gradients, mode, and the state of the random generators.

    Parameters
    ----------
    model : nn.Module
        An unmodified classifier in evaluation mode that maps `x` to logits of shape (N, classes).
    x : Tensor, shape (N, ...), floating point
        The input, normalised as the model expects it. LRP takes the numbers of tokens as well.
    target : int, Tensor of int, list of int, or None
        The class to explain: one for all samples, one for each (a tensor (N,)), several for all (a list of T)
        or several for each (a tensor (N, T)). None is the predicted class.
    method : str
        A name in `ATTRIBUTIONS`: "lrp" (layer-wise relevance propagation), "gradient", "gradient_x_input",
        "smooth_grad", "integrated_gradients", "grad_cam", "occlusion", "lime" or "shap".
    composite : str or mapping
        For LRP: a name in `spray.lrp.COMPOSITES`, or a mapping from kinds of layers and module names or globs to
        rules (see `spray.lrp.composites.build_composite`). Other methods take no notice of it.
    **options
        For all methods:

        - `contrast` (bool): explain the target's logit minus the mean of the other classes' logits;
        - `autocast` (torch.dtype): run the forward pass under autocast to this dtype.

        For LRP (see `spray.attribution.relevance.lrp`): `init`, `layer`, `start`, `condition`,
        `relevance_dtype`, `fallback`, `sum_positions`, and the options of the composite: `epsilon`, `gamma`,
        `zero_bias`, `addition`, `normalization`, and `low` and `high`, the bounds of the normalised input
        (numbers, one per channel, or tensors that broadcast).

        Of the other methods:

        - smooth_grad: `n_samples`, `sigma` (share of a sample's range), `seed`, `batch_size`;
        - integrated_gradients: `baseline`, `n_steps`, `batch_size`;
        - grad_cam: `layer` (a module's name), `relu`;
        - occlusion: `window`, `stride`, `baseline`, `batch_size`;
        - lime: `segments` (number of superpixels, or a mask), `n_samples`, `kernel_width`, `baseline`, `seed`,
          `batch_size`;
        - shap: `segments`, `n_samples`, `baseline`, `seed`, `batch_size`.

        A `baseline` is a number, one per channel or a tensor that broadcasts; `batch_size` (64) the most inputs
        that a method puts through the model at once.

    Returns
    -------
    Tensor
        The attribution: shape, dtype and device of `x`, detached; for several targets (N, T, ...). With a
        ``layer=`` of LRP, relevance of the shape of that layer's output; of several layers a dict.

    Raises
    ------
    UserError
        For arguments that aren't allowed, a model in training mode, an operation in the model that LRP has no
        rule for, or values that aren't finite.
    """
    return _explain(model, x, target, method, composite, options, None)


def explain_with_logits(
    model: nn.Module,
    x: Tensor,
    target: Target = None,
    method: str = "lrp",
    composite: str | Mapping[str, Rule | str | Mapping[str, Any]] = "epsilon_plus_flat",
    **options: Any,
) -> tuple[Any, Tensor]:
    """Attribute as `explain` does, and return the model's logits (N, classes) as well.

    Where the method's own forward pass is that of `x`, the logits are those that were explained: no second pass
    is made.
    """
    seen: list[Tensor] = []
    takes = "on_logits" in inspect.signature(ATTRIBUTIONS.get(method)).parameters
    contrast = method != "lrp" and options.get("contrast", False)
    if takes and not contrast and not (several(target) and method != "lrp"):
        R = _explain(model, x, target, method, composite, options, seen.append)
        return R, seen[0]
    R = _explain(model, x, target, method, composite, options, None)
    with torch.inference_mode():
        return R, model(x)


def _explain(
    model: nn.Module,
    x: Tensor,
    target: Target,
    method: str,
    composite: Any,
    options: dict[str, Any],
    on_logits: Callable[[Tensor], Any] | None,
) -> Any:
    attribute = ATTRIBUTIONS.get(method)
    check_arguments(model, x, integers=method == "lrp")
    options = dict(options)
    autocast = dtype_named("autocast", options.pop("autocast", None), ("bfloat16", "float16"))
    if method == "lrp":
        options = {"composite": composite, **options}
    else:
        if options.pop("contrast", False):
            model = Contrast(model)
        refuse_options(options, attribute, method)
    if on_logits is not None:
        options["on_logits"] = on_logits
    devices = [x.device] if x.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices, enabled=method != "lrp"),  # which undoes the model's draws itself
        torch.inference_mode(False),
        torch.autocast(x.device.type, autocast, enabled=autocast is not None),
    ):
        sample = x.detach().clone() if x.is_inference() else x.detach()
        if several(target) and method != "lrp":
            R: Any = torch.stack([attribute(model, sample, one, **options) for one in columns(target)], 1)
        else:
            R = attribute(model, sample, target, **options)
    for name, relevance in R.items() if isinstance(R, dict) else [("", R)]:
        check_finite(relevance, f"the attribution at {name!r}" if name else "the attribution")
    return R


def check_arguments(model: nn.Module, x: Tensor, integers: bool = False) -> None:
    """Raise a UserError unless `model` is in evaluation mode and `x` a batch of floats (or `integers`: of tokens)."""
    if not isinstance(model, nn.Module):
        raise UserError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    training = [name for name, module in model.named_modules() if module.training]
    if training:
        where = f"module {training[0]!r}" if training[0] else "the model"
        raise UserError(f"{where} is in training mode; call model.eval() before explain")
    embeds = integers and any(isinstance(module, nn.Embedding | nn.EmbeddingBag) for module in model.modules())
    tokens = embeds and isinstance(x, Tensor) and x.dtype in (torch.int32, torch.int64)
    if not isinstance(x, Tensor) or not (x.is_floating_point() or tokens) or x.dim() < 2:
        got = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise UserError(f"x must be a floating-point tensor of shape (N, ...), not {got}")


def refuse_options(options: Mapping[str, Any], attribute: Attribution, method: str) -> None:
    """Raise a UserError if there are options that a method doesn't take."""
    parameters = inspect.signature(attribute).parameters.values()
    allowed = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and not p.name.startswith("on_")]
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        raise UserError(
            f"method {method!r} takes no option {', '.join(unknown)}; allowed: {', '.join(allowed) or 'none'}"
        )
