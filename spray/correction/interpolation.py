"""Back towards the weights before: the stop of methods that train and have no strength that could be weaker."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from spray.correction.base import Problem
from spray.correction.choice import Trial, choose, control, harms, validation

SHARES = (1.0, 0.75, 0.5, 0.25)
"""Shares of the way from the weights before to those after that are tried, the whole way first."""
SHORT = 0.05
"""By how much accuracy under the artifact may be below that without, for nothing stronger to be tried."""


Make = Callable[[Problem, np.ndarray | None], nn.Module]
"""Trains a problem's model on some images, or on all, and returns it."""


def stepped_back(problem: Problem, *makes: tuple[dict[str, Any], Make]) -> nn.Module:
    """Train, and go back towards the weights before as far as clean accuracy asks for it.

    Wortsman et al., "Robust fine-tuning of zero-shot models", 2022 (WiSE-FT): models on the straight line between the
    weights before and after fine-tuning keep more of the one's accuracy and have more of the other's. The share of the
    way is the largest of `SHARES` that costs no clean accuracy on held-back images, which the model that it is chosen
    with is not trained on; it costs one training more, and the control if no other method has asked for it. The rule,
    the reference and what is done if every share costs are those of `spray.correction.choice`.

    Parameters
    ----------
    problem : Problem
        Whose model is trained, and whose facts are filled.
    *makes : tuple of dict and callable
        Ways to train, each with what the facts call it, the weakest first. A stronger one is tried only where the one
        before costs nothing, and leaves the accuracy under the artifact more than `SHORT` below that without.
    """
    split = validation(problem)
    reference = control(problem, split)
    before = copy.deepcopy(problem.model)

    def trials() -> Iterator[Trial]:
        for setting, make in makes:
            trial = make(replace(problem, model=copy.deepcopy(before), facts={}, on_epoch=None), split.rest)
            for share in SHARES:
                measure = split.measure(between(before, trial, share))
                yield Trial(setting | {"share": share}, measure, result=make)
                is_fine = not harms(reference, measure, problem.options.max_loss)
                if is_fine:
                    break
            enough = measure.attacked >= float(measure.right.mean()) - SHORT
            if enough or not is_fine or share < SHARES[0]:
                return

    best = choose(problem, reference, trials(), stop=False)
    if best.allowed and len(makes) == 1:
        problem.facts["why"] = (
            "largest share of the way from the weights before to those after the training that costs no clean "
            "accuracy, of all classes or of one"
        )
    return between(before, best.result(problem, None), best.setting["share"])


def between(before: nn.Module, after: nn.Module, share: float) -> nn.Module:
    """Return a model between two of the same architecture, a share of the straight way from the first to the second.

    Buffers of floats, such as a batch norm's statistics, are on the way too; all else is as in the model after.

    Parameters
    ----------
    before, after : nn.Module
        Left as they are.
    share : float
        From 0 to 1; for 1 it is `after` itself.
    """
    if share == 1:
        return after
    start, end = before.state_dict(), after.state_dict()
    model = copy.deepcopy(after)
    # From values of both models, so that what two names share is not moved twice; an infinity has no way to itself.
    model.load_state_dict(
        {
            key: torch.lerp(start[key], value, share) if _moves(start[key], value) else value
            for key, value in end.items()
        }
    )
    return model


def _moves(start: object, end: object) -> bool:
    if not (isinstance(start, Tensor) and isinstance(end, Tensor)):
        return False
    return (end.is_floating_point() or end.is_complex()) and not torch.equal(start, end)
