"""Weights on disk, written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from spray.storage import replacing


def save_weights(path: Path, model: nn.Module) -> None:
    """Write a model's `state_dict`, on the CPU, to `path`."""
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    with replacing(path) as temporary:
        torch.save(state, temporary)
