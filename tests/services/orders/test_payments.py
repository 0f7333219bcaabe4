"""Placing an order: what happens with each answer of payments, and with none."""

import time
from collections.abc import Callable
from typing import Any

import pytest
from django.db import OperationalError

from microservices import RpcContext, RpcException
from microservices.context import current
from microservices.exceptions import ConnectionLost, DeadlineExceeded, NoHandler, Unavailable
from orders.models import Order, Product, Status
from payments.models import Payment
from payments.provider import FakeProvider

pytestmark = pytest.mark.django_db(databases=["orders", "payments"])

Events = list[tuple[str, dict[str, Any]]]
Stock = Callable[..., Product]
Buy = Callable[..., Order]

AUTHORIZED = {"id": "payment", "status": "authorized", "from_tomorrow": True}
NOT_FOUND = RpcException({"statusCode": 404, "code": "payment-not-found", "message": "There is no such payment."})


def counts(product: Product) -> tuple[int, int]:
    product.refresh_from_db()
    return product.on_hand, product.reserved


def patterns(events: Events) -> list[str]:
    return [pattern for pattern, _ in events]


def test_a_good_token_confirms_the_order_and_takes_the_money(stock: Stock, buy: Buy, told: Events) -> None:
    tea = stock("tea", price=500)

    order = buy(tea, quantity=2)

    payment = Payment.objects.get()
    assert (order.status, order.payment_id) == (Status.CONFIRMED, payment.id)
    assert (payment.status, payment.amount, payment.currency) == ("captured", 1000, "EUR")
    assert (payment.order_id, payment.user_id) == (order.id, "ada")
    assert payment.idempotency_key == f"{order.id}:authorize"
    assert counts(tea) == (8, 0)
    assert patterns(told) == ["order_created", "order_confirmed"]


def test_a_declined_token_cancels_the_order_and_the_caller_hears_why(stock: Stock, buy: Buy, told: Events) -> None:
    tea = stock("tea")

    with pytest.raises(RpcException) as refused:
        buy(tea, token="tok_declined")

    order = Order.objects.get()
    assert (refused.value.status_code, refused.value.code) == (402, "payment-declined")
    assert refused.value.error["order_id"] == order.id
    assert [(error["pointer"], error["code"]) for error in refused.value.errors] == [
        ("/payment_token", "insufficient_funds")
    ]
    assert (order.status, order.cancel_reason) == (Status.CANCELLED, "payment-declined")
    assert counts(tea) == (10, 0)
    assert patterns(told) == ["order_created", "order_cancelled"]


def test_an_answer_that_is_lost_is_asked_for_and_the_money_is_taken_once(stock: Stock, buy: Buy) -> None:
    tea = stock("tea")

    order = buy(tea, token="tok_lost_reply")

    payment = Payment.objects.get()
    assert (order.status, order.payment_id) == (Status.CONFIRMED, payment.id)
    assert payment.status == "captured"


def test_a_sequence_that_has_begun_is_ended_though_its_caller_has_given_up(
    stock: Stock, buy: Buy, monkeypatch: pytest.MonkeyPatch
) -> None:
    tea = stock("tea")
    caller = RpcContext(service="orders", pattern="create_order", transport="test", side="server")
    caller.cap_deadline(0.1)
    token = current.set(caller)

    order = buy(tea, token="tok_slow")

    current.reset(token)
    assert caller.deadline
    assert caller.deadline < time.monotonic()
    assert order.status == Status.CONFIRMED
    assert Payment.objects.get().status == "captured"


def test_each_step_has_its_own_key(stock: Stock, buy: Buy, payments_answer: Callable[..., Any]) -> None:
    payments = payments_answer(authorize_payment=AUTHORIZED, capture_payment=AUTHORIZED)

    order = buy(stock("tea"))

    assert [(pattern, data["idempotency_key"]) for pattern, data in payments.asked] == [
        ("authorize_payment", f"{order.id}:authorize"),
        ("capture_payment", f"{order.id}:capture"),
    ]


@pytest.mark.parametrize(
    "error", [Unavailable("away"), ConnectionLost(), DeadlineExceeded(), NoHandler(), RpcException()]
)
def test_a_payment_that_was_made_all_the_same_confirms_the_order(
    stock: Stock, buy: Buy, payments_answer: Callable[..., Any], error: RpcException
) -> None:
    payments = payments_answer(
        authorize_payment=error, get_payment_by_key=AUTHORIZED, capture_payment=AUTHORIZED | {"status": "captured"}
    )

    order = buy(stock("tea"))

    assert (order.status, order.payment_id) == (Status.CONFIRMED, "payment")
    assert payments.patterns == ["authorize_payment", "get_payment_by_key", "capture_payment"]


def test_a_payment_that_was_declined_all_the_same_is_a_402(
    stock: Stock, buy: Buy, payments_answer: Callable[..., Any]
) -> None:
    declined = {"id": "payment", "status": "declined", "decline_code": "stolen_card"}
    payments_answer(authorize_payment=DeadlineExceeded(), get_payment_by_key=declined)

    with pytest.raises(RpcException) as refused:
        buy(stock("tea"))

    assert refused.value.status_code == 402
    assert [error["code"] for error in refused.value.errors] == ["stolen_card"]


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (Unavailable("away"), 503, "payment-unavailable"),
        (ConnectionLost(), 503, "payment-unavailable"),
        (DeadlineExceeded(), 504, "payment-timeout"),
        (RpcException({"statusCode": 504, "code": "provider-timeout"}), 504, "payment-timeout"),
        (RpcException({"statusCode": 409, "code": "key-reused"}), 503, "payment-unavailable"),
        (RpcException(), 503, "payment-unavailable"),
    ],
)
@pytest.mark.parametrize("asked", [NOT_FOUND, Unavailable("away"), DeadlineExceeded()])
def test_an_order_of_whose_payment_nobody_knows_is_cancelled(
    stock: Stock,
    buy: Buy,
    told: Events,
    payments_answer: Callable[..., Any],
    error: RpcException,
    status: int,
    code: str,
    asked: RpcException,
) -> None:
    tea = stock("tea")
    payments = payments_answer(authorize_payment=error, get_payment_by_key=asked)

    with pytest.raises(RpcException) as refused:
        buy(tea)

    order = Order.objects.get()
    assert (refused.value.status_code, refused.value.code) == (status, code)
    assert refused.value.error["order_id"] == order.id
    assert (order.status, order.cancel_reason) == (Status.CANCELLED, code)
    assert counts(tea) == (10, 0)
    assert payments.patterns == ["authorize_payment", "get_payment_by_key"]
    assert patterns(told) == ["order_created", "order_cancelled"]


@pytest.mark.parametrize("answer", [{"id": "payment", "status": "voided"}, Unavailable("away"), DeadlineExceeded()])
def test_a_payment_that_is_still_under_way_is_voided_after_the_order_is_cancelled(
    stock: Stock, buy: Buy, payments_answer: Callable[..., Any], answer: Any
) -> None:
    pending = {"id": "payment", "status": "pending"}
    payments = payments_answer(authorize_payment=DeadlineExceeded(), get_payment_by_key=pending, void_payment=answer)

    with pytest.raises(RpcException) as refused:
        buy(stock("tea"))

    order = Order.objects.get()
    assert (refused.value.status_code, order.status) == (504, Status.CANCELLED)
    assert payments.asked[-1] == ("void_payment", {"id": "payment", "idempotency_key": f"{order.id}:void"})


@pytest.mark.parametrize("error", [Unavailable("away"), DeadlineExceeded(), RpcException()])
def test_an_order_whose_money_could_not_be_taken_stays_confirmed(
    stock: Stock,
    buy: Buy,
    payments_answer: Callable[..., Any],
    caplog: pytest.LogCaptureFixture,
    error: RpcException,
) -> None:
    tea = stock("tea")
    payments_answer(authorize_payment=AUTHORIZED, capture_payment=error)

    order = buy(tea)

    assert order.status == Status.CONFIRMED
    assert counts(tea) == (9, 0)
    assert "was not captured" in caplog.text


def test_an_order_that_cannot_be_confirmed_gives_money_and_stock_back(
    stock: Stock, buy: Buy, provider: FakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    tea = stock("tea")

    def locked(**_: object) -> None:
        raise OperationalError("database is locked")

    monkeypatch.setattr("orders.services.order_confirm", locked)

    with pytest.raises(OperationalError):
        buy(tea)

    assert Order.objects.get().status == Status.CANCELLED
    assert Payment.objects.get().status == "voided"
    assert counts(tea) == (10, 0)


def test_an_order_is_not_left_pending_by_an_error_that_nobody_foresaw(
    stock: Stock, buy: Buy, payments_answer: Callable[..., Any]
) -> None:
    payments_answer(authorize_payment=ZeroDivisionError())

    with pytest.raises(ZeroDivisionError):
        buy(stock("tea"))

    order = Order.objects.get()
    assert (order.status, order.cancel_reason) == (Status.CANCELLED, "internal")


def test_nothing_is_paid_for_what_is_out_of_stock(stock: Stock, buy: Buy, payments_answer: Callable[..., Any]) -> None:
    payments = payments_answer()

    with pytest.raises(RpcException, match="not enough"):
        buy(stock("tea", on_hand=0))

    assert payments.asked == []
