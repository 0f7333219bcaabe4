"""NestJS's Kafka records (nest-wire.md section 12): there is no envelope, what stands beside a value is headers.

A value is the payload as NestJS writes it: objects and lists as JSON, strings as they are, numbers and booleans
as text, null as no value. So that our own peers get back what went, `kafka_type` says `json` or `text` where the
bytes alone would be misread, and `none` for the end of a stream; NestJS overlooks it.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import lru_cache
from typing import Any

import msgspec
from msgspec import UNSET, Raw

from .. import codec
from ..context import deadline_on_wire
from ..exceptions import ConfigurationError, PacketError
from ..packets import pattern_name

CORRELATION = "kafka_correlationId"
REPLY_TOPIC = "kafka_replyTopic"
REPLY_PARTITION = "kafka_replyPartition"
ERROR = "kafka_nest-err"
DISPOSED = "kafka_nest-is-disposed"
TYPE = "kafka_type"
REPLY = ".reply"

Headers = list[tuple[str, bytes]]

_OURS = "kafka_"
_LONGEST_NAME = 249
_LEGAL = re.compile(r"[a-zA-Z0-9._-]+")
_NULL = Raw(b"null")
_SKEW = 1000
"""Milliseconds by which the clocks of two machines may differ."""


# Names


def is_legal(name: str) -> bool:
    """Return whether a topic can be called so."""
    return len(name) <= _LONGEST_NAME and _LEGAL.fullmatch(name) is not None and name not in (".", "..")


@lru_cache(maxsize=4096)
def topic_of(route: str, prefix: str = "") -> str:
    """Return the topic of a route: its own name, or its short one; where neither is legal, one made of it."""
    short = pattern_name(route)
    for name in (route, short):
        if is_legal(name) and is_legal(prefix + name + REPLY):
            return prefix + name
    tail = hashlib.sha256(route.encode("utf-8", "surrogatepass")).hexdigest()[:12]
    readable = re.sub(r"[^a-zA-Z0-9._-]+", "-", short)[:100]
    return f"{prefix}{readable}-{tail}"


def by_topic(routes: Iterable[str], prefix: str) -> dict[str, str]:
    """Return routes by their topics. Raises ConfigurationError where two of them would meet in one."""
    found: dict[str, str] = {}
    for route in routes:
        topic = topic_of(route, prefix)
        other = found.setdefault(topic, route)
        if other != route:
            raise ConfigurationError(f"{other!r} and {route!r} would share the topic {topic!r}.")
    for topic in found:
        if f"{topic}{REPLY}" in found:
            raise ConfigurationError(f"The topic {f'{topic}{REPLY}'!r} would carry the answers to {topic!r}.")
    return found


# Values


def write_value(data: Any, own: codec.Codec | None = None) -> tuple[bytes | None, bytes | None]:
    """Return a value as NestJS writes it, or as JSON in a codec of one's own, and its type where the bytes do not tell.

    Raises what `codec.UNENCODABLE` names.
    """
    body = b"null" if data is UNSET else codec.encode(data)
    if body == b"null":
        return None, None
    if own is not None:
        return own.encode(body), b"json"
    if body[0] in b"{[":
        return body, None
    if body[0] != ord('"'):
        return body, b"json"
    text: bytes = codec.decode(body).encode()
    return text, b"text" if text[:1] in (b"{", b"[") else None


def read_value(value: bytes | None, kind: bytes | None, decode: Callable[[bytes], bytes] | None = None) -> Raw:
    """Return a value as JSON: what NestJS would make of it, unless a peer of ours says what it is.

    `decode` gives the JSON that a codec of one's own has made something else of, and what it cannot read as it is.
    """
    if value is None:
        return _NULL
    if decode is not None and (body := decode(value)) is not value:
        value, kind = body, b"json"
    if kind == b"json" or (kind is None and value[:1] in (b"{", b"[")):
        json = _json(value)
        if json is not None:
            return json
    return Raw(codec.encode(value.decode("utf-8", "replace")))


def _json(value: bytes) -> Raw | None:
    with suppress(UnicodeDecodeError):
        value.decode()
        with suppress(msgspec.DecodeError, RecursionError):
            return msgspec.json.decode(value, type=Raw)
        # Half a character, as JavaScript may send it, is mended where packets are read.
        with suppress(msgspec.DecodeError, PacketError):
            mended = codec.decode_reply(b'{"response":' + value + b"}").response
            if isinstance(mended, Raw) and len(bytes(mended)) == len(value):  # not `{},"response":{}`
                return mended
    return None


# Headers


def write_headers(texts: Mapping[str, str], ours: Mapping[str, bytes | None]) -> Headers:
    """Return headers: texts, and those of the protocol that are there."""
    headers = [(key, text.encode("utf-8", "replace")) for key, text in texts.items() if key not in ours]
    return headers + [(key, value) for key, value in ours.items() if value is not None]


def read_headers(record: Any) -> dict[str, str]:
    """Return the headers of a record as texts."""
    return {key: "" if value is None else value.decode("utf-8", "replace") for key, value in record.headers}


def metadata_of(headers: Mapping[str, str], timestamp: int) -> Any:
    """Return what of the headers is metadata; a deadline counts from the sending, and a record may have waited."""
    metadata = {key: value for key, value in headers.items() if not key.startswith(_OURS)}
    if deadline_on_wire(metadata) is not None:
        left, age = int(metadata["deadline"]), max(0, int(time.time() * 1000) - timestamp)
        # What may only look late keeps half of its time.
        metadata["deadline"] = str(max(0, left - (age if age > _SKEW else min(age, left // 2))))
    return metadata or UNSET
