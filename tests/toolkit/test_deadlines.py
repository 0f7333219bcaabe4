"""Deadlines: one timer for many, never early."""

import asyncio
import time

import pytest

from microservices.deadlines import TICK, Deadlines


@pytest.mark.asyncio
async def test_an_entry_expires_after_its_deadline_and_soon() -> None:
    expired: asyncio.Queue[tuple[str, float]] = asyncio.Queue()
    deadlines = Deadlines[str](asyncio.get_running_loop(), lambda entry: expired.put_nowait((entry, time.monotonic())))
    start = time.monotonic()

    for number in (3, 1, 2):
        deadlines.add(start + number * 1.5 * TICK, f"{number}")
    async with asyncio.timeout(5):
        found = [await expired.get() for _ in range(3)]

    assert [entry for entry, _ in found] == ["1", "2", "3"]
    assert all(at >= start + int(entry) * 1.5 * TICK for entry, at in found)


@pytest.mark.asyncio
async def test_an_entry_that_has_ended_does_not_expire() -> None:
    expired: asyncio.Queue[str] = asyncio.Queue()
    deadlines = Deadlines[str](asyncio.get_running_loop(), expired.put_nowait)
    start = time.monotonic()

    deadlines.add(start, "ended").discard("ended")
    deadlines.add(start + 2 * TICK, "left")

    async with asyncio.timeout(5):
        assert await expired.get() == "left"
    assert expired.empty()


def test_entries_of_one_tick_share_a_timer() -> None:
    timers = []

    class Loop:
        def call_later(self, delay: float, callback: object, *args: object) -> None:
            timers.append(delay)

    deadlines = Deadlines[int](Loop(), print)  # type: ignore[arg-type]
    deadline = (int(time.monotonic() / TICK) + 100) * TICK

    for number in range(50):
        deadlines.add(deadline + TICK / 100 * number, number)

    assert len(timers) == 1
