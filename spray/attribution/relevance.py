"""Layer-wise relevance propagation as an attribution method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from spray.attribution.registry import ATTRIBUTIONS
from spray.attribution.target import Target, check_logits, class_indices, one_hot
from spray.errors import UserError
from spray.lrp import Rule, build_composite, propagate


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
        mask = one_hot(logits, class_indices(logits, target)[:, 0])
        return mask if init == "one" else mask * logits.detach()

    return propagate(model, x, build_composite(composite, model, **options), initial)
