"""POST /api/orders/{id}/cancel: from the request to the services and back."""

from collections.abc import Iterator
from typing import Any

import pytest
from django.test import Client

from microservices.executor import lending
from microservices.ids import uuid7
from orders.contracts import Customer, Item
from orders.models import Order, Product
from orders.services import order_place

pytestmark = pytest.mark.django_db(databases=["orders", "payments"])

ADA = Customer(id="ada", name="Ada", email="ada@example.org")


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    # The handlers run in the test's thread, and so in its transaction; what they announce is not the matter here.
    for service in ("orders", "payments"):
        monkeypatch.setattr(f"{service}.services.emit_on_commit", lambda *_, **__: None)
    with lending():
        yield


@pytest.fixture
def order() -> Order:
    """A confirmed order over 1000."""
    tea = Product.objects.create(sku="tea", name="tea", price=500, currency="EUR", on_hand=10)
    return order_place(customer=ADA, lines=[Item(product_id=tea.id, quantity=2)], payment_token="tok_ok")


@pytest.mark.parametrize(("body", "reason"), [({}, "customer"), ({"reason": "found it cheaper"}, "found it cheaper")])
def test_a_cancelled_order_is_answered(client: Client, order: Order, body: dict[str, Any], reason: str) -> None:
    answer = client.post(f"/api/orders/{order.id}/cancel", body, content_type="application/json")

    shown = answer.json()
    assert (answer.status_code, shown["id"]) == (200, order.id)
    assert (shown["status"], shown["cancel_reason"], shown["refunded"]) == ("cancelled", reason, 1000)
    assert shown == client.get(f"/api/v1/orders/{order.id}").json()


def test_a_body_is_not_needed(client: Client, order: Order) -> None:
    answer = client.post(f"/api/v1/orders/{order.id}/cancel")

    assert answer.status_code == 200, answer.content


@pytest.mark.parametrize("state", ["shipped", "delivered", "cancelled"])
def test_an_order_that_is_past_that_is_a_problem_with_its_state(client: Client, order: Order, state: str) -> None:
    Order.objects.filter(pk=order.pk).update(status=state)

    answer = client.post(f"/api/orders/{order.id}/cancel")

    problem = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert (answer.status_code, problem["code"], problem["service"]) == (409, "wrong-state", "orders")
    assert state in problem["detail"]
    assert not problem["retryable"]


@pytest.mark.parametrize("body", [{"reason": ""}, {"reason": "x" * 51}, {"reason": ["x"]}])
def test_a_reason_that_does_not_fit_is_pointed_at(client: Client, order: Order, body: dict[str, Any]) -> None:
    answer = client.post(f"/api/orders/{order.id}/cancel", body, content_type="application/json")

    assert (answer.status_code, [error["pointer"] for error in answer.json()["errors"]]) == (400, ["/reason"])
    assert Order.objects.get().status == "confirmed"


def test_an_order_that_is_not_there_is_not_found(client: Client) -> None:
    answer = client.post(f"/api/orders/{uuid7()}/cancel")

    assert (answer.status_code, answer.json()["code"]) == (404, "order-not-found")


@pytest.mark.parametrize("method", ["get", "put", "patch", "delete"])
def test_nothing_but_post_cancels(client: Client, order: Order, method: str) -> None:
    answer = getattr(client, method)(f"/api/orders/{order.id}/cancel")

    assert answer.status_code == 405
    assert Order.objects.get().status == "confirmed"


def test_it_stands_in_the_document(client: Client) -> None:
    document = client.get("/api/openapi.json").json()

    post = document["paths"]["/api/v1/orders/{id}/cancel"]["post"]
    assert (post["summary"], post["tags"]) == ("Cancel an order", ["orders"])
    assert post["responses"]["200"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Order"}
    assert "refunded" in document["components"]["schemas"]["Order"]["properties"]
    assert document["components"]["schemas"]["OrderCancel"].get("required") is None
