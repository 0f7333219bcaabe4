"""Products, payments and a bus to test orders with."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from microservices.executor import lending
from orders.contracts import Customer, Item
from orders.models import Order, Product
from orders.services import order_create, order_place
from payments.provider import FakeProvider

Events = list[tuple[str, dict[str, Any]]]
Stock = Callable[..., Product]
Buy = Callable[..., Order]

ADA = Customer(id="ada", name="Ada", email="ada@example.org")


class PaymentsDouble:
    """Stands in for the payments service: answers each pattern as told, and notes what it was asked."""

    def __init__(self, answers: dict[str, Any]) -> None:
        self.answers = answers
        self.asked: list[tuple[str, dict[str, Any]]] = []

    def send(self, pattern: dict[str, str], data: dict[str, Any], *, returns: Any, timeout: float) -> Any:
        assert timeout > 0
        self.asked.append((pattern["cmd"], data))
        answer = self.answers[pattern["cmd"]]
        if isinstance(answer, Exception):
            raise answer
        return msgspec.convert(answer, returns)

    @property
    def patterns(self) -> list[str]:
        return [pattern for pattern, _ in self.asked]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # The handlers of payments run in the test's thread, and so in its transaction.
    with lending():
        yield


@pytest.fixture(autouse=True)
def provider(monkeypatch: pytest.MonkeyPatch) -> FakeProvider:
    """Give payments a provider of their own."""
    fake = FakeProvider()
    fake.slowness = 0.3
    monkeypatch.setattr("payments.services.get_provider", lambda: fake)
    return fake


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> Events:
    """Note what orders announce; what payments announce is their own matter."""
    events: Events = []

    def emit_on_commit(pattern: str, data: msgspec.Struct, *, using: str) -> None:
        assert using == "orders"
        events.append((pattern, msgspec.to_builtins(data)))

    monkeypatch.setattr("orders.services.emit_on_commit", emit_on_commit)
    monkeypatch.setattr("payments.services.emit_on_commit", lambda *_, **__: None)
    return events


@pytest.fixture
def payments_answer(monkeypatch: pytest.MonkeyPatch) -> Callable[..., PaymentsDouble]:
    """Put a double in the place of payments."""

    def payments_answer(**answers: Any) -> PaymentsDouble:
        double = PaymentsDouble(answers)
        monkeypatch.setattr("orders.payments.clients", {"payments": SimpleNamespace(sync=double)})
        return double

    return payments_answer


@pytest.fixture
def stock() -> Stock:
    """Put a product into stock, by its name."""

    def stock(name: str, on_hand: int = 10, **fields: Any) -> Product:
        values = {"sku": name, "name": name, "price": 1000, "currency": "EUR"} | fields
        return Product.objects.create(on_hand=on_hand, **values)

    return stock


@pytest.fixture
def order() -> Buy:
    """Store a pending order of some of each product."""

    def order(*products: Product, quantity: int = 1, customer: Customer = ADA) -> Order:
        lines = [Item(product_id=product.id, quantity=quantity) for product in products]
        return order_create(customer=customer, lines=lines)

    return order


@pytest.fixture
def buy() -> Buy:
    """Order some of each product and pay with a token."""

    def buy(*products: Product, quantity: int = 1, token: str = "tok_ok") -> Order:  # noqa: S107 - a card to try with
        lines = [Item(product_id=product.id, quantity=quantity) for product in products]
        return order_place(customer=ADA, lines=lines, payment_token=token)

    return buy
