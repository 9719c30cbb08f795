"""Tells a mistake in the command line or the configuration in one line."""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from typing import Any

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from spray.errors import UserError
from spray.pipelines.config import SprayConfig


def explain_mistake(error: BaseException) -> str | None:
    """Return one line about a user's mistake: what is wrong, what to do; None for any other error."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OverrideParseException):
        hint = "write key=value, and quote special characters: key='\"a,b\"'"
        return f"cannot read the option {error.override!r}; {hint}"
    if isinstance(error, MissingConfigException):
        return _missing_config(error)
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(cause, MissingMandatoryValue):
        return f"{cause.full_key} is missing; give it as {cause.full_key}=VALUE"
    if isinstance(cause, ConfigKeyError | ConfigAttributeError):
        return _unknown_key(str(cause.full_key or cause.key))
    if isinstance(cause, ValidationError):
        return _wrong_type(cause)
    if isinstance(error, HydraException | OmegaConfBaseException):
        return _composition(error)
    if isinstance(error, OSError):
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        return f"{what}; check run_dir and the other paths"
    # Hydra raises plain ones for flags that do not go together.
    return _first_line(error) if isinstance(error, ValueError) else None


def _missing_config(error: MissingConfigException) -> str:
    if error.missing_cfg_file is None or error.options is None:
        return _first_line(error)
    group, _, name = error.missing_cfg_file.rpartition("/")
    return f"unknown {group} {name!r}{_hint(name, error.options)}; allowed: {', '.join(error.options)}"


def _composition(error: BaseException) -> str:
    text = _first_line(error)
    if match := re.search(r"Could not override '([^']+)'", text):
        return _unknown_key(match[1])
    if match := re.search(r"Error merging override ([\w.]+)=", text):
        return _wrong_shape(match[1], text)
    if match := re.search(r"(\S+) appears more than once in the final defaults list", text):
        return f"{match[1]} is given twice; write {match[1]}=NAME once, without a plus sign"
    if text.startswith("Ambiguous value"):
        return f"{text}; write a list as [a,b], quote a text as '\"a,b\"', or add --multirun to run both"
    return text


def _wrong_shape(key: str, text: str) -> str:
    """Say that a list is no mapping, or a mapping no list."""
    known = known_options()
    if isinstance(known.get(key), list):
        return f"{key} is a list; write {key}=[..], with commas between its items"
    inside = [name for name in known if name.startswith(f"{key}.")]
    if inside:
        return f"{key} is a mapping; write {key}={{KEY: VALUE}}, or its keys by themselves, such as {inside[0]}=VALUE"
    parent = ".".join(key.split(".")[:2])
    if isinstance(known.get(parent), list):
        return f"{parent} is a list, which is given as a whole; write {parent}=[..], with commas between its items"
    return text


def _wrong_type(error: ValidationError) -> str:
    """Say which option has a value of the wrong type, and what it should look like."""
    key, text = str(error.full_key or ""), _first_line(error)
    default = known_options().get(key)
    example = f"; give something like {key}={_written(default)}" if default is not None else ""
    return f"{key}: {text}{example}" if key else text


def _written(value: Any) -> str:
    """Return a value as it is written on the command line."""
    if isinstance(value, list):
        return f"[{','.join(map(_written, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _unknown_key(key: str) -> str:
    """Say that there is no such option, and which may be meant or what there is."""
    parent = key.rpartition(".")[0]
    known = [*known_options(), "experiment"]
    siblings = [name for name in known if name.rpartition(".")[0] == parent]
    if not siblings:
        siblings = [name for name in known if "." not in name]
        return f"unknown option {key!r}{_hint(key, known)}; allowed: {', '.join(siblings)}"
    return f"unknown option {key!r}{_hint(key, siblings)}; allowed: {', '.join(siblings)}"


def known_options(section: Any = None, prefix: str = "") -> dict[str, Any]:
    """Return every dotted key of the configuration with its default; sections have None."""
    value = SprayConfig() if section is None else section
    items = {f.name: getattr(value, f.name) for f in fields(value)} if is_dataclass(value) else value
    options: dict[str, Any] = {}
    for name, part in items.items():
        is_section = is_dataclass(part) or isinstance(part, dict)
        options[prefix + name] = None if is_section else part
        if is_section:
            options |= known_options(part, f"{prefix}{name}.")
    return options


def _hint(name: str, allowed: Any) -> str:
    close = get_close_matches(name, list(allowed), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines()]
    return next((line for line in lines if line), type(error).__name__)
