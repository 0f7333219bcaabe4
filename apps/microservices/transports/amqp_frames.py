"""The frames of AMQP 0-9-1 that come and go with each message, by hand: pamqp takes as long as all the rest."""

from __future__ import annotations

import struct
from functools import lru_cache

METHOD, HEADER, BODY, _HEARTBEAT = 1, 2, 3, 8
KINDS = (METHOD, HEADER, BODY, _HEARTBEAT)
FRAME = struct.Struct(">BHI")
BEAT = FRAME.pack(_HEARTBEAT, 0, 0) + b"\xce"
AROUND = FRAME.size + 1
"""How many bytes a frame has around what it carries."""
_PUBLISH, RETURN, DELIVER, ACK, _NACK = (b"\0\x3c\0%c" % each for each in (40, 50, 60, 80, 120))
NO_AMQP = (struct.error, ValueError, LookupError, TypeError, RecursionError)
"""What is raised for bytes that cannot be read, and for names and tables that cannot be written."""
HEAD = struct.Struct(">BHIIQ")
_SIZE = struct.Struct(">I")
TAG = struct.Struct(">QB")
_VERDICT = struct.Struct(">BHI4sQBB")
_REQUEUE = 2


def facts_of(header: bytes) -> tuple[bytes, bytes, bool]:
    """Return what each message is asked for: its `correlation_id` and `reply_to`, and whether it has other headers.

    The two are as they travel, their length before them. One that is cut off tells nothing.
    """
    correlation_id = reply_to = b""
    has_headers = False
    try:
        flags, at = header[12] << 8 | header[13], 14
        if flags & 0xC000:
            for type_or_encoding in (0x8000, 0x4000):
                if flags & type_or_encoding:
                    at += 1 + header[at]
        if flags & 0x2000:
            (size,) = _SIZE.unpack_from(header, at)
            has_headers = size > 0
            at += 4 + size
        at += (flags >> 12 & 1) + (flags >> 11 & 1)  # the delivery mode and the priority
        if flags & 0x0400:
            end = at + 1 + header[at]
            correlation_id, at = header[at:end], end
        if flags & 0x0200:
            end = at + 1 + header[at]
            reply_to, at = header[at:end], end
    except NO_AMQP:
        return b"", b"", False
    return (b"", b"", False) if at > len(header) or flags & 1 else (correlation_id, reply_to, has_headers)


def framed(channel: int, payload: bytes) -> bytes:
    """Return the frame of a method."""
    return b"%b%b\xce" % (FRAME.pack(METHOD, channel, len(payload)), payload)


def published(channel: int, place: bytes, properties: bytes, body: bytes, frame_max: int) -> bytes:
    """Return the frames of a message: `place` is what `publishing` gives, `properties` are marshalled."""
    size = len(body)
    header = HEAD.pack(HEADER, channel, 12 + len(properties), 0x3C0000, size)
    limit = frame_max - AROUND
    if 0 < size <= limit:
        return b"%b%b%b\xce%b%b\xce" % (place, header, properties, FRAME.pack(BODY, channel, size), body)
    parts = [place, header, properties, b"\xce"]
    for start in range(0, size, limit):
        part = body[start : start + limit]
        parts += FRAME.pack(BODY, channel, len(part)), part, b"\xce"
    return b"".join(parts)


@lru_cache(maxsize=4096)
def publishing(channel: int, exchange: bytes, key: bytes, mandatory: bool = False) -> bytes:
    """Return the frame that says where a message goes: both names with their length before them, as `short` has it."""
    return framed(channel, b"%b\0\0%b%b%c" % (_PUBLISH, exchange, key, mandatory))


def acked(channel: int, tag: int) -> bytes:
    """Return the frame that acknowledges a message."""
    return _VERDICT.pack(METHOD, channel, 13, ACK, tag, 0, 0xCE)


def nacked(channel: int, tag: int, *, requeue: bool) -> bytes:
    """Return the frame that gives a message back."""
    return _VERDICT.pack(METHOD, channel, 13, _NACK, tag, _REQUEUE * requeue, 0xCE)


@lru_cache(maxsize=4096)
def names_of(names: bytes) -> tuple[str, str]:
    """Return the exchange and the routing key of a delivery, also where they are no UTF-8."""
    end = 1 + names[0]
    key = names[end + 1 : end + 1 + names[end]]
    return names[1:end].decode("utf-8", "replace"), key.decode("utf-8", "replace")


def short(text: str) -> bytes:
    """Return a text as it travels in properties. Raises ValueError for one of more than 255 bytes."""
    body = text.encode()
    return bytes((len(body),)) + body


def long(text: bytes) -> str:
    """Return what such a text says."""
    return text[1:].decode("utf-8", "replace")
