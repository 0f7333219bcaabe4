"""Reading payments."""

from collections.abc import Callable

import pytest

from microservices import RpcException
from microservices.ids import uuid7
from payments.models import Payment
from payments.selectors import payment_get, payment_list

pytestmark = pytest.mark.django_db(databases=["payments"])

Authorize = Callable[..., Payment]


def test_a_payment_is_found_by_id(authorize: Authorize) -> None:
    payment = authorize()

    assert payment_get(payment_id=payment.id) == payment


@pytest.mark.parametrize("payment_id", [uuid7(), uuid7().upper(), "1", "", "\x00"])
def test_an_id_that_no_payment_has_is_not_found_well_formed_or_not(payment_id: str) -> None:
    with pytest.raises(RpcException) as refused:
        payment_get(payment_id=payment_id)

    assert (refused.value.status_code, refused.value.code) == (404, "payment-not-found")


def test_payments_are_listed_by_order_and_by_user(authorize: Authorize) -> None:
    first = authorize(order_id="one", user_id="ada", key="1")
    second = authorize(order_id="two", user_id="ada", key="2")
    third = authorize(order_id="three", user_id="ben", key="3")

    assert payment_list(order_id="two").payments == [second]
    assert payment_list(user_id="ada").payments == [second, first]
    assert payment_list().payments == [third, second, first]
    assert payment_list(order_id="one", user_id="ben").payments == []


def test_pages_follow_one_another_until_all_payments_were_seen_once(authorize: Authorize) -> None:
    expected = [authorize(key=str(number)).id for number in range(5)][::-1]

    pages = [payment_list(limit=2)]
    while cursor := pages[-1].next:
        pages.append(payment_list(cursor=cursor, limit=2))

    seen = [[payment.id for payment in page.payments] for page in pages]
    assert seen == [expected[0:2], expected[2:4], expected[4:]]


@pytest.mark.parametrize("cursor", ["", "nonsense", "%%%", "ä"])
def test_a_malformed_cursor_is_refused_by_name(cursor: str) -> None:
    with pytest.raises(RpcException) as refused:
        payment_list(cursor=cursor)

    assert [error["pointer"] for error in refused.value.errors] == ["/cursor"]
