"""Finds the Clever Hans artifacts that an image classifier relies on, proves their effect and removes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spray.attribution import explain as explain

__all__ = ["explain"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import `explain` when it is first used, so that `import spray` itself stays light."""
    if name == "explain":
        from spray.attribution import explain

        return explain
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
