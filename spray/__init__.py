"""Finds the Clever Hans artifacts that an image classifier relies on, proves their effect and removes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spray.attribution import explain as explain
    from spray.correction import load_corrected as load_corrected

__all__ = ["explain", "load_corrected"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import what is used when it is first used, so that `import spray` itself stays light."""
    if name == "explain":
        from spray.attribution import explain

        return explain
    if name == "load_corrected":
        from spray.correction import load_corrected

        return load_corrected
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
