"""The request doors of the notifications service: what they take and what they hand out."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from microservices import RpcContext
from notifications import handlers
from notifications.contracts import GetNotifications, MarkRead
from notifications.services import notify


def ask(handler: Callable[..., Any], shape: type, data: dict[str, Any]) -> Any:
    """Call a handler as the toolkit would: JSON in, JSON out."""
    context = RpcContext(service="notifications", pattern=handler.__name__, transport="test", side="server")
    payload: Any = msgspec.json.decode(msgspec.json.encode(data), type=shape)
    return msgspec.json.decode(msgspec.json.encode(handler(payload, context)))


@pytest.mark.django_db(databases=["notifications"])
def test_a_page_says_how_many_of_all_are_unread() -> None:
    for number in range(3):
        notify(event_id=str(number), kind="user_created", user_id="ada", facts={"name": "Ada"})

    page = ask(handlers.get_notifications, GetNotifications, {"user_id": "ada", "limit": 1})

    assert [shown["kind"] for shown in page["notifications"]] == ["user_created"]
    assert set(page["notifications"][0]) == {"id", "user_id", "kind", "title", "body", "data", "read_at", "created_at"}
    assert page["unread"] == 3
    assert page["next"]


@pytest.mark.django_db(databases=["notifications"])
def test_one_or_all_notifications_are_marked_read() -> None:
    told = [notify(event_id=id, kind="user_created", user_id="ada", facts={"name": "Ada"}) for id in ("1", "2", "3")]

    one = ask(handlers.mark_read, MarkRead, {"user_id": "ada", "id": told[0].id})
    rest = ask(handlers.mark_read, MarkRead, {"user_id": "ada"})

    assert (one, rest) == ({"unread": 2}, {"unread": 0})


@pytest.mark.parametrize(
    ("shape", "data"),
    [
        (GetNotifications, {}),
        (GetNotifications, {"user_id": ""}),
        (GetNotifications, {"user_id": "ada", "limit": 0}),
        (MarkRead, {"id": "x"}),
        (MarkRead, {"user_id": "ada", "id": 1}),
    ],
)
def test_a_payload_that_does_not_fit_is_refused(shape: type, data: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(data, shape)


@pytest.mark.parametrize("shape", [GetNotifications, MarkRead])
def test_fields_that_a_caller_of_another_day_sends_are_ignored(shape: type) -> None:
    assert msgspec.convert({"user_id": "ada", "from_tomorrow": True}, shape)
