"""A service takes on as much as it does without becoming slower, and the urgent first."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from microservices.context import RpcContext
from microservices.exceptions import RpcException
from microservices.instruments import dropped
from microservices.resilience.limiter import Gradient, Limiter
from tests.toolkit.conftest import context
from tests.toolkit.resilience.conftest import Clock, Service


async def turn(times: int = 3) -> None:
    for _ in range(times):
        await asyncio.sleep(0)


def call(**facts: Any) -> RpcContext:
    """Make the context of a request."""
    return context(raw_id="1", **facts)


def urgent(priority: str) -> RpcContext:
    return call(metadata={"priority": priority})


@pytest.mark.asyncio
async def test_a_bounded_number_waits_and_the_rest_is_told_when_to_come_again() -> None:
    shop = Service(["answer"])
    shop.gate = asyncio.Event()
    limiter = Limiter("full", Gradient(2), 2)
    endpoint = limiter(shop)
    calls = [asyncio.create_task(endpoint(number, call())) for number in range(5)]
    await turn()

    with pytest.raises(RpcException) as refused:
        await calls[4]
    assert (refused.value.status_code, refused.value.code) == (503, "overloaded")
    assert refused.value.error["retryAfter"] == 1
    assert (limiter.in_flight, limiter.waiting, limiter.refused) == (2, 2, 1)
    assert dropped.value("full", "limiter", "interactive") == 1

    shop.gate.set()
    assert await asyncio.gather(*calls[:4]) == ["answer"] * 4
    assert (limiter.in_flight, limiter.waiting) == (0, 0)


@pytest.mark.asyncio
async def test_what_is_more_urgent_goes_first_and_takes_the_place_of_what_is_less() -> None:
    shop = Service(["answer"])
    shop.gate = asyncio.Event()
    endpoint = Limiter("shop", Gradient(2), 2)(shop)
    asked = ["batch", "batch", "batch", "background", "interactive", "nonsense"]
    calls = [asyncio.create_task(endpoint(name, urgent(name))) for name in asked]
    await turn()
    shop.gate.set()

    results = await asyncio.gather(*calls, return_exceptions=True)

    # Two ran at once. Two of those that waited, the batch and the background, made room.
    assert [data for data, _ in shop.calls] == ["batch", "batch", "interactive", "nonsense"]
    assert [isinstance(result, RpcException) for result in results] == [False, False, True, True, False, False]


@pytest.mark.asyncio
async def test_who_gives_up_waiting_leaves_no_gap() -> None:
    shop = Service(["answer"])
    shop.gate = asyncio.Event()
    limiter = Limiter("shop", Gradient(1))
    first, second = (asyncio.create_task(limiter(shop)(number, call())) for number in range(2))
    await turn()

    second.cancel()
    await turn()
    assert limiter.waiting == 0
    third = asyncio.create_task(limiter(shop)(2, call()))
    await turn()
    shop.gate.set()
    await first
    third.cancel()  # its place was given to it in this moment
    await turn()

    assert limiter.in_flight == 0
    assert await limiter(shop)(3, call()) == "answer"


@pytest.mark.asyncio
async def test_events_are_not_refused() -> None:
    shop = Service(["answer"])
    shop.gate = asyncio.Event()
    limiter = Limiter("shop", Gradient(1), 0)
    heard = [asyncio.create_task(limiter(shop)(number, context())) for number in range(5)]
    await turn()

    assert shop.under_way == 5
    shop.gate.set()
    await asyncio.gather(*heard)


def test_inline_handlers_are_left_where_they_are() -> None:
    def inline(data: Any, context: Any) -> None: ...

    assert Limiter("shop").in_place(inline) is inline


class Crowd:
    """A service that does `places` things at a time, each in 20 ms, asked for as much as a limit lets in."""

    def __init__(self, limit: Gradient, places: int) -> None:
        self.limit = limit
        self.places = places

    def ask(self, calls: int, *, seconds: float = 0.02, at_a_time: int = 10**9, pattern: str = "ask") -> None:
        for _ in range(calls):
            in_flight = min(at_a_time, self.limit.value)
            self.limit.add(pattern, seconds * max(1.0, in_flight / self.places), in_flight)


def test_a_limit_grows_while_calls_take_as_long_as_ever() -> None:
    limit = Gradient(20, most=200)

    Crowd(limit, places=1000).ask(3000)

    assert limit.value == 200


def test_a_limit_that_is_not_used_proves_nothing() -> None:
    limit = Gradient(20)

    Crowd(limit, places=1000).ask(3000, at_a_time=3)

    assert limit.value == 20


@pytest.mark.parametrize("places", [8, 16, 50])
def test_a_crowd_that_stays_does_not_become_what_is_usual(places: int) -> None:
    limit = Gradient(20)
    service = Crowd(limit, places)
    service.ask(100, at_a_time=1)

    service.ask(100_000)

    assert places <= limit.value <= 3 * places


def test_a_limit_shrinks_as_calls_take_longer_and_grows_again_when_they_do_not() -> None:
    limit = Gradient(100, least=4)
    service = Crowd(limit, places=1000)
    service.ask(100)
    before = limit.value

    service.ask(100, seconds=0.2)
    slow = limit.value
    service.ask(1000)

    assert slow < before / 2
    assert limit.value > before / 2


def test_what_has_become_slower_for_good_is_usual_in_the_end() -> None:
    limit = Gradient(100, least=4)
    service = Crowd(limit, places=1000)
    service.ask(100)

    limits = []
    for _ in range(3000):
        service.ask(1, seconds=0.2)
        limits.append(limit.value)

    assert min(limits) == 4
    assert limits[-1] > 100


def test_each_pattern_has_a_pace_of_its_own() -> None:
    limit = Gradient(20, most=200)
    service = Crowd(limit, places=1000)

    for _ in range(1000):
        service.ask(3, seconds=0.001, pattern="get_user")
        service.ask(1, seconds=0.5, pattern="make_report")

    assert limit.value == 200


def test_one_call_that_hung_changes_little() -> None:
    limit = Gradient(100)
    service = Crowd(limit, places=1000)
    service.ask(1000)
    before = limit.value

    service.ask(1, seconds=30)
    service.ask(100)

    assert limit.value >= before * 0.9


def test_patterns_without_number_share_a_pace() -> None:
    limit = Gradient()

    for number in range(1000):
        limit.add(f"user.{number}", 0.02, 1)

    assert len(limit._usual) == 257


@pytest.mark.asyncio
async def test_who_would_wait_for_more_than_half_of_his_time_is_told_at_once() -> None:
    shop = Service(["answer"])
    shop.gate = asyncio.Event()
    limit = Gradient(1)
    limit.add("ask", 1.0, 1)
    limiter = Limiter("shop", limit)
    endpoint = limiter(shop)
    first = asyncio.create_task(endpoint(1, call()))
    await turn()

    patient = call()
    patient.cap_deadline(2.5)
    hasty = call()
    hasty.cap_deadline(1.5)
    waiting = asyncio.create_task(endpoint(2, patient))
    await turn()
    with pytest.raises(RpcException, match="more to do than it can") as refused:
        await endpoint(3, hasty)

    assert refused.value.code == "overloaded"
    assert (limiter.waiting, limiter.refused) == (1, 1)
    shop.gate.set()
    assert await asyncio.gather(first, waiting) == ["answer"] * 2


@pytest.mark.asyncio
async def test_what_can_no_longer_end_in_time_is_not_begun() -> None:
    shop = Service(["answer"])
    shop.gate = asyncio.Event()
    limit = Gradient(1)
    limit.add("quick", 0.001, 1)
    limit.takes = lambda pattern: 1.0  # type: ignore[method-assign]
    limiter = Limiter("shop", limit)
    endpoint = limiter(shop)
    first = asyncio.create_task(endpoint(1, call()))
    await turn()
    late = call()
    late.cap_deadline(0.5)
    waiting = asyncio.create_task(endpoint(2, late))
    await turn()

    shop.gate.set()

    assert await first == "answer"
    with pytest.raises(RpcException) as refused:
        await waiting
    assert refused.value.code == "overloaded"
    assert [data for data, _ in shop.calls] == [1]
    assert (limiter.in_flight, limiter.waiting) == (0, 0)


@pytest.mark.asyncio
async def test_times_are_those_of_the_handler_not_of_the_queue() -> None:
    clock = Clock()
    seen: list[float] = []
    limit = Gradient(1)
    limit.add = lambda pattern, seconds, in_flight: seen.append(seconds)  # type: ignore[method-assign]

    async def work(data: float, context: Any) -> None:
        clock.now += data
        await asyncio.sleep(0)

    endpoint = Limiter("shop", limit, clock=clock)(work)
    await asyncio.gather(endpoint(1.0, call()), endpoint(2.0, call()))

    assert seen == [1.0, 2.0]


def test_it_sheds_for_as_long_as_more_is_refused_than_taken() -> None:
    limiter = Limiter("shop")

    def second(now: float, taken: int, refused: int) -> float:
        limiter.taken += taken
        limiter.refused += refused
        limiter.look(now)
        return limiter.shedding(now)

    assert second(1, 10, 10) == 0
    assert second(2, 10, 11) == 0
    assert [second(now, 1, 5) for now in (3, 8, 13)] == [1, 6, 11]
    assert second(14, 0, 0) == 0
    assert second(15, 1, 5) == 0
