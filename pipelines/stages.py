"""The eight stages, in order."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module

from spray.errors import UserError
from spray.pipelines.stage import Stage

NAMES = ("train", "attribute", "analyze", "rank", "isolate", "correct", "verify", "report")


def in_order(asked: Iterable[str]) -> list[str]:
    """Return the asked stages once each, in the order in which they run.

    Raises
    ------
    UserError
        If there is no stage of that name, or none was asked for.
    """
    names = set(asked)
    for name in sorted(names - set(NAMES)):
        close = get_close_matches(name, NAMES, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise UserError(f"unknown stage {name!r}{hint}; stages= allows: {', '.join(NAMES)}")
    if not names:
        raise UserError(f"stages=[] asks for nothing; it allows: {', '.join(NAMES)}")
    return [name for name in NAMES if name in names]


def load(names: Iterable[str]) -> dict[str, Stage]:
    """Import the named stages and all that they need; return them by name, in order."""
    loaded: dict[str, Stage] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in loaded:
            loaded[name] = import_module(f"spray.pipelines.{name}").STAGE
            waiting += loaded[name].needs
    return {name: loaded[name] for name in NAMES if name in loaded}
