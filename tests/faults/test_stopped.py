"""A service that stands still: it takes connections, and answers nothing."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any

import pytest

from microservices.resilience.breaker import State
from tests.faults.conftest import Work, calling
from tests.faults.figures import Figures
from tests.faults.load import Results, steadily
from tests.faults.tier import seconds

pytestmark = [pytest.mark.slow, pytest.mark.asyncio, pytest.mark.timeout(120)]
DEADLINE = 0.5
LATE = 0.05
"""How much later than its deadline a call may end."""
STOPPED = "SIGSTOP"


async def test_a_service_that_stands_still_costs_a_deadline_and_soon_not_even_that(
    work: Work, figures: Figures
) -> None:
    async with calling(work.url, {"retry": "safe"}) as client:

        def ask(duration: float) -> Coroutine[Any, Any, Results]:
            return steadily(lambda number: client.send("echo", number, timeout=DEADLINE), rate=100, seconds=duration)

        before = await ask(1)
        guard = client._bound().guard
        assert guard is not None
        assert guard.breaker is not None
        (circuit,) = guard.breaker.circuits.values()
        work.signal(signal.SIGSTOP)
        stopped = await ask(seconds(3, 20))
        assert circuit.state in (State.OPEN, State.HALF_OPEN)

        work.signal(signal.SIGCONT)
        loop = asyncio.get_running_loop()
        continued = loop.time()
        async with asyncio.timeout(40):
            while circuit.state is not State.CLOSED:
                await ask(0.1)
        closed_after = loop.time() - continued
        after = await ask(1)

    print(stopped.failures)
    figures.at_most(STOPPED, "slowest call, of 0.5 s", stopped.slowest, DEADLINE + LATE, "s")
    figures.at_least(STOPPED, "calls refused at once, the breaker open", stopped.failures["circuit-open"], 100)
    figures.at_most(STOPPED, "until the breaker closes after SIGCONT", closed_after, 36, "s")
    failed = (before.failures + after.failures).total()
    figures.at_most(STOPPED, "calls that failed before and after", failed, 0)
