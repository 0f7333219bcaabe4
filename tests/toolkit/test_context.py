"""What is known about a message, above all how long it may take."""

import time
from typing import Any

import pytest
from msgspec import Raw

from microservices.context import deadline_on_wire
from microservices.exceptions import DeadlineExceeded
from tests.toolkit.conftest import context


def test_a_message_without_a_deadline_never_expires() -> None:
    unhurried = context()

    unhurried.check_deadline()

    assert unhurried.remaining() is None
    assert not unhurried.expired()


def test_a_deadline_that_has_passed_is_an_error() -> None:
    late = context(deadline=time.monotonic() - 1)

    assert late.remaining() == 0
    assert late.expired()
    with pytest.raises(DeadlineExceeded):
        late.check_deadline()


def test_a_deadline_is_only_ever_brought_forward() -> None:
    hurried = context()

    hurried.cap_deadline(10)
    hurried.cap_deadline(100)

    assert 9 < (hurried.remaining() or 0) <= 10


@pytest.mark.parametrize("deadline", [5, None, {}, "", "-5", "5.5", "²", "٥", "1e3", "9" * 13, "soon"])
def test_nonsense_counts_as_no_deadline(deadline: Any) -> None:
    assert deadline_on_wire({"deadline": deadline}) is None


@pytest.mark.parametrize("metadata", [None, [], "5", {}, ["deadline"]])
def test_metadata_of_another_kind_holds_no_deadline(metadata: Any) -> None:
    assert deadline_on_wire(metadata) is None


def test_a_deadline_travels_as_milliseconds_left() -> None:
    deadline = deadline_on_wire({"deadline": "1500"})

    assert deadline is not None
    assert 1.4 < deadline - time.monotonic() <= 1.5


def test_only_facts_of_the_whole_journey_are_inherited() -> None:
    metadata: dict[str, Any] = {"traceparent": "00-1-2-01", "identity": "ada", "deadline": "5", "source": "gateway"}

    assert context(metadata=metadata).inherited() == {"traceparent": "00-1-2-01", "identity": "ada"}


def test_what_is_no_text_is_not_inherited() -> None:
    assert context(metadata={"traceparent": 5, "tracestate": None, "identity": ["ada"]}).inherited() == {}


@pytest.mark.parametrize(("raw", "id"), [(b'"1a"', "1a"), (b"5", "5"), (b"null", "null"), ('"é"'.encode(), "é")])
def test_an_id_is_shown_as_text(raw: bytes, id: str) -> None:
    assert context(raw_id=Raw(raw)).id == id


def test_an_event_has_no_id() -> None:
    assert context().id is None
