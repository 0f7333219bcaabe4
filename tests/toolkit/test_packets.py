"""Packets as they are written, and the route that a pattern stands for."""

import json
import math
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from msgspec import UNSET

from microservices.exceptions import PacketError
from microservices.packets import Event, Request, Response, pattern_name, route, route_in_text, route_on_wire

RECORDED = json.loads((Path(__file__).parent / "golden" / "patterns.json").read_text())


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: json.dumps(case["pattern"])[:60])
def test_a_route_is_what_nestjs_makes_of_the_pattern(case: dict[str, Any]) -> None:
    text = route(case["pattern"])

    assert text == case["route"]


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: json.dumps(case["pattern"])[:60])
def test_a_pattern_on_the_wire_has_the_same_route(case: dict[str, Any]) -> None:
    on_wire = json.dumps(case["pattern"], ensure_ascii=False, indent=1).encode()

    if isinstance(case["pattern"], str):  # a text is read as JSON where it is JSON
        assert route_on_wire(on_wire) == route_in_text(case["route"])
    else:
        assert route_on_wire(on_wire) == case["route"]


@pytest.mark.parametrize("pattern", [None, True, False])
def test_what_can_never_match_has_no_route(pattern: Any) -> None:
    assert route(pattern) is None
    assert route_on_wire(json.dumps(pattern).encode()) is None


@pytest.mark.parametrize("pattern", [b"bytes", {1}, object()])
def test_what_is_no_pattern_is_an_error(pattern: Any) -> None:
    with pytest.raises(PacketError, match="is no pattern"):
        route(pattern)


@pytest.mark.parametrize("raw", [b"", b"{", b"{'a':1}", b'"\xff"', b"NaN", b"[" * 100_000, b"1" * 5000])
def test_bytes_that_hold_no_pattern_have_no_route(raw: bytes) -> None:
    assert route_on_wire(raw) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{ "b" : 1, "a": "x" }', '{"a":"x","b":1}'),
        ("5.0", "5"),
        ("1e3", "1000"),
        ("-0", "0"),
        (" 7", "7"),
        ('"quoted"', "quoted"),
        ("[1,2]", '{"0":1,"1":2}'),
        ("null", None),
        ("true", None),
        ("false", None),
        ("05", "05"),
        ('{"a":1', '{"a":1'),
        ("users.created", "users.created"),
        ("", ""),
        ("nothing", "nothing"),
        ("é", "é"),
    ],
)
def test_a_text_is_read_as_json_where_it_is_json(text: str, expected: str | None) -> None:
    assert route_in_text(text) == expected


def test_lists_tuples_and_objects_of_their_indices_are_one_pattern() -> None:
    assert route([1, "a"]) == route((1, "a")) == route({"0": 1, "1": "a"}) == '{"0":1,"1":"a"}'


def test_the_order_of_keys_makes_no_difference() -> None:
    keys = ["cmd", "Cmd", "version", "_a", "a b", "10", "9"]

    routes = {route(dict.fromkeys(order, 1)) for order in (keys, keys[::-1], sorted(keys))}

    assert routes == {'{"_a":1,"10":1,"9":1,"a b":1,"cmd":1,"Cmd":1,"version":1}'}


# The order of keys, by the rules of nest-wire.md section 2

PRINTABLE = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=8)
PUNCTUATION = " _-,;:!?.'\"()[]{}@*/\\&#%`^+<=>|~$"
DIGITS = "0123456789"
LETTERS = "aAbBcCxXyYzZ"


def first(*keys: str) -> str:
    """Return which of different keys comes first in a route."""
    return str(next(iter(json.loads(str(route(dict.fromkeys(keys, 0)))))))


@given(st.lists(PRINTABLE, max_size=20, unique=True), st.randoms(use_true_random=False))
@settings(derandomize=True, max_examples=300, deadline=None)
def test_shuffled_keys_give_the_same_route(keys: list[str], source: Random) -> None:
    values = {key: number for number, key in enumerate(keys)}

    assert route({key: values[key] for key in source.sample(keys, len(keys))}) == route(values)


@given(PRINTABLE, PRINTABLE, PRINTABLE)
@settings(derandomize=True, max_examples=500, deadline=None)
def test_keys_are_in_one_order_whatever_stands_beside_them(one: str, two: str, three: str) -> None:
    assume(len({one, two, three}) == 3)
    least = first(one, two, three)

    for pair in ((one, two), (two, three), (one, three)):
        assert first(*pair) == first(*reversed(pair))
        if least in pair:
            assert first(*pair) == least


@given(PRINTABLE, PRINTABLE.filter(bool))
@settings(derandomize=True, max_examples=300, deadline=None)
def test_what_a_key_begins_with_comes_before_it(key: str, rest: str) -> None:
    assert first(key + rest, key) == key


@given(PRINTABLE, PRINTABLE)
@settings(derandomize=True, max_examples=300, deadline=None)
def test_of_keys_that_differ_in_case_alone_lower_comes_before_upper(start: str, end: str) -> None:
    lower, upper = start + "k" + end.lower(), start + "K" + end.upper()

    assert first(upper, lower) == lower
    assert first(start + "K" + end.lower(), start + "k" + end.upper()) == start + "k" + end.upper()


@given(
    PRINTABLE,
    st.sampled_from(PUNCTUATION),
    st.sampled_from(DIGITS),
    st.sampled_from(LETTERS),
    st.lists(PRINTABLE, min_size=3, max_size=3),
)
@settings(derandomize=True, max_examples=500, deadline=None)
def test_punctuation_comes_before_digits_and_these_before_letters(
    start: str, mark: str, digit: str, letter: str, ends: list[str]
) -> None:
    marked, numbered, lettered = (start + char + end for char, end in zip((mark, digit, letter), ends, strict=True))

    assert first(lettered, numbered, marked) == marked
    assert first(lettered, numbered) == numbered


# Numbers, by the rules of ECMA-262 (Number::toString)

FINITE = st.floats(allow_nan=False, allow_infinity=False)


@given(FINITE)
@settings(derandomize=True, max_examples=500, deadline=None)
def test_a_number_is_printed_as_the_shortest_text_that_reads_back(number: float) -> None:
    text = route(number)

    assert text is not None
    assert float(text) == number
    digits = text.lstrip("-").partition("e")[0].replace(".", "").strip("0")
    assert digits == repr(abs(number)).partition("e")[0].replace(".", "").strip("0")


@given(FINITE.filter(bool))
@settings(derandomize=True, max_examples=500, deadline=None)
def test_a_number_has_an_exponent_only_outside_1e_minus_6_to_1e21(number: float) -> None:
    text = str(route(number))

    mantissa, e, exponent = text.partition("e")
    if 1e-6 <= abs(number) < 1e21:
        assert not e
    else:
        assert exponent[0] in "+-"
        assert exponent[1] != "0"
        assert len(mantissa.lstrip("-").partition(".")[0]) == 1
    assert not (mantissa.endswith("0") and "." in mantissa)
    assert not mantissa.endswith(".")


@given(st.integers(-(2**53), 2**53))
@settings(derandomize=True, max_examples=200, deadline=None)
def test_a_safe_integer_is_printed_as_it_is(number: int) -> None:
    assert route(number) == str(number)
    assert route(float(number)) == str(number)


@given(st.integers(2**53, 10**400))
@settings(derandomize=True, max_examples=200, deadline=None)
def test_a_large_integer_is_rounded_as_javascript_rounds_it(number: int) -> None:
    try:
        expected = route(float(number))
    except OverflowError:
        expected = "Infinity"

    assert route(number) == expected


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (math.nan, "NaN"),
        (math.inf, "Infinity"),
        (-math.inf, "-Infinity"),
        (-(10**400), "-Infinity"),
        (5e-324, "5e-324"),
        (1.7976931348623157e308, "1.7976931348623157e+308"),
        (123456789.125, "123456789.125"),
        (0.000001234, "0.000001234"),
        (1.234e-7, "1.234e-7"),
        (1e20, "100000000000000000000"),
        (999999999999999900000, "999999999999999900000"),
        (100, "100"),
        (-1e-7, "-1e-7"),
    ],
)
def test_a_number_at_the_edge_is_printed_as_node_prints_it(number: float, text: str) -> None:
    assert route(number) == text


# Names


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ({"cmd": "get_user"}, "get_user"),
        ({"cmd": "get_user", "v": 2}, "cmd=get_user,v=2"),
        ({"cmd": 5}, "5"),
        ("order_created", "order_created"),
        (7, "7"),
        ({"line": "a\nb"}, '{"line":"a\nb"}'),
        ("{not json", "{not json"),
        ([0] * 21, "[TOO_MANY_KEYS]"),
    ],
)
def test_a_pattern_has_a_short_name_for_people(pattern: Any, name: str) -> None:
    assert pattern_name(str(route(pattern))) == name


# Packets


@pytest.mark.parametrize(
    ("packet", "text"),
    [
        (Request({"cmd": "sum"}, [1], UNSET, "a"), '{"pattern":{"cmd":"sum"},"data":[1],"id":"a"}'),
        (
            Request("sum", None, {"deadline": "5"}, "a"),
            '{"pattern":"sum","data":null,"metadata":{"deadline":"5"},"id":"a"}',
        ),
        (Event("made", {"id": 1}), '{"pattern":"made","data":{"id":1}}'),
        (Response(response=6, is_disposed=True, id="a"), '{"response":6,"isDisposed":true,"id":"a"}'),
        (Response(response=None, is_disposed=True, id="a"), '{"response":null,"isDisposed":true,"id":"a"}'),
        (Response(response=1, id="a"), '{"response":1,"id":"a"}'),
        (Response(is_disposed=True, id="a"), '{"isDisposed":true,"id":"a"}'),
        (Response(err={"code": 1}, is_disposed=True, id="a"), '{"err":{"code":1},"isDisposed":true,"id":"a"}'),
    ],
)
def test_a_packet_is_written_with_nestjs_keys_in_its_order(packet: msgspec.Struct, text: str) -> None:
    assert msgspec.json.encode(packet).decode() == text
