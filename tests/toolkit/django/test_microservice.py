"""Which doors a service opens, and which of them bring it events."""

from __future__ import annotations

from typing import Any

import pytest

from microservices import transports
from microservices.handlers import event_pattern, message_pattern
from microservices.microservice import Microservice
from microservices.transports import Address, Role, parse
from microservices.transports.base import Server, Status
from tests.toolkit.conftest import service


@message_pattern("ask")
async def ask() -> None: ...


@event_pattern("made")
async def made() -> None: ...


class Door(Server):
    """Notes that it was opened."""

    scheme = "door"
    opened: list[Door] = []  # noqa: RUF012 - shared on purpose

    async def listen(self) -> None:
        self.opened.append(self)

    async def close(self, grace: float) -> None:
        self.status = Status.CLOSED

    def unwrap(self) -> None: ...


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Role]]:
    """The doors that were opened, and as what."""
    roles: list[tuple[str, Role]] = []

    def load(address: Address, role: Role) -> Any:
        roles.append((address.scheme, role))
        return lambda address, dispatcher: Door(address._replace(options={}), dispatcher)

    monkeypatch.setattr(transports, "load", load)
    monkeypatch.setattr(Door, "opened", [])
    return roles


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("url", "events", "doors", "hears"),
    [
        ("tcp://h:1", None, [("tcp", "server")], [True]),
        ("tcp://h:1", "redis://h:1", [("tcp", "server"), ("redis", "listener")], [True, True]),
        # NestJS's Redis knows one kind of channel: the server that takes requests hears the events, too.
        ("redis://h:1", "redis://h:1", [("redis", "server")], [True]),
        ("redis://h:1", "redis://other:1", [("redis", "server"), ("redis", "listener")], [True, True]),
        # Elsewhere a bus is more than that, and what it brings must not come twice.
        ("nats://h:1", "nats://h:1?stream=events", [("nats", "server"), ("nats", "listener")], [False, True]),
        ("kafka://h:1", "kafka://h:1", [("kafka", "server"), ("kafka", "listener")], [False, True]),
        ("kafka://h:1", "kafka://h:2", [("kafka", "server"), ("kafka", "listener")], [True, True]),
        ("amqp://h:1/one", "amqp://h:1/other", [("amqp", "server"), ("amqp", "listener")], [True, True]),
        (
            "redis://h:1?sentinel=a",
            "redis://h:1?sentinel=b",
            [("redis", "server"), ("redis", "listener")],
            [True, True],
        ),
        ("redis://h:1", "redis://h:1?codec=a.B", [("redis", "server"), ("redis", "listener")], [False, True]),
        ("redis://h:1", "redis-streams://h:1", [("redis", "server"), ("redis-streams", "listener")], [True, True]),
    ],
)
async def test_events_come_by_one_door_of_a_broker(
    opened: list[tuple[str, Role]], url: str, events: str | None, doors: Any, hears: list[bool]
) -> None:
    shop = Microservice(service(ask, made), [url], None if events is None else parse(events))

    await shop.listen()
    await shop.close(0)

    assert opened == doors
    assert [door.hears_events for door in Door.opened] == hears


@pytest.mark.asyncio
async def test_a_service_that_hears_nothing_has_no_listener(opened: list[tuple[str, Role]]) -> None:
    shop = Microservice(service(ask), ["tcp://h:1"], parse("nats://h:1"))

    await shop.listen()
    await shop.close(0)

    assert opened == [("tcp", "server")]


def test_a_door_without_the_events_of_a_bus_has_the_routes_of_requests_alone() -> None:
    door = Door(parse("tcp://h:1"), service(ask, made))
    everything = set(door.routes)
    door.hears_events = False

    assert (everything, set(door.routes)) == ({"ask", "made"}, {"ask"})
