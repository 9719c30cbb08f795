"""Finds the Clever Hans artifacts that an image classifier relies on, proves their effect and removes them."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spray.explain import explain as explain

__all__ = ["explain"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import `explain` when it is first used, so that `import spray` itself stays light."""
    if name == "explain":
        return import_module("spray.explain").explain
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Package(ModuleType):
    """Keeps `spray.explain` the function where the import system sets it to the submodule of that name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "explain" and isinstance(value, ModuleType):
            value = value.explain
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
