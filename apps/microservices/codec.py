"""Bytes to packets and typed payloads, and back: NestJS's JSON (nest-wire.md section 3)."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import msgspec
from msgspec import Raw

from . import depth
from .exceptions import InvalidPayload, PacketError, RpcException
from .packets import Packet, Reply

Decoder = Callable[[bytes | Raw], Any]
P = TypeVar("P", Packet, Reply)


class Codec:
    """What a packet's JSON becomes on the wire, and back: NestJS's `serializer` and `deserializer`.

    A transport's option `codec` names a subclass by its dotted path.
    """

    def encode(self, body: bytes) -> bytes:
        """Return what travels in place of the JSON `body`; over TCP it must be UTF-8."""
        return body

    def decode(self, body: bytes) -> bytes:
        """Return the JSON that `body` stands for. What it raises makes `body` a foreign message."""
        return body


class PayloadKind(ABC):
    """How payloads of a kind that msgspec does not know become JSON, and JSON becomes them."""

    blocking: ClassVar[bool] = False
    """Whether decoding may wait, for a database: then it belongs into the thread of a `def` handler."""

    @abstractmethod
    def accepts(self, annotation: Any) -> bool:
        """Return whether `annotation`, a handler's or the type of what it returned, is of this kind."""

    @abstractmethod
    def decoder(self, annotation: Any) -> Decoder:
        """Compile a function that decodes JSON into `annotation`; it raises InvalidPayload."""

    @abstractmethod
    def encode(self, value: Any) -> Any:
        """Return a value of this kind as plain objects."""


_kinds: list[PayloadKind] = []


def register(kind: PayloadKind) -> None:
    """Have payloads of one more kind understood. To be done before handlers are declared."""
    _kinds[:] = [known for known in _kinds if type(known) is not type(kind)] + [kind]


def kind_of(annotation: Any) -> PayloadKind | None:
    """Return the registered kind of a payload; None for what msgspec knows itself."""
    return next((kind for kind in _kinds if kind.accepts(annotation)), None)


def plain(value: Any) -> Any:
    """Return a payload of a registered kind as plain objects. Raises TypeError for any other."""
    kind = kind_of(type(value))
    if kind is None:
        raise TypeError(f"Encoding objects of type {type(value).__qualname__} is unsupported")
    return kind.encode(value)


_encoder = msgspec.json.Encoder(enc_hook=plain)
_packets = msgspec.json.Decoder(Packet)
_replies = msgspec.json.Decoder(Reply)

encode = _encoder.encode
"""Return JSON bytes for any packet or payload. Raises TypeError for a type that has no JSON form."""


UNENCODABLE = (TypeError, ValueError, OverflowError, RecursionError)
"""What `encode` raises for data without a JSON form."""


def not_json(error: Exception) -> RpcException:
    """Return what a caller is told whose data cannot be encoded: `error` is one of UNENCODABLE."""
    return RpcException({"statusCode": 400, "code": "not-json", "message": f"The data has no JSON form: {error}"})


def decode_packet(body: bytes | bytearray | memoryview) -> Packet:
    """Return the request or event in `body`.

    Raises PacketError for JSON that is no packet, and msgspec.DecodeError for what is no JSON.
    """
    try:
        return _packets.decode(body)
    except (msgspec.ValidationError, RecursionError) as error:
        return _odd(error, body, Packet())
    except msgspec.DecodeError as error:
        return decode_packet(_mended(error, body))


def decode_reply(body: bytes | bytearray | memoryview) -> Reply:
    """Return the response packet in `body`; the same errors as `decode_packet`."""
    try:
        return _replies.decode(body)
    except (msgspec.ValidationError, RecursionError) as error:
        return _odd(error, body, Reply())
    except msgspec.DecodeError as error:
        return decode_reply(_mended(error, body))


def decode(raw: bytes | Raw) -> Any:
    """Return any JSON value as plain Python objects."""
    return msgspec.json.decode(raw)


def decoder(annotation: Any) -> Decoder:
    """Compile a function that decodes JSON into `annotation`; it raises InvalidPayload naming the field.

    `annotation` is anything that msgspec can decode: a Struct, a dataclass, a TypedDict, a built-in
    type, or Any for plain objects; or of a kind that is registered. Raises TypeError for a type that
    JSON cannot fill. What may hold anything holds it to a bounded depth.
    """
    kind = kind_of(annotation)
    if kind is not None:
        return _shallow(kind.decoder(annotation))
    typed = msgspec.json.Decoder(annotation).decode

    def decode_payload(raw: bytes | Raw) -> Any:
        try:
            return typed(raw)
        except msgspec.ValidationError as error:
            raise invalid_payload(error) from error
        except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
            raise InvalidPayload("The payload is not JSON.") from error

    return _shallow(decode_payload) if depth.is_unbounded(annotation) else decode_payload


def _shallow(decode: Decoder) -> Decoder:
    shallow = depth.SHALLOW

    def decode_shallow(raw: bytes | Raw) -> Any:
        if len(raw) > shallow and depth.is_beyond(raw):
            raise InvalidPayload(f"The payload is nested deeper than {depth.MOST} levels.")
        return decode(raw)

    return decode_shallow


def invalid_payload(error: msgspec.ValidationError) -> InvalidPayload:
    """Turn msgspec's one-line complaint into an error with a JSON pointer to the field."""
    message, _, path = str(error).partition(" - at `$")
    pointer = "".join(f"/{name or index}" for name, index in _PATH.findall(path.rstrip("`")))
    missing = _MISSING.search(message)
    if missing:
        pointer += f"/{missing[1]}"
    message = _REGEX.sub(" of the expected form", message)  # a regular expression tells people nothing
    return InvalidPayload(message.replace("`", "'"), pointer)


_PATH = re.compile(r"\.([^.\[\]]+)|\[(\d+|\.\.\.)\]")
_REGEX = re.compile(r" matching regex .*", re.DOTALL)
_MISSING = re.compile(r"missing required field `([^`]+)`")


def _odd(error: Exception, body: bytes | bytearray | memoryview, empty: P) -> P:
    # JSON.parse would have taken it: `null` counts as {}, and any other value has no pattern.
    if bytes(body).strip() == b"null":
        return empty
    raise PacketError(f"no packet: {error}") from error


def _mended(error: msgspec.DecodeError, body: bytes | bytearray | memoryview) -> bytes:
    # JavaScript sends a text that was cut inside an emoji with half a character, as an escape.
    # Refused, it would end the connection under all the other calls on it.
    mended = _ESCAPE.sub(lambda escape: rb"\ufffd" if escape["half"] else escape[0], bytes(body))
    if mended == body:
        raise error
    return mended


# A pair of surrogates, half of one, or any other escape: so that an escaped backslash starts none.
_ESCAPE = re.compile(
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(?P<half>u[dD][89a-fA-F][0-9a-fA-F]{2})|.)",
    re.DOTALL,
)
