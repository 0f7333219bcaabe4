"""Deadlines of many calls, nearly all of which end in time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from .exceptions import DeadlineExceeded

E = TypeVar("E", bound=Hashable)

TICK = 0.01
"""How many seconds late an entry may expire; one with a far deadline a thousandth of the time that it had."""
_MOST = 1000


class Deadlines(Generic[E]):
    """Calls `expire` with each entry whose deadline has passed, never early.

    A timer of the loop costs as much as half a call, so that one serves all the entries of a tick. Ticks far away
    are wider, so that their number is bounded, whatever deadlines peers may choose.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, expire: Callable[[E], None]) -> None:
        self.loop = loop
        self._expire = expire
        self._ticks: dict[float, set[E]] = {}
        """By the time when they are over."""

    def add(self, deadline: float, entry: E) -> set[E]:
        """Watch an entry until `deadline`, a reading of `time.monotonic()`; discard it from the set where it ended."""
        tick = self._ticks.get((int(deadline / TICK) + 1) * TICK)
        if tick is None:
            tick = self._tick(deadline)
        tick.add(entry)
        return tick

    def _tick(self, deadline: float) -> set[E]:
        now, width = time.monotonic(), TICK
        while deadline - now > width * _MOST:
            width *= 2
        end = (int(deadline / width) + 1) * width
        tick = self._ticks.get(end)
        if tick is None:
            tick = self._ticks[end] = set()
            self.loop.call_later(max(0.0, end - now), self._passed, end)
        return tick

    def _passed(self, end: float) -> None:
        early = end - time.monotonic()
        if early > 0:  # some loops count in milliseconds
            self.loop.call_later(early + 0.001, self._passed, end)
            return
        for entry in list(self._ticks.pop(end)):
            self._expire(entry)


class Within:
    """`with Within(deadlines, deadline):` raises DeadlineExceeded where the task is still inside when that passes.

    What `asyncio.timeout_at` does with a timer of its own. `deadlines` is one of these.
    """

    __slots__ = ("_cancelling", "_deadline", "_deadlines", "_expired", "_task", "_tick")

    def __init__(self, deadlines: Deadlines[Within], deadline: float) -> None:
        self._deadlines = deadlines
        self._deadline = deadline
        self._expired = False

    def __enter__(self) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("A deadline needs a task that it can end.")
        self._task = task
        self._cancelling = task.cancelling()
        self._tick = self._deadlines.add(self._deadline, self)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._tick.discard(self)
        # Another cancellation that came meanwhile is passed on.
        if self._expired and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise DeadlineExceeded() from None

    def expire(self) -> None:
        """End what is inside."""
        self._expired = True
        self._task.cancel()
