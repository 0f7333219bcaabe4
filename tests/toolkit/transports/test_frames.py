"""Frames: counted in UTF-16 units, cut out of bytes however they arrive."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microservices.exceptions import FrameError
from microservices.transports.frames import MAX_HEADER, FrameReader, utf16_units
from tests.toolkit.conftest import frame

# Characters of one to four bytes, and those that look like frames.
TEXTS = (
    st.text(st.sampled_from("a#7\x00\u007f\u0080é\u0301\u07ff\u0800漢\u2028\ud7ff\ue000\uffff\U00010000😀\U0010ffff"))
    | st.text()
)
LIMIT = 1000


def cut(data: bytes, sizes: list[int]) -> list[bytes]:
    """Cut bytes into pieces of these sizes, again and again."""
    pieces, at, turn = [], 0, 0
    while at < len(data):
        pieces.append(data[at : at + sizes[turn % len(sizes)]])
        at, turn = at + len(pieces[-1]), turn + 1
    return pieces


def read(reader: FrameReader, pieces: list[bytes]) -> list[bytes]:
    """Feed pieces and return the bodies that come out."""
    bodies = []
    for piece in pieces:
        reader.feed(piece)
        while cut_out := reader.cut(3):
            bodies += cut_out
    return bodies


@given(TEXTS)
@settings(derandomize=True, max_examples=300, deadline=None)
def test_units_are_those_of_utf_16(text: str) -> None:
    assert utf16_units(text.encode()) == len(text.encode("utf-16-le")) // 2


@given(st.lists(TEXTS.filter(bool), max_size=5), st.lists(st.integers(1, 40), min_size=1, max_size=5))
@settings(derandomize=True, max_examples=300, deadline=None)
def test_what_is_sent_is_what_is_read_however_it_is_cut(texts: list[str], sizes: list[int]) -> None:
    sent = [text.encode() for text in texts]
    reader = FrameReader(LIMIT)

    bodies = read(reader, cut(b"".join(map(frame, sent)), sizes))

    assert bodies == sent
    assert not reader.partial


@given(st.binary(max_size=60), st.lists(st.integers(1, 20), min_size=1, max_size=4))
@settings(derandomize=True, max_examples=300, deadline=None)
def test_any_bytes_give_bodies_or_a_frame_error_and_the_same_in_any_pieces(data: bytes, sizes: list[int]) -> None:
    def outcome(pieces: list[bytes]) -> tuple[list[bytes], bool]:
        reader, bodies = FrameReader(LIMIT), []
        try:
            for piece in pieces:
                bodies += read(reader, [piece])
        except FrameError:
            return [], True
        return bodies, False

    assert outcome(cut(b"3#" + data, sizes)) == outcome([b"3#" + data])


@given(TEXTS.filter(bool), st.data())
@settings(derandomize=True, max_examples=200, deadline=None)
def test_a_frame_that_is_not_complete_is_partial(text: str, data: st.DataObject) -> None:
    whole = frame(text.encode())
    reader = FrameReader(LIMIT)

    bodies = read(reader, [whole[: data.draw(st.integers(1, len(whole) - 1))]])

    assert bodies == []
    assert reader.partial


def test_a_reader_that_has_read_nothing_is_not_partial() -> None:
    assert not FrameReader(LIMIT).partial


def test_an_empty_body_is_a_body() -> None:
    reader = FrameReader(LIMIT)

    assert read(reader, [b"0#1#a0#"]) == [b"", b"a", b""]


@pytest.mark.parametrize(
    "header", [b"#", b"a#", b"-1#", b"+1#", b"1.5#", b" 1#", b"1 #", b"1e2#", "²#".encode(), b"\x001#"]
)
def test_a_length_that_is_no_number_is_a_frame_error(header: bytes) -> None:
    with pytest.raises(FrameError, match="Corrupted length value"):
        read(FrameReader(LIMIT), [header + b"{}"])


@pytest.mark.parametrize("pieces", [[b"1" * (MAX_HEADER + 1)], [b"1"] * (MAX_HEADER + 1), [b"x"], [b"1", b"x"], [b"{"]])
def test_a_header_that_cannot_end_well_is_not_waited_for(pieces: list[bytes]) -> None:
    with pytest.raises(FrameError, match="Corrupted length value"):
        read(FrameReader(LIMIT), pieces)


def test_the_longest_header_is_read() -> None:
    assert read(FrameReader(LIMIT), [b"0000000002#{}"]) == [b"{}"]


def test_a_frame_at_the_limit_is_read_and_one_beyond_is_refused_by_its_header() -> None:
    at_limit = "é" * LIMIT

    assert read(FrameReader(LIMIT), [frame(at_limit.encode())]) == [at_limit.encode()]
    with pytest.raises(FrameError, match=r"length \(1001\) exceeds the maximum allowed length \(1000\)"):
        read(FrameReader(LIMIT), [b"1001#"])


def test_a_length_that_ends_inside_a_character_is_a_frame_error() -> None:
    with pytest.raises(FrameError, match="inside a character"):
        read(FrameReader(LIMIT), ["1#😀".encode()])


@pytest.mark.parametrize("text", ["a" * 400_000, "é漢😀" * 50_000])
def test_reading_takes_time_linear_in_the_bytes(text: str) -> None:
    pieces = cut(frame(text.encode()), [7])
    reader = FrameReader(10**6)

    started = time.process_time()
    bodies = read(reader, pieces)

    assert bodies == [text.encode()]
    assert time.process_time() - started < 2  # quadratic, it would take minutes
