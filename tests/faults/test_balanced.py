"""Two instances of a service, one of which is killed, stands still, or is slow."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from microservices.client import Client
from tests.faults.conftest import Work, calling
from tests.faults.figures import Figures
from tests.faults.load import Results, steadily
from tests.faults.proxy import FaultProxy
from tests.faults.service import SECONDS
from tests.faults.tier import seconds

pytestmark = [pytest.mark.slow, pytest.mark.asyncio, pytest.mark.timeout(120)]
RATE = 200
SAFE: dict[str, Any] = {"retry": "safe"}
Start = Callable[..., Work]


async def asking(client: Client, strike: Callable[[], Awaitable[None]]) -> Results:
    """Make safe calls, so many a second, until `strike` is over."""
    striking = asyncio.create_task(strike())
    results = Results()
    while not striking.done():
        results.extend(await steadily(lambda number: client.send("echo", number), RATE, 0.25))
    await striking
    print(results.failures)
    return results


async def test_one_of_two_that_is_killed_again_and_again_costs_no_safe_call(start: Start, figures: Figures) -> None:
    fault = "SIGKILL of one of two, each 2.5 s"
    stays, victim = start(), start()
    kills = 0

    async def strike() -> None:
        nonlocal victim, kills
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds(5, 30)
        while loop.time() < end:
            began = loop.time()
            victim.signal(signal.SIGKILL)
            await asyncio.to_thread(victim.wait)
            kills += 1
            victim = await asyncio.to_thread(start, port=victim.port)
            await asyncio.sleep(began + 2.5 - loop.time())

    async with calling(f"{stays.url},{victim.url}", SAFE) as client:
        results = await asking(client, strike)
        balancer = client.balancer
        assert balancer is not None
        async with asyncio.timeout(10):  # and the one that is back gets calls again
            while balancer.out:
                await client.send("echo", 1)

    figures.at_least(fault, "kills", kills, 2)
    figures.at_least(fault, "safe calls", len(results), 100 * kills)
    figures.at_most(fault, "safe calls that failed", results.failures.total(), 0)
    figures.at_most(fault, "slowest", results.slowest, 2, "s")


async def test_one_of_two_that_stands_still_costs_an_attempt_and_no_call(start: Start, figures: Figures) -> None:
    fault = "SIGSTOP of one of two, attempts of 1 s"
    well, stopped = start(), start()

    async def strike() -> None:
        await asyncio.sleep(0.5)
        stopped.signal(signal.SIGSTOP)
        await asyncio.sleep(seconds(5, 30))

    async with calling(f"{well.url},{stopped.url}", {**SAFE, "attempt_timeout": 1}) as client:
        results = await asking(client, strike)
        late = sum(done.seconds > 0.5 for done in results)
        stopped.signal(signal.SIGCONT)
        begun = await asking(client, lambda: asyncio.sleep(seconds(2, 10)))

    figures.at_least(fault, "calls", len(results), 300)
    figures.at_most(fault, "calls that failed", (results.failures + begun.failures).total(), 0)
    figures.at_most(fault, "calls that took an attempt longer", late, 0.02 * len(results))
    figures.at_most(fault, "slowest", results.slowest, 2, "s")


async def test_one_of_two_that_is_five_times_slower_gets_few_calls(start: Start, figures: Figures) -> None:
    fault = "one of two five times slower"
    quick, slow = start(), start()
    between = FaultProxy(slow.port)
    between.faults.latency = 2 * SECONDS  # there and back
    await between.listen()
    try:
        async with calling(f"{quick.url},tcp://127.0.0.1:{between.port}", SAFE) as client:
            results = await steadily(lambda number: client.send("work", number), RATE, seconds(3, 20))
        async with calling(slow.url) as client:
            got = await client.send("begun")
    finally:
        await between.close()

    figures.at_most(fault, "calls that failed", results.failures.total(), 0)
    figures.at_least(fault, "its share of the calls", got / len(results), 1 / len(results))
    # By its speed its part would be a sixth; dealt out in turn, half.
    figures.at_most(fault, "its share of the calls, at most", got / len(results), 1 / 6)
