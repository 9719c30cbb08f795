"""Channels last: an order of values in memory in which CPUs convolve and pool small networks twice as fast."""

from __future__ import annotations

import copy
from contextlib import suppress

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
    if x.device.type == "cpu":
        found = copy.deepcopy(model).to(memory_format=torch.channels_last)
        with torch.inference_mode(), suppress(RuntimeError):
            expected, logits = model(x), found(x)
            if bool((logits - expected).abs().max() <= EQUAL * expected.abs().max()):
                return found
    return copy.deepcopy(model)
