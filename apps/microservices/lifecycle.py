"""The one owner of start, readiness, drain and signals."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from contextvars import Context
from enum import StrEnum
from types import FrameType
from typing import Any

from . import conf, transports
from .client import Client, clients
from .conf import Settings, get_settings
from .discovery.registry import Heartbeat, Report
from .doors import refuse_insecure
from .microservice import Microservice, get_executor, opened
from .reports import Reporter
from .transports.base import Server
from .watchdog import Watchdog

logger = logging.getLogger("microservices")

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
BEATS_KEPT = "1000"
OVERDUE = 5.0
"""Seconds beyond DRAIN_TIMEOUT after which the watchdog ends the process."""


class State(StrEnum):
    """Where a process stands in its life."""

    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"


class Lifecycle:
    """Starts the services that live in this process and stops them without dropping their work."""

    def __init__(self) -> None:
        self.state = State.STOPPED
        self.started = False
        """Whether the process has once been ready."""
        self.started_at = time.monotonic()
        self._end = 0.0
        self.microservices: Sequence[Microservice] = ()
        self.application: Any = None
        self.bounded: list[Any] = []
        """What else has bounds than the services that live here."""
        # Whoever holds a connection that never ends by itself adds how it takes its leave.
        self.on_drain: set[Callable[[], Awaitable[None]]] = set()
        # What goes on for as long as the process is ready; started again when it fails.
        self.background: list[Callable[[], Awaitable[None]]] = []
        self._tasks: list[asyncio.Task[None]] = []
        self.pages: dict[str, str] = {}
        """Where the process serves HTTP: "http" for the whole of it, "health" for its health pages alone."""
        self._bus: Client | None = None
        self._heartbeat: Heartbeat | None = None
        self._beating: asyncio.Task[None] | None = None
        self.watchdog = Watchdog("")
        self._watching: asyncio.Task[None] | None = None

    @property
    def ready(self) -> bool:
        """Whether the process takes calls."""
        return self.state is State.READY

    @property
    def grace(self) -> float:
        """Seconds that running work has to finish when the process stops."""
        return get_settings().drain_timeout

    @property
    def remaining(self) -> float:
        """Seconds of it that are left once draining has begun; never quite none, so that what is done can leave."""
        return max(0.5, self._end - time.monotonic())

    @property
    def patience(self) -> float:
        """Seconds after which work that still runs is cancelled; a sixth of the grace is kept for what follows."""
        return max(0.0, self.remaining - self.grace / 6)

    @property
    def cancelled(self) -> int:
        """How many handlers were not waited for to their end."""
        return sum(microservice.cancelled for microservice in self.microservices)

    @property
    def uptime(self) -> float:
        """Seconds since the process was set up."""
        return time.monotonic() - self.started_at

    async def start(self, urls: Mapping[str, Sequence[str]] | None = None) -> None:
        """Open the doors, if LISTEN says so, and be ready. Raises ConfigurationError.

        `urls` names, by service, the doors to open in place of the map's.
        """
        settings = get_settings()
        self.state = State.STARTING
        self.watchdog = Watchdog(settings.name, settings.watchdog)
        self._watching = asyncio.create_task(self.watchdog.watch(), context=Context(), name="watchdog")
        clients.settle(asyncio.get_running_loop())
        here = list(opened(urls))
        self.microservices = [microservice for microservice, _ in here]
        refuse_insecure(url for _, doors in here for url in doors)
        servers: dict[str, Server] = {}
        for microservice, doors in here:
            for mailbox in microservice.mailboxes:
                mailbox.application = self.application or mailbox.application
            if microservice.limiter is not None:
                self.watchdog.looks.append(microservice.limiter.look)
            await microservice.listen(doors, servers)
            logger.info(
                "%s lives here%s",
                microservice.name,
                "" if microservice.servers or microservice.shared else ", its doors closed",
            )
        self.state = State.READY
        self.started = True
        await self._announce(True)
        self._tasks = [asyncio.create_task(self._keep(work), context=Context()) for work in self.background]
        if settings.heartbeat:
            told = {each.name: doors for each, doors in here if urls is None or each.name in urls}
            self._begin_to_beat(settings, told)

    async def drain(self) -> None:
        """Take no more messages and finish the running ones within DRAIN_TIMEOUT.

        First nothing more is fetched from brokers; calls are taken for DRAIN_PAUSE, until all know that they should
        go elsewhere; then the doors close, and what is at work is waited for (operations.md section 8).
        """
        settings = get_settings()
        self.state = State.DRAINING
        self._end = time.monotonic() + self.grace
        self.watchdog.limit(self.grace + OVERDUE)
        await self._announce(False)
        if self._heartbeat is not None:
            await self._heartbeat.tell("draining")
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        consumers = asyncio.gather(*(each.stop_consuming(self.patience) for each in self.microservices))
        if self.started:
            await asyncio.sleep(min(settings.drain_pause, self.grace / 2))
        await asyncio.gather(
            consumers,
            *(microservice.close(self.patience) for microservice in self.microservices),
            *(self._leave(leave) for leave in tuple(self.on_drain)),
        )

    async def stop(self) -> None:
        """Close all connections to others. Call it after `drain` and after the last HTTP request."""
        await get_executor().idle(self.remaining)
        await self._end_the_beat()
        await clients.close()
        for microservice in self.microservices:
            await microservice.finish()
        clients.settle(None)
        watching, self._watching = self._watching, None
        if watching is not None:
            watching.cancel()
            await asyncio.wait([watching])
        self.state = State.STOPPED

    def _begin_to_beat(self, settings: Settings, doors: Mapping[str, Sequence[str]]) -> None:
        reporter = Reporter(self.pages, doors, time.time() - self.uptime)
        self._bus = bus = _bus_for_beats(settings)

        async def emit(event: str, report: Report) -> None:
            await bus.emit(event, report)

        def reports() -> Sequence[Report]:
            return reporter.reports(self.microservices, draining=self.state is State.DRAINING)

        self._heartbeat = Heartbeat(emit, reports, settings.heartbeat)
        # Apart from the other background work: a process that drains is alive until it says that it is not.
        self._beating = asyncio.create_task(self._keep(self._heartbeat.beat), context=Context())

    async def _end_the_beat(self) -> None:
        beating, self._beating = self._beating, None
        if beating is not None:
            beating.cancel()
            await asyncio.wait([beating])
        heartbeat, self._heartbeat = self._heartbeat, None
        if heartbeat is not None:
            await heartbeat.tell("down")
        bus, self._bus = self._bus, None
        if bus is not None:
            await bus.close()

    async def _announce(self, ready: bool) -> None:
        for microservice in self.microservices:
            for server in microservice.servers:
                await server.announce(ready)

    async def _keep(self, work: Callable[[], Awaitable[None]]) -> None:
        pause = FIRST_PAUSE
        while True:
            began = time.monotonic()
            try:
                await work()
                return
            except Exception:
                if time.monotonic() - began > LONGEST_PAUSE:
                    pause = FIRST_PAUSE
                logger.exception("background work has failed; it starts again in %g s", pause)
            await asyncio.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE)

    async def _leave(self, leave: Callable[[], Awaitable[None]]) -> None:
        try:
            async with asyncio.timeout(self.grace):
                await leave()
        except Exception:  # of one connection: the others have to be told, too
            logger.exception("a connection was not ended properly")


def _bus_for_beats(settings: Settings) -> Client:
    address = conf.events_address()
    if address.scheme == "memory":
        return clients.events
    if address.scheme.endswith("-streams"):
        # A beat is old news after seconds; those of a day would fill the broker's memory.
        address = address._replace(options={**address.options, "max_length": BEATS_KEPT})
    bus = transports.load(address, "bus")
    # Without middlewares: no log line, no breaker, no retry for what is told again in a moment.
    return Client("events", lambda: bus(address, "events"), source=settings.name, timeout=settings.call_timeout)


lifecycle = Lifecycle()


def exit_now(code: int) -> None:
    """End the process without waiting for threads that are still at work."""
    # It may be called between any two steps of the main thread, in the middle of a write, too.
    with suppress(Exception):
        logging.shutdown()
        sys.stdout.flush()
    os._exit(code)


async def until_signalled(at_once: Callable[[], None] = lambda: None) -> signal.Signals:
    """Wait for SIGTERM or SIGINT; a second one calls `at_once` and ends the process, even where the loop is stuck."""
    loop = asyncio.get_running_loop()
    received: asyncio.Future[signal.Signals] = loop.create_future()
    signals: list[int] = []

    def on_signal(number: int, _: FrameType | None) -> None:
        signals.append(number)
        if len(signals) > 1:
            at_once()
            exit_now(128 + number)
        loop.call_soon_threadsafe(received.set_result, signal.Signals(number))

    # Not the loop's own way, which waits for its next turn.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    return await received
