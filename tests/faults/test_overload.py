"""More is asked than can be done."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from tests.faults.conftest import Work, calling
from tests.faults.figures import Figures
from tests.faults.load import steadily
from tests.faults.service import CAPACITY
from tests.faults.tier import seconds

pytestmark = [pytest.mark.slow, pytest.mark.asyncio]
DEADLINE = 0.5
# Without a breaker, which would end a storm, and without the few retries a second that are a small service's.
IMPATIENT = {"retry": "safe", "breaker": False, "retry_floor": 0}


async def test_twice_as_much_as_it_can_leaves_nearly_all_that_it_can(work: Work, figures: Figures) -> None:
    duration = seconds(3, 20)
    async with calling(work.url) as client:
        results = await steadily(
            lambda number: client.send("work", number, timeout=DEADLINE), rate=2 * CAPACITY, seconds=duration
        )
    in_time = results.succeeded.ended_by(results[0].began + duration)
    print(results.failures)

    figures.at_least("2 x overload", "goodput, of capacity", len(in_time) / duration / CAPACITY, 0.85)
    figures.at_most("2 x overload", "p99 of accepted calls", in_time.percentile(99) * 1000, 400, "ms")
    figures.at_most("2 x overload", "slowest call, of its deadline", results.slowest / DEADLINE, 1.1)


async def test_retries_do_not_become_a_storm(work: Work, figures: Figures) -> None:
    for what, policies in {"by default": {"retry": "safe"}, "without a breaker": IMPATIENT}.items():
        async with calling(work.url, policies) as client:
            before = await client.send("begun", None)
            calls = await steadily(lambda number: client.send("refuse", number), rate=500, seconds=seconds(1.5, 20))
            begun = await client.send("begun", None) - before

        figures.at_most(f"retry storm, {what}", "amplification", begun / len(calls), 1.2)


async def test_retries_of_three_layers_are_not_multiplied(start: Callable[..., Work], figures: Figures) -> None:
    lowest = start()
    middle = start("", 200, lowest.url)
    upper = start("", 200, middle.url)
    async with calling(upper.url, IMPATIENT) as client, calling(lowest.url) as counting:
        calls = await steadily(lambda number: client.send("refuse", number), rate=200, seconds=seconds(1.5, 20))
        begun = await counting.send("begun", None)

    print(calls.failures)
    figures.at_least("retry storm, three layers", "calls that reach the lowest", begun / len(calls), 1)
    figures.at_most("retry storm, three layers", "amplification", begun / len(calls), 1.2)


async def test_slow_calls_take_no_place_of_others(work: Work, figures: Figures) -> None:
    async with calling(work.url, {"retry": "safe"}) as users, calling(work.url, {"retry": "safe"}) as orders:
        duration = seconds(2, 15)
        quick = steadily(lambda number: users.send("echo", number), rate=100, seconds=duration)
        slow = steadily(lambda number: orders.send("wait", 1.0, timeout=2), rate=400, seconds=duration)
        results, others = await asyncio.gather(quick, slow)

    print(others.failures)
    figures.at_most("400 slow calls a second", "others that failed", sum(results.failures.values()), 0)
    figures.at_most("400 slow calls a second", "p99 of others", results.percentile(99) * 1000, 100, "ms")
