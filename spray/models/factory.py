"""The user's own architecture: a function in a file or in an installed package."""

from __future__ import annotations

from torch import nn

from spray.errors import UserError
from spray.factories import call, kind_of, one_line

__all__ = ["call_factory", "one_line"]


def call_factory(factory: str, n_classes: int) -> nn.Module:
    """Call the user's function and return its model.

    Parameters
    ----------
    factory : str
        ``FILE.py:FUNCTION`` or ``package.module:function``. While the file is loaded and the function runs,
        the file's folder (for a package, the working directory) can be imported from.
    n_classes : int
        Passed if the function has a parameter `num_classes` or `n_classes`; else it is called with nothing.

    Raises
    ------
    UserError
        If there is no such file, module or function, or it fails, or returns anything but an `nn.Module`.
    """
    model = call(factory, "model.factory", {"num_classes": n_classes, "n_classes": n_classes})
    if not isinstance(model, nn.Module):
        raise UserError(f"model.factory={factory} returns {kind_of(model)}; it must return an nn.Module")
    return model
