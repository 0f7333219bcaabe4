"""Instances of the shop come and go, and nobody who shops notices."""

from __future__ import annotations

import asyncio
import itertools
import signal
from collections.abc import Awaitable, Callable

import pytest

from tests.faults.figures import Figures
from tests.faults.fleet import GATEWAY, Fleet, Instance, Orders, Shopper
from tests.faults.load import Results, crowd, steadily
from tests.faults.tier import FULL, seconds
from tests.system.shop import SERVICES, Shop

pytestmark = [pytest.mark.slow, pytest.mark.asyncio, pytest.mark.timeout(300)]
READERS, BUYERS = 8, 2
PAUSE = "0.5"


async def shopping(shopper: Shopper, strike: Callable[[], Awaitable[None]]) -> tuple[Results, Results]:
    """Let people look and buy until `strike` is over; return what became of their calls."""
    over = asyncio.create_task(strike())

    async def until_over(call: Callable[[int], Awaitable[None]], callers: int) -> Results:
        results = Results()
        numbers = itertools.count()
        while not over.done():
            results.extend(await crowd(lambda _: call(next(numbers)), callers, 0.2))
        return results

    reads, orders = await asyncio.gather(until_over(shopper.read, READERS), until_over(shopper.order, BUYERS))
    await over
    print("reads", reads.failures, "orders", orders.failures)
    return reads, orders


async def test_kills_of_one_of_two_lose_no_read_and_double_no_order(shop: Shop, figures: Figures) -> None:
    fault = "SIGKILL of one of two, each 2 s"
    fleet = Fleet(shop, twice=("users", "orders"))
    orders_kept = Orders(shop.databases)
    orders_kept.stock_up()
    await fleet.start()
    kills = 0

    async def strike() -> None:
        nonlocal kills
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds(4, 60)
        victims = itertools.cycle([*fleet.instances["orders"], *fleet.instances["users"]])
        while loop.time() < end:
            began = loop.time()
            victim = next(victims)
            await victim.end(signal.SIGKILL)
            kills += 1
            victim.start()
            await asyncio.sleep(began + 2 - loop.time())
            await victim.until_ready()

    async with Shopper(fleet) as shopper:
        reads, orders = await shopping(shopper, strike)
        placed = orders_kept.placed()

    figures.at_least(fault, "kills", kills, 10 if FULL else 2)
    figures.at_least(fault, "reads", len(reads), 10 * kills)
    figures.at_most(fault, "reads that failed", reads.failures.total(), 0)
    figures.at_most(fault, "slowest read", reads.slowest, 5, "s")
    figures.at_least(fault, "orders", len(orders.succeeded), kills)
    figures.at_most(fault, "orders placed twice", sum(count - 1 for count in placed.values()), 0)
    figures.at_most(fault, "orders lost that were answered", len(shopper.confirmed - placed.keys()), 0)


async def test_rolling_restarts_fail_no_request(shop: Shop, figures: Figures) -> None:
    fault = "SIGTERM of each in turn"
    services = SERVICES if FULL else ("users", "orders", "payments")
    twice = (*(services if FULL else ("users",)), GATEWAY)
    fleet = Fleet(shop, twice, services)
    Orders(shop.databases).stock_up()
    await fleet.start(DRAIN_PAUSE=PAUSE)
    codes: list[int] = []

    async def restart(instance: Instance) -> None:
        codes.append(await instance.end(signal.SIGTERM))
        instance.start(DRAIN_PAUSE=PAUSE)
        await instance.until_ready()

    async def strike() -> None:
        for instance in fleet:
            if instance.service in twice:
                await restart(instance)

    async with Shopper(fleet) as shopper:
        reads, orders = await shopping(shopper, strike)

    figures.at_least(fault, "restarts", len(codes), 10 if FULL else 4)
    figures.at_most(fault, "exit codes other than 0", sum(map(bool, codes)), 0)
    figures.at_least(fault, "requests", len(reads) + len(orders), 1000 if FULL else 200)
    figures.at_most(fault, "requests that failed", (reads.failures + orders.failures).total(), 0)


async def test_orders_that_stand_still_leave_users_alone(shop: Shop, figures: Figures) -> None:
    fault = "orders stopped, 20 asked a second"
    fleet = Fleet(shop, services=("users", "orders"))
    await fleet.start(CALL_TIMEOUT="1")
    (orders,) = fleet.instances["orders"]
    assert orders.process is not None

    async with Shopper(fleet) as shopper:
        await shopper.read(0)
        await shopper.read(1)
        orders.process.signal(signal.SIGSTOP)
        duration = seconds(3, 20)
        users, others = await asyncio.gather(
            steadily(lambda number: shopper.read(1 + 2 * number), rate=20, seconds=duration),
            steadily(lambda number: shopper.read(2 * number), rate=20, seconds=duration),
        )
        orders.process.signal(signal.SIGCONT)

    print("orders", others.failures)
    figures.at_most(fault, "orders that were answered", len(others.succeeded), 0)
    figures.at_most(fault, "slowest of them, of 1 s", others.slowest, 3, "s")
    figures.at_most(fault, "users that failed", users.failures.total(), 0)
    figures.at_most(fault, "p99 of users", users.percentile(99) * 1000, 900, "ms")
