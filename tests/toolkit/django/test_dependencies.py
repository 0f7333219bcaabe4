"""Which services an app calls is declared, checked, and kept in development."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest
from django.apps import apps
from pytest_django import Settings

from microservices import clients, message_pattern
from microservices.checks import check_dependencies, check_retries
from microservices.dependencies import circles
from microservices.exceptions import ConfigurationError
from tests.toolkit.django.test_checks import told

Install = Callable[..., None]


class Keyless(msgspec.Struct):
    """A payload by which nobody knows a repetition."""

    amount: int


@pytest.fixture
def declare(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let apps of the shop declare other calls."""

    def declare(**calls: tuple[str, ...]) -> None:
        for app, called in calls.items():
            monkeypatch.setattr(apps.app_configs[app], "calls", called, raising=False)

    return declare


def test_services_that_wait_for_one_another_are_w004(declare: Callable[..., None]) -> None:
    declare(orders=("payments", "orders"), payments=("users",), users=("orders",))

    assert list(circles()) == [["orders", "payments", "users", "orders"]]
    assert told(check_dependencies()) == [
        (
            "W004",
            "orders calls payments calls users calls orders: each may wait for the others until none has time left.",
        )
    ]


def test_a_call_to_nobody_is_e011(declare: Callable[..., None]) -> None:
    declare(orders=("payment",))

    assert told(check_dependencies()) == [
        ("E011", "orders declares that it calls 'payment', which MICROSERVICES['CLIENTS'] does not name.")
    ]


def test_repeating_what_must_not_be_repeated_is_e005(install: Install, settings: Settings) -> None:
    @message_pattern("order")
    async def order() -> None: ...

    install(shop=[order])
    place = settings.MICROSERVICES["CLIENTS"]["shop"]
    for policies in ({"retry": "safe"}, {"retry": "keyed"}, {"retries": 1}):
        settings.MICROSERVICES = {
            **settings.MICROSERVICES,
            "CLIENTS": {"shop": {**place, "patterns": {"order": policies}}},
        }
        assert [id for id, _ in told(check_retries())] == ["E005"]

    settings.MICROSERVICES = {
        **settings.MICROSERVICES,
        "CLIENTS": {"shop": {**place, "patterns": {"order": {"deadline": 1}}}},
    }
    assert told(check_retries()) == []


def test_a_key_that_no_payload_has_is_w006(install: Install) -> None:
    @message_pattern("pay", retry="keyed")
    async def pay(data: Keyless) -> None: ...

    install(shop=[pay])

    assert [id for id, _ in told(check_retries())] == ["W006"]


@pytest.mark.asyncio
async def test_a_call_that_is_not_declared_is_refused_in_development(
    install: Install, settings: Settings, declare: Callable[..., None]
) -> None:
    @message_pattern("ask")
    async def ask() -> str:
        return str(await clients["users"].send("answer"))

    @message_pattern("ask_self")
    async def ask_self() -> str:
        return str(await clients["orders"].send("answer"))

    @message_pattern("answer")
    async def answer() -> str:
        return "answered"

    for development, declared in ((True, ()), (True, ("users",)), (False, ())):
        settings.DEBUG = development
        install(orders=[ask, ask_self, answer], users=[answer])
        declare(orders=declared)
        clients.reset()
        assert await clients["users"].send("answer") == "answered"  # nobody's handler
        assert await clients["orders"].send("ask_self") == "answered"
        if development and not declared:
            with pytest.raises(Exception, match="Internal server error"):
                await clients["orders"].send("ask")
        else:
            assert await clients["orders"].send("ask") == "answered"
        await clients.close()


@pytest.mark.asyncio
async def test_the_refusal_says_what_to_add(install: Install, settings: Settings, declare: Callable[..., None]) -> None:
    heard: list[str] = []

    @message_pattern("ask")
    async def ask() -> None:
        try:
            await clients["users"].send("answer")
        except ConfigurationError as error:
            heard.append(str(error))

    @message_pattern("answer")
    async def answer() -> None: ...

    settings.DEBUG = True
    install(orders=[ask], users=[answer])
    declare(orders=())
    clients.reset()
    await clients["orders"].send("ask")
    await clients.close()

    assert heard == ["orders calls users, and does not declare it: add 'users' to `calls` of its AppConfig."]
