"""Bytes to packets and typed payloads."""

from dataclasses import dataclass
from typing import Annotated, Any, TypedDict

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import UNSET, Raw

from microservices import codec
from microservices.exceptions import InvalidPayload, PacketError
from microservices.packets import Packet


class Line(msgspec.Struct):
    """Part of an order."""

    product: str
    quantity: Annotated[int, msgspec.Meta(ge=1)] = 1


class Order(msgspec.Struct, rename="camel"):
    """A payload."""

    order_lines: list[Line]
    by_name: dict[str, Line] = {}


class Place(TypedDict):
    """A payload of another kind."""

    city: str


@dataclass
class Point:
    """A payload of a third kind."""

    x: int


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(JSON)
@settings(derandomize=True, max_examples=150, deadline=None)
def test_any_json_value_survives_the_way_there_and_back(value: Any) -> None:
    assert codec.decode(codec.encode(value)) == value


def test_values_without_a_number_in_json_become_null() -> None:
    assert codec.encode([float("nan"), float("inf"), -float("inf")]) == b"[null,null,null]"


@pytest.mark.parametrize("value", [object(), {(1, 2): object()}, 1j])
def test_a_value_without_a_json_form_is_a_type_error(value: Any) -> None:
    with pytest.raises(TypeError):
        codec.encode(value)


# Packets


def test_a_packet_keeps_its_values_undecoded() -> None:
    packet = codec.decode_packet(b' {"id": 5, "data": [1, 2 ], "pattern": {"cmd" : "sum"}, "more": 1} ')

    assert (bytes(packet.pattern), bytes(packet.data), bytes(packet.id)) == (b'{"cmd" : "sum"}', b"[1, 2 ]", b"5")
    assert packet.metadata is UNSET


def test_null_is_an_empty_packet() -> None:
    assert codec.decode_packet(b" null ") == Packet()
    assert codec.decode_reply(b"null").id is None


DEEP = b'{"data":' + b"[" * 100_000 + b"]" * 100_000 + b"}"


@pytest.mark.parametrize("body", [b"5", b"[]", b'"text"', b"true", DEEP], ids=lambda body: body[:8].decode())
def test_json_that_is_no_packet_is_a_packet_error(body: bytes) -> None:
    for decode in (codec.decode_packet, codec.decode_reply):
        if b"data" in body and decode is codec.decode_reply:
            body = body.replace(b"data", b"response")
        with pytest.raises(PacketError):
            decode(body)


@pytest.mark.parametrize("body", [b"", b"{", b"nul", b"{}{}", b'{"a":NaN}', b"{'a':1}", b'{"a":1,}'])
def test_bytes_that_are_no_json_are_a_decode_error(body: bytes) -> None:
    for decode in (codec.decode_packet, codec.decode_reply):
        with pytest.raises(msgspec.DecodeError):
            decode(body)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (r"cut \ud83d", "cut \ufffd"),
        (r"\ude00 cut", "\ufffd cut"),
        (r"\uD83D\uD83D\uDE00", "\ufffd😀"),
        (r"\ud83d\ude00 whole \ud83d", "😀 whole \ufffd"),
        (r"\\ud83d \ud83d", "\\ud83d \ufffd"),
        (r"\ud83d\n", "\ufffd\n"),
    ],
)
def test_half_a_character_from_javascript_becomes_a_replacement_character(written: str, read: str) -> None:
    packet = codec.decode_packet(f'{{"pattern":"echo","data":"{written}","id":"1"}}'.encode())
    reply = codec.decode_reply(f'{{"response":"{written}","id":"1"}}'.encode())

    assert codec.decode(packet.data) == read
    assert codec.decode(reply.response) == read


def test_mending_half_characters_takes_time_linear_in_the_text() -> None:
    # A pattern that backtracks would not come back from this.
    body = b'{"data":"' + rb"\\" * 200_000 + rb"\ud83d" * 50_000 + b'"}'

    packet = codec.decode_packet(body)

    assert codec.decode(packet.data) == "\\" * 200_000 + "\ufffd" * 50_000


def test_a_reply_may_hold_more_keys_than_it_should() -> None:
    reply = codec.decode_reply(b'{"id":"1","response":{"a":1},"isDisposed":true,"status":"x","trace":[]}')

    assert (reply.id, bytes(reply.response), reply.is_disposed, reply.err) == ("1", b'{"a":1}', True, None)


# Payloads


@pytest.mark.parametrize(
    ("annotation", "raw", "value"),
    [
        (Any, b'{"a":[1,null]}', {"a": [1, None]}),
        (int, b"5", 5),
        (list[int], b"[1,2]", [1, 2]),
        (Point, b'{"x":1,"unknown":2}', Point(1)),
        (Place, b'{"city":"Rome"}', {"city": "Rome"}),
        (Order, b'{"orderLines":[{"product":"tea"}]}', Order([Line("tea")])),
        (Line | None, b"null", None),
    ],
)
def test_a_payload_becomes_what_the_annotation_says(annotation: Any, raw: bytes, value: Any) -> None:
    assert codec.decoder(annotation)(Raw(raw)) == value


@pytest.mark.parametrize(
    ("raw", "pointer"),
    [
        (b'{"orderLines":[{"product":"tea"},{"product":5}]}', "/orderLines/1/product"),
        (b'{"orderLines":[{"product":"tea","quantity":0}]}', "/orderLines/0/quantity"),
        (b'{"orderLines":[{"quantity":1}]}', "/orderLines/0/product"),
        (b'{"orderLines":"none"}', "/orderLines"),
        (b'{"orderLines":[],"byName":{"a":[]}}', "/byName"),
        (b"{}", "/orderLines"),
        (b"[]", ""),
        (b"null", ""),
    ],
)
def test_a_payload_that_does_not_fit_names_the_field(raw: bytes, pointer: str) -> None:
    with pytest.raises(InvalidPayload) as caught:
        codec.decoder(Order)(Raw(raw))

    assert caught.value.status_code == 400
    assert [error["pointer"].removesuffix("/...") for error in caught.value.errors] == [pointer]
    assert caught.value.errors[0]["message"] == caught.value.message
    assert "`" not in caught.value.message


@pytest.mark.parametrize("raw", [b"", b"{", b'"\xff"', b"[" * 100_000])
def test_a_payload_that_is_no_json_is_invalid(raw: bytes) -> None:
    for annotation in (Any, Order):
        with pytest.raises(InvalidPayload):
            codec.decoder(annotation)(Raw(raw))


def test_a_number_beyond_all_numbers_is_invalid() -> None:
    with pytest.raises(InvalidPayload):
        codec.decoder(Any)(Raw(b'{"a":1e400}'))


def test_a_type_that_json_cannot_fill_is_refused_at_once() -> None:
    with pytest.raises(TypeError):
        codec.decoder(dict[bytes | str, complex | Point | Line])
