"""Attribution of a model's decision to its input: `explain` and the registry of its methods."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from spray.errors import UserError
from spray.lrp import Rule, build_composite, propagate
from spray.registry import Registry

Target = int | Tensor | None


# An attribution method takes the model, its input, the target and options of its own.
Attribution = Callable[..., Tensor]

ATTRIBUTIONS: Registry[Attribution] = Registry("attribution method")


def explain(
    model: nn.Module,
    x: Tensor,
    target: Target = None,
    method: str = "lrp",
    composite: str | Mapping[str, Rule | str] = "epsilon_plus_flat",
    **options: Any,
) -> Tensor:
    """Attribute a model's output for a class to the input.

    The model is left as it was: weights, hooks, gradients, mode, and the state of the random generators.

    Parameters
    ----------
    model : nn.Module
        An unmodified classifier in evaluation mode that maps `x` to logits of shape (N, classes).
    x : Tensor, shape (N, ...), floating point
        The input, normalised as the model expects it.
    target : int, Tensor of int, shape (N,), or None
        The class to explain, one for all samples or one for each; None is the predicted class.
    method : str
        A name in `ATTRIBUTIONS`: "lrp" (layer-wise relevance propagation), "gradient" (of the target's
        logit), "gradient_x_input".
    composite : str or mapping
        For LRP: a name in `spray.lrp.COMPOSITES`, or a mapping from kinds of layers ("first", "convolution",
        "linear") and module names or globs to rules (see `spray.lrp.rules`) or their names. Other methods
        take no notice of it.
    **options
        For LRP: `init`, "logit" (default; the relevance starts with the target's logit) or "one", and the
        options of the composite: `epsilon`, `gamma`, and `low` and `high`, the bounds of the normalised input
        (numbers, one per channel, or tensors that broadcast).

    Returns
    -------
    Tensor
        The attribution: shape, dtype and device of `x`, detached.

    Raises
    ------
    UserError
        For arguments that aren't allowed, a model in training mode, an operation in the model that LRP has no
        rule for, or values that aren't finite.
    """
    attribute = ATTRIBUTIONS.get(method)
    check_arguments(model, x)
    if method == "lrp":
        options = {"composite": composite, **options}
    else:
        refuse_options(options, attribute, method)
    devices = [x.device] if x.device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),
        torch.inference_mode(False),
        torch.autocast(x.device.type, enabled=False),
    ):
        sample = x.detach().clone() if x.is_inference() else x.detach()
        R = attribute(model, sample, target, **options).detach()
    check_finite(R, "the attribution")
    return R


@ATTRIBUTIONS.register("lrp")
def lrp(
    model: nn.Module,
    x: Tensor,
    target: Target,
    *,
    composite: str | Mapping[str, Rule | str] = "epsilon_plus_flat",
    init: str = "logit",
    **options: Any,
) -> Tensor:
    """Propagate relevance layer by layer (Bach et al. 2015; Montavon et al. 2019)."""
    if init not in ("logit", "one"):
        raise UserError(f"unknown init {init!r}; allowed: logit, one")

    def initial(output: Any) -> Tensor:
        logits = check_logits(output, x)
        mask = one_hot(logits, target)
        return mask if init == "one" else mask * logits.detach()

    return propagate(model, x, build_composite(composite, model, **options), initial)


@ATTRIBUTIONS.register("gradient")
def gradient(model: nn.Module, x: Tensor, target: Target) -> Tensor:
    """Return the gradient of the target's logit with respect to the input (Simonyan et al. 2014)."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        logits = check_logits(model(leaf.clone()), x)  # a clone, since the model may change its input in place
        mask = one_hot(logits, target)
        result = torch.autograd.grad(logits, leaf, mask, allow_unused=True)[0] if logits.requires_grad else None
    if result is None:
        raise UserError("the model's output has no gradient with respect to its input")
    return result


@ATTRIBUTIONS.register("gradient_x_input")
def gradient_x_input(model: nn.Module, x: Tensor, target: Target) -> Tensor:
    """Return the gradient times the input (Shrikumar et al. 2016)."""
    return gradient(model, x, target) * x


def check_arguments(model: nn.Module, x: Tensor) -> None:
    """Raise a UserError unless `model` is a module in evaluation mode and `x` a batch of floats."""
    if not isinstance(model, nn.Module):
        raise UserError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    training = [name for name, module in model.named_modules() if module.training]
    if training:
        where = f"module {training[0]!r}" if training[0] else "the model"
        raise UserError(f"{where} is in training mode; call model.eval() before explain")
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2:
        got = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise UserError(f"x must be a floating-point tensor of shape (N, ...), not {got}")


def refuse_options(options: Mapping[str, Any], attribute: Attribution, method: str) -> None:
    """Raise a UserError if there are options that a method doesn't take."""
    parameters = inspect.signature(attribute).parameters.values()
    allowed = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        raise UserError(
            f"method {method!r} takes no option {', '.join(unknown)}; allowed: {', '.join(allowed) or 'none'}"
        )


def check_logits(output: Any, x: Tensor) -> Tensor:
    """Return a model's output, or raise a UserError unless it is finite and of shape (N, classes)."""
    if not isinstance(output, Tensor) or output.dim() != 2 or output.shape[0] != x.shape[0]:
        got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
        raise UserError(f"the model must return logits of shape (N, classes) with N = {x.shape[0]}, not {got}")
    check_finite(output, "the model's output")
    return output


def check_finite(values: Tensor, what: str) -> None:
    """Raise a UserError that names the first samples with values that are infinite or not a number."""
    bad = (~torch.isfinite(values)).flatten(1).any(1).nonzero().flatten().tolist()
    if bad:
        more = ", ..." if len(bad) > 5 else ""
        raise UserError(
            f"{what} is not finite for samples [{', '.join(map(str, bad[:5]))}{more}]; check their values "
            "and the model's weights"
        )


def one_hot(logits: Tensor, target: Target) -> Tensor:
    """Return the mask (N, classes) of the targets, 1 at each sample's."""
    n, classes = logits.shape
    if target is None:
        index = logits.detach().argmax(1)
    elif isinstance(target, Tensor) and target.dim() > 0:
        if target.shape != (n,) or target.is_floating_point() or target.dtype == torch.bool:
            raise UserError(
                f"target must be an int, None or a tensor of {n} ints, not {target.dtype} of shape "
                f"{tuple(target.shape)}"
            )
        index = target.to(logits.device, torch.int64)
    else:
        try:
            index = torch.full((n,), target.__index__(), device=logits.device)
        except (AttributeError, TypeError):
            raise UserError(f"target must be an int, None or a tensor of {n} ints, not {target!r}") from None
    if n and not 0 <= int(index.min()) <= int(index.max()) < classes:
        raise UserError(
            f"target {int(index.min())} to {int(index.max())} is out of range: the model has classes 0 to {classes - 1}"
        )
    return torch.zeros_like(logits, requires_grad=False).scatter(1, index[:, None], 1)
