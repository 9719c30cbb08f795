"""The registry of attribution methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from spray.registry import Registry

# A method takes the model, its input (N, ...), the target and keyword-only options of its own, and returns
# the attribution, a tensor in the shape of the input.
Attribution = Callable[..., Any]

ATTRIBUTIONS: Registry[Attribution] = Registry("attribution method")
