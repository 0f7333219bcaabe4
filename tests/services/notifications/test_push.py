"""Pushing to the browsers of a user."""

import asyncio
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime
from typing import Any

import pytest

from microservices import clients
from notifications import push
from notifications.contracts import Notification
from notifications.services import notify


def on_the_loop(work: Coroutine[Any, Any, Any]) -> Any:
    return clients.run(work).result(5)


def notification(user_id: str = "ada") -> Notification:
    return Notification(
        id="1",
        user_id=user_id,
        kind="user_created",
        title="Welcome",
        body="Hello",
        data={},
        read_at=None,
        created_at=datetime(2030, 1, 2, tzinfo=UTC),
    )


def test_a_notification_reaches_the_group_of_its_user_as_plain_values(layer: Any) -> None:
    on_the_loop(layer.group_add("user.ada", "browser"))

    push.push(notification())

    pushed = on_the_loop(layer.receive("browser"))
    assert pushed == {
        "type": "notify",
        "notification": {
            "id": "1",
            "user_id": "ada",
            "kind": "user_created",
            "title": "Welcome",
            "body": "Hello",
            "data": {},
            "read_at": None,
            "created_at": "2030-01-02T00:00:00Z",
        },
    }


def test_a_notification_reaches_nobody_else(layer: Any) -> None:
    on_the_loop(layer.group_add("user.ben", "browser"))

    push.push(notification())

    assert layer.channels == {}


@pytest.mark.django_db(databases=["notifications"])
def test_an_event_that_comes_twice_is_pushed_once(layer: Any) -> None:
    on_the_loop(layer.group_add("user.ada", "browser"))

    for _ in range(2):
        stored = notify(event_id="1", kind="user_created", user_id="ada", facts={"name": "Ada"})

    assert on_the_loop(layer.receive("browser"))["notification"]["id"] == stored.id
    assert layer.channels == {}


def test_without_a_channel_layer_nothing_happens() -> None:
    push.push(notification())


@pytest.mark.parametrize("user_id", ["ada lovelace", "a" * 200])
def test_a_user_whose_id_names_no_group_is_pushed_nothing(
    layer: Any, caplog: pytest.LogCaptureFixture, user_id: str
) -> None:
    push.push(notification(user_id))

    assert "was not pushed" in caplog.text


@pytest.mark.parametrize("fate", [ConnectionError, asyncio.Event().wait])
def test_a_layer_that_is_away_or_hangs_holds_nobody_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fate: Callable[[], Any]
) -> None:
    class Broken:
        async def group_send(self, group: str, message: dict[str, Any]) -> None:
            outcome = fate()
            if isinstance(outcome, Exception):
                raise outcome
            await outcome

    monkeypatch.setattr(push, "PATIENCE", 0.05)
    monkeypatch.setattr(push, "get_channel_layer", Broken)

    push.push(notification())

    assert "was not pushed" in caplog.text
