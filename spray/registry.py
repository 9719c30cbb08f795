"""Named, exchangeable parts: one registry for each kind."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from typing import Generic, TypeVar

from spray.errors import UserError

T = TypeVar("T")


class Registry(Generic[T]):
    """The parts of one kind, by name.

    Parameters
    ----------
    kind : str
        What the parts are, as it reads in an error: "attribution method", "dataset", ...
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._parts: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers a part under `name`."""

        def add(part: T) -> T:
            if name in self._parts:
                raise ValueError(f"{self.kind} {name!r} is registered twice")
            self._parts[name] = part
            return part

        return add

    def names(self) -> list[str]:
        """Return the registered names in alphabetical order."""
        return sorted(self._parts)

    def get(self, name: str) -> T:
        """Return the part called `name`.

        Raises
        ------
        UserError
            If there is none; the message lists those that there are, the closest one first.
        """
        if name in self._parts:
            return self._parts[name]
        close = get_close_matches(str(name), self._parts, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise UserError(f"unknown {self.kind} {name!r}{hint}; allowed: {', '.join(self.names())}")
