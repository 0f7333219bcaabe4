"""A loop that turns, one that stands still, and one that is stuck."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from microservices import watchdog
from microservices.watchdog import Watchdog, lag

APPS = str(Path(__file__).parents[2] / "apps")


@pytest.mark.asyncio
async def test_the_lag_of_the_loop_is_measured_and_whoever_wants_is_called_once_a_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watchdog, "TICK", 0.01)
    dog = Watchdog("measured")
    looks: list[float] = []
    dog.looks.append(looks.append)
    watching = asyncio.create_task(dog.watch())
    async with asyncio.timeout(5):
        while len(looks) < 2:  # noqa: ASYNC110 - of what is called, and no event
            await asyncio.sleep(0.01)
    watching.cancel()
    await asyncio.wait([watching])

    counts, total = lag.samples()["measured",]
    assert sum(counts) > 20
    assert total < 2
    assert 0.9 < looks[1] - looks[0] < 3


@pytest.mark.asyncio
async def test_what_holds_the_loop_is_named_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(watchdog, "TICK", 0.01)
    monkeypatch.setattr(watchdog, "BLOCKED", 0.05)
    told = threading.Event()

    def note(self: Watchdog, seconds: float) -> None:
        tell(self, seconds)
        told.set()

    tell = Watchdog._tell
    monkeypatch.setattr(Watchdog, "_tell", note)

    def careless() -> None:
        told.wait(5)
        time.sleep(0.1)  # no second line for the same standstill

    dog = Watchdog("held")
    watching = asyncio.create_task(dog.watch())
    await asyncio.sleep(0.05)
    careless()
    watching.cancel()
    await asyncio.wait([watching])

    assert caplog.text.count("has stood still") == 1
    assert "careless (" in caplog.text
    assert Path(__file__).name in caplog.text


@pytest.mark.asyncio
async def test_a_watchdog_that_was_ended_leaves_no_thread() -> None:
    watching = asyncio.create_task(Watchdog("ended").watch())
    await asyncio.sleep(0)
    (thread,) = [each for each in threading.enumerate() if each.name == "watchdog"]
    watching.cancel()
    await asyncio.wait([watching])
    thread.join(5)

    assert not thread.is_alive()


@pytest.mark.parametrize("call", ["watch", "limit"])
def test_a_process_that_is_stuck_ends_with_its_stacks(call: str) -> None:
    program = f"""
import asyncio, time
from microservices.watchdog import Watchdog

async def main():
    dog = Watchdog("stuck", 0.3)
    watching = asyncio.create_task(dog.watch())
    await asyncio.sleep(0)
    if {call!r} == "limit":
        dog.limit(0.5)
        await asyncio.sleep(30)
    else:
        time.sleep(30)

asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env={"PYTHONPATH": APPS}, capture_output=True, text=True, timeout=20
    )

    assert done.returncode == 1
    assert "Timeout (0:00:00" in done.stderr
    assert ("in main" if call == "watch" else "in run_forever") in done.stderr
