"""Deadlines of many calls, nearly all of which end in time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

E = TypeVar("E", bound=Hashable)

TICK = 0.01
"""How many seconds late an entry may expire."""


class Deadlines(Generic[E]):
    """Calls `expire` with each entry whose deadline has passed, never early.

    A timer of the loop costs as much as half a call, so that one serves all the entries of a tick.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, expire: Callable[[E], None]) -> None:
        self._loop = loop
        self._expire = expire
        self._ticks: dict[int, set[E]] = {}

    def add(self, deadline: float, entry: E) -> set[E]:
        """Watch an entry until `deadline`, a reading of `time.monotonic()`; discard it from the set where it ended."""
        number = int(deadline / TICK) + 1
        tick = self._ticks.get(number)
        if tick is None:
            tick = self._ticks[number] = set()
            self._loop.call_later(max(0.0, number * TICK - time.monotonic()), self._passed, number)
        tick.add(entry)
        return tick

    def _passed(self, number: int) -> None:
        early = number * TICK - time.monotonic()
        if early > 0:  # some loops count in milliseconds
            self._loop.call_later(early + 0.001, self._passed, number)
            return
        for entry in list(self._ticks.pop(number)):
            self._expire(entry)
