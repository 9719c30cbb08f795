"""The registry of exchangeable parts."""

from __future__ import annotations

import pytest

from spray.errors import UserError
from spray.registry import Registry


def make() -> Registry[int]:
    registry: Registry[int] = Registry("colour")
    for number, name in enumerate(["red", "green", "blue"]):
        assert registry.register(name)(number) == number
    return registry


def test_gives_back_what_was_registered() -> None:
    registry = make()
    assert registry.names() == ["blue", "green", "red"]
    assert [registry.get(name) for name in ("red", "green", "blue")] == [0, 1, 2]


def test_a_name_is_taken_once() -> None:
    with pytest.raises(ValueError, match="colour 'red' is registered twice"):
        make().register("red")(7)


@pytest.mark.parametrize(
    ("name", "hint"), [("grene", " (did you mean 'green'?)"), ("zzz", ""), (3, ""), (None, ""), ("", "")]
)
def test_an_unknown_name_is_told_in_one_line(name: str, hint: str) -> None:
    with pytest.raises(UserError) as error:
        make().get(name)
    assert str(error.value) == f"unknown colour {name!r}{hint}; allowed: blue, green, red"


def test_registries_do_not_share_their_parts() -> None:
    assert Registry("other").names() == []
    assert make().names() == make().names()
