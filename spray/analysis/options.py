"""Reads parts with their options from a configuration: `name`, `{name: value}` or `{name: {option: value}}`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection
from difflib import get_close_matches
from typing import Any, get_args, get_type_hints

from spray.errors import UserError
from spray.registry import Registry


def named_options(
    entry: Any, registry: Registry[Any], key: str, reserved: Collection[str] = ()
) -> tuple[str, dict[str, Any]]:
    """Return a part's name and options, checked against the part's signature.

    Parameters
    ----------
    entry : str or mapping
        `pool`, `{pool: 8}` (a value for the first option) or `{pool: {size: 8}}`.
    registry : Registry
        Of the parts; each is a function or class whose parameters with a default are its options.
    key : str
        What the entry is called in the configuration, for errors.
    reserved : collection of str
        Parameters that aren't the user's to set.

    Returns
    -------
    tuple of str and dict
        The registered name, and keyword arguments.

    Raises
    ------
    UserError
        If there is no such part, no such option, or a value has another type.
    """
    if isinstance(entry, str):
        name, given = entry, None
    elif isinstance(entry, dict) and len(entry) == 1:
        ((name, given),) = entry.items()
    else:
        raise UserError(f"{key}: {entry!r} is neither a name nor {{name: value}} nor {{name: {{option: value}}}}")
    try:
        part = registry.get(name)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    options = option_types(part, reserved)
    if given is None:
        return name, {}
    if not isinstance(given, dict):
        if not options:
            raise UserError(f"{key}: {name} has no options, but was given {given!r}")
        given = {next(iter(options)): given}
    return name, {option: _checked(f"{key}: {name}", option, value, options) for option, value in given.items()}


def option_types(part: Callable[..., Any], reserved: Collection[str] = ()) -> dict[str, Any]:
    """Return the types of a part's options by name: of its parameters that have a default."""
    hints = get_type_hints(part)
    return {
        name: hints[name]
        for name, parameter in inspect.signature(part).parameters.items()
        if parameter.default is not parameter.empty and name not in reserved
    }


def at_least(name: str, value: float, least: float, strictly: bool = False) -> None:
    """Check a number's range.

    Raises
    ------
    UserError
        If `value` is below `least` (or equal to it, if `strictly`).
    """
    if value < least or (strictly and value == least):
        raise UserError(f"{name}={value} is out of range; it has to be {'above' if strictly else 'at least'} {least}")


def _checked(where: str, option: Any, value: Any, options: dict[str, Any]) -> Any:
    if option not in options:
        close = get_close_matches(str(option), options, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise UserError(f"{where} has no option {option!r}{hint}; allowed: {', '.join(options) or 'none'}")
    allowed = get_args(options[option]) or (options[option],)
    if float in allowed and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) not in allowed or (isinstance(value, float) and not math.isfinite(value)):
        names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in allowed)
        raise UserError(f"{where}.{option}={value!r} has the wrong type; it has to be {names}")
    return value
