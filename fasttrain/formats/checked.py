"""What values of a stranger's JSON have to be: small checks, put together to describe an object.

A check takes a value and where it was found, and raises Malformed in one line where it is something else.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping

from fasttrain.system.errors import DataError

Check = Callable[[object, str], None]
_LONGEST_NAME = 255  # bytes, of a file system


class Malformed(DataError):
    """A value is not what it has to be; the text says where, and what it is."""


def _require(condition: bool, value: object, where: str, what: str) -> None:
    if not condition:
        raise Malformed(f"{where}: {_shown(value)} is no {what}")


def _shown(value: object) -> str:
    """Return a value in a few words that a terminal can show."""
    return reprlib.repr(value).encode("ascii", "backslashreplace").decode()


def number(low: float, high: float) -> Check:
    """Return the check of a number within bounds: not-a-number and true are none."""

    def check(value: object, where: str) -> None:
        sound = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
        _require(sound, value, where, f"number from {low} to {high}")

    return check


def count(value: object, where: str) -> None:
    """Check a whole number of 63 bits."""
    sound = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63
    _require(sound, value, where, "whole number")


def text(value: object, where: str) -> None:
    """Check a text."""
    _require(isinstance(value, str), value, where, "text")


def plain_name(value: object, where: str) -> None:
    """Check the name of a file in the folder itself, that can be printed."""
    sound = isinstance(value, str) and value.isprintable() and "/" not in value and value not in ("", ".", "..")
    _require(sound and len(str(value).encode()) <= _LONGEST_NAME, value, where, "plain file name")


def list_of(one: Check, length: int | None = None) -> Check:
    """Return the check of a list, of a length if that is given."""

    def check(value: object, where: str) -> None:
        _require(isinstance(value, list), value, where, "list")
        assert isinstance(value, list)
        _require(length in (None, len(value)), value, where, f"list of {length}")
        for place, item in enumerate(value):
            one(item, f"{where}[{place}]")

    return check


def table_of(one: Check) -> Check:
    """Return the check of a JSON object of any keys."""

    def check(value: object, where: str) -> None:
        _require(isinstance(value, dict), value, where, "JSON object")
        assert isinstance(value, dict)
        for key, item in value.items():
            one(item, f"{where}[{_shown(key)}]")

    return check


def any_value(_value: object, _where: str) -> None:
    """Check nothing."""


def none_or(one: Check) -> Check:
    """Return the check of a value that may be missing."""

    def check(value: object, where: str) -> None:
        if value is not None:
            one(value, where)

    return check


def fields(required: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    """Return the check of a JSON object of these keys and no other."""
    known = {**required, **(optional or {})}

    def check(value: object, where: str) -> None:
        _require(isinstance(value, dict), value, where, "JSON object")
        assert isinstance(value, dict)
        if missing := [key for key in required if key not in value]:
            raise Malformed(f"{where}: {missing[0]} is missing")
        for key, item in value.items():
            if key not in known:
                raise Malformed(f"{where}: unknown entry {_shown(key)}")
            known[key](item, f"{where}.{key}")

    return check
