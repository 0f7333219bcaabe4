"""Packets of NestJS's protocol, and the route that a pattern stands for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import UNSET, Raw, UnsetType

from .exceptions import PacketError

# What we write. Field order is NestJS's own, so that recorded packets match byte for byte.


class Request(msgspec.Struct, gc=False, omit_defaults=True):
    """A request to be answered (nest-wire.md section 1)."""

    pattern: Any
    data: Any
    metadata: dict[str, str] | UnsetType
    id: str


class Event(msgspec.Struct, gc=False, omit_defaults=True):
    """A message without an answer: the missing `id` is what makes it an event."""

    pattern: Any
    data: Any
    metadata: dict[str, str] | UnsetType = UNSET


class Response(msgspec.Struct, gc=False, omit_defaults=True, rename="camel"):
    """One packet of an answer. No other key may travel (nest-wire.md section 6.2)."""

    response: Any = UNSET
    err: Any = UNSET
    is_disposed: bool | UnsetType = UNSET
    id: Any = UNSET
    status: str | UnsetType = UNSET


# What we read. Values stay undecoded until somebody knows their type.


class Packet(msgspec.Struct, gc=False):
    """A request or an event as it came in."""

    pattern: Raw | UnsetType = UNSET
    data: Raw | UnsetType = UNSET
    metadata: Any = UNSET
    id: Raw | UnsetType = UNSET


class Reply(msgspec.Struct, gc=False, rename="camel"):
    """One packet of an answer as it came in."""

    id: Any = None
    response: Raw | UnsetType = UNSET
    err: Any = None
    is_disposed: Any = False


# Routes. The rules are nest-wire.md section 2.

MAX_DEPTH = 5
MAX_KEYS = 20
_ORDER = " _-,;:!?.'\"()[]{}@*/\\&#%`^+<=>|~$0123456789abcdefghijklmnopqrstuvwxyz"
_WEIGHTS = {char: weight for weight, char in enumerate(_ORDER)}
_WEIGHTS |= {char.upper(): weight for char, weight in _WEIGHTS.items()}


def route(pattern: Any) -> str | None:
    """Return the text under which a pattern is registered and looked up.

    `pattern` is a string, a number, or a mapping or list of them. A pattern that can never
    match (`None` or a boolean) gives `None`.
    """
    if isinstance(pattern, str):
        return pattern
    if isinstance(pattern, bool) or pattern is None:
        return None
    if isinstance(pattern, int | float):
        return _number(pattern)
    if isinstance(pattern, Mapping | list | tuple):
        return _object(pattern, 0)
    raise PacketError(f"{pattern!r} is no pattern: use a string, a number, a mapping or a list.")


def route_on_wire(raw: bytes) -> str | None:
    """Return the route of a pattern as it stands in a packet: JSON, possibly JSON inside a string."""
    try:
        pattern = msgspec.json.decode(raw)
        return route_in_text(pattern) if isinstance(pattern, str) else route(pattern)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError, PacketError):
        return None


def route_in_text(text: str) -> str | None:
    """Return the route that a channel name or a pattern text stands for: parsed as JSON where it is JSON."""
    if not text or text[0] not in '{["-0123456789tfn \t\r\n':
        return text
    try:
        return route(msgspec.json.decode(text))
    except (msgspec.DecodeError, RecursionError):
        return text


def pattern_name(route: str) -> str:
    """Return a short name for people: `get_user` for `{"cmd":"get_user"}`, else `cmd=get_user,v=2`."""
    if not route.startswith("{"):
        return route
    try:
        fields = msgspec.json.decode(route)
    except msgspec.DecodeError:
        return route
    if set(fields) == {"cmd"}:
        return str(fields["cmd"])
    return ",".join(f"{key}={value}" for key, value in fields.items())


def _object(pattern: Any, depth: int) -> str:
    if depth > MAX_DEPTH:
        return "[MAX_DEPTH_REACHED]"
    items = pattern.items() if isinstance(pattern, Mapping) else enumerate(pattern)
    fields = {str(key): value for key, value in items}
    if len(fields) > MAX_KEYS:
        return "[TOO_MANY_KEYS]"
    keys = sorted(fields, key=_collation)
    return "{" + ",".join(f'"{_escape(key)}":{_value(fields[key], depth)}' for key in keys) + "}"


def _value(value: Any, depth: int) -> str:
    if isinstance(value, str):
        return f'"{_escape(value)}"'
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return _number(value)
    return _object(value, depth + 1)


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def _collation(key: str) -> tuple[list[int], list[bool]]:
    """Order keys as JavaScript's localeCompare does for ASCII; other characters go last, by code point."""
    return [_WEIGHTS.get(char, 256 + ord(char)) for char in key], [char.isupper() for char in key]


def _number(number: float) -> str:
    """Print a number as JavaScript's Number.prototype.toString does (ECMA-262, 6.1.6.1.20)."""
    try:
        value = float(number)
    except OverflowError:
        return "Infinity" if number > 0 else "-Infinity"
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value == 0:
        return "0"
    mantissa, _, exponent = f"{value!r}".partition("e")
    sign = "-" if mantissa[0] == "-" else ""
    whole, _, fraction = mantissa.lstrip("-").partition(".")
    digits = (whole + fraction).lstrip("0")
    # `point` is where the decimal point stands, counted from the first significant digit.
    point = int(exponent or 0) + (len(whole) if whole != "0" else len(fraction.lstrip("0")) - len(fraction))
    digits = digits.rstrip("0")
    if len(digits) <= point <= 21:
        return sign + digits.ljust(point, "0")
    if 0 < point <= 21:
        return f"{sign}{digits[:point]}.{digits[point:]}"
    if -6 < point <= 0:
        return f"{sign}0.{'0' * -point}{digits}"
    tail = f".{digits[1:]}" if len(digits) > 1 else ""
    return f"{sign}{digits[0]}{tail}e{'+' if point > 0 else '-'}{abs(point - 1)}"
