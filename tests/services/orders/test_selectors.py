"""Reading products and orders."""

from collections.abc import Callable

import pytest
from pytest_django import DjangoAssertNumQueries

from microservices import RpcException
from microservices.ids import uuid7
from orders.contracts import Customer
from orders.models import Order, Product
from orders.selectors import (
    order_get,
    order_list,
    order_list_all,
    order_shown,
    product_get,
    product_list,
    product_list_by_ids,
    product_shown,
)
from orders.services import order_cancel

pytestmark = pytest.mark.django_db(databases=["orders"])

Stock = Callable[..., Product]
Buy = Callable[..., Order]

NOBODY_HAS = [uuid7(), uuid7().upper(), "1", "", "\x00", "ä" * 36]


def test_a_product_is_shown_with_what_can_be_ordered_now(stock: Stock, order: Buy) -> None:
    tea = stock("tea", on_hand=10)
    order(tea, quantity=3)

    shown = product_shown(product_get(product_id=tea.id))

    assert (shown.available, shown.on_hand, shown.reserved) == (7, 10, 3)


@pytest.mark.parametrize("product_id", NOBODY_HAS)
def test_an_id_that_no_product_has_is_not_found(product_id: str) -> None:
    with pytest.raises(RpcException) as refused:
        product_get(product_id=product_id)

    assert (refused.value.status_code, refused.value.code) == (404, "product-not-found")


def test_what_is_not_on_offer_is_nowhere_to_be_found(stock: Stock) -> None:
    old = stock("old", active=False)

    with pytest.raises(RpcException, match="no such product"):
        product_get(product_id=old.id)

    assert product_list().products == []
    assert product_list_by_ids(product_ids=[old.id]) == []


def test_products_are_found_by_ids_in_the_order_asked_without_the_unknown(stock: Stock) -> None:
    tea, cup = stock("tea"), stock("cup")

    found = product_list_by_ids(product_ids=[cup.id, uuid7(), "nonsense", tea.id, cup.id])

    assert found == [cup, tea]


def test_pages_of_products_follow_one_another(stock: Stock) -> None:
    expected = [stock(name).sku for name in ("one", "two", "three", "four", "five")]

    pages = [product_list(limit=2)]
    while cursor := pages[-1].next:
        pages.append(product_list(cursor=cursor, limit=2))

    skus = [[product.sku for product in page.products] for page in pages]
    assert skus == [expected[0:2], expected[2:4], expected[4:]]


@pytest.mark.parametrize("order_id", NOBODY_HAS)
def test_an_id_that_no_order_has_is_not_found(order_id: str) -> None:
    with pytest.raises(RpcException) as refused:
        order_get(order_id=order_id)

    assert (refused.value.status_code, refused.value.code) == (404, "order-not-found")


def test_orders_are_listed_by_user_and_by_status_the_latest_first(stock: Stock, order: Buy) -> None:
    tea = stock("tea")
    ben = Customer(id="ben", name="Ben", email="ben@example.org")
    first, second, third = order(tea), order(tea, customer=ben), order(tea)
    order_cancel(order_id=first.id, reason="test")

    for listed in (lambda **of: order_list(**of).orders, order_list_all):
        assert listed() == [third, second, first]
        assert listed(user_id="ada") == [third, first]
        assert listed(status="cancelled") == [first]
        assert listed(user_id="ben", status="cancelled") == []


def test_pages_of_orders_follow_one_another(stock: Stock, order: Buy) -> None:
    tea = stock("tea")
    expected = [order(tea).number for _ in range(5)][::-1]

    pages = [order_list(limit=2)]
    while cursor := pages[-1].next:
        pages.append(order_list(cursor=cursor, limit=2))

    numbers = [[order.number for order in page.orders] for page in pages]
    assert numbers == [expected[0:2], expected[2:4], expected[4:]]


def test_all_orders_at_once_are_the_latest_that_one_answer_may_hold(
    stock: Stock, order: Buy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orders.selectors.MAX_ALL", 3)
    tea = stock("tea")
    placed = [order(tea) for _ in range(5)]

    assert order_list_all() == placed[:1:-1]


def test_all_orders_at_once_take_two_queries_with_all_lines(
    stock: Stock, order: Buy, django_assert_num_queries: DjangoAssertNumQueries
) -> None:
    tea, cup = stock("tea"), stock("cup")
    for _ in range(3):
        order(tea, cup)

    with django_assert_num_queries(2, using="orders"):
        shown = [order_shown(order) for order in order_list_all()]

    assert [len(order.lines) for order in shown] == [2, 2, 2]


def test_a_page_of_orders_takes_two_queries_with_all_lines(
    stock: Stock, order: Buy, django_assert_num_queries: DjangoAssertNumQueries
) -> None:
    tea, cup = stock("tea"), stock("cup")
    for _ in range(3):
        order(tea, cup)

    with django_assert_num_queries(2, using="orders"):
        shown = [order_shown(order) for order in order_list().orders]

    assert [len(order.lines) for order in shown] == [2, 2, 2]


@pytest.mark.parametrize("listing", [product_list, order_list])
@pytest.mark.parametrize("cursor", ["", "nonsense", "%%%", "ä"])
def test_a_malformed_cursor_is_refused_by_name(listing: Callable[..., object], cursor: str) -> None:
    with pytest.raises(RpcException) as refused:
        listing(cursor=cursor)

    assert [error["pointer"] for error in refused.value.errors] == ["/cursor"]
