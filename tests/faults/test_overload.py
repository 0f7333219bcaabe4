"""More is asked than can be done."""

from __future__ import annotations

import pytest

from tests.faults.conftest import Work, calling
from tests.faults.figures import Figures
from tests.faults.load import steadily
from tests.faults.service import CAPACITY
from tests.faults.tier import seconds

pytestmark = [pytest.mark.slow, pytest.mark.asyncio]
DEADLINE = 0.5


async def test_twice_as_much_as_it_can_leaves_nearly_all_that_it_can(work: Work, figures: Figures) -> None:
    duration = seconds(4, 20)
    async with calling(work.url) as client:
        results = await steadily(
            lambda number: client.send("work", number, timeout=DEADLINE), rate=2 * CAPACITY, seconds=duration
        )
    in_time = results.succeeded.ended_by(results[0].began + duration)
    print(results.failures)

    figures.at_least("2 x overload", "goodput, of capacity", len(in_time) / duration / CAPACITY, 0.85)
    figures.at_most("2 x overload", "p99 of accepted calls", in_time.percentile(99) * 1000, 400, "ms")
    figures.at_most("2 x overload", "slowest call, of its deadline", results.slowest / DEADLINE, 1.1)
