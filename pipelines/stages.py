"""The stages, in order: the eight of the loop, and those that run only when asked for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from difflib import get_close_matches
from importlib import import_module
from typing import TYPE_CHECKING

from spray.errors import UserError
from spray.pipelines import project
from spray.pipelines.preemption import deferred
from spray.pipelines.stage import Stage

if TYPE_CHECKING:
    from spray.pipelines.config import SprayConfig

NAMES = ("train", "attribute", "analyze", "rank", "isolate", "correct", "verify", "report")
ON_REQUEST = ("compare",)
"""Stages that are no part of the loop; they run after those that they need."""


def in_order(asked: Iterable[str]) -> list[str]:
    """Return the asked stages once each, in the order in which they run.

    Raises
    ------
    UserError
        If there is no stage of that name, or none was asked for.
    """
    names = set(asked)
    known = (*NAMES, *ON_REQUEST)
    for name in sorted(names - set(known)):
        close = get_close_matches(name, known, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise UserError(f"unknown stage {name!r}{hint}; stages= allows: {', '.join(known)}")
    if not names:
        raise UserError(f"stages=[] asks for nothing; it allows: {', '.join(known)}")
    return [name for name in known if name in names]


def load(names: Iterable[str], config: SprayConfig | None = None) -> dict[str, Stage]:
    """Import the named stages and all that they need, by this configuration; return them by name, in order."""
    loaded: dict[str, Stage] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in loaded:
            with deferred():
                stage: Stage = import_module(f"spray.pipelines.{name}").STAGE
            if config is not None:
                stage = replace(stage, needs=(*stage.needs, *stage.also_needs(config)))
                if project.is_project(config):
                    stage = project.substitute(stage, config)
            loaded[name] = stage
            waiting += stage.needs
    return {name: loaded[name] for name in (*NAMES, *ON_REQUEST) if name in loaded}
