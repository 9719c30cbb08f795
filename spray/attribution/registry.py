"""The registry of attribution methods."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from spray.registry import Registry

# A method takes the model, its input (N, ...), the target and keyword-only options of its own, and returns
# the attribution in the shape of the input.
Attribution = Callable[..., Tensor]

ATTRIBUTIONS: Registry[Attribution] = Registry("attribution method")
