"""Faults on purpose, to see what the policies make of them: for tests and development (operations.md section 1)."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from copy import copy
from typing import Annotated, Any

import msgspec

from ..context import RpcContext
from ..exceptions import DeadlineExceeded, RpcException
from ..middleware import Endpoint
from ..packets import pattern_name

logger = logging.getLogger("microservices.faults")

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]

_HELD_BACK = 0.1
"""For how many seconds a message is held back that others are to overtake."""


class Fault(msgspec.Struct, frozen=True, forbid_unknown_fields=True, repr_omit_defaults=True):
    """What befalls the messages of a pattern: times in seconds, and shares of the messages from 0 to 1."""

    latency: Annotated[float, msgspec.Meta(ge=0)] = 0
    """How much later each is sent."""
    drop: Share = 0
    """How many are lost: the sender of a request waits until its deadline, that of an event hears nothing."""
    error: Share = 0
    """How many others are refused with 503, and not sent."""
    duplicate: Share = 0
    """How many of those that are sent are sent twice, at the same time; the first answer counts."""
    reorder: Share = 0
    """How many are held back, so that those of other callers overtake them."""
    seconds: Annotated[float, msgspec.Meta(gt=0, le=86_400)] = 600
    """When it ends, from the first message on that it may strike: nobody shall have to think of it."""


class Faults:
    """Middlewares next to the transport of one service, for its requests and for its events.

    `faults` are by the names of patterns, `*` for all others.
    """

    def __init__(
        self,
        service: str,
        faults: Mapping[str, Fault],
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
        rng: random.Random | None = None,
    ) -> None:
        self._service = service
        self._faults = faults
        self._ends: dict[str, float] = {}
        self._clock = clock
        self._sleep = sleep
        self._chance = (rng or random.Random()).random  # noqa: S311 - strikes by chance

    @property
    def active(self) -> list[str]:
        """The patterns whose faults have not ended; they may not have begun, either."""
        now = self._clock()
        return [name for name in self._faults if now < self._ends.get(name, float("inf"))]

    def request(self, endpoint: Endpoint) -> Endpoint:
        """Stand before requests."""
        return self._before(endpoint, self._no_answer)

    def event(self, endpoint: Endpoint) -> Endpoint:
        """Stand before events."""

        async def unheard(context: RpcContext) -> None:
            """Nobody is told."""

        return self._before(endpoint, unheard)

    def _before(self, endpoint: Endpoint, lost: Callable[[RpcContext], Awaitable[None]]) -> Endpoint:
        async def faulty(data: Any, context: RpcContext) -> Any:
            fault = self._of(context)
            if fault is None:
                return await endpoint(data, context)
            await self._hold(fault, context)
            fate = self._chance()
            if fate < fault.drop:
                return await lost(context)
            if fate < fault.drop + fault.error:
                raise RpcException({"statusCode": 503, "code": "injected", "message": "This error is on purpose."})
            if self._strikes(fault.duplicate) and not hasattr(data, "__aiter__"):  # that can be read once
                return await _twice(endpoint, data, context)
            return await endpoint(data, context)

        return faulty

    def _of(self, context: RpcContext) -> Fault | None:
        name = pattern_name(context.pattern)
        if name not in self._faults:
            name = "*"
        fault = self._faults.get(name)
        if fault is None:
            return None
        now = self._clock()
        if name not in self._ends:
            self._ends[name] = now + fault.seconds
            logger.warning("%s %s: faults on purpose for %g s: %s", self._service, name, fault.seconds, fault)
        return fault if now < self._ends[name] else None

    def _strikes(self, share: float) -> bool:
        return share > 0 and self._chance() < share

    async def _hold(self, fault: Fault, context: RpcContext) -> None:
        seconds = fault.latency + (_HELD_BACK if self._strikes(fault.reorder) else 0)
        left = context.remaining()
        if left is not None and left < seconds:
            await self._no_answer(context)
        if seconds:
            await self._sleep(seconds)

    async def _no_answer(self, context: RpcContext) -> None:
        await self._sleep(context.remaining() or 0)
        raise DeadlineExceeded()


async def _twice(endpoint: Endpoint, data: Any, context: RpcContext) -> Any:
    # A context for each: the transport gives it its id.
    both = (endpoint(data, each) for each in (context, copy(context)))
    first, _ = await asyncio.gather(*both, return_exceptions=True)
    if isinstance(first, BaseException):
        raise first
    return first
