"""MQTT's packets, bytes against values; gmqtt is the second opinion."""

from typing import Any

import pytest
from gmqtt.mqtt.property import Property
from hypothesis import given
from hypothesis import strategies as st

from microservices.transports import mqtt_packets as packets

TOLD: dict[str, Any] = {
    "payload_format_id": 1,
    "message_expiry_interval": 2**32 - 1,
    "content_type": "text/é",
    "response_topic": "a/b",
    "correlation_data": "id",
    "session_expiry_interval": 7,
    "receive_maximum": 65535,
    "maximum_packet_size": 268_435_455,
    "user_property": [("a", "1"), ("é", ""), ("a", "2")],
}


@given(st.integers(0, 2**28 - 1), st.binary(max_size=3))
def test_a_number_is_read_as_it_was_written(value: int, rest: bytes) -> None:
    body = packets.number(value)

    assert packets.read_number(b"x" + body + rest, 1) == (value, 1 + len(body))
    with pytest.raises(IndexError):
        packets.read_number(body[:-1], 0)


@pytest.mark.parametrize("name", TOLD)
def test_a_property_is_written_as_others_write_it(name: str) -> None:
    value = TOLD[name].encode() if name == "correlation_data" else TOLD[name]
    theirs = bytes(Property.factory(name=name).dumps(value))

    assert packets.encode_properties({name: TOLD[name]}) == packets.number(len(theirs)) + theirs


def test_properties_are_read_as_they_were_written() -> None:
    body = packets.encode_properties(TOLD)

    assert packets.read_properties(b"x" + body + b"y", 1) == ({**TOLD, "correlation_data": b"id"}, 1 + len(body))
    assert packets.read_properties(packets.encode_properties({}), 0) == ({}, 1)


@pytest.mark.parametrize("value", [-1, 2**32, "soon", None])
def test_what_does_not_fit_into_a_property_is_told(value: Any) -> None:
    with pytest.raises(packets.UNENCODABLE):
        packets.encode_properties({"message_expiry_interval": value})
    with pytest.raises(packets.UNENCODABLE):
        packets.encode_properties({"user_property": [("a", "x" * 65536)]})


@pytest.mark.parametrize("body", [b"", b"\5", b"\2\x01", b"\2\x7f\0", b"\3\x03\0\1", b"\2\x02\0", b"\4\x03\0\1\xff"])
def test_broken_properties_are_told(body: bytes) -> None:
    with pytest.raises((LookupError, ValueError, packets.struct.error)):
        packets.read_properties(body, 0)
