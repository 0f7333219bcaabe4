"""A second request for a call that takes longer than nearly all do."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from microservices.context import RpcContext
from microservices.exceptions import RpcException
from microservices.middleware import Endpoint
from microservices.resilience.hedge import Hedge
from microservices.resilience.retry import Budget
from tests.toolkit.conftest import context
from tests.toolkit.resilience.conftest import Clock, Service

pytestmark = pytest.mark.asyncio


class Slow:
    """An endpoint whose calls end when they are told, in any order."""

    def __init__(self) -> None:
        self.calls: list[asyncio.Future[Any]] = []
        self.contexts: list[RpcContext] = []
        self.called = asyncio.Event()

    async def __call__(self, data: Any, context: RpcContext) -> Any:
        self.contexts.append(context)
        self.calls.append(asyncio.get_running_loop().create_future())
        self.called.set()
        return await self.calls[-1]

    async def until(self, calls: int) -> None:
        """Wait until so many calls have come."""
        async with asyncio.timeout(5):
            while len(self.calls) < calls:
                self.called.clear()
                await self.called.wait()


async def experienced(hedge: Hedge, clock: Clock, seconds: float = 0.001) -> None:
    """Let a hedge learn that calls take so long."""

    async def quick(data: Any, context: RpcContext) -> str:
        clock.now += seconds
        return "answer"

    endpoint: Endpoint = hedge(quick)
    for _ in range(20):
        await endpoint(None, context())


async def test_the_first_answer_of_two_wins_and_the_other_is_given_up(clock: Clock) -> None:
    hedge, slow = Hedge(Budget(clock=clock), clock), Slow()
    await experienced(hedge, clock)

    call = asyncio.create_task(hedge(slow)(None, context()))
    await slow.until(2)
    slow.calls[1].set_result("the second")

    assert await call == "the second"
    await asyncio.sleep(0)
    assert slow.calls[0].cancelled()
    assert slow.contexts[0] is not slow.contexts[1]
    assert hedge.hedged == 1


async def test_an_error_of_one_is_no_answer_while_the_other_may_still_give_one(clock: Clock) -> None:
    hedge, slow = Hedge(Budget(clock=clock), clock), Slow()
    await experienced(hedge, clock)
    call = asyncio.create_task(hedge(slow)(None, context()))
    await slow.until(2)

    slow.calls[0].set_exception(RpcException("no"))
    await asyncio.sleep(0)
    slow.calls[1].set_result("the second")

    assert await call == "the second"


async def test_where_both_fail_it_has_failed(clock: Clock) -> None:
    hedge, slow = Hedge(Budget(clock=clock), clock), Slow()
    await experienced(hedge, clock)
    call = asyncio.create_task(hedge(slow)(None, context()))
    await slow.until(2)

    slow.calls[1].set_exception(RpcException("no"))
    for _ in range(5):  # seen before the other ends
        await asyncio.sleep(0)
    slow.calls[0].set_exception(RpcException("neither"))

    with pytest.raises(RpcException, match="neither"):
        await call


async def test_nothing_is_hedged_before_twenty_answers_are_known(clock: Clock) -> None:
    hedge = Hedge(Budget(clock=clock), clock)
    shop = Service(["answer"])

    for _ in range(19):
        assert await hedge(shop)(None, context()) == "answer"

    assert (len(shop.calls), hedge.hedged) == (19, 0)


async def test_a_hedge_comes_out_of_the_budget_of_retries(clock: Clock) -> None:
    hedge, slow = Hedge(Budget(0, 0, clock), clock), Slow()
    await experienced(hedge, clock)
    call = asyncio.create_task(hedge(slow)(None, context()))
    await slow.until(1)
    await asyncio.sleep(0.02)

    assert len(slow.calls) == 1
    slow.calls[0].set_result("the only one")
    assert await call == "the only one"


async def test_who_gives_up_gives_up_both(clock: Clock) -> None:
    hedge, slow = Hedge(Budget(clock=clock), clock), Slow()
    await experienced(hedge, clock)
    call = asyncio.create_task(hedge(slow)(None, context()))
    await slow.until(2)

    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await asyncio.sleep(0)

    assert all(each.cancelled() for each in slow.calls)
