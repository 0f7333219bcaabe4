"""The doors of the orders service: what they take and what they hand out."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from microservices import RpcContext
from microservices.stubs import proto_files
from orders import handlers
from orders.contracts import CancelOrder, CreateOrder, FindOrders, GetOrder, GetOrders, GetProduct, GetProducts
from orders.models import Product

Stock = Callable[..., Product]
Events = list[tuple[str, dict[str, Any]]]

CUSTOMER = {"id": "ada", "name": "Ada", "email": "ada@example.org"}
CREATE = {"customer": CUSTOMER, "lines": [{"product_id": "x", "quantity": 1}], "payment_token": "tok_ok"}


def ask(handler: Callable[..., Any], shape: type, data: dict[str, Any]) -> Any:
    """Call a handler as the toolkit would: JSON in, JSON out."""
    context = RpcContext(service="orders", pattern=handler.__name__, transport="test", side="server")
    payload: Any = msgspec.json.decode(msgspec.json.encode(data), type=shape)
    return msgspec.json.decode(msgspec.json.encode(handler(payload, context)))


@pytest.mark.django_db(databases=["orders", "payments"])
def test_a_placed_order_is_shown_with_lines_and_customer(stock: Stock, told: Events) -> None:
    tea = stock("tea", price=500)

    shown = ask(handlers.create_order, CreateOrder, CREATE | {"lines": [{"product_id": tea.id, "quantity": 2}]})

    line = {
        "product_id": tea.id,
        "sku": "tea",
        "name": "tea",
        "unit_price": 500,
        "quantity": 2,
        "line_total": 1000,
    }
    assert (shown["status"], shown["total"], shown["currency"]) == ("confirmed", 1000, "EUR")
    assert (shown["lines"], shown["customer"]) == ([line], CUSTOMER)
    assert shown["confirmed_at"].endswith("Z")
    assert shown == ask(handlers.get_order, GetOrder, {"id": shown["id"]})
    assert shown == ask(handlers.get_orders, GetOrders, {"user_id": "ada", "status": "confirmed"})["orders"][0]
    assert set(told[-1][1]) == set(shown)


@pytest.mark.django_db(databases=["orders", "payments"])
@pytest.mark.parametrize(("given", "kept"), [({}, "customer"), ({"reason": None}, "customer"), ({"reason": "x"}, "x")])
def test_an_order_that_is_called_off_is_shown_as_it_stands_then(stock: Stock, given: dict[str, Any], kept: str) -> None:
    placed = ask(handlers.create_order, CreateOrder, CREATE | {"lines": [{"product_id": stock("t").id, "quantity": 2}]})

    shown = ask(handlers.cancel_order, CancelOrder, {"id": placed["id"], **given})

    assert (shown["status"], shown["cancel_reason"], shown["refunded"]) == ("cancelled", kept, shown["total"])
    assert shown["cancelled_at"].endswith("Z")
    assert shown == ask(handlers.get_order, GetOrder, {"id": placed["id"]})


@pytest.mark.django_db(databases=["orders", "payments"])
def test_all_orders_are_given_at_once_by_user_and_status(stock: Stock) -> None:
    create = CREATE | {"lines": [{"product_id": stock("tea").id, "quantity": 1}]}
    ben = {"id": "ben", "name": "Ben", "email": "ben@example.org"}
    one, other = (ask(handlers.create_order, CreateOrder, create | {"customer": who}) for who in (CUSTOMER, ben))

    everything = ask(handlers.find_all, FindOrders, {})
    of_ben = ask(handlers.find_all, FindOrders, {"user_id": "ben", "status": "confirmed"})
    nothing = ask(handlers.find_all, FindOrders, {"user_id": "ben", "status": "cancelled"})

    assert (everything, of_ben, nothing) == ([other, one], [other], [])


@pytest.mark.django_db(databases=["orders", "payments"])
def test_an_order_is_the_message_of_the_proto_file_field_by_field(stock: Stock) -> None:
    message = proto_files().method("OrdersService/CancelOrder").response
    placed = ask(handlers.create_order, CreateOrder, CREATE | {"lines": [{"product_id": stock("t").id, "quantity": 2}]})
    order = ask(handlers.cancel_order, CancelOrder, {"id": placed["id"]})

    travelled = message.decode(message.encode(order, strict=True), nulls=True)

    assert travelled == order


@pytest.mark.django_db(databases=["orders"])
def test_products_are_given_by_page_or_by_their_ids(stock: Stock) -> None:
    tea, cup = stock("tea"), stock("cup")

    page = ask(handlers.get_products, GetProducts, {"limit": 1})
    batch = ask(handlers.get_products, GetProducts, {"ids": [cup.id, tea.id]})
    none = ask(handlers.get_products, GetProducts, {"ids": []})

    assert [product["id"] for product in page["products"]] == [tea.id]
    assert page["next"]
    assert [product["id"] for product in batch["products"]] == [cup.id, tea.id]
    assert none == {"products": [], "next": None}
    assert batch["products"][1] == ask(handlers.get_product, GetProduct, {"id": tea.id})


@pytest.mark.parametrize(
    ("shape", "data"),
    [
        (CreateOrder, CREATE | {"lines": []}),
        (CreateOrder, CREATE | {"lines": CREATE["lines"] * 51}),
        (CreateOrder, CREATE | {"lines": [{"product_id": "x", "quantity": 0}]}),
        (CreateOrder, CREATE | {"lines": [{"product_id": "x", "quantity": 1001}]}),
        (CreateOrder, CREATE | {"lines": [{"product_id": "x", "quantity": "1"}]}),
        (CreateOrder, CREATE | {"lines": [{"product_id": "\x00", "quantity": 1}]}),
        (CreateOrder, CREATE | {"customer": CUSTOMER | {"email": "ada@example.org\nBcc: ben@example.org"}}),
        (CreateOrder, CREATE | {"customer": CUSTOMER | {"name": ""}}),
        (CreateOrder, CREATE | {"payment_token": ""}),
        (CreateOrder, {"lines": CREATE["lines"], "payment_token": "tok_ok"}),
        (GetProducts, {"ids": ["x"] * 101}),
        (GetProducts, {"limit": 0}),
        (GetOrders, {"status": "lost"}),
        (GetOrders, {"user_id": "\x00"}),
        (GetOrder, {}),
        (FindOrders, {"status": "lost"}),
        (FindOrders, {"user_id": ""}),
        (CancelOrder, {}),
        (CancelOrder, {"id": "x", "reason": ""}),
        (CancelOrder, {"id": "x", "reason": "x" * 51}),
        (CancelOrder, {"id": "x", "reason": "mine\nBcc: all"}),
    ],
)
def test_a_payload_that_does_not_fit_is_refused(shape: type, data: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(data, shape)


@pytest.mark.parametrize("shape", [CreateOrder, CancelOrder, FindOrders, GetOrder, GetOrders, GetProduct, GetProducts])
def test_fields_that_a_caller_of_another_day_sends_are_ignored(shape: type) -> None:
    assert msgspec.convert(CREATE | {"id": "x", "from_tomorrow": True}, shape)
