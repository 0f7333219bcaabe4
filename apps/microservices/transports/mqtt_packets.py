"""The packets of MQTT 3.1.1 and 5, as far as a client speaks them: bytes from values, and values from bytes.

What reads may raise a LookupError, a ValueError or a struct.error for bytes that are no MQTT.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import msgspec

from ..context import NO_HEADERS

# The kinds of packets, with the flags that are always theirs.
CONNECT, CONNACK, PINGREQ, DISCONNECT = 0x10, 0x20, 0xC0, 0xE0
PUBLISH, PUBACK, PUBREC, PUBREL, PUBCOMP = 0x30, 0x40, 0x50, 0x62, 0x70
SUBSCRIBE, SUBACK, UNSUBSCRIBE, UNSUBACK = 0x82, 0x90, 0xA2, 0xB0

PUBLISH_HEAD = 2 + 65535 + 2
"""The most bytes that a PUBLISH takes to tell its topic and its number."""
NOBODY = 0x10
"""The reason code of a message that reached no subscriber."""

_REASONS = {
    # Of the CONNACK of MQTT 3.1.1
    0x01: "unacceptable protocol version",
    0x02: "identifier rejected",
    0x03: "broker unavailable",
    0x04: "bad user name or password",
    0x05: "not authorized",
    # Of MQTT 5
    0x80: "unspecified error",
    0x81: "malformed packet",
    0x82: "protocol error",
    0x83: "implementation specific error",
    0x84: "unsupported protocol version",
    0x85: "client identifier not valid",
    0x86: "bad user name or password",
    0x87: "not authorized",
    0x88: "broker unavailable",
    0x89: "broker busy",
    0x8A: "banned",
    0x8B: "the broker shuts down",
    0x8C: "bad authentication method",
    0x8D: "keep alive timeout",
    0x8E: "another connection has taken the client_id",
    0x8F: "topic filter invalid",
    0x90: "topic name invalid",
    0x93: "receive maximum exceeded",
    0x95: "packet too large",
    0x97: "quota exceeded",
    0x99: "payload format invalid",
    0x9A: "retain not supported",
    0x9B: "QoS not supported",
    0x9C: "use another broker",
    0x9D: "the broker has moved",
    0x9E: "shared subscriptions not supported",
    0x9F: "connection rate exceeded",
    0xA2: "wildcard subscriptions not supported",
}

# By its number: the name of a property, and how its value is written, as `struct` or we here name that.
_PROPERTIES = {
    1: ("payload_format_id", "!B"),
    2: ("message_expiry_interval", "!I"),
    3: ("content_type", "text"),
    8: ("response_topic", "text"),
    9: ("correlation_data", "bytes"),
    11: ("subscription_identifier", "number"),
    17: ("session_expiry_interval", "!I"),
    18: ("assigned_client_identifier", "text"),
    19: ("server_keep_alive", "!H"),
    21: ("auth_method", "text"),
    22: ("auth_data", "bytes"),
    26: ("response_info", "text"),
    28: ("server_reference", "text"),
    31: ("reason_string", "text"),
    33: ("receive_maximum", "!H"),
    34: ("topic_alias_maximum", "!H"),
    36: ("max_qos", "!B"),
    37: ("retain_available", "!B"),
    38: ("user_property", "pair"),
    39: ("maximum_packet_size", "!I"),
    40: ("wildcard_subscription_available", "!B"),
    41: ("sub_id_available", "!B"),
    42: ("shared_subscription_available", "!B"),
}
_NUMBERS = {name: (id, form) for id, (name, form) in _PROPERTIES.items()}


class Message(msgspec.Struct):
    """A message as the broker sent it."""

    topic: str
    payload: bytes
    qos: int
    retain: bool
    dup: bool
    id: int
    properties: dict[str, Any]

    @property
    def headers(self) -> Mapping[str, str]:
        """The user properties of MQTT 5; of several with one name the last."""
        pairs = self.properties and self.properties.get("user_property")
        return dict(pairs) if pairs else NO_HEADERS


def explain(code: int) -> str:
    """Return what a reason code means."""
    return f"{_REASONS[code]} (0x{code:02x})" if code in _REASONS else f"0x{code:02x}"


def read_message(first: int, data: bytes, at: int, end: int, *, v5: bool) -> Message:
    """Return the message of a PUBLISH, whose body begins at `at`."""
    qos, id = first >> 1 & 3, 0
    start = at + 2
    at = start + (data[at] << 8 | data[at + 1])
    topic = data[start:at]
    if qos:
        id = int.from_bytes(data[at : at + 2])
        at += 2
    properties: dict[str, Any] = {}
    if v5:
        properties, at = read_properties(data, at)
    if at > end or qos > 2:
        raise ValueError("a broken PUBLISH")
    return Message(topic.decode(), data[at:end], qos, first & 1 > 0, first & 8 > 0, id, properties)


def publish(flags: int, topic: bytes, id: bytes, told: bytes, body: bytes) -> bytes:
    """Return a PUBLISH; `id` is empty with QoS 0, `told` are the properties of MQTT 5, with their length."""
    size = len(topic)
    length = number(2 + size + len(id) + len(told) + len(body))
    return b"%c%b%b%b%b%b%b" % (PUBLISH | flags, length, size.to_bytes(2), topic, id, told, body)


def connect(
    client_id: str, username: str, password: str, keepalive: int, *, clean: bool, properties: Mapping[str, Any] | None
) -> bytes:
    """Return a CONNECT: of MQTT 5 where there are properties, be it none, else of 3.1.1."""
    flags, told = clean << 1, text(client_id)
    if username or password:
        flags |= 0x80
        told += text(username)
    if password:
        flags |= 0x40
        told += text(password)
    head = text("MQTT") + struct.pack("!BBH", 4 if properties is None else 5, flags, keepalive)
    body = head + (b"" if properties is None else encode_properties(properties)) + told
    return bytes([CONNECT]) + number(len(body)) + body


def encode_properties(properties: Mapping[str, Any]) -> bytes:
    """Return properties by their names. Raises one of `UNENCODABLE` where a value does not fit."""
    if not properties:
        return b"\0"
    parts = []
    for name, value in properties.items():
        id, form = _NUMBERS[name]
        if form == "pair":
            parts += [bytes([id]) + text(key) + text(each) for key, each in value]
        elif form in ("text", "bytes"):
            parts.append(bytes([id]) + text(value))
        else:
            parts.append(bytes([id]) + struct.pack(form, value))
    body = b"".join(parts)
    return number(len(body)) + body


UNENCODABLE = (TypeError, AttributeError, ValueError, struct.error)


def read_properties(data: bytes, at: int) -> tuple[dict[str, Any], int]:
    """Return properties by their names, and where what follows them begins."""
    length, at = read_number(data, at)
    end = at + length
    found: dict[str, Any] = {}
    while at < end:
        name, form = _PROPERTIES[data[at]]
        value: Any
        if form == "number":
            value, at = read_number(data, at + 1)
        elif form.startswith("!"):
            (value,) = struct.unpack_from(form, data, at + 1)
            at += 1 + struct.calcsize(form)
        else:
            value, at = _read_bytes(data, at + 1)
            value = value if form == "bytes" else value.decode()
        if form == "pair":
            second, at = _read_bytes(data, at)
            found.setdefault(name, []).append((value, second.decode()))
        else:
            found[name] = value
    if at != end:
        raise ValueError("broken properties")
    return found, end


def text(value: str) -> bytes:
    """Return a text with its length before it."""
    body = value.encode()
    return struct.pack("!H", len(body)) + body


def _read_bytes(data: bytes, at: int) -> tuple[bytes, int]:
    start = at + 2
    end = start + int.from_bytes(data[at:start])
    return data[start:end], end


@lru_cache(maxsize=4096)
def number(value: int) -> bytes:
    """Return a number in as many bytes as it needs."""
    body = bytearray()
    while value > 127:
        body.append(value & 127 | 128)
        value >>= 7
    body.append(value)
    return bytes(body)


def read_number(data: bytes, at: int) -> tuple[int, int]:
    """Return a number, and where what follows it begins. Raises IndexError where not all of it is there."""
    byte = data[at]
    if byte < 128:
        return byte, at + 1
    value = 0
    for shift in (0, 7, 14, 21):
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a length of more than four bytes")
