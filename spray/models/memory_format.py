"""Channels last: an order of values in memory in which CPUs convolve and pool small networks twice as fast."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

EQUAL = 1e-3
"""Most that logits may differ, as a share of the largest: other orders of summation round differently."""


def channels_last(model: nn.Module, x: Tensor) -> nn.Module:
    """Return a copy of a model in the order of memory that suits CPUs, or in its own where it can't compute in that.

    A model that calls `view` on activations, say, raises an error there.

    Parameters
    ----------
    model : nn.Module
        In eval mode.
    x : Tensor
        (n, ...): normalised images to try it on, on the model's device; on a GPU nothing is changed.

    Returns
    -------
    nn.Module
    """
    found = copy.deepcopy(model)
    if x.device.type != "cpu":
        return found
    with torch.inference_mode():
        expected = model(x)
        try:
            found = found.to(memory_format=torch.channels_last)
            logits = found(x)
        except RuntimeError:
            return copy.deepcopy(model)
    same = (logits - expected).abs().max() <= EQUAL * expected.abs().max()
    return found if bool(same) else copy.deepcopy(model)
