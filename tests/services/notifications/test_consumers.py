"""The events that the notifications service hears, and what it tells of each."""

from typing import Any

import msgspec
import pytest
from django.core.mail import EmailMessage

from microservices import RpcContext
from microservices.handlers import Handler
from notifications.consumers import NotificationsConsumer
from notifications.models import Channel, Delivery, Notification, Status

pytestmark = pytest.mark.django_db(databases=["notifications"])

ADA = {"id": "ada", "name": "Ada", "email": "ada@example.org", "role": "customer", "status": "active", "version": 1}
ORDER = {
    "id": "order-1",
    "number": "2030-000001",
    "customer": {"id": "ada", "name": "Ada", "email": "ada@example.org"},
    "lines": [{"product_id": "tea", "quantity": 2}],
    "total": 1290,
    "currency": "EUR",
    "cancel_reason": None,
}
PAYMENT = {"id": "payment-1", "order_id": "order-1", "user_id": "ada", "amount": 1290, "currency": "EUR"}


def hear(pattern: str, data: dict[str, Any], **metadata: Any) -> None:
    """Call the method that hears an event as the toolkit would: JSON in."""
    method = getattr(NotificationsConsumer(), pattern)
    context = RpcContext(service="notifications", pattern=pattern, transport="test", side="server", metadata=metadata)
    method(Handler(method).convert(msgspec.Raw(msgspec.json.encode(data))), context)


@pytest.mark.parametrize(
    ("pattern", "data", "title", "said"),
    [
        ("user_created", ADA, "Welcome to the shop", "Hello Ada"),
        ("order_created", ORDER, "Your order 2030-000001", "over 12.90 EUR"),
        ("order_confirmed", ORDER, "Your order 2030-000001 is confirmed", "We are packing it"),
        (
            "order_cancelled",
            ORDER | {"cancel_reason": "payment-declined"},
            "Your order 2030-000001 is cancelled",
            "cancelled: the payment was declined.",
        ),
        ("order_cancelled", ORDER, "Your order 2030-000001 is cancelled", "something went wrong on our side"),
    ],
)
def test_what_happens_to_users_and_orders_goes_to_the_inbox_and_by_e_mail(
    mailoutbox: list[EmailMessage], pattern: str, data: dict[str, Any], title: str, said: str
) -> None:
    hear(pattern, data)

    stored = Notification.objects.get()
    assert (stored.user_id, stored.kind, stored.title, stored.read_at) == ("ada", pattern, title, None)
    assert said in stored.body
    assert [(mail.to, mail.subject, mail.body) for mail in mailoutbox] == [(["ada@example.org"], title, stored.body)]
    assert set(stored.deliveries.values_list("channel", "status", "attempt")) == {
        (Channel.INBOX, Status.SENT, 1),
        (Channel.EMAIL, Status.SENT, 1),
    }


@pytest.mark.parametrize(
    ("pattern", "data", "said"),
    [
        ("payment_captured", PAYMENT, "12.90 EUR"),
        ("payment_failed", PAYMENT | {"decline_code": "insufficient_funds"}, "not enough money"),
    ],
)
def test_what_happens_to_payments_goes_to_the_inbox_alone_for_want_of_an_address(
    mailoutbox: list[EmailMessage], pattern: str, data: dict[str, Any], said: str
) -> None:
    hear(pattern, data)

    stored = Notification.objects.get()
    assert (stored.user_id, stored.kind, stored.data["order_id"]) == ("ada", pattern, "order-1")
    assert said in stored.body
    assert mailoutbox == []
    assert Delivery.objects.get().channel == Channel.INBOX


@pytest.mark.parametrize("metadata", [{"id": "message-1"}, {}])
def test_an_event_that_comes_twice_is_told_once(mailoutbox: list[EmailMessage], metadata: dict[str, str]) -> None:
    for _ in range(2):
        hear("order_created", ORDER, **metadata)

    assert Notification.objects.count() == 1
    assert len(mailoutbox) == 1


@pytest.mark.parametrize("wrong", ["", 7, None, "x" * 101])
def test_an_id_that_is_none_is_replaced_by_what_happened_to_whom(wrong: Any) -> None:
    hear("order_created", ORDER, id=wrong)
    hear("order_created", ORDER)
    hear("order_confirmed", ORDER, id=wrong)
    hear("order_created", ORDER | {"id": "order-2"}, id=wrong)

    assert list(Notification.objects.order_by("pk").values_list("dedupe_key", flat=True)) == [
        "order_created:order-1:order_created",
        "order_confirmed:order-1:order_confirmed",
        "order_created:order-2:order_created",
    ]


@pytest.mark.parametrize(
    ("pattern", "data"),
    [
        ("order_created", {"bad": 1}),
        ("order_created", ORDER | {"total": "much"}),
        ("order_created", ORDER | {"customer": {"id": "ada", "name": "Ada", "email": "ada@example.org\nBcc: all"}}),
        ("payment_captured", {"id": "payment-1"}),
        ("user_created", ADA | {"id": "\x00"}),
    ],
)
def test_an_event_that_does_not_fit_is_refused_whole(pattern: str, data: dict[str, Any]) -> None:
    with pytest.raises(Exception, match=r"[Ee]xpected|[Rr]equired|missing"):
        hear(pattern, data)

    assert Notification.objects.count() == 0


def test_the_consumer_hears_each_event_under_its_own_name() -> None:
    methods = [getattr(NotificationsConsumer, name) for name in vars(NotificationsConsumer) if not name.startswith("_")]

    heard = {door.name: method.__name__ for method in methods for door in method.__microservice_doors__}

    assert heard == {
        name: name
        for name in (
            "user_created",
            "order_created",
            "order_confirmed",
            "order_cancelled",
            "payment_captured",
            "payment_failed",
        )
    }
