"""A setting declared once: its default, meaning, unit and range; and checking a value against the declaration."""

from __future__ import annotations

import dataclasses
import difflib
import json
import typing
from collections.abc import Mapping
from typing import Any, Literal

from tdpo_cli.errors import RequestError

LONGEST_NAME = 60  # characters of a name that a message shows


class SettingError(RequestError):
    """A setting that does not exist or a value that does not fit it."""


def knob(
    default: Any, doc: str, *,
    at_least: float | None = None, above: float | None = None, at_most: float | None = None, below: float | None = None,
):  # fmt: skip
    """A setting, explained once: its default, its meaning with unit, and its range."""
    metadata = {"doc": doc, "at_least": at_least, "above": above, "at_most": at_most, "below": below}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def convert(value: Any, hint: Any, limits: Mapping[str, Any], what: str) -> Any:
    """The value as the key's type, or a SettingError that says what was expected."""
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            close = suggest(value, choices) if isinstance(value, str) else ""
            raise SettingError(f"{what}: {said(value)} is not one of {', '.join(choices)}.{close}")
        return value
    if accepts_none(hint):
        if value is None:
            return None
        return convert(value, next(h for h in typing.get_args(hint) if h is not type(None)), limits, what)
    if isinstance(value, int) and abs(value) >= 2**63:  # TOML and JSON put no limit to a whole number
        raise SettingError(f"{what}: {said(value)} is out of range.")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if hint == tuple[int, int]:
        return _pair(value, limits, what)
    if hint == tuple[int, int, int]:
        return _window(value, what)
    if hint == tuple[str, ...]:
        if isinstance(value, str):
            value = [part.strip() for part in value.split(",") if part.strip()]
        if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
            raise SettingError(f"{what}: expected a list of strings, got {said(value)}.")
        for item in value:
            _check_text(item, what)
        return tuple(value)
    if hint == dict[str, str]:
        if not isinstance(value, Mapping) or not all(isinstance(item, str) for item in value.values()):
            raise SettingError(f"{what}: expected a table of strings, got {said(value)}.")
        for text in (*value, *value.values()):
            _check_text(text, what)
        return dict(value)
    if hint == dict[str, float]:
        return _numbers(value, limits, what)
    if type(value) is not hint:
        raise SettingError(f"{what}: expected {type_name(hint)}, got {said(value)}.")
    if hint is str:
        _check_text(value, what)
    if hint in (int, float):
        _check_range(value, limits, what)
    return value


def _numbers(value: Any, limits: Mapping[str, Any], what: str) -> dict[str, float]:
    """A table of numbers, in its order."""
    if not isinstance(value, Mapping):
        raise SettingError(f"{what}: expected a table of numbers, got {said(value)}.")
    if any(isinstance(item, Mapping) for item in value.values()):
        raise SettingError(f"{what}: expected a table of numbers, got {said(value)}. A name with a dot in it needs quotes.")
    return {name: convert(item, float, limits, f"{what}.{name}") for name, item in value.items()}


def _check_text(value: str, what: str) -> None:
    """SettingError for half characters, which no file can hold, and for the NUL that ends a path."""
    if "\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise SettingError(f"{what}: {said(value)} holds a character that text cannot have.")


def _pair(value: Any, limits: Mapping[str, Any], what: str) -> tuple[int, int]:
    """Two whole numbers, or one that counts for both."""
    both = [value, value] if type(value) is int else value
    if not isinstance(both, (list, tuple)) or len(both) != 2 or not all(type(item) is int for item in both):
        raise SettingError(f"{what}: expected a whole number or two of them, got {said(value)}.")
    for item in both:
        _check_range(item, limits, what)
    return both[0], both[1]


def _window(value: Any, what: str) -> tuple[int, int, int]:
    """[size, first, last], [size, [first, last]], {size = ..., range = [first, last]}, or a size alone: from 0 to -1, the last step but one."""
    if isinstance(value, Mapping) and set(value) == {"size", "range"}:
        value = [value["size"], value["range"]]
    if isinstance(value, (list, tuple)) and len(value) == 2 and isinstance(value[1], (list, tuple)):
        value = [value[0], *value[1]]
    three = [value, 0, -1] if type(value) is int else value
    if not isinstance(three, (list, tuple)) or len(three) != 3 or not all(type(item) is int for item in three):
        raise SettingError(f"{what}: expected [size, first, last] or a size, whole numbers, got {said(value)}.")
    return tuple(three)


def _check_range(value: float, limits: Mapping[str, Any], what: str) -> None:
    if value != value or value in (float("inf"), float("-inf")):
        raise SettingError(f"{what}: {value} is not a finite number.")
    at_least, above, at_most, below = (limits[name] for name in ("at_least", "above", "at_most", "below"))
    must = None
    if at_least is not None and value < at_least:
        must = f"at least {at_least}"
    elif above is not None and value <= above:
        must = f"above {above}"
    elif at_most is not None and value > at_most:
        must = f"at most {at_most}"
    elif below is not None and value >= below:
        must = f"below {below}"
    if must:
        raise SettingError(f"{what}: {value} is out of range; it must be {must} ({limits['doc']}).")


def suggest(word: str, known: typing.Iterable[str], prefix: str = "") -> str:
    """' Did you mean x?' for the closest known word, or nothing."""
    close = difflib.get_close_matches(word[:LONGEST_NAME], list(known), n=1, cutoff=0.5)
    return f" Did you mean {prefix}{close[0]}?" if close else ""


def named(word: str) -> str:
    """A name from outside as a message shows it: as it is, or quoted with escapes and cut where it is long or not printable."""
    if word.isprintable() and len(word) <= LONGEST_NAME:
        return word
    return json.dumps(word[:LONGEST_NAME]) + ("..." if len(word) > LONGEST_NAME else "")


def accepts_none(hint: Any) -> bool:
    return type(None) in typing.get_args(hint)


def type_name(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return " | ".join(typing.get_args(hint))
    if accepts_none(hint):
        return " | ".join(type_name(h) if h is not type(None) else "none" for h in typing.get_args(hint))
    plain = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
    lists = {tuple[str, ...]: "a list of strings", tuple[int, int]: "a whole number or two of them", tuple[int, int, int]: "[size, first, last]"}
    return plain.get(hint) or lists.get(hint) or ("a table of numbers" if hint == dict[str, float] else "a table of strings")


def said(value: Any) -> str:
    kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "a string", list: "a list", dict: "a table"}
    try:
        shown = json.dumps(value, default=str)
    except ValueError:  # more digits than Python writes
        shown = "..."
    return f"{shown if len(shown) < 60 else shown[:57] + '...'} ({kinds.get(type(value), type(value).__name__)})"
