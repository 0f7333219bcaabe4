"""The doors of the payments service: what they take and what they hand out."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from microservices import RpcContext
from microservices.stubs import proto_files
from payments import handlers
from payments.contracts import (
    AuthorizePayment,
    CapturePayment,
    GetPayment,
    GetPaymentByKey,
    GetPayments,
    RefundPayment,
    VoidPayment,
)

AUTHORIZE = {
    "order_id": "order",
    "user_id": "ada",
    "amount": 1250,
    "currency": "EUR",
    "payment_token": "tok_ok",
    "idempotency_key": "order:authorize",
}
REFUND = {"id": "x", "amount": 250, "idempotency_key": "refund"}


def ask(handler: Callable[..., Any], shape: type, data: dict[str, Any]) -> Any:
    """Call a handler as the toolkit would: JSON in, JSON out."""
    context = RpcContext(service="payments", pattern=handler.__name__, transport="test", side="server")
    payload: Any = msgspec.json.decode(msgspec.json.encode(data), type=shape)
    return msgspec.json.decode(msgspec.json.encode(handler(payload, context)))


@pytest.mark.django_db(databases=["payments"])
def test_a_payment_is_shown_without_token_key_and_reference() -> None:
    shown = ask(handlers.authorize_payment, AuthorizePayment, AUTHORIZE)

    assert set(shown) == {
        "id",
        "order_id",
        "user_id",
        "amount",
        "currency",
        "status",
        "decline_code",
        "authorized_at",
        "captured_at",
        "created_at",
    }
    assert shown == ask(handlers.get_payment, GetPayment, {"id": shown["id"]})
    assert shown == ask(handlers.get_payment_by_key, GetPaymentByKey, {"idempotency_key": "order:authorize"})
    assert shown == ask(handlers.get_payments, GetPayments, {"order_id": "order"})["payments"][0]


@pytest.mark.django_db(databases=["payments"])
def test_money_is_taken_or_let_go_by_the_id_of_the_payment() -> None:
    one = ask(handlers.authorize_payment, AuthorizePayment, AUTHORIZE)
    two = ask(handlers.authorize_payment, AuthorizePayment, AUTHORIZE | {"idempotency_key": "another"})

    captured = ask(handlers.capture_payment, CapturePayment, {"id": one["id"], "idempotency_key": "capture"})
    voided = ask(handlers.void_payment, VoidPayment, {"id": two["id"], "idempotency_key": "void"})

    assert (captured["status"], voided["status"]) == ("captured", "voided")
    assert captured["captured_at"].endswith("Z")


@pytest.mark.django_db(databases=["payments"])
def test_a_refund_is_the_message_of_the_proto_file_field_by_field() -> None:
    message = proto_files().method("PaymentsService/Refund").response
    payment = ask(handlers.authorize_payment, AuthorizePayment, AUTHORIZE)
    ask(handlers.capture_payment, CapturePayment, {"id": payment["id"], "idempotency_key": "capture"})

    refund = ask(handlers.refund_payment, RefundPayment, REFUND | {"id": payment["id"]})

    assert set(refund) == {"payment", "refund_id", "amount", "status"}
    assert (refund["amount"], refund["status"]) == (250, "done")
    assert refund["payment"] == ask(handlers.get_payment, GetPayment, {"id": payment["id"]})
    assert refund["payment"]["status"] == "part_refunded"
    assert refund == message.decode(message.encode(refund, strict=True), nulls=True)


@pytest.mark.parametrize(
    ("shape", "data"),
    [
        (AuthorizePayment, AUTHORIZE | {"amount": 0}),
        (AuthorizePayment, AUTHORIZE | {"amount": 12.5}),
        (AuthorizePayment, AUTHORIZE | {"amount": 2**53}),
        (AuthorizePayment, AUTHORIZE | {"currency": "eur"}),
        (AuthorizePayment, AUTHORIZE | {"currency": "EUR\n"}),
        (AuthorizePayment, AUTHORIZE | {"order_id": ""}),
        (AuthorizePayment, AUTHORIZE | {"payment_token": "\x00"}),
        (AuthorizePayment, AUTHORIZE | {"idempotency_key": "k" * 101}),
        (CapturePayment, {"id": "x"}),
        (VoidPayment, {"idempotency_key": "x"}),
        (RefundPayment, REFUND | {"amount": 0}),
        (RefundPayment, REFUND | {"amount": 2**53}),
        (RefundPayment, REFUND | {"idempotency_key": ""}),
        (RefundPayment, REFUND | {"reason": "x" * 201}),
        (RefundPayment, REFUND | {"reason": "\x00"}),
        (RefundPayment, {"id": "x", "amount": 1}),
        (GetPayments, {"limit": 101}),
        (GetPayments, {"user_id": "\x00"}),
    ],
)
def test_a_payload_that_does_not_fit_is_refused(shape: type, data: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(data, shape)


@pytest.mark.parametrize(
    "shape",
    [AuthorizePayment, CapturePayment, VoidPayment, RefundPayment, GetPayment, GetPaymentByKey, GetPayments],
)
def test_fields_that_a_caller_of_another_day_sends_are_ignored(shape: type) -> None:
    assert msgspec.convert(AUTHORIZE | {"id": "x", "from_tomorrow": True}, shape)
