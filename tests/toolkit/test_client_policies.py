"""A client with policies: which pattern has which, and that they cost little."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from pytest_django import Settings

from microservices import message_pattern
from microservices.client import Client
from microservices.conf import get_settings, plan
from microservices.context import RpcContext
from microservices.exceptions import ConfigurationError, ConnectionLost, RpcException
from microservices.resilience.policies import Plan
from microservices.transports.local import LocalClient
from tests.toolkit.conftest import service

pytestmark = pytest.mark.asyncio


class Flaky:
    """A handler that loses its connection a number of times before it answers."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.calls = 0

    def answer(self) -> int:
        self.calls += 1
        if self.calls <= self.failures:
            raise ConnectionLost()
        return self.calls


def client_of(*functions: Callable[..., Any], patterns: dict[str, Any] | None = None, **policies: Any) -> Client:
    dispatcher = service(*functions)
    plan = Plan("shop", {"retry_delay": 0, **policies}, patterns or {})
    return Client("shop", lambda: LocalClient(dispatcher), plan=plan, load=lambda path: lambda data, error: path)


async def test_a_pattern_that_is_safe_is_asked_again_and_another_is_not() -> None:
    safe, other = Flaky(2), Flaky(2)

    @message_pattern({"cmd": "safe"})
    async def ask() -> int:
        return safe.answer()

    @message_pattern({"cmd": "other"})
    async def do() -> int:
        return other.answer()

    client = client_of(ask, do, patterns={"safe": {"retry": "safe"}})

    assert await client.send({"cmd": "safe"}) == 3
    with pytest.raises(RpcException, match="Connection closed"):
        await client.send({"cmd": "other"})
    assert other.calls == 1


async def test_each_pattern_has_its_own_deadline_and_a_call_may_name_another() -> None:
    @message_pattern("ask")
    async def ask(data: Any, context: RpcContext) -> float:
        return context.remaining() or 0

    client = client_of(ask, patterns={"ask": {"deadline": 30}})

    assert 29 < await client.send("ask") <= 30
    assert 9 < await client.send("ask", timeout=10) <= 10
    assert client.seconds(None, "ask") == 30
    assert client.seconds(None, "other") == client.timeout


async def test_a_fallback_is_decoded_like_any_answer() -> None:
    @message_pattern("ask")
    async def ask() -> None:
        raise RpcException({"statusCode": 503, "message": "away"})

    client = client_of(ask, patterns={"ask": {"fallback": "own.fallback"}})

    assert await client.send("ask", returns=str) == "own.fallback"


async def test_a_pattern_is_folded_once() -> None:
    @message_pattern("ask")
    async def ask() -> int:
        return flaky.answer()

    flaky = Flaky(0)
    client = client_of(ask, patterns={"ask": {"retry": "safe", "cache": 60}})

    assert [await client.send("ask") for _ in range(3)] == [1, 1, 1]


async def test_calls_of_all_patterns_share_the_places_of_their_service() -> None:
    gate = asyncio.Event()

    @message_pattern("one")
    async def one() -> None:
        await gate.wait()

    @message_pattern("two")
    async def two() -> None: ...

    client = client_of(one, two, capacity=1, queue=0)
    first = asyncio.create_task(client.send("one"))
    await asyncio.sleep(0.01)

    with pytest.raises(RpcException) as refused:
        await client.send("two")
    assert refused.value.code == "overloaded"
    gate.set()
    await first


async def test_settings_are_merged_from_all_services_over_one_to_a_pattern(settings: Settings) -> None:
    place = {"url": "tcp://127.0.0.1:1", "policies": {"retries": 3}, "patterns": {"ask": {"retries": 4}}}
    settings.MICROSERVICES = {"POLICIES": {"retries": 1, "capacity": 7}, "CLIENTS": {"shop": place}}

    found = plan("shop")

    assert (found.common.retries, found.of("ask").retries, found.of("other").retries) == (3, 4, 3)
    assert found.common.capacity == 7


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"policies": {"retrys": 1}}, "policies: .*retrys"),
        ({"patterns": {"ask": {"capacity": 1}}}, "shop ask: capacity is for a service as a whole"),
    ],
)
async def test_a_mistake_is_told_when_the_settings_are_read(
    settings: Settings, wrong: dict[str, Any], message: str
) -> None:
    settings.MICROSERVICES = {"CLIENTS": {"shop": {"url": "tcp://127.0.0.1:1", **wrong}}}

    with pytest.raises(ConfigurationError, match=message):
        get_settings()
