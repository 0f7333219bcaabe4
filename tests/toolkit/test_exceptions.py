"""Errors on the wire: ours, and what foreign ones stand for."""

from typing import Any

import pytest

from microservices.exceptions import (
    INTERNAL,
    ConnectionLost,
    DeadlineExceeded,
    FrameError,
    InvalidPayload,
    MicroserviceError,
    NoHandler,
    PacketError,
    RpcException,
    Unavailable,
)

NO_HANDLER = "There is no matching message handler defined in the remote service."


@pytest.mark.parametrize(
    ("error", "wire"),
    [
        ("boom", {"status": "error", "message": "boom"}),
        (5, {"status": "error", "message": 5}),
        (None, {"status": "error", "message": None}),
        (["a"], {"status": "error", "message": ["a"]}),
        ({"code": 404, "message": "nf", "details": {"a": 1}}, {"code": 404, "message": "nf", "details": {"a": 1}}),
        ({}, {}),
    ],
)
def test_an_error_travels_as_nestjs_sends_it(error: Any, wire: Any) -> None:
    travelled = RpcException(error)

    assert travelled.to_wire() == wire
    assert RpcException.from_wire(wire).error == error


def test_an_unexpected_error_says_nothing() -> None:
    assert RpcException().to_wire() == {"status": "error", "message": "Internal server error"}


def test_no_handler_is_a_text_on_the_wire() -> None:
    assert NoHandler().to_wire() == NO_HANDLER
    assert type(RpcException.from_wire(NO_HANDLER)) is NoHandler


# What a foreign service's `err` stands for


@pytest.mark.parametrize("key", ["statusCode", "status"])
@pytest.mark.parametrize("status", [400, 404, 418, 500, 599])
def test_a_status_between_400_and_599_is_kept(key: str, status: int) -> None:
    assert RpcException.from_wire({key: status, "message": "no"}).status_code == status


@pytest.mark.parametrize("status", [0, 200, 399, 600, -404, "404", 404.0, True, None, [404]])
def test_any_other_status_is_500(status: Any) -> None:
    assert RpcException.from_wire({"statusCode": status, "message": "no"}).status_code == 500


def test_status_code_counts_before_status() -> None:
    assert RpcException.from_wire({"status": 500, "statusCode": 409}).status_code == 409
    assert RpcException.from_wire({"status": "error", "statusCode": 409, "message": "taken"}).status_code == 409


def test_a_list_of_messages_becomes_errors() -> None:
    error = RpcException.from_wire({"statusCode": 400, "message": ["name is empty", "age is negative"], "error": "Bad"})

    assert error.errors == [
        {"pointer": "", "message": "name is empty", "code": "invalid"},
        {"pointer": "", "message": "age is negative", "code": "invalid"},
    ]
    assert error.message == "The data is not valid."
    assert (error.status_code, error.code) == (400, "invalid")


@pytest.mark.parametrize(
    ("err", "status", "code", "message"),
    [
        ({"status": "error", "message": "Forbidden resource"}, 403, "forbidden", "Forbidden resource"),
        ({"status": "error", "message": "Internal server error"}, 500, "internal", "Internal server error"),
        ({"status": "error", "message": "boom"}, 500, "rpc-error", "boom"),
        ("boom", 500, "rpc-error", "boom"),
        ({"status": "error", "message": 5}, 500, "rpc-error", "5"),
        ({"statusCode": 404, "code": "user-not-found", "message": "nf"}, 404, "user-not-found", "nf"),
        ({"statusCode": 404, "message": "Not Found"}, 404, "not-found", "Not Found"),
        ({"statusCode": 409, "code": 11000, "message": "taken"}, 409, "conflict", "taken"),
        ({"statusCode": 429, "message": "slow down"}, 429, "quota", "slow down"),
        ({"code": 404, "message": "nf"}, 500, "rpc-error", "nf"),
        ({"reason": "odd"}, 500, "rpc-error", ""),
        (NO_HANDLER, 502, "no-handler", NO_HANDLER),
        (7, 500, "rpc-error", "7"),
        (["a"], 500, "rpc-error", "The data is not valid."),
    ],
)
def test_a_foreign_error_has_a_status_a_code_and_a_message(err: Any, status: int, code: str, message: str) -> None:
    error = RpcException.from_wire(err)

    assert (error.status_code, error.code, error.message) == (status, code, message)
    assert str(error) == message


def test_only_well_formed_errors_are_listed() -> None:
    error = RpcException({"errors": [{"pointer": "/a", "message": "no", "code": "x"}, "odd", None], "message": ["b"]})

    assert error.errors == [{"pointer": "/a", "message": "no", "code": "x"}]


# Our own


@pytest.mark.parametrize(
    ("error", "status", "code", "retryable"),
    [
        (InvalidPayload("bad", "/a"), 400, "invalid", False),
        (NoHandler(), 502, "no-handler", False),
        (Unavailable("down"), 503, "unavailable", True),
        (Unavailable("full", code="overloaded"), 503, "overloaded", True),
        (ConnectionLost(), 503, "connection-lost", True),
        (DeadlineExceeded(), 504, "deadline-exceeded", True),
        (RpcException({"statusCode": 429}), 429, "quota", True),
        (RpcException("boom"), 500, "rpc-error", False),
        (RpcException(), 500, "internal", False),
    ],
)
def test_each_error_keeps_its_meaning_over_the_wire(
    error: RpcException, status: int, code: str, retryable: bool
) -> None:
    travelled = RpcException.from_wire(error.to_wire())

    for known in (error, travelled):
        assert (known.status_code, known.code, known.retryable) == (status, code, retryable)
        assert (known.message, known.errors) == (error.message, error.errors)


def test_an_invalid_payload_points_at_the_field() -> None:
    error = InvalidPayload("Expected 'int', got 'str'", "/lines/0/quantity")

    assert error.errors == [{"pointer": "/lines/0/quantity", "message": "Expected 'int', got 'str'", "code": "invalid"}]


def test_the_tree_of_errors_is_the_one_that_the_module_draws() -> None:
    tree = {
        PacketError: MicroserviceError,
        FrameError: PacketError,
        RpcException: MicroserviceError,
        InvalidPayload: RpcException,
        NoHandler: RpcException,
        Unavailable: RpcException,
        ConnectionLost: Unavailable,
        DeadlineExceeded: RpcException,
    }

    assert {error: error.__base__ for error in tree} == tree


def test_a_traceback_of_a_service_in_development_is_a_note_and_changes_nothing_else() -> None:
    error = RpcException.from_wire({"status": "error", "message": INTERNAL, "traceback": "ValueError: a bug"})

    assert (error.error, error.code) == (INTERNAL, "internal")
    assert error.__notes__ == ["In the service:\nValueError: a bug"]


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        ({"statusCode": 503}, 1),
        ({"statusCode": 503, "retryAfter": 2.5}, 3),
        ({"statusCode": 429, "retryAfter": 7}, 7),
        ({"statusCode": 429}, None),
        ({"statusCode": 404}, None),
        ({"statusCode": 503, "retryAfter": -1}, 1),
        ({"statusCode": 503, "retryAfter": "soon"}, 1),
        ({"statusCode": 503, "retryAfter": float("nan")}, 1),
        ("text", None),
    ],
)
def test_an_error_may_say_when_the_same_call_may_succeed(error: Any, seconds: int | None) -> None:
    assert RpcException(error).retry_after == seconds
