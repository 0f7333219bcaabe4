"""A provider and a bus to test payments with."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from payments.models import Payment
from payments.provider import FakeProvider
from payments.services import payment_authorize

Events = list[tuple[str, dict[str, Any]]]
Authorize = Callable[..., Payment]


@pytest.fixture(autouse=True)
def provider(monkeypatch: pytest.MonkeyPatch) -> FakeProvider:
    """Give the service a provider of its own."""
    fake = FakeProvider()
    fake.slowness = 0.01
    monkeypatch.setattr("payments.services.get_provider", lambda: fake)
    return fake


@pytest.fixture(autouse=True)
def told(monkeypatch: pytest.MonkeyPatch) -> Events:
    """Note what the service announces."""
    events: Events = []

    def emit_on_commit(pattern: str, data: msgspec.Struct, *, using: str) -> None:
        assert using == "payments"
        events.append((pattern, msgspec.to_builtins(data)))

    monkeypatch.setattr("payments.services.emit_on_commit", emit_on_commit)
    return events


@pytest.fixture
def authorize() -> Authorize:
    """Authorise a payment; each call names only what matters to it."""

    def authorize(token: str = "tok_ok", **facts: Any) -> Payment:  # noqa: S107 - a card to try with
        order = {"order_id": "order", "user_id": "ada", "amount": 1250, "currency": "EUR", "key": "order:authorize"}
        return payment_authorize(token=token, **(order | facts))

    return authorize
