"""Changing orders and the stock that they take."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from django.db import IntegrityError, transaction

from microservices import RpcException
from microservices.ids import uuid7
from orders.contracts import Customer, Item
from orders.models import Order, OrderLine, OrderSequence, Product, Reservation, State, Status
from orders.services import order_cancel, order_confirm, order_create, order_place

pytestmark = pytest.mark.django_db(databases=["orders"])

Events = list[tuple[str, dict[str, Any]]]
Stock = Callable[..., Product]
Buy = Callable[..., Order]
AtOnce = Callable[..., list[Any]]

ADA = Customer(id="ada", name="Ada", email="ada@example.org")


def counts(product: Product) -> tuple[int, int]:
    product.refresh_from_db()
    return product.on_hand, product.reserved


def patterns(events: Events) -> list[str]:
    return [pattern for pattern, _ in events]


def test_a_new_order_is_pending_and_holds_its_stock_for_a_while(stock: Stock, order: Buy, told: Events) -> None:
    tea, cup = stock("tea", price=500), stock("cup", price=1500)

    placed = order(tea, cup, quantity=2)

    held = list(placed.reservations.values_list("product_id", "quantity", "state"))
    assert (placed.status, placed.total, placed.currency, placed.version) == (Status.PENDING, 4000, "EUR", 1)
    assert (placed.user_id, placed.customer_name, placed.customer_email) == ("ada", "Ada", "ada@example.org")
    assert [counts(tea), counts(cup)] == [(10, 2), (10, 2)]
    assert held == [(tea.id, 2, State.HELD), (cup.id, 2, State.HELD)]
    assert {held.expires_at - placed.placed_at for held in placed.reservations.all()} == {timedelta(minutes=15)}
    assert [(pattern, data["id"], len(data["lines"])) for pattern, data in told] == [("order_created", placed.id, 2)]


def test_the_lines_are_copies_that_a_change_of_price_does_not_reach(stock: Stock, order: Buy) -> None:
    tea = stock("tea", price=500)
    placed = order(tea, quantity=3)

    Product.objects.filter(pk=tea.pk).update(name="Other", price=9999)

    line = placed.lines.get()
    assert (line.product_id, line.name, line.unit_price, line.quantity, line.line_total) == (
        tea.id,
        "tea",
        500,
        3,
        1500,
    )


def test_orders_are_numbered_by_year_without_gaps(stock: Stock, order: Buy) -> None:
    tea = stock("tea")
    first = order(tea)
    with pytest.raises(RpcException):
        order(tea, quantity=1000)

    second = order(tea)

    year = first.placed_at.year
    assert [first.number, second.number] == [f"{year}-000001", f"{year}-000002"]


def test_another_year_begins_with_one(stock: Stock, order: Buy) -> None:
    OrderSequence.objects.create(year=1999, last=41)

    placed = order(stock("tea"))

    assert placed.number.endswith("-000001")


def test_what_is_out_of_stock_is_named_line_by_line_and_nothing_is_stored(
    stock: Stock, order: Buy, told: Events
) -> None:
    tea, cup, pot = stock("tea"), stock("cup", on_hand=1), stock("pot", on_hand=0)

    with pytest.raises(RpcException) as refused:
        order(cup, tea, pot, quantity=2)

    assert (refused.value.status_code, refused.value.code) == (409, "out-of-stock")
    named = [(error["pointer"], error["available"]) for error in refused.value.errors]
    assert named == [("/lines/0", 1), ("/lines/2", 0)]
    assert (Order.objects.count(), Reservation.objects.count(), OrderSequence.objects.count()) == (0, 0, 0)
    assert counts(tea) == (10, 0)
    assert told == []


def test_what_others_hold_is_not_available(stock: Stock, order: Buy) -> None:
    tea = stock("tea", on_hand=3)
    order(tea, quantity=2)

    with pytest.raises(RpcException) as refused:
        order(tea, quantity=2)

    assert [error["available"] for error in refused.value.errors] == [1]


def test_two_lines_of_one_product_share_its_stock(stock: Stock, order: Buy) -> None:
    tea = stock("tea", on_hand=3)

    with pytest.raises(RpcException) as refused:
        order(tea, tea, quantity=2)

    assert [error["pointer"] for error in refused.value.errors] == ["/lines/1"]


def test_products_that_are_not_on_offer_are_named_line_by_line(stock: Stock) -> None:
    tea, old = stock("tea"), stock("old", active=False)
    wanted = [Item(product_id=id, quantity=1) for id in (old.id, tea.id, uuid7(), "nonsense")]

    with pytest.raises(RpcException) as refused:
        order_create(customer=ADA, lines=wanted)

    assert (refused.value.status_code, refused.value.code) == (400, "unknown-product")
    assert [error["pointer"] for error in refused.value.errors] == [f"/lines/{n}/product_id" for n in (0, 2, 3)]
    assert counts(tea) == (10, 0)


def test_an_order_is_in_one_currency(stock: Stock, order: Buy) -> None:
    tea, cup = stock("tea"), stock("cup", currency="USD")

    with pytest.raises(RpcException) as refused:
        order(tea, cup)

    assert (refused.value.status_code, refused.value.code) == (400, "mixed-currencies")
    assert counts(tea) == (10, 0)


def test_a_confirmed_order_has_its_stock_for_good(stock: Stock, order: Buy, told: Events) -> None:
    tea = stock("tea")
    placed = order(tea, quantity=4)

    confirmed = order_confirm(order_id=placed.id, payment_id="payment")

    confirmed.refresh_from_db()
    assert (confirmed.status, confirmed.payment_id, confirmed.version) == (Status.CONFIRMED, "payment", 2)
    assert confirmed.confirmed_at
    assert counts(tea) == (6, 0)
    assert confirmed.reservations.get().state == State.COMMITTED
    assert patterns(told) == ["order_created", "order_confirmed"]


def test_a_cancelled_order_gives_its_stock_back(stock: Stock, order: Buy, told: Events) -> None:
    tea = stock("tea")
    placed = order(tea, quantity=4)

    cancelled = order_cancel(order_id=placed.id, reason="payment-declined")

    cancelled.refresh_from_db()
    assert (cancelled.status, cancelled.cancel_reason, cancelled.version) == (Status.CANCELLED, "payment-declined", 2)
    assert cancelled.cancelled_at
    assert counts(tea) == (10, 0)
    assert cancelled.reservations.get().state == State.RELEASED
    assert [data["cancel_reason"] for _, data in told] == [None, "payment-declined"]


def test_only_a_pending_order_is_confirmed_or_cancelled(stock: Stock, order: Buy) -> None:
    tea = stock("tea")
    cancelled = order_cancel(order_id=order(tea).id, reason="test")
    confirmed = order_confirm(order_id=order(tea).id, payment_id="payment")

    for placed, state in ((cancelled, "cancelled"), (confirmed, "confirmed")):
        with pytest.raises(RpcException) as refused:
            order_confirm(order_id=placed.id, payment_id="payment")
        with pytest.raises(RpcException):
            order_cancel(order_id=placed.id, reason="test")
        assert (refused.value.status_code, refused.value.error["state"]) == (409, state)

    assert counts(tea) == (9, 0)


@pytest.mark.parametrize("order_id", [uuid7(), "nonsense"])
def test_nobody_changes_an_order_that_is_not_there(order_id: str) -> None:
    with pytest.raises(RpcException) as refused:
        order_cancel(order_id=order_id, reason="test")

    assert refused.value.status_code == 404


@pytest.mark.parametrize("wrong", [{"reserved": 11}, {"on_hand": -1}, {"reserved": -1}, {"price": 0}, {"version": 0}])
def test_the_database_itself_refuses_stock_that_makes_no_sense(stock: Stock, wrong: dict[str, object]) -> None:
    tea = stock("tea")

    with pytest.raises(IntegrityError), transaction.atomic(using="orders"):
        Product.objects.filter(pk=tea.pk).update(**wrong)


@pytest.mark.parametrize("wrong", [{"status": "lost"}, {"version": 0}, {"refunded": 1001}])
def test_the_database_itself_refuses_orders_that_make_no_sense(
    stock: Stock, order: Buy, wrong: dict[str, object]
) -> None:
    placed = order(stock("tea"))

    with pytest.raises(IntegrityError), transaction.atomic(using="orders"):
        Order.objects.filter(pk=placed.pk).update(**wrong)


def test_an_order_that_cannot_be_stored_whole_is_not_stored(
    stock: Stock, order: Buy, monkeypatch: pytest.MonkeyPatch
) -> None:
    tea = stock("tea")

    def full(*_: object) -> None:
        raise IntegrityError("disk full")

    monkeypatch.setattr(OrderLine.objects, "bulk_create", full)

    with pytest.raises(IntegrityError):
        order(tea)

    assert Order.objects.count() == 0
    assert counts(tea) == (10, 0)


@pytest.mark.django_db(databases=["orders"], transaction=True)
def test_a_service_refuses_to_run_inside_another_transaction(stock: Stock, order: Buy) -> None:
    tea = stock("tea")

    with pytest.raises(RuntimeError, match="durable"), transaction.atomic(using="orders"):
        order(tea)


@pytest.mark.django_db(databases=["orders", "payments"], transaction=True)
def test_fifty_buyers_at_once_of_thirty_pieces_get_exactly_thirty(
    at_once: AtOnce, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is tested is the stock, not who is fast enough.
    monkeypatch.setattr("orders.payments.AUTHORIZE_TIMEOUT", 30)
    [tea] = at_once(lambda: Product.objects.create(sku="tea", name="tea", price=500, currency="EUR", on_hand=30))

    def buy() -> str:
        return order_place(customer=ADA, lines=[Item(product_id=tea.id, quantity=1)], payment_token="tok_ok").number

    outcomes = at_once(*[buy] * 50)

    numbers = sorted(outcome for outcome in outcomes if outcome != "out-of-stock")
    [rest] = at_once(lambda: counts(tea))
    [stored] = at_once(lambda: list(Order.objects.values_list("status", flat=True)))
    assert [number.partition("-")[2] for number in numbers] == [f"{n:06}" for n in range(1, 31)]
    assert rest == (0, 0)
    assert stored == [Status.CONFIRMED] * 30
