"""Deadlines: one timer for many, never early."""

import asyncio
import time

import pytest

from microservices.deadlines import TICK, Deadlines, Within
from microservices.exceptions import DeadlineExceeded


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
    # Not on the border of a tick: a float may lie on either side of it.
    deadline = (int(time.monotonic() / TICK) + 100.25) * TICK

    for number in range(50):
        deadlines.add(deadline + TICK / 100 * number, number)

    assert len(timers) == 1


@pytest.mark.asyncio
async def test_what_takes_longer_than_its_deadline_ends_with_that() -> None:
    deadlines = Deadlines[Within](asyncio.get_running_loop(), Within.expire)

    with pytest.raises(DeadlineExceeded), Within(deadlines, time.monotonic() + TICK):
        await asyncio.Event().wait()

    task = asyncio.current_task()
    assert task is not None
    assert not task.cancelling()


@pytest.mark.asyncio
async def test_what_ends_in_time_is_left_alone() -> None:
    deadlines = Deadlines[Within](asyncio.get_running_loop(), Within.expire)

    with Within(deadlines, time.monotonic() + TICK):
        await asyncio.sleep(0)
    with pytest.raises(ValueError, match="broken"), Within(deadlines, time.monotonic() + TICK):
        raise ValueError("broken")

    await asyncio.sleep(3 * TICK)  # nothing comes late


@pytest.mark.asyncio
async def test_a_cancellation_from_outside_stays_one() -> None:
    deadlines = Deadlines[Within](asyncio.get_running_loop(), Within.expire)
    inside = asyncio.Event()

    async def wait() -> None:
        with Within(deadlines, time.monotonic() + 60):
            inside.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(wait())
    await inside.wait()
    task.cancel()

    with pytest.raises(asyncio.CancelledError):
        await task


def test_ticks_are_bounded_whatever_deadlines_are_chosen() -> None:
    timers = []

    class Loop:
        def call_later(self, delay: float, callback: object, *args: object) -> None:
            timers.append(delay)

    deadlines = Deadlines[int](Loop(), print)  # type: ignore[arg-type]
    now = time.monotonic()

    for number in range(50_000):
        deadlines.add(now + 3600 + number / 10, number).discard(number)

    assert len(timers) < 3000
    assert all(delay >= 3600 for delay in timers)
