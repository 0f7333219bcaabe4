"""What a process tells of itself to whoever keeps the list of the fleet, and when."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Literal

import msgspec

from ..exceptions import RpcException

logger = logging.getLogger("microservices.discovery")

UP, DRAINING, DOWN = "instance_up", "instance_draining", "instance_down"
EVENTS = (UP, DRAINING, DOWN)

EMIT_LIMIT = 2.0
FAREWELL_LIMIT = 1.0

# Anybody on the bus can write a report: it must fit where it is kept.
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=100, pattern=r"\A[^\x00]*\Z")]
Text = Annotated[str, msgspec.Meta(max_length=300, pattern=r"\A[^\x00]*\Z")]
Count = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]


class PatternReport(msgspec.Struct, frozen=True):
    """One pattern that a service answers or hears."""

    name: Text
    kind: Name
    retry: Name = "never"
    deadline: float | None = None


class Report(msgspec.Struct, frozen=True):
    """What one instance of a service tells of itself. Fields that it does not know are passed over."""

    service: Name
    instance: Name
    start: Annotated[str, msgspec.Meta(max_length=64, pattern=r"\A[^\x00]*\Z")] = ""
    """A random id of the process's start: a process that begins again counts from the beginning."""
    sequence: Count = 0
    """Grows with each report of a start, so that a late one is told from a new one."""
    state: Literal["up", "degraded", "draining", "down"] = "up"
    reason: Text = ""
    version: Text = ""
    host: Text = ""
    pid: Count = 0
    zone: Text = ""
    addresses: Annotated[dict[Name, Text], msgspec.Meta(max_length=20)] = {}
    """URLs by scheme, without credentials or query; `health` and `http` are pages."""
    patterns: Annotated[tuple[PatternReport, ...], msgspec.Meta(max_length=1000)] = ()
    started_at: Annotated[float, msgspec.Meta(ge=0, le=253_402_300_000)] = 0.0
    """Seconds since 1970, by the clock of the instance."""


class Heartbeat:
    """Tells, over and over, how the services of this process are.

    `emit` hands one event over; `reports` gives what is true now, one report for each service.
    `pause` waits between two beats.
    """

    def __init__(
        self,
        emit: Callable[[str, Report], Awaitable[None]],
        reports: Callable[[], Sequence[Report]],
        interval: float = 5.0,
        *,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.start = os.urandom(8).hex()
        self._emit = emit
        self._reports = reports
        self._interval = interval
        self._pause = pause
        self._sequence = 0
        self._failing = False

    async def beat(self) -> None:
        """Tell now, and then each interval, until cancelled. A bus that is away is logged once."""
        while True:
            outcomes = await asyncio.gather(*(self._hand_over(UP, report) for report in self._current()))
            failures = [outcome for outcome in outcomes if outcome is not None]
            if failures and not self._failing:
                logger.warning("nobody hears that this process is up: %s", failures[0])
            elif self._failing and not failures:
                logger.info("it is heard again that this process is up")
            self._failing = bool(failures)
            await self._pause(self._interval)

    async def tell(self, state: Literal["draining", "down"]) -> None:
        """Tell once that this process ends; nothing is raised or waited for where nobody hears it."""
        event = DRAINING if state == "draining" else DOWN
        reports = [msgspec.structs.replace(report, state=state, reason="") for report in self._current()]
        telling = asyncio.gather(*(self._hand_over(event, report) for report in reports))
        try:
            async with asyncio.timeout(FAREWELL_LIMIT):
                await telling
        except TimeoutError:
            logger.info("nobody heard that this process is %s", state)

    def _current(self) -> list[Report]:
        self._sequence += 1
        return [
            msgspec.structs.replace(report, start=self.start, sequence=self._sequence) for report in self._reports()
        ]

    async def _hand_over(self, event: str, report: Report) -> str | None:
        try:
            async with asyncio.timeout(EMIT_LIMIT):
                await self._emit(event, report)
        except TimeoutError:
            return f"not within {EMIT_LIMIT:g} s"
        except RpcException as error:
            return str(error)
        except Exception as error:
            if not self._failing:
                logger.exception("%s could not be told", event)
            return repr(error)
        return None
