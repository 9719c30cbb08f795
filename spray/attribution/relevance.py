"""Layer-wise relevance propagation as an attribution method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch
from torch import Tensor, nn

from spray.attribution.registry import ATTRIBUTIONS
from spray.attribution.target import Target, check_logits, class_indices, several
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
        index = class_indices(logits, target)
        masks = torch.zeros_like(logits).expand(index.shape[1], -1, -1).scatter(2, index.T[..., None], 1)
        return masks if init == "one" else masks * logits.detach()

    R = propagate(model, x, build_composite(composite, model, **options), initial)
    return R.transpose(0, 1) if several(target) else R[0]
