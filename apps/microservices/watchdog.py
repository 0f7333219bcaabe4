"""Sees whether the event loop turns: measures how late it is, names what holds it up, ends what is stuck."""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable
from types import FrameType

from .instruments import Histogram

logger = logging.getLogger("microservices.watchdog")

lag = Histogram(
    "microservices_event_loop_lag_seconds",
    "How late the event loop comes to what is due.",
    ("service",),
    buckets=(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)

TICK = 0.25
BLOCKED = 1.0
"""Seconds after which a loop that stands still is told of, with what holds it up."""
_LIBRARIES = (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))


class Watchdog:
    """Watches the loop that calls `watch`, from a thread of its own.

    `stuck` is after how many seconds without a turn of the loop the process is ended, its stacks on standard
    error; 0 for never. That is left to faulthandler, which needs neither the loop nor Python's lock. `name` is
    what this process calls itself. `looks` are called once a second, with the time.
    """

    def __init__(self, name: str, stuck: float = 0.0) -> None:
        self.looks: list[Callable[[float], None]] = []
        self._name = name
        self._stuck = stuck
        self._until: float | None = None
        self._beat = time.monotonic()
        self._main = 0
        self._over = threading.Event()

    async def watch(self) -> None:
        """Watch until cancelled."""
        self._main = threading.get_ident()
        self._over.clear()
        loop = asyncio.get_running_loop()
        self._beat = time.monotonic()
        watcher = threading.Thread(target=self._look_on, name="watchdog", daemon=True)
        watcher.start()
        self._arm()
        looked = self._beat
        try:
            while True:
                due = loop.time() + TICK
                await asyncio.sleep(TICK)
                lag.observe(max(0.0, loop.time() - due), self._name)
                self._beat = now = time.monotonic()
                if now - looked >= 1:
                    looked = now
                    self._arm()
                    for look in self.looks:
                        look(now)
        finally:
            self._over.set()
            if self._until is None:
                faulthandler.cancel_dump_traceback_later()

    def limit(self, seconds: float) -> None:
        """End the process, its stacks on standard error, unless it has ended by itself in so many seconds."""
        if self._stuck:
            self._until = time.monotonic() + seconds
            self._arm()

    def _arm(self) -> None:
        if self._until is not None:
            left = max(0.1, self._until - time.monotonic())
        elif self._stuck:
            left = self._stuck
        else:
            return
        faulthandler.dump_traceback_later(left, exit=True, file=sys.__stderr__ or sys.stderr)

    def _look_on(self) -> None:
        told = looked = time.monotonic()
        while not self._over.wait(TICK):
            last, looked = looked, time.monotonic()
            # A process that was stopped as a whole has a late thread, too.
            if looked - last < 2 * TICK and looked - self._beat >= BLOCKED and told != self._beat:
                told = self._beat
                self._tell(looked - self._beat)

    def _tell(self, seconds: float) -> None:
        frame = sys._current_frames().get(self._main)
        if frame is not None:
            stack = "".join(traceback.format_stack(frame))
            logger.error("the event loop has stood still for %.1f s, in %s\n%s", seconds, _culprit(frame), stack)


def _culprit(frame: FrameType) -> str:
    """Return the innermost function that is no library's."""
    inner: FrameType | None = frame
    while inner is not None and inner.f_code.co_filename.startswith(_LIBRARIES):
        inner = inner.f_back
    code = (inner or frame).f_code
    return f"{code.co_qualname} ({code.co_filename}:{(inner or frame).f_lineno})"
