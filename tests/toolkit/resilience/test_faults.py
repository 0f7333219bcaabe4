"""Faults on purpose: each strikes as often as it is told, and all of them end."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest
from pytest_django import Settings

from microservices import clients, message_pattern
from microservices.checks import check_settings
from microservices.client import Client
from microservices.conf import get_settings
from microservices.context import RpcContext
from microservices.exceptions import ConfigurationError, DeadlineExceeded, RpcException
from microservices.resilience.faults import Fault, Faults
from microservices.resilience.policies import Plan
from microservices.transports.local import LocalClient
from tests.toolkit.conftest import context, service
from tests.toolkit.resilience.conftest import Clock, Service

SEED = 20_26


def faults(clock: Clock, **given: Any) -> Faults:
    """Return the faults of the pattern `ask`."""
    return Faults("shop", {"ask": Fault(**given)}, clock=clock, sleep=clock.sleep, rng=random.Random(SEED))


@pytest.mark.asyncio
async def test_latency_is_added_to_each_and_never_beyond_the_deadline(clock: Clock) -> None:
    shop = Service(["answer"])
    slow = faults(clock, latency=200).request(shop)

    assert await slow(None, context()) == "answer"
    with pytest.raises(DeadlineExceeded):
        await slow(None, context(deadline=time.monotonic() + 100))

    assert clock.slept == [200, pytest.approx(100, rel=0.1)]
    assert len(shop.calls) == 1


@pytest.mark.asyncio
async def test_errors_come_in_their_share_and_nothing_is_sent_then(clock: Clock) -> None:
    shop = Service(["answer"])
    faulty = faults(clock, error=0.25).request(shop)

    came: Counter[str] = Counter()
    for _ in range(1000):
        try:
            came[await faulty(None, context())] += 1
        except RpcException as error:
            came[f"{error.status_code} {error.code}"] += 1

    assert came["503 injected"] == pytest.approx(250, rel=0.2)
    assert len(shop.calls) == came["answer"] == 1000 - came["503 injected"]


@pytest.mark.asyncio
async def test_a_request_that_is_lost_has_no_answer_until_its_deadline(clock: Clock) -> None:
    shop = Service(["answer"])

    with pytest.raises(DeadlineExceeded):
        await faults(clock, drop=1).request(shop)(None, context(deadline=time.monotonic() + 3000))

    assert clock.slept == [pytest.approx(3000, rel=0.1)]
    assert shop.calls == []


@pytest.mark.asyncio
async def test_nobody_hears_of_an_event_that_is_lost(clock: Clock) -> None:
    bus = Service([None])

    await faults(clock, drop=1).event(bus)(None, context(deadline=time.monotonic() + 3))

    assert (bus.calls, clock.slept) == ([], [])


@pytest.mark.asyncio
async def test_the_shares_of_what_is_lost_and_what_is_refused_are_both_of_all(clock: Clock) -> None:
    bus = Service([None])
    faulty = faults(clock, drop=0.5, error=0.4).event(bus)

    refused = 0
    for _ in range(1000):
        try:
            await faulty(None, context())
        except RpcException:
            refused += 1

    assert refused == pytest.approx(400, rel=0.15)
    assert len(bus.calls) == pytest.approx(100, rel=0.3)


@pytest.mark.asyncio
@pytest.mark.parametrize("verb", ["request", "event"])
async def test_what_is_duplicated_is_sent_twice(clock: Clock, verb: str) -> None:
    shop = Service(["answer"])
    doubled = getattr(faults(clock, duplicate=1), verb)(shop)

    assert await doubled("data", context()) == "answer"

    (first, one), (second, other) = shop.calls
    assert first == second == "data"
    assert one is not other  # each is given an id of its own


@pytest.mark.asyncio
async def test_duplicates_are_sent_at_the_same_time_and_the_first_answer_counts(clock: Clock) -> None:
    both = asyncio.Barrier(2)
    answers = [RpcException("of the second"), "of the first"]

    async def shop(data: Any, context: RpcContext) -> Any:
        answer = answers.pop()
        await both.wait()
        if isinstance(answer, RpcException):
            raise answer
        return answer

    async with asyncio.timeout(5):
        assert await faults(clock, duplicate=1).request(shop)("data", context()) == "of the first"
    assert answers == []


@pytest.mark.asyncio
async def test_a_stream_that_is_sent_can_be_read_once_and_is_not_duplicated(clock: Clock) -> None:
    async def numbers() -> AsyncIterator[int]:
        yield 1

    shop = Service(["answer"])

    assert await faults(clock, duplicate=1).request(shop)(numbers(), context()) == "answer"
    assert len(shop.calls) == 1


@pytest.mark.asyncio
async def test_some_are_held_back_so_that_those_of_others_overtake_them(clock: Clock) -> None:
    bus = Service([None])
    mixed = faults(clock, reorder=0.5).event(bus)

    await asyncio.gather(*(mixed(number, context()) for number in range(100)))

    came = [data for data, _ in bus.calls]
    assert set(clock.slept) == {0.1}
    assert len(clock.slept) == pytest.approx(50, rel=0.3)
    assert came != list(range(100))
    assert sorted(came) == list(range(100))


@pytest.mark.asyncio
async def test_they_end_after_their_time(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    shop = Service(["answer"])
    injected = faults(clock, error=1, seconds=60)
    faulty = injected.request(shop)

    clock.now += 3600  # they begin with the first message
    assert injected.active == ["ask"]
    with pytest.raises(RpcException, match="on purpose"):
        await faulty(None, context())
    clock.now += 60

    assert injected.active == []
    assert await faulty(None, context()) == "answer"
    assert "shop ask: faults on purpose for 60 s" in caplog.text


@pytest.mark.asyncio
async def test_other_patterns_are_spared_unless_all_are_meant(clock: Clock) -> None:
    shop = Service(["answer"])
    named = {"get_user": Fault(error=1)}

    spared = Faults("shop", named, clock=clock).request(shop)
    assert await spared(None, context(pattern='{"cmd":"get_users"}')) == "answer"
    with pytest.raises(RpcException, match="on purpose"):
        await spared(None, context(pattern='{"cmd":"get_user"}'))

    struck = Faults("shop", {**named, "*": Fault(error=1)}, clock=clock).request(shop)
    with pytest.raises(RpcException, match="on purpose"):
        await struck(None, context(pattern='{"cmd":"get_users"}'))


@pytest.mark.asyncio
async def test_policies_see_them_as_they_see_those_of_a_network(clock: Clock) -> None:
    @message_pattern("ask")
    async def ask() -> str:
        return "answer"

    dispatcher = service(ask)
    plan = Plan("shop", {"retry_delay": 0}, {"ask": {"retry": "safe"}})
    most = Faults("shop", {"ask": Fault(error=0.8)}, rng=random.Random(SEED))
    client = Client("shop", lambda: LocalClient(dispatcher), plan=plan, faults=most)

    came: Counter[str] = Counter()
    for _ in range(40):
        try:
            came[await client.send("ask")] += 1
        except RpcException as error:
            came[error.code] += 1
    await client.close()

    assert came["answer"]
    assert came["injected"]
    assert came["circuit-open"]


def test_clients_have_those_of_settings_in_development_alone(settings: Settings) -> None:
    settings.MICROSERVICES = {
        "CLIENTS": {"users": {"url": "tcp://127.0.0.1:1"}, "orders": {"url": "tcp://127.0.0.1:2"}},
        "FAULTS": {"users": {"get_user": {"drop": 0.5}}, "events": {"order_created": {"duplicate": 1}}},
    }
    settings.DEBUG = True
    assert clients.faults == ["users/get_user", "events/order_created"]
    assert check_settings() == []

    clients.reset()
    settings.DEBUG = False
    assert clients.faults == []
    assert [(error.id, error.msg) for error in check_settings()] == [
        ("microservices.E014", "MICROSERVICES['FAULTS'] is for development: DEBUG is off.")
    ]


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"user": {"*": {}}}, r"has no use for 'user': known are events\."),
        ({"events": {"*": {"errors": 1}}}, "unknown field `errors`"),
        ({"events": {"*": {"error": 1.1}}}, "Expected `float` <= 1.0 - at `.*error`"),
        ({"events": {"*": {"seconds": 0}}}, "seconds"),
    ],
)
def test_a_mistake_is_told(settings: Settings, given: Any, complaint: str) -> None:
    settings.MICROSERVICES = {"FAULTS": given}

    with pytest.raises(ConfigurationError, match=complaint):
        get_settings()
