"""The one owner of start, readiness, drain and signals."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Sequence
from enum import StrEnum

from .client import clients
from .conf import get_settings
from .microservice import Microservice, get_microservice

logger = logging.getLogger("microservices")


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
        self.started_at = time.monotonic()
        self.microservices: Sequence[Microservice] = ()

    @property
    def ready(self) -> bool:
        """Whether the process takes calls."""
        return self.state is State.READY

    @property
    def grace(self) -> float:
        """Seconds that running work has to finish when the process stops."""
        return get_settings().drain_timeout

    @property
    def uptime(self) -> float:
        """Seconds since the process was set up."""
        return time.monotonic() - self.started_at

    async def start(self) -> None:
        """Open the doors, if LISTEN says so, and be ready. Raises ConfigurationError."""
        settings = get_settings()
        self.state = State.STARTING
        clients.settle(asyncio.get_running_loop())
        self.microservices = [get_microservice(name) for name in settings.servers]
        for microservice in self.microservices:
            if settings.listen:
                await microservice.listen()
            logger.info("%s lives here%s", microservice.name, "" if settings.listen else ", its doors closed")
        self.state = State.READY

    async def drain(self) -> None:
        """Take no more messages and finish the running ones within DRAIN_TIMEOUT."""
        self.state = State.DRAINING
        await asyncio.gather(*(microservice.close(self.grace) for microservice in self.microservices))

    async def stop(self) -> None:
        """Close all connections to others. Call it after `drain` and after the last HTTP request."""
        await clients.close()
        clients.settle(None)
        self.state = State.STOPPED


lifecycle = Lifecycle()


async def until_signalled() -> signal.Signals:
    """Wait for SIGTERM or SIGINT; a second one ends the process at once."""
    loop = asyncio.get_running_loop()
    received: asyncio.Future[signal.Signals] = loop.create_future()

    def on_signal(number: signal.Signals) -> None:
        if received.done():
            for handled in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(handled)
            signal.raise_signal(number)
        else:
            received.set_result(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    return await received
