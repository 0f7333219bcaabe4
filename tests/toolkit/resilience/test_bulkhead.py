"""A target has a bounded number of calls at a time."""

from __future__ import annotations

import asyncio
import time

import pytest

from microservices.exceptions import DeadlineExceeded, Unavailable
from microservices.instruments import dropped
from microservices.resilience.bulkhead import Bulkhead
from tests.toolkit.conftest import context
from tests.toolkit.resilience.conftest import Service

pytestmark = pytest.mark.asyncio


async def turn(times: int = 3) -> None:
    for _ in range(times):
        await asyncio.sleep(0)


async def test_so_many_go_through_so_many_wait_and_the_rest_is_refused() -> None:
    shop = Service(["answer"])
    shop.gate = asyncio.Event()
    bulkhead = Bulkhead("crowded", capacity=2, queue=3)
    endpoint = bulkhead(shop)
    calls = [asyncio.create_task(endpoint(number, context())) for number in range(6)]
    await turn()

    assert (shop.under_way, bulkhead.bounds[0].used, bulkhead.bounds[1].used) == (2, 2, 3)
    with pytest.raises(Unavailable) as refused:
        await calls[5]
    assert refused.value.code == "overloaded"
    assert dropped.value("crowded", "bulkhead", "overloaded") == 1

    shop.gate.set()
    assert await asyncio.gather(*calls[:5]) == ["answer"] * 5
    assert [data for data, _ in shop.calls] == [0, 1, 2, 3, 4]
    assert (bulkhead.bounds[0].used, bulkhead.bounds[1].used) == (0, 0)


async def test_nobody_waits_beyond_his_deadline() -> None:
    shop = Service(["answer"])
    shop.gate = asyncio.Event()
    bulkhead = Bulkhead("shop", capacity=1)
    first = asyncio.create_task(bulkhead(shop)(1, context()))
    await turn()

    with pytest.raises(DeadlineExceeded):
        await bulkhead(shop)(2, context(deadline=time.monotonic() + 0.01))

    assert bulkhead.bounds[1].used == 0
    shop.gate.set()
    assert await first == "answer"
    assert bulkhead.bounds[0].used == 0


async def test_a_call_that_is_given_up_leaves_its_place_to_the_next_one() -> None:
    shop = Service(["answer"])
    shop.gate = asyncio.Event()
    bulkhead = Bulkhead("shop", capacity=1)
    first, second, third = (asyncio.create_task(bulkhead(shop)(n, context())) for n in range(3))
    await turn()

    second.cancel()
    await turn()
    assert bulkhead.bounds[1].used == 1
    first.cancel()
    await turn()

    assert [data for data, _ in shop.calls] == [0, 2]
    shop.gate.set()
    assert await third == "answer"
    assert bulkhead.bounds[0].used == 0


async def test_a_place_given_to_one_who_leaves_in_that_moment_is_passed_on() -> None:
    shop = Service(["answer"])
    shop.gate = asyncio.Event()
    bulkhead = Bulkhead("shop", capacity=1)
    first, second, third = (asyncio.create_task(bulkhead(shop)(n, context())) for n in range(3))
    await turn()

    shop.gate.set()
    await first  # its end has given the place to the second one
    second.cancel()

    assert await third == "answer"
    assert bulkhead.bounds[0].used == 0


async def test_whatever_a_call_ends_with_gives_its_place_back() -> None:
    bulkhead = Bulkhead("shop", capacity=1)
    endpoint = bulkhead(Service([ValueError("a bug"), "answer"]))

    with pytest.raises(ValueError, match="a bug"):
        await endpoint(1, context())

    assert await endpoint(2, context()) == "answer"
