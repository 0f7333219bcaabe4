"""What has come as a broker's message: NestJS's packet, or something of others (nest-wire.md section 6)."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from msgspec import UNSET, Raw

from .. import codec
from ..exceptions import PacketError
from ..packets import Packet

TRACE = ("traceparent", "tracestate")
"""What also travels as headers where a transport has them, for those who know nothing of NestJS's packets."""


def read_packet(body: bytes) -> Packet:
    """Return NestJS's packet, or an event with the whole message as its data: JSON, or a text."""
    try:
        return read_json(body)
    except PacketError:
        return Packet(data=Raw(codec.encode(body.decode("utf-8", "replace"))))


def read_json(body: bytes) -> Packet:
    """Return NestJS's packet, or an event with the whole JSON as its data. Raises PacketError for what is no JSON."""
    try:
        packet = codec.decode_packet(body)
    except PacketError:
        return Packet(data=Raw(body))  # a list or a number of somebody else's
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise PacketError(f"no JSON: {error}") from error
    if packet.pattern is UNSET and packet.data is UNSET:
        return Packet(data=Raw(body))
    return packet


def trace_headers(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return what of a call's metadata travels as headers, too."""
    return {key: metadata[key] for key in TRACE if key in metadata}


def with_trace(packet: Packet, headers: Mapping[str, object]) -> Packet:
    """Give a packet the trace that only its headers tell."""
    if not headers:
        return packet
    told = {key: value for key in TRACE if isinstance(value := headers.get(key), str)}
    if told:
        packet.metadata = {**told, **(packet.metadata if isinstance(packet.metadata, dict) else {})}
    return packet
