"""Weights on disk, written whole or not at all."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import nn

from spray.storage import write_bytes


def save_weights(path: Path, model: nn.Module) -> None:
    """Write a model's `state_dict`, on the CPU, to `path`; the same weights always give the same bytes."""
    state = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    # Through memory, since torch.save puts the name of a file, here a temporary one, into it.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_bytes(path, buffer.getvalue())
