"""Answers that are kept, and calls that are shared."""

from __future__ import annotations

import asyncio
import time

import pytest

from microservices.exceptions import DeadlineExceeded, RpcException
from microservices.resilience.cache import Cache, Coalescing
from tests.toolkit.conftest import context
from tests.toolkit.resilience.conftest import Clock, Service

pytestmark = pytest.mark.asyncio


async def test_an_answer_is_kept_for_its_time_and_no_longer(clock: Clock) -> None:
    shop = Service(["first", "second"])
    cache = Cache(10, clock=clock)
    endpoint = cache(shop)

    assert await endpoint({"id": 1}, context()) == "first"
    clock.now += 9.9
    assert await endpoint({"id": 1}, context()) == "first"
    clock.now += 0.2
    assert await endpoint({"id": 1}, context()) == "second"
    assert (cache.hits, cache.misses) == (1, 2)


async def test_another_pattern_other_data_or_another_user_is_another_call(clock: Clock) -> None:
    shop = Service(["answer"])
    endpoint = Cache(10, clock=clock)(shop)

    await endpoint({"id": 1}, context())
    await endpoint({"id": 2}, context())
    await endpoint({"id": 1}, context(pattern="other"))
    await endpoint({"id": 1}, context(metadata={"identity": "ada"}))
    await endpoint({"id": 1}, context(metadata={"traceparent": "00-1-2-01"}))

    assert len(shop.calls) == 4


async def test_errors_are_not_kept(clock: Clock) -> None:
    endpoint = Cache(10, clock=clock)(Service([RpcException("no"), "answer"]))

    with pytest.raises(RpcException):
        await endpoint(1, context())

    assert await endpoint(1, context()) == "answer"


async def test_the_answer_used_longest_ago_makes_room(clock: Clock) -> None:
    shop = Service(["answer"])
    endpoint = Cache(10, size=2, clock=clock)(shop)

    for number in (1, 2, 1, 3, 1, 2):
        await endpoint(number, context())

    assert [data for data, _ in shop.calls] == [1, 2, 3, 2]


async def test_data_without_a_json_form_is_left_to_the_transport(clock: Clock) -> None:
    shop = Service(["answer"])

    assert await Cache(10, clock=clock)(Coalescing()(shop))(object(), context()) == "answer"


async def test_equal_calls_under_way_are_made_once() -> None:
    shop = Service(["answer"])
    shop.gate = asyncio.Event()
    endpoint = Coalescing()(shop)
    calls = [asyncio.create_task(endpoint({"id": number % 2}, context())) for number in range(6)]
    await asyncio.sleep(0)
    shop.gate.set()

    assert await asyncio.gather(*calls) == ["answer"] * 6
    assert len(shop.calls) == 2
    assert await endpoint({"id": 0}, context()) == "answer"
    assert len(shop.calls) == 3  # what has ended is not kept


async def test_a_shared_call_goes_on_as_long_as_somebody_waits() -> None:
    shop = Service(["answer"])
    shop.gate = asyncio.Event()
    endpoint = Coalescing()(shop)
    first, second = (asyncio.create_task(endpoint(1, context())) for _ in range(2))
    await asyncio.sleep(0.001)

    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert shop.under_way == 1
    shop.gate.set()
    assert await second == "answer"


async def test_a_shared_call_that_nobody_waits_for_is_given_up() -> None:
    shop = Service(["answer"])
    shop.gate = asyncio.Event()
    endpoint = Coalescing()(shop)
    call = asyncio.create_task(endpoint(1, context()))
    await asyncio.sleep(0.001)
    assert shop.under_way == 1

    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await asyncio.sleep(0)

    assert shop.under_way == 0


async def test_an_error_is_everybodys() -> None:
    shop = Service([RpcException("no")])
    endpoint = Coalescing()(shop)
    calls = [asyncio.create_task(endpoint(1, context())) for _ in range(2)]

    results = await asyncio.gather(*calls, return_exceptions=True)

    assert [str(result) for result in results] == ["no", "no"]
    assert len(shop.calls) == 1


async def test_whoever_has_time_left_asks_again_when_the_leaders_is_over() -> None:
    shop = Service([DeadlineExceeded(), "answer"])
    endpoint = Coalescing()(shop)
    leader = asyncio.create_task(endpoint(1, context(deadline=time.monotonic() + 60)))
    follower = asyncio.create_task(endpoint(1, context(deadline=time.monotonic() + 60)))

    with pytest.raises(DeadlineExceeded):
        await leader
    assert await follower == "answer"
    assert len(shop.calls) == 2


async def test_a_follower_waits_no_longer_than_his_own_deadline() -> None:
    shop = Service(["answer"])
    shop.gate = asyncio.Event()
    endpoint = Coalescing()(shop)
    leader = asyncio.create_task(endpoint(1, context()))
    await asyncio.sleep(0)

    with pytest.raises(DeadlineExceeded):
        await endpoint(1, context(deadline=time.monotonic() + 0.01))

    shop.gate.set()
    assert await leader == "answer"
